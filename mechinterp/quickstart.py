"""The first two minutes: find the induction heads of a real model, and prove it.

Loads a model, patches every head on the induction task, looks at the heads that matter, follows
the paths between them, takes them out, and sees whether the model can still repeat what it has
read. It ends with a report to open in a browser.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp import plotting
from mechinterp._progress import progress
from mechinterp.causal.patching import activation_patching
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.causal.paths import path_patching
from mechinterp.edits import Mean
from mechinterp.heads.attention import attention_patterns
from mechinterp.heads.attention_result import AttentionPatterns
from mechinterp.hooks import HookManager
from mechinterp.models import forward, load_model
from mechinterp.report.writing import report
from mechinterp.sites import n_heads, site_layers
from mechinterp.tasks import Prompts, Text, load_task, repeated_tokens

Head = tuple[int, int]
Say = Callable[..., None]

_MATTERS = 0.1  # a head matters when it restores this share of the gap by itself
_MOST_HEADS = 6
_TASK_PROMPTS = 32
_LENGTH, _PROMPTS, _CONTROLS = 50, 16, 8
_SHOWN_LENGTH, _SHOWN_HEADS = 10, 3
_PATH_PROMPTS, _RECEIVERS, _PATHS, _SHOWN_PATHS = 8, 4, 6, 14
_FILES = (
    "account.txt",
    "report.html",
    "patching.nc",
    "attention.nc",
    "paths.nc",
    "losses.json",
    "patching.png",
    "attention.png",
    "circuit.png",
    "ablation.png",
)


def quickstart(
    out: str | os.PathLike[str] = "mechinterp-quickstart",
    *,
    source: str | Path | TransformerBridge = "embedded",
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Find the induction circuit of a model, print an account, and return the folder of files.

    Args:
        out: Folder for figures and results. It is written when all is done; files of an
            earlier quickstart in it are replaced.
        source: The model, as for ``mi.load_model``.
        seed: Of the random tokens and of the control heads.
        console: Where the account is printed.

    Raises:
        FileExistsError: ``out`` is a file, or a folder with other things in it.
    """
    folder = _checked_folder(Path(out))
    console = console or Console(highlight=False, soft_wrap=True)
    said: list[str] = []

    def say(line: str = "") -> None:
        said.append(line)
        console.print(line, markup=False)

    model = load_model(source)
    heads_total = sum(int(block.attn.W_O.shape[0]) for block in model.blocks)
    say(f"Model: {model.cfg.model_name}, {len(model.blocks)} layers, {heads_total} heads.")
    with _filled(folder) as part:
        found, heads = _find(model, seed, say)
        found.save(part / "patching.nc")
        _save(found.plot(), part / "patching.png")
        looks = _attention(model, heads, seed, say)
        looks.save(part / "attention.nc")
        _save(looks.figure(sorted(looks.heads[:_SHOWN_HEADS])), part / "attention.png")
        paths = _circuit(model, heads, seed, say)
        paths.save(part / "paths.nc")
        _save(paths.diagram(n=_SHOWN_PATHS), part / "circuit.png")
        losses = _ablate(model, heads, seed, say)
        losses.save(part / "losses.json")
        _save(losses.plot(), part / "ablation.png")
        say()
        say(f"Figures and results are in {folder}{os.sep}")
        say(f"To look closer, open {folder / 'report.html'} in a browser: it needs no network.")
        account = "\n".join(said) + "\n"
        (part / "account.txt").write_text(account, encoding="utf-8")
        report(
            {
                "Which heads carry the answer?": found,
                "Where do they look?": looks,
                "Who tells whom?": paths,
            },
            part / "report.html",
            title="Quickstart: the heads that repeat",
            account=account,
        )
    return folder


def _find(model: TransformerBridge, seed: int, say: Say) -> tuple[PatchingResult, list[Head]]:
    """Patch every head of the induction task and name those that matter."""
    task = load_task("induction", model, _TASK_PROMPTS, seed)
    say()
    say("1. Which heads carry the answer?")
    say(f"   Task: {len(task)} prompts of random tokens whose beginning comes again. The right")
    say("   next token is the one that came next the first time. In the corrupted prompts")
    say("   another token stood there. Into each corrupted run we patch one head's clean")
    say("   output z, and see how much of the clean answer comes back.")
    result = activation_patching(model, task, "z", positions="all")
    clean, corrupted = (float(result.data[name].mean()) for name in ("clean", "corrupted"))
    say(f"   Mean logit difference: clean {clean:+.2f}, corrupted {corrupted:+.2f}.")
    table = result.top(_MOST_HEADS)
    effect = table["effect"].to_numpy()
    enough = (table["low"].to_numpy() > 0) & (effect > _MATTERS * (clean - corrupted))
    matters = table.iloc[np.flatnonzero(enough)]
    if clean <= corrupted or matters.empty:
        say("   No head stands out: no induction here. Going on with the largest.")
        matters = table.head(1)
    heads = [(int(layer), int(head)) for layer, head in matters[["layer", "head"]].to_numpy()]
    for (layer, head), (effect, low, high) in zip(
        heads, matters[["effect", "low", "high"]].to_numpy(), strict=True
    ):
        say(
            f"   head {layer}.{head} restores {effect / (clean - corrupted):4.0%} "
            f"({effect:+.2f}, 95 % interval {low:+.2f} to {high:+.2f})"
        )
    return result, heads


