"""Direct logit attribution: which components write the answer into the residual stream.

The stream at the answer is a sum of what components wrote there. With the final norm held at
the scale it had, the logit difference is linear in that sum, so each component has its share
and the shares add up: to what the unembedding gives. A soft-cap on top of it (Gemma 2) is not
linear; then the logits before the cap are attributed, and the convention says so.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the norm held
as in nostalgebraist's and TransformerLens's accounting, but on raw weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import bar
from mechinterp.activations import Key
from mechinterp.engine.closing import Closing, tolerated
from mechinterp.engine.direct import HeldNorm, attention_shares
from mechinterp.lens.attribution_result import DirectAttributionResult, labelled
from mechinterp.lens.states import Batch, batches, budget_of
from mechinterp.models import fingerprint
from mechinterp.record import convention_of
from mechinterp.sites import is_headless, is_post_norm, site_layers
from mechinterp.tasks import Task, as_data, as_prompts


@dataclass(frozen=True)
class Component:
    """One writer of the residual stream: ``kind`` of a layer, and which head."""

    kind: str
    layer: int = -1
    head: int = -1

    @property
    def label(self) -> str:
        """Its name: ``embed``, ``3.2`` for a head, ``3.attn bias``, ``5.mlp``."""
        if self.kind == "head":
            return f"{self.layer}.{self.head}"
        return self.kind if self.layer < 0 else f"{self.layer}.{self.kind}"


Shares = dict[Component, Float[Tensor, " row"]]


def direct_logit_attribution(
    model: TransformerBridge, data: Any, *, memory: int | float | str | None = None
) -> DirectAttributionResult:
    """Return each component's share of the logit difference where a task is answered.

    Components are the embedding (with what positions add, where they are added), every head
    (``result``), every layer's attention bias, every MLP (with its output bias), and the
    final bias, of norm and unembedding. Without distractors it is the answer's logit. Behind
    a post-norm a component has its share of what that norm gave, at the scale it had. Shares
    are of the direct effect: what later layers make of a component is theirs.

    Args:
        model: Left as it was, raw weights and all. Edits in force on it apply.
        data: A ``Task``; its clean prompts are read. Of sets of answers, the mean logit.
        memory: Bytes, or a size such as ``"2GB"``, to take beside the model.

    Raises:
        TypeError: ``data`` is not a task.
        ValueError: The model has no unembedding; its blocks normalise after adding (BERT), so
            what a component writes is rescaled in every later layer; the memory is too small.
        RuntimeError: The shares do not add up, so that this architecture writes into its
            residual stream in a way that is not known here.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    task = as_data(data, accepts=(Task,), method="direct_logit_attribution")
    closing = Closing(model, "direct_logit_attribution")
    if any(map(is_post_norm, model.blocks)):
        raise ValueError(
            f"{model.cfg.model_name} normalises the residual stream after every layer, so what "
            "a component writes does not reach the end as it is, and its masked-LM head is not "
            "linear. Use mi.activation_patching or mi.path_patching to 'logits'."
        )
    prompts = as_prompts(model, task)
    index = torch.tensor(task.answer_positions)[:, None]
    keys: list[Key] = [("embed", None), ("resid_pre", 0)]
    for site in ("z", "mlp_out"):
        keys += [(site, layer) for layer in site_layers(model, site)]
    found: list[Shares] = []
    differences, attributed, scales, capped = [], [], [], []
    with bar(len(task), "attributing logits") as advance:
        for batch in batches(model, prompts, index, keys, budget_of(model, memory)):
            rows = batch.prompt.tolist()
            signed = signed_tokens(task, rows)
            total, bends = _attributable(closing, batch, signed)
            norm = HeldNorm(closing.final_norm, batch.last)
            shares = _shares(model, closing, batch, signed, total.scale, norm)
            _check(shares, total.value, batch.logits)
            found.append(shares)
            differences.append(_weighted(batch.logits.double(), signed))
            attributed.append(total.value)
            scales.append(norm.scale)
            capped.append(bends)
            advance(len(rows))
    components = list(found[0])
    shares = torch.stack([torch.cat([each[c] for each in found]) for c in components], dim=1)
    name = "logit" if task.distractors is None else "logit_diff"
    unit = "logits" if task.distractors is None else "nats of log-odds"
    before = any(capped)
    per_prompt = {
        "logit_diff": torch.cat(differences),
        "attributed": torch.cat(attributed),
        "scale": torch.cat(scales),
    }
    return DirectAttributionResult(
        labelled(
            task,
            components,
            shares.cpu().numpy(),
            {name: each.cpu().numpy() for name, each in per_prompt.items()},
        ),
        convention_of(
            "direct_logit_attribution",
            model,
            task,
            {name: unit},
            fingerprint(model),
            {
                "final_norm": "held at the scale it had",
                "attributed": "logits before the soft-cap" if before else "logits",
            },
            positions="answer",
        ),
    )


