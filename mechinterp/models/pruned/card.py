"""The model card of a saved model: what was pruned from what, and pictures of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models.identity import fingerprint
from mechinterp.models.plain import unwrap
from mechinterp.models.pruned.anatomy import Anatomy
from mechinterp.models.pruned.record import Pruning, pruning_of

_MARK = "library_name: mechinterp"  # a README without it is somebody else's
_CARD, _PICTURE = "README.md", "card_{}.png"


def parts_of(card: object | Sequence[object]) -> list[str | Figure]:
    """Return the parts of a card, every picture as a figure.

    Raises:
        TypeError: Something is neither a text nor a picture.
    """
    listed = list(card) if isinstance(card, list | tuple) else [card]
    return [_part(each) for each in listed]


def write_card(model: TransformerBridge, parts: Sequence[str | Figure], folder: Path) -> None:
    """Write ``README.md`` and its pictures into an existing folder."""
    name = str(model.cfg.model_name)
    tags = ["tags: [pruned]"] if pruning_of(model).steps else []
    lines = ["---", _MARK, *tags, "---", "", f"# {name}", "", *_account(model)]
    pictures = 0
    for part in parts:
        if isinstance(part, str):
            lines += [part.strip(), ""]
            continue
        pictures += 1
        file = _PICTURE.format(pictures)
        part.savefig(folder / file, bbox_inches="tight", dpi=150)
        lines += [f"![{_title(part)}]({file})", ""]
    (folder / _CARD).write_text("\n".join(lines), encoding="utf-8")


def card_files(folder: Path) -> list[Path]:
    """Return the files in a folder that are a card which `write_card` wrote."""
    card = folder / _CARD
    if not card.is_file() or _MARK not in card.read_text(encoding="utf-8", errors="ignore"):
        return []
    return [card, *folder.glob(_PICTURE.format("*"))]


def _part(part: Any) -> str | Figure:
    if isinstance(part, str | Figure):
        return part
    axes = part if isinstance(part, Axes) else getattr(part, "plot", lambda: None)()
    if not isinstance(axes, Axes):
        raise TypeError(
            f"a model card shows texts and pictures, but {type(part).__name__} is neither. "
            "Pass Markdown text, a result, or a matplotlib figure or axes."
        )
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _title(figure: Figure) -> str:
    titles = [axes.get_title("left") or axes.get_title() for axes in figure.axes]
    return next((title for title in titles if title), "figure")


def _account(model: TransformerBridge) -> list[str]:
    pruning = pruning_of(model)
    if not pruning.steps:
        return []
    anatomy = Anatomy(unwrap(model), model.adapter)
    first = pruning.steps[0]
    return [
        f"Pruned from `{first['model']}` (fingerprint `{first['of']}`) with mechinterp; "
        f"this model's fingerprint is `{fingerprint(model)}`.",
        "",
        "Its layers have different shapes, which `transformers` cannot read by itself:",
        "",
        "```python",
        "import mechinterp as mi",
        "",
        'model = mi.load_model("path/to/this/folder")',
        "```",
        "",
        *_steps(pruning),
        *_layers(pruning, anatomy),
    ]


def _steps(pruning: Pruning) -> list[str]:
    lines = ["## Steps", ""]
    for number, step in enumerate(pruning.steps, 1):
        kind = "heads" if "heads" in step else "neurons"
        count = sum(map(len, step[kind].values()))
        lines.append(f"{number}. {count} {kind}, {_folding(step)}, from `{step['of'][:16]}`.")
    return [*lines, ""]


def _folding(step: Any) -> str:
    if step["fold"] == "zero":
        return "as if they gave nothing"
    over = step["mean_over"]
    digest = f", sha256 `{over['sha256'][:16]}`" if "sha256" in over else ""
    return (
        f"their mean over {over['prompts']} prompts ({over['kind']}{digest}) folded into the "
        "output bias"
    )


def _layers(pruning: Pruning, anatomy: Anatomy) -> list[str]:
    lines = ["## Layers", "", "| layer | heads left | heads removed | neurons left |"]
    lines += ["| --- | --- | --- | --- |"]
    for layer in range(len(anatomy.blocks)):
        gone = pruning.heads.get(layer, ())
        left = len(anatomy.heads(layer).queries)
        names = ", ".join(map(str, gone)) or "none"
        lost = len(pruning.neurons.get(layer, ()))
        neurons = _of(anatomy.n_neurons(layer), lost) if anatomy.has_mlp else "no MLP"
        lines.append(f"| {layer} | {_of(left, len(gone))} | {names} | {neurons} |")
    return [*lines, "", "Heads are named as in the original model.", ""]


def _of(left: int, lost: int) -> str:
    return f"{left} of {left + lost}"
