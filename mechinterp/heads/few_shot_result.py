"""What examples in the prompt do: the numbers against how many, and their picture."""

from dataclasses import dataclass

import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference, plotting, stats
from mechinterp.results import Result

METRICS = {"exact": "share right", "first_token": "share right", "log_prob": "nats"}
_SHOWN = {"exact": "accuracy (whole answer)", "first_token": "accuracy (first token)"}
_SAID = {
    "true": "true examples",
    "shuffled_labels": "labels shuffled",
    "new_content": "same format, other words",
}
_MARKERS = ("o", "s", "^")


@dataclass(frozen=True, eq=False)
class FewShotResult(Result):
    """How the model answers after so many examples of each kind.

    ``data["value"]`` has the axes ``metric``, ``condition``, ``shots`` and ``prompt`` (one
    query each, with its ``input`` and ``output``). The prompt without examples is the same in
    every condition.
    """

    @property
    def effect(self) -> xr.DataArray:
        """What the examples add: each value minus that with the fewest examples, per query."""
        value = self.data["value"]
        return (value - value.isel(shots=0, drop=True)).rename("effect")

    @property
    def accuracy(self) -> xr.DataArray:
        """Share of queries whose whole answer is right, per condition and number of shots."""
        return self.data["value"].sel(metric="exact", drop=True).mean("prompt")

    def curve(self, *, metric: str | None = None) -> xr.Dataset:
        """Return ``mean``, ``low``, ``high`` (95 % bootstrap over queries) of a ``metric``."""
        value = self.of_metric(self.data["value"], metric).transpose(..., "prompt")
        low, high = stats.bootstrap_interval(inference.per_prompt(value))
        mean = value.mean("prompt")
        return xr.Dataset(
            {"mean": mean, "low": mean.copy(data=low), "high": mean.copy(data=high)}
        )

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Draw the mean against the number of examples, a line per condition.

        Bands are 95 % bootstrap intervals over queries. ``metric`` is ``"exact"`` (default),
        ``"first_token"`` or ``"log_prob"``.
        """
        curves = self.curve(metric=metric)
        shots = curves["shots"].values.astype(float)
        several = self.data.sizes["prompt"] > 1
        for number, condition in enumerate(curves["condition"].values):
            line = curves.sel(condition=condition)
            ax = plotting.curve(
                shots,
                line["mean"].values,
                low=line["low"].values if several else None,
                high=line["high"].values if several else None,
                ax=ax,
                label=_SAID[str(condition)],
                colour=plotting.COLOURS[number],
                marker=_MARKERS[number],
            )
        assert ax is not None
        name = metric or next(iter(METRICS))
        if name != "log_prob":
            ax.set_ylim(-0.02, 1.02)
        ax.set_xticks(shots)
        ax.set_xlabel("examples in the prompt")
        ax.set_ylabel(_SHOWN.get(name, "log-probability of the answer (nats)"))
        plotting.legend(ax)
        n = self.data.sizes["prompt"]
        plotting.title(
            ax,
            f"few-shot · {self.convention.data}",
            f"{n} queries, band: 95 %" if several else "one query: no interval",
        )
        return ax