def _attention(
    model: TransformerBridge, heads: Sequence[Head], seed: int, say: Say
) -> AttentionPatterns:
    """Say where the heads look on repeated random tokens, and return it for one prompt."""
    prompts = repeated_tokens(model, _PROMPTS, _SHOWN_LENGTH, seed=seed)
    layers = sorted({layer for layer, _ in heads})
    acts = HookManager(model).capture(prompts, "pattern", layers=layers)
    looks = {
        (layer, head): tuple(
            float(_attention_at(acts["pattern", layer][:, head], _SHOWN_LENGTH, back).mean())
            for back in (_SHOWN_LENGTH - 1, 1)
        )
        for layer, head in heads
    }
    say()
    say("2. Where do they look?")
    say("   Random tokens, given twice. From a token's second occurrence, an induction head")
    say("   looks at the token after its first, and copies it. Share of attention that goes")
    say("            to the token after the first occurrence   to one token back")
    for (layer, head), (successor, previous) in looks.items():
        say(f"   head {layer}.{head} {successor:>25.0%} {previous:>28.0%}")
    if induction := [
        f"{i}.{j}" for (i, j), (after, back) in looks.items() if after > max(back, 0.2)
    ]:
        say(f"   So these are induction heads: {', '.join(induction)}.")
    else:
        say("   None of them looks like an induction head.")
    name = f"{_SHOWN_LENGTH} random tokens x 2"
    text = Text(name, prompts, tuple(range(_PROMPTS)), prompts.tokens.shape[1])
    shown = sorted(heads, key=lambda head: -max(looks[head]))
    return attention_patterns(model, text, heads=shown)


def _attention_at(
    pattern: Float[Tensor, "prompt query_pos key_pos"], period: int, back: int
) -> Float[Tensor, " prompt"]:
    """Return the mean attention from the second copy to the token ``back`` places before.

    0: none, 1: all of it. ``back = period - 1`` is the token after the first occurrence,
    the prefix matching of Olsson et al. 2022, arXiv:2209.11895.
    """
    queries = torch.arange(pattern.shape[1] - period, pattern.shape[1], device=pattern.device)
    return pattern[:, queries, queries - back].float().mean(1)


def _circuit(
    model: TransformerBridge, heads: Sequence[Head], seed: int, say: Say
) -> PatchingResult:
    """Say along which paths heads tell each other and the logits, and return them all."""
    task = load_task("induction", model, _PATH_PROMPTS, seed)
    first = min(site_layers(model, "z"))
    hearing = [head for head in heads if head[0] > first][:_RECEIVERS]
    receivers = {f"{layer}.{head}": _inputs(model, layer, head) for layer, head in hearing}
    result = path_patching(model, task, receivers | {"logits": ["logits"]}, senders="z")
    say()
    say("3. Who tells whom?")
    say("   What a head wrote in the clean run is told to one receiver alone: another head's")
    say("   inputs, or the logits. All else stays as in the corrupted run. The largest effects")
    say("   on the logit difference, which circuit.png draws:")
    for _, path in result.top(_PATHS).iterrows():
        what = f"{path['layer']}.{path['head']} -> {path['receiver']}"
        say(f"   {what:<15} {path['effect']:+.2f} ({path['low']:+.2f} to {path['high']:+.2f})")
    return result


def _inputs(model: TransformerBridge, layer: int, head: int) -> list[str]:
    """Return the nodes that a head reads: its queries, and the keys and values of its group."""
    queries, keys = (n_heads(model, site, layer) for site in ("q", "k"))
    group = head * keys // queries
    return [f"{layer}.{head}.q", f"{layer}.{group}.k", f"{layer}.{group}.v"]


