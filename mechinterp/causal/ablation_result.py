"""What taking parts of a model out did to the metric."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from mechinterp.drawing import draw
from mechinterp.results import Result

_MOST_SETS = 24


@dataclass(frozen=True, eq=False)
class AblationResult(Result):
    """The metric with parts taken out, and with none.

    ``data["ablated"]`` has ``prompt`` and either the axes of the parts (``layer`` and ``head``
    or ``neuron``) or ``set``, whose labels name what was taken out together;
    ``data["intact"]`` is the model's own value per prompt, in the metric's unit. With several
    metrics both have a ``metric`` axis. With ``screen=``, ``data["exact"]`` says which values
    were computed in the model's own dtype.
    """

    @property
    def effect(self) -> xr.DataArray:
        """Metric without the parts minus with them, per prompt, in the metric's unit."""
        return (self.data["ablated"] - self.data["intact"]).rename("effect")

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Draw the mean effect of every part: a grid of layers and heads, or a line.

        A dot in a grid, a filled point on a line: significant at 0.05 after correction for
        all cells by max-T. Of many sets those with the largest effects are shown.

        ``metric`` is which of several (default: the first).
        """
        effect = self.effect_of(metric)
        if "neuron" in effect.dims:
            effect = effect.stack(set=("layer", "neuron"), create_index=False)
            names = zip(effect["layer"].values, effect["neuron"].values, strict=True)
            effect = effect.assign_coords(set=[f"{layer}.{unit}" for layer, unit in names])
            effect = effect.drop_vars(["layer", "neuron"])
        label = f"effect on {metric or next(iter(self.convention.metrics))}"
        unit = self.convention.metrics[metric or next(iter(self.convention.metrics))]
        if effect.sizes.get("set", 0) > _MOST_SETS:
            size = np.abs(effect.mean("prompt").values)
            kept = np.sort(np.argsort(-size, kind="stable")[:_MOST_SETS])
            label = f"{label}: {len(kept)} largest of {effect.sizes['set']}"
            effect = effect.isel(set=kept)
        return draw(
            effect,
            self.convention,
            label=f"{label} ({unit})" if unit else label,
            ax=ax,
        )
