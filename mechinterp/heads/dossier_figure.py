"""The figure of the induction dossier: four panels of one size."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechinterp import inference, plotting
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.heads.knockout import KnockOut
from mechinterp.heads.scores_result import HeadScores
from mechinterp.nulls import Head

_VISIBLE = 0.05  # share of the largest effect
_MOST_ROWS = 10


def draw(
    scores: HeadScores,
    found: Sequence[Head],
    loss: xr.DataArray,
    knock_out: KnockOut,
    paths: PatchingResult | None,
) -> Figure:
    """Draw prefix matching, the loss along the copies, knock-outs and the keys' senders."""
    figure = plotting.new_figure(plotting.NOTEBOOK_WIDTH, 7.0)
    (matching, along), (out, senders) = figure.subplots(2, 2)
    _matching(matching, scores, found)
    _along(along, loss)
    _out(out, knock_out)
    if paths is None:
        senders.set_axis_off()
    else:
        _senders(senders, paths)
    return figure


def _matching(ax: Axes, scores: HeadScores, found: Sequence[Head]) -> None:
    mean = scores.mean()["induction"].transpose("layer", "head")
    marked = xr.zeros_like(mean, dtype=bool)
    for layer, head in found:
        marked.loc[{"layer": layer, "head": head}] = True
    plotting.heat_grid(mean, ax=ax, label="attention", marked=marked, signed=False)
    _thin(ax, [str(layer) for layer in mean["layer"].values])
    plotting.title(ax, "prefix matching", "dot: by the criterion, above untrained heads")


def _along(ax: Axes, loss: xr.DataArray) -> None:
    mean, half = loss.mean("prompt"), loss.sizes["position"] // 2
    ax.plot(np.arange(1, 1 + mean.size), mean.values, color=plotting.COLOURS[0])
    ax.axvline(half + 0.5, color="0.6", linestyle="--", linewidth=0.8)
    ax.set_xlabel("position (dashed: the second copy begins)")
    ax.set_ylabel("loss (nats)")
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    plotting.title(ax, "loss along two copies", f"{loss.sizes['prompt']} prompts")


def _out(ax: Axes, knock_out: KnockOut) -> None:
    knock_out.plot(ax)
    ax.set_title("")
    for text in list(ax.texts):
        text.remove()
    n, p = knock_out.data.sizes["set"], f"p = {knock_out.p:.2g}"
    if knock_out.smallest_p > inference.ALPHA:
        p += ", the smallest there is" if knock_out.p == knock_out.smallest_p else ""
    plotting.title(ax, "knock-out", f"{n} random sets, matched by layer: {p}")


def _senders(ax: Axes, paths: PatchingResult) -> None:
    """Draw the earlier heads with a visible effect through some candidate's keys."""
    effect = paths.effect.transpose("prompt", "layer", "head", "receiver")
    p = inference.adjusted_p(effect).transpose("layer", "head", "receiver")
    mean = effect.mean("prompt")
    size = np.nan_to_num(np.abs(mean.values)).reshape(-1, mean.sizes["receiver"])
    visible = size > _VISIBLE * size.max()
    order = np.argsort(-size.max(1), kind="stable")[:_MOST_ROWS]
    rows = np.sort([row for row in order if visible[row].any()]).astype(int)
    if not len(rows):
        rows = order[:1]
    names = [f"{a}.{b}" for a in mean["layer"].values for b in mean["head"].values]
    shown = xr.DataArray(
        mean.values.reshape(size.shape)[rows],
        dims=("sender", "receiver"),
        coords={
            "sender": [names[row] for row in rows],
            "receiver": mean["receiver"].values,
        },
    )
    marked = (p.values.reshape(size.shape) < inference.ALPHA) & visible
    plotting.heat_grid(
        shown, ax=ax, label="effect (nats)", marked=shown.copy(data=marked[rows])
    )
    ax.set_xlabel("candidate whose keys receive")
    ax.set_ylabel("sending head")
    caption = f"{len(rows)} of {len(names)} heads, those with a visible effect"
    if not inference.no_p_exists(effect.sizes["prompt"]):
        caption += "\ndot: p < 0.05 after max-T over all cells"
    plotting.title(ax, "paths into the keys", caption)


def _thin(ax: Axes, names: list[str]) -> None:
    """Label every so many rows, so that the labels of many do not overprint each other."""
    step = max(1, -(-len(names) // 12))
    ax.set_yticks(np.arange(len(names))[::step] + 0.5, names[::step])