@dataclass(frozen=True)
class _Losses:
    """Mean loss in nats at each predicted token of two copies, under three conditions."""

    heads: list[Head]
    controls: list[list[Head]]
    intact: list[float]
    ablated: list[float]
    control: list[list[float]]

    def second(self, losses: Sequence[float]) -> float:
        """Return the mean loss on the second copy, without its first token."""
        return float(np.mean(losses[_LENGTH:]))

    def save(self, path: Path) -> None:
        """Write the numbers as JSON."""
        unit = "nats per token, mean over prompts; one number per predicted token"
        path.write_text(json.dumps({"unit": unit} | vars(self), indent=1), encoding="utf-8")

    def plot(self) -> Axes:
        """Draw the losses along the prompt."""
        ax = plotting.new_axes(plotting.NOTEBOOK_WIDTH, 3.6)
        blue, red, green = plotting.COLOURS[:3]
        x = np.arange(2, len(self.intact) + 2)  # nothing predicts the first token
        many = len(self.control)
        control = np.array(self.control)
        label = f"{len(self.heads)} random other heads out (mean and range of {many} draws)"
        ax.fill_between(x, control.min(0), control.max(0), color=green, alpha=0.2, linewidth=0)
        ax.plot(x, control.mean(0), color=green, label=label)
        names = ", ".join(f"{layer}.{head}" for layer, head in self.heads)
        ax.plot(x, self.ablated, color=red, label=f"heads {names} out")
        ax.plot(x, self.intact, color=blue, label="intact")
        ax.axvline(_LENGTH + 0.5, color="0.5", linewidth=0.8, linestyle="--")
        top = 1.3 * max(ax.get_ylim()[1], 1.0)
        ax.set(ylim=(0, top), xlim=(0, len(x) + 2))
        ax.text(_LENGTH + 1.5, 0.95 * top, "second copy", fontsize=8, color="0.4", va="top")
        ax.set_xlabel("position of the predicted token")
        ax.set_ylabel("loss (nats)")
        ax.set_title(
            "Repeated random tokens, with and without the heads", loc="left", fontsize=10
        )
        ax.legend(frameon=False, fontsize=8, loc="upper left")
        ax.spines[["top", "right"]].set_visible(False)
        return ax


def _ablate(model: TransformerBridge, heads: list[Head], seed: int, say: Say) -> _Losses:
    """Take the heads out together, and as many random others, and compare the losses."""
    prompts = repeated_tokens(model, _PROMPTS, _LENGTH, seed=seed + 1)
    generator = np.random.default_rng(seed)
    others = [
        (layer, head)
        for layer, block in enumerate(model.blocks)
        for head in range(int(block.attn.W_O.shape[0]))
        if (layer, head) not in heads
    ]
    drawn = [
        generator.choice(len(others), min(len(heads), len(others)), replace=False)
        for _ in range(_CONTROLS)
    ]
    controls = [sorted(others[i] for i in each) for each in drawn]
    conditions = [[], heads, *controls]
    values = [
        _loss(model, prompts, without)
        for without in progress(conditions, len(conditions), "ablating heads")
    ]
    losses = _Losses(heads, controls, values[0], values[1], values[2:])
    intact, ablated = losses.second(losses.intact), losses.second(losses.ablated)
    control = [losses.second(each) for each in losses.control]
    first = float(np.mean(losses.intact[: _LENGTH - 1]))
    say()
    say("4. Does the model need them?")
    say(
        f"   {_PROMPTS} prompts of {_LENGTH} random tokens, given twice. Heads are taken out by"
    )
    say("   putting their mean output in place of their own.")
    say(f"   Loss on the first copy (nothing to copy from):  {first:5.2f} nats per token")
    say(f"   Loss on the second copy, intact:                {intact:5.2f}")
    say(f"   Loss on the second copy, the heads taken out:   {ablated:5.2f}")
    say(
        f"   ... as many random other heads taken out:       {np.mean(control):5.2f} "
        f"({min(control):.2f} to {max(control):.2f} in {len(control)} draws)"
    )
    say()
    if first - intact < 0.5:
        say("   This model hardly repeats what it has read, so there is no copying to break.")
        return losses
    broken = [(loss - intact) / (first - intact) for loss in (ablated, *control)]
    say(f"   Repeating the text saved {first - intact:.2f} nats per token. Without these heads")
    say(
        f"   {broken[0]:.0%} of that is lost, without random others {np.mean(broken[1:]):.0%} "
        f"({min(broken[1:]):.0%} to {max(broken[1:]):.0%})."
    )
    if broken[0] > max(broken[1:]):
        say("   No random set does as much: these heads are how the model repeats.")
    else:
        say("   Some random set does as much, so these heads are not alone in it.")
    return losses


@torch.no_grad()
def _loss(model: TransformerBridge, prompts: Prompts, without: Sequence[Head]) -> list[float]:
    """Return the mean loss at each predicted token of the copies, some heads mean-ablated."""
    manager = HookManager(model)
    with ExitStack() as stack:
        if without:
            means = manager.mean(prompts, "z", layers=sorted({layer for layer, _ in without}))
            edits = [
                Mean("z", means, layers=layer, heads=[h for at, h in without if at == layer])
                for layer in sorted({layer for layer, _ in without})
            ]
            stack.enter_context(manager.edit(*edits))
        log_probs = forward(model, prompts.tokens, prompts.mask)[:, :-1].log_softmax(-1)
    predicted = prompts.tokens[:, 1:].to(log_probs.device)
    losses = -log_probs.gather(-1, predicted[..., None])[..., 0]
    return losses[:, -(2 * _LENGTH - 1) :].double().mean(0).tolist()


def _save(drawn: Axes | Figure, path: Path) -> None:
    figure = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=150)


def _checked_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Pass another folder with --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _FILES[0]).exists():
        raise FileExistsError(
            f"{folder} holds other files, and no earlier quickstart. Pass another --out."
        )
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"the folder {folder.absolute().parent} does not exist. Create it first."
        )
    return folder


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of ``folder`` if all goes well."""
    part = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        yield part
        folder.mkdir(exist_ok=True)
        for name in _FILES:
            (part / name).replace(folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
