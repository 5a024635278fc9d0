"""How important each head is, by one method, and the order of pruning that follows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from scipy.stats import t as student

from mechinterp import plotting
from mechinterp.drawing import draw
from mechinterp.nulls import Head
from mechinterp.results import Result

SIGNED = ("ablation", "shapley")


@dataclass(frozen=True, eq=False)
class HeadImportance(Result):
    """What each head is worth; larger is more important.

    ``data["importance"]`` has the axes ``layer`` and ``head`` (NaN where a layer has no such
    head, or it was not scored), and ``prompt`` where the method scores prompts. Its unit is in
    ``convention.metrics``. ``data`` may hold more: ``error`` (Monte-Carlo standard error of
    Shapley values), ``open`` (each gate's probability of being open along its training, on
    ``step``).
    """

    @property
    def effect(self) -> xr.DataArray:
        """The importance of every head."""
        return self.data["importance"].rename("effect")

    @property
    def signed(self) -> bool:
        """Whether a head can do harm: then its importance is below 0, and tests make sense."""
        return self.convention.settings["importance"] in SIGNED

    def statistics(self, **options: Any) -> xr.Dataset:
        """Return every head's mean importance, its interval and its p-values.

        ``options`` are those of other results' ``statistics``. The intervals of Shapley
        values are wider by the error of having sampled few orders (Student's t, added in
        quadrature); their p-values are for the orders sampled.
        """
        table = super().statistics(**options)
        if "error" not in self.data:
            return table
        pairs = self.convention.settings["orders"] // 2
        t = student.ppf((1 + table.attrs["confidence"]) / 2, pairs - 1)
        sampling = float(t) * self.data["error"]
        below = np.hypot(table["effect"] - table["low"], sampling)
        above = np.hypot(table["high"] - table["effect"], sampling)
        found = table.assign(low=table["effect"] - below, high=table["effect"] + above)
        found.attrs["interval"] += f", and Student's t over {pairs} pairs of orders"
        return found

    @property
    def order(self) -> list[Head]:
        """The heads, the least important first: the order in which to prune them.

        Ties go by chance, under the seed of the call.
        """
        values = self.data["importance"]
        mean = values.mean("prompt") if "prompt" in values.dims else values
        mean = mean.transpose("layer", "head")
        chance = np.random.default_rng(self.convention.seed).random(mean.size)
        flat = np.lexsort((chance, mean.values.ravel()))  # NaN last
        flat = flat[: int(np.isfinite(mean.values).sum())]
        at = np.unravel_index(flat, mean.shape)
        layers, heads = (mean[axis].values[i] for axis, i in zip(mean.dims, at, strict=True))
        return [(int(a), int(b)) for a, b in zip(layers, heads, strict=True)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the importance of every head, layers by heads.

        A dot: different from 0 at 0.05 after correction by max-T, where the method has signs
        and prompts.
        """
        name, unit = next(iter(self.convention.metrics.items()))
        label = f"{name} ({unit})" if unit else name
        effect = self.effect
        if "prompt" in effect.dims:
            return draw(effect, self.convention, label=label, signed=self.signed, ax=ax)
        ax = plotting.heat_grid(effect, ax=ax, label=label, signed=False)
        plotting.title(
            ax, f"{self.convention.settings['importance']} · {self.convention.data}", ""
        )
        return ax

    def _rank(self, mean: np.ndarray) -> np.ndarray:
        return mean