@dataclass(frozen=True, eq=False)
class Signed:
    """Tokens with weights: answers share +1, distractors -1; padding weighs nothing."""

    ids: Int[Tensor, "row token"]
    weights: Float[Tensor, "row token"]


def signed_tokens(task: Task, rows: Sequence[int]) -> Signed:
    """Return what the logit difference of some prompts adds up."""
    ids, weights = [], []
    for tokens, sign in ((task.answers, 1.0), (task.distractors, -1.0)):
        if tokens is not None:
            chosen = tokens[list(rows)].cpu()
            there = (chosen >= 0).double()
            ids.append(chosen.clamp(min=0))
            weights.append(sign * there / there.sum(1, keepdim=True))
    return Signed(torch.cat(ids, 1), torch.cat(weights, 1))


def _weighted(logits: Float[Tensor, "row d_vocab"], signed: Signed) -> Float[Tensor, " row"]:
    ids = signed.ids.to(logits.device)
    return (logits.gather(1, ids).double() * signed.weights.to(logits.device)).sum(1)


@dataclass(frozen=True, eq=False)
class _Total:
    """What is attributed, and by what the output transform multiplies the unembedding."""

    value: Float[Tensor, " row"]
    scale: float


@torch.no_grad()
def _attributable(closing: Closing, batch: Batch, signed: Signed) -> tuple[_Total, bool]:
    """Return the differences that shares must add up to, and whether a cap comes after them.

    A transform that only multiplies (Cohere, Granite) is part of the shares.
    """
    raw, logits = closing.unembedded(batch.last)
    raw, logits = raw.double(), logits.double()
    scale = float((raw * logits).sum() / raw.square().sum())
    allowed = tolerated(batch.logits.dtype, logits)
    if float((scale * raw - logits).abs().max()) <= allowed:
        scale = 1.0 if abs(scale - 1) < 1e-5 else scale
        return _Total(_weighted(batch.logits, signed), scale), False
    return _Total(_weighted(raw, signed), 1.0), True


def _shares(
    model: TransformerBridge,
    closing: Closing,
    batch: Batch,
    signed: Signed,
    scale: float,
    norm: HeldNorm,
) -> Shares:
    """Return every component's share, per row, in float64."""
    W_U, b_U = closing.unembedding(signed.ids)
    weights = scale * signed.weights.to(W_U.device)
    direction = torch.einsum("rtd,rt->rd", W_U, weights)
    aim = norm.pulled(direction)
    embed, entering = batch.seen["embed", None], batch.seen["resid_pre", 0]
    found: Shares = {}
    if closing.adds_positions:
        found[Component("embed")] = _dot(embed, aim)
        found[Component("pos_embed")] = _dot(entering - embed, aim)
    else:  # what is not added multiplies (Gemma), or there is none
        found[Component("embed")] = _dot(entering, aim)
    for layer in range(len(model.blocks)):
        z = batch.seen.get(("z", layer))
        if is_headless(model, layer):
            z = batch.last.new_zeros(len(batch.last), 0, model.cfg.d_head)
        if z is not None:
            heads, bias = attention_shares(model, layer, z, aim)
            for head, share in enumerate(heads.unbind(1)):
                found[Component("head", layer, head)] = share
            found[Component("attn bias", layer)] = bias
        if ("mlp_out", layer) in batch.seen:
            found[Component("mlp", layer)] = _dot(batch.seen["mlp_out", layer], aim)
    constant = _dot(norm.bias, direction) + (b_U * weights).sum(1)
    found[Component("final bias")] = constant
    return found


def _dot(
    part: Float[Tensor, "row d_model"], aim: Float[Tensor, "row d_model"]
) -> Float[Tensor, " row"]:
    return (part.double() * aim).sum(-1)


def _check(
    shares: Shares, total: Float[Tensor, " row"], logits: Float[Tensor, "row d_vocab"]
) -> None:
    """Raise unless the shares add up.

    Raises:
        RuntimeError: They do not, beyond rounding.
    """
    off = float((sum(shares.values(), torch.zeros_like(total)) - total).abs().max())
    allowed = tolerated(logits.dtype, logits)
    if not off <= allowed:
        raise RuntimeError(
            f"the shares of all components miss the logit difference by {off:.3g} (allowed: "
            f"{allowed:.3g}), so this architecture or a hook writes into the residual stream "
            "in a way that is not known here. No share can be trusted: "
            "use mi.path_patching to 'logits'."
        )
