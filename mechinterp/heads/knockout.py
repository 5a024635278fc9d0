"""Knock-out: what heads are worth to copying, against random heads of the same layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from transformer_lens.model_bridge import TransformerBridge

from mechinterp import plotting
from mechinterp.edits import Mean
from mechinterp.engine import Cell
from mechinterp.engine.calls import metrics_of_cells
from mechinterp.hooks import HookManager
from mechinterp.metrics import resolve_metrics
from mechinterp.nulls import Head, different_random_heads, resolved_heads
from mechinterp.record import convention_of
from mechinterp.results import Result
from mechinterp.tasks import Task


@dataclass(frozen=True, eq=False)
class KnockOut(Result):
    """How much the loss on the second copy rises without some heads, in nats.

    ``data["alone"]``: each head by itself, on ``prompt`` and ``place`` (``"layer.head"``);
    ``data["together"]``: all of them, on ``prompt``; ``data["random"]``: as many random heads
    of the same layers, mean over prompts, on ``set``, no set twice; ``data["loss"]``: of the
    whole model.
    """

    @property
    def effect(self) -> xr.DataArray:
        """The rise of the loss without each head by itself."""
        return self.data["alone"]

    @property
    def p(self) -> float:
        """How probable so large a rise is in random sets: (1 + as large) / (1 + sets).

        Counted over different sets. It is never below ``smallest_p``.
        """
        random = self.data["random"].values
        as_large = int((random >= float(self.data["together"].mean()) - 1e-9).sum())
        return (1 + as_large) / (1 + len(random))

    @property
    def smallest_p(self) -> float:
        """The smallest p that so many sets can give."""
        return 1 / (1 + self.data.sizes["set"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the random sets as a histogram, and the heads' own rise as a line."""
        ax = ax if ax is not None else plotting.new_axes(4.6, 3.0)
        random, together = self.data["random"].values, float(self.data["together"].mean())
        ax.hist(
            random, bins=min(30, len(random)), color=plotting.COLOURS[4], label="random sets"
        )
        names = ", ".join(self.data["place"].values)
        ax.axvline(together, color=plotting.COLOURS[1], label=names, linewidth=2)
        ax.set_xlabel("rise of the loss on the second copy (nats)")
        ax.set_ylabel("random sets")
        plotting.legend(ax)
        ax.spines[["top", "right"]].set_visible(False)
        note = f"{len(random)} sets matched by layer: p = {self.p:.2g}"
        plotting.title(ax, f"knock-out · {self.convention.data}", note)
        return ax


def knock_out(
    model: TransformerBridge,
    data: Task,
    heads: Sequence[Head],
    *,
    n_sets: int = 1000,
    seed: int = 0,
) -> KnockOut:
    """Knock heads out, alone and together, and as many random heads of the same layers.

    Their mean ``z`` over all positions of the prompts takes the place of their own, everywhere
    in the prompt. The loss is that of the answer.

    Args:
        model: Left as it was.
        data: A task whose answer is what comes next; ``heads.copies.second_copy`` makes one.
        heads: The heads, as pairs (layer, head).
        n_sets: How many different random sets; all that exist, where there are fewer.
        seed: Of the random sets.

    Raises:
        ValueError: There are no heads, one does not exist or is named twice, or a layer has too
            few others to match with (see ``mi.random_heads``).
    """
    chosen = resolved_heads(model, heads)
    different, possible = different_random_heads(model, chosen, n_sets, seed)
    layers = sorted({layer for layer, _ in chosen})
    means = HookManager(model).mean(data.clean, "z", layers=layers)

    def cell(out: Sequence[Head]) -> Cell:
        return Cell(
            [
                Mean("z", means, layers=layer, heads=[h for at, h in out if at == layer])
                for layer in sorted({layer for layer, _ in out})
            ]
        )

    sets = [*([head] for head in chosen), chosen, *different]
    metrics = resolve_metrics("loss", data.metric)
    found = metrics_of_cells(model, data, map(cell, sets), on="clean", metrics=metrics)
    loss = found.runs["clean"][:, 0].double().cpu().numpy()
    rise = found.values[..., 0].double().cpu().numpy() - loss
    prompts = np.arange(len(data))
    arrays = {
        "alone": (("prompt", "place"), rise[: len(chosen)].T),
        "together": (("prompt",), rise[len(chosen)]),
        "random": (("set",), rise[len(chosen) + 1 :].mean(1)),
        "loss": (("prompt",), loss),
    }
    coords = {
        "prompt": prompts,
        "place": [f"{layer}.{head}" for layer, head in chosen],
        "set": [_named(each) for each in different],
    }
    settings = {
        "sets_asked": n_sets,
        "sets_different": len(different),
        "sets_possible": possible,
    }
    return KnockOut(
        xr.Dataset(arrays, coords),
        convention_of(
            "knock_out",
            model,
            data,
            {"loss": "nats"},
            found.fingerprint,
            settings,
            site="z",
            ablation="mean over all positions",
            seed=seed,
        ),
    )


def _named(heads: Sequence[Head]) -> str:
    return " ".join(f"{layer}.{head}" for layer, head in heads)
