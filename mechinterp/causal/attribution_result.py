"""What attribution patching estimates: the numbers, what they mean, and how they are drawn."""

from dataclasses import dataclass

import xarray as xr
from matplotlib.axes import Axes

from mechinterp.causal.diagram import diagram
from mechinterp.drawing import draw
from mechinterp.results import Result


@dataclass(frozen=True, eq=False)
class AttributionResult(Result):
    """What patching each place would do to the metric, estimated from gradients.

    ``data["score"]`` has the swept axes plus ``prompt`` (``layer``, ``head`` and ``position``
    for nodes), ``data["clean"]`` and ``data["corrupted"]`` are the exact baselines per prompt,
    in the metric's unit. With several metrics all three have a ``metric`` axis. An estimate
    can be far off, mostly too small: ``mi.audit`` says how far.
    """

    @property
    def effect(self) -> xr.DataArray:
        """Estimated metric after the patch minus before it, per prompt, in the metric's unit.

        Has the axes of ``PatchingResult.effect``, and its sign where ``signed``; otherwise it
        is a size, 0 or more.
        """
        return self.data["score"].rename("effect")

    @property
    def signed(self) -> bool:
        """Whether scores have a sign. Those averaged over dropped layers are sizes."""
        return bool(self.convention.settings["signed"])

    def plot(
        self,
        ax: Axes | None = None,
        *,
        metric: str | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Axes:
        """Draw the mean estimate: a grid over two axes, a line or points over one.

        A sweep over layers, heads and positions shows the heads with the largest estimates.
        ``metric`` is which of several (default: the first). ``start`` and ``stop`` are the
        first of the positions that is shown and the one after the last, to look at a part of a
        long prompt; the correction is for all cells, shown or not.

        Raises:
            ValueError: There are no positions, or none of them lies there.
        """
        return draw(
            self.of_metric(self.effect, metric),
            self.convention,
            label=self._label(metric),
            signed=self.signed,
            shown=slice(start, stop),
            ax=ax,
        )

    def diagram(
        self, ax: Axes | None = None, *, n: int = 16, metric: str | None = None
    ) -> Axes:
        """Draw the ``n`` edges with the largest estimates as arrows between their nodes.

        As ``PatchingResult.diagram``. ``metric`` is which of several (default: the first).

        Raises:
            ValueError: These are estimates of places, not of edges.
        """
        effect = self.of_metric(self.effect, metric)
        told = {"n": n, "label": self._label(metric), "signed": self.signed, "ax": ax}
        return diagram(effect, self.convention, **told)

    def _label(self, metric: str | None) -> str:
        name = metric or next(iter(self.convention.metrics))
        unit = self.convention.metrics[name]
        size = "" if self.signed else "size of the "
        variant = self.convention.settings["variant"]
        return f"{size}effect on {name} by {variant}" + (f" ({unit})" if unit else "")
