"""Does the bridge compute what plain Hugging Face computes, and which sites work on it?"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models.native import is_native
from mechinterp.models.plain import processed_weights, unwrap
from mechinterp.models.run import answers_once, forward, input_device


@dataclass(frozen=True)
class Verification:
    """How far a bridge is from the plain model it wraps, and which of its sites work.

    ``logit_gap`` is the largest difference of any logit, in logits; ``kl_gap`` the largest
    divergence KL(plain || bridge) at any position, in nats; both are None, with
    ``no_counterpart`` saying why, where there is nothing to compare with. ``tolerance`` is
    1e-5 times the largest logit, 1e-9 times in float64, 1e-2 times in half precision.
    ``missing`` maps each site that does not work on every layer to the reasons.
    """

    model_name: str
    dtype: str
    logit_gap: float | None
    kl_gap: float | None
    tolerance: float | None
    no_counterpart: str
    working: tuple[str, ...]
    missing: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether the logits agree within tolerance, or have nothing to agree with."""
        return self.logit_gap is None or self.logit_gap <= (self.tolerance or 0.0)

    def show(self) -> None:
        """Print a readable account."""
        table = Table(title=f"{self.model_name} ({self.dtype})", show_header=False)
        if self.logit_gap is None:
            table.add_row("plain Hugging Face", f"nothing to compare: {self.no_counterpart}")
        else:
            verdict = "within" if self.ok else "[bold red]beyond[/]"
            table.add_row(
                "largest logit gap",
                f"{self.logit_gap:.2g}, {verdict} the tolerance of {self.tolerance:.2g}",
            )
            table.add_row("largest KL gap", f"{self.kl_gap:.2g} nats")
        table.add_row("sites that work", " ".join(self.working) or "none")
        for site, reason in self.missing.items():
            table.add_row(f"no {site}", reason)
        Console().print(table)


@torch.no_grad()
def verify(model: TransformerBridge, *, seed: int = 0) -> Verification:
    """Compare the bridge with the plain model it wraps, try every site, print and return it.

    The comparison is on four prompts of random tokens of different lengths, run padded
    through the bridge and one by one, without padding, through the plain model.

    Args:
        model: A bridge; left as it was.
        seed: Of the random tokens.

    Returns:
        The largest gaps in logits and KL divergence, and what each site did; ``ok`` says
        whether all is within the tolerance.
    """
    logit_gap, kl_gap, tolerance = None, None, None
    no_counterpart = _no_counterpart(model)
    if not no_counterpart:
        tokens, mask = _prompts(model, seed)
        ours = forward(model, tokens, mask)
        theirs = _one_by_one(model, tokens, mask)
        seen = mask[:, : ours.shape[1]].to(ours.device)
        logit_gap = float((ours - theirs)[seen].abs().max())
        tolerance = _relative_tolerance(ours.dtype) * float(theirs[seen].abs().max())
        kl_gap = float(_kl(theirs[seen], ours[seen]).max())
    # The catalogue lives a floor above and imports this package, so it is looked up here.
    catalogue = import_module("mechinterp.catalogue").sites(model)
    working = tuple(entry.name for entry in catalogue if entry.works)
    missing = {
        entry.name: "; ".join(sorted(set(entry.missing.values())))
        for entry in catalogue
        if entry.missing or not entry.works
    }
    account = Verification(
        model_name=str(model.cfg.model_name),
        dtype=str(next(model.original_model.parameters()).dtype).removeprefix("torch."),
        logit_gap=logit_gap,
        kl_gap=kl_gap,
        tolerance=tolerance,
        no_counterpart=no_counterpart,
        working=working,
        missing=missing,
    )
    account.show()
    return account


def _no_counterpart(model: TransformerBridge) -> str:
    if is_native(model):
        return "a native bridge is transformer-lens' own model, not one from Hugging Face."
    if processed_weights(model):
        return "its weights were processed (folded, centred), so they differ on purpose."
    return ""


def _prompts(
    model: TransformerBridge, seed: int
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
    longest = min(24, model.cfg.n_ctx)
    lengths = torch.tensor([longest, max(1, longest // 2), max(1, longest - 1), 1])
    mask = torch.arange(longest) < lengths[:, None]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.cfg.d_vocab, mask.shape, generator=generator), mask


def _one_by_one(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
) -> Float[Tensor, "prompt answer_pos d_out"]:
    """Return the plain model's answers, padded with zeros."""
    module, device = unwrap(model), input_device(model)
    rows = []
    for row, seen in zip(tokens.to(device), mask, strict=True):
        output = module(row[None, : int(seen.sum())])
        answer = output.logits if hasattr(output, "logits") else output.last_hidden_state
        rows.append(answer if answers_once(model) else answer[0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _relative_tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 1e-2)


def _kl(
    reference: Float[Tensor, "pos d_out"], other: Float[Tensor, "pos d_out"]
) -> Float[Tensor, " pos"]:
    """Return KL(reference || other) of the distributions that the logits stand for."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
