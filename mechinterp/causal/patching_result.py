"""What patching did to the metric: the numbers, what they mean, and how they are drawn."""

import warnings
from dataclasses import dataclass
from typing import Literal

import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference
from mechinterp.causal.diagram import diagram
from mechinterp.drawing import draw
from mechinterp.results import Result

Direction = Literal["denoising", "noising"]


@dataclass(frozen=True, eq=False)
class PatchingResult(Result):
    """What one activation patch at a time did to the metric.

    ``data["patched"]`` has the swept axes plus ``prompt``; ``data["clean"]`` and
    ``data["corrupted"]`` are the two baselines per prompt, in the metric's unit. With several
    metrics all three have a ``metric`` axis.
    """

    @property
    def effect(self) -> xr.DataArray:
        """Metric after the patch minus before it, per prompt, in the metric's unit.

        Before is the corrupted run when denoising, the clean run when noising.
        """
        base = self.data["corrupted" if self._denoising else "clean"]
        return (self.data["patched"] - base).rename("effect")

    @property
    def recovered(self) -> xr.DataArray:
        """Share of the mean clean-corrupted gap that the patch restores: 0 nothing, 1 all.

        NaN, with a warning, for a metric whose gap may as well be zero (its 95 % bootstrap
        interval over prompts contains 0).

        Raises:
            AttributeError: The direction is noising, which reports ``destroyed``.
        """
        self._require("denoising", "recovered", "destroyed")
        return self._warned(self._share().rename("recovered"))

    @property
    def destroyed(self) -> xr.DataArray:
        """Share of the mean clean-corrupted gap that the patch breaks: 0 nothing, 1 all.

        NaN, with a warning, for a metric whose gap may as well be zero (its 95 % bootstrap
        interval over prompts contains 0).

        Raises:
            AttributeError: The direction is denoising, which reports ``recovered``.
        """
        self._require("noising", "destroyed", "recovered")
        return self._warned(self._share().rename("destroyed"))

    def plot(
        self,
        ax: Axes | None = None,
        *,
        value: Literal["share", "effect"] | None = None,
        metric: str | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Axes:
        """Draw the swept places: a grid over two axes, a line or points over one.

        A dot in a grid, a filled point on a line: significant at 0.05 after correction for
        all cells by max-T (``statistics`` says how). Lines have a band, the 95 % interval of
        the effect; on the scale of the share it is divided by the mean gap, whose own
        uncertainty it leaves out. A sweep over layers, heads and positions shows the heads with
        the largest effects.

        Args:
            ax: Where to draw; a new figure by default.
            value: ``"share"`` of the gap (recovered or destroyed) or the ``"effect"`` in the
                metric's unit. Default: the share, where the gap is not zero.
            metric: Which of several metrics (default: the first).
            start: The first of the swept positions that is shown, to look at a part of a long
                prompt. The correction is for all cells, shown or not.
            stop: The one after the last that is shown.

        Raises:
            ValueError: The share is asked for and there is no clear gap to take one of.
        """
        share = self.of_metric(self._share(), metric)
        if value is None:
            value = "effect" if bool(share.isnull().all()) else "share"
        effect = self.of_metric(self.effect, metric)
        scale, intervals = 1.0, "the mean"
        if value == "share":
            if bool(share.isnull().all()):
                doubt = inference.gap_doubt(*self._runs(metric), "there is no share of it")
                raise ValueError(f"{doubt} Pass value='effect'.")
            intervals = "effect / mean gap"
            scale = (1 if self._denoising else -1) / self.of_metric(self._gap(), metric)
        return draw(
            effect,
            self.convention,
            label=self._label(value, metric),
            scale=scale,
            intervals=intervals,
            shown=slice(start, stop),
            ax=ax,
        )

    def diagram(
        self, ax: Axes | None = None, *, n: int = 16, metric: str | None = None
    ) -> Axes:
        """Draw the ``n`` strongest paths as arrows from senders to receivers.

        Nodes stand at the height of their layer. An arrow is as wide as its mean effect is
        large, red where it is positive and blue where negative, dashed where it is not
        significant after correction for all edges; beside it the receiver's input and the
        effect in the metric's unit.

        Raises:
            ValueError: This result is not of ``mi.path_patching``.
        """
        effect = self.of_metric(self.effect, metric)
        label = self._label("effect", metric)
        return diagram(effect, self.convention, n=n, label=label, ax=ax)

    @property
    def _denoising(self) -> bool:
        return self.convention.direction == "denoising"

    def _require(self, direction: str, asked: str, instead: str) -> None:
        if self.convention.direction != direction:
            raise AttributeError(
                f"{asked} belongs to {direction}, but this result was made by "
                f"{self.convention.direction}. Read .{instead} or .effect."
            )

    def _runs(self, metric: str | None) -> tuple[xr.Dataset, list[str]]:
        """Return both baselines by one metric, and its name."""
        name = metric or next(iter(self.convention.metrics))
        runs = self.data[["clean", "corrupted"]]
        return runs.sel(metric=name) if "metric" in runs.dims else runs, [name]

    def _gap(self) -> xr.DataArray:
        return inference.mean_gap(self.data)

    def _share(self) -> xr.DataArray:
        mean = self.data.mean("prompt", skipna=False)
        if self._denoising:
            return (mean["patched"] - mean["corrupted"]) / self._gap()
        return (mean["clean"] - mean["patched"]) / self._gap()

    def _warned(self, share: xr.DataArray) -> xr.DataArray:
        names = list(self.convention.metrics)
        if doubt := inference.gap_doubt(self.data, names, f"{share.name} is NaN"):
            warnings.warn(
                f"{doubt} Read .effect, or use a task on which the two runs differ.",
                stacklevel=3,
            )
        return share

    def _label(self, value: str, metric: str | None) -> str:
        name = metric or next(iter(self.convention.metrics))
        if value == "share":
            return f"{'recovered' if self._denoising else 'destroyed'} share of {name}"
        unit = self.convention.metrics[name]
        return f"effect on {name}" + (f" ({unit})" if unit else "")
