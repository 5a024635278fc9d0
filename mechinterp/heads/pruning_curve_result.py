"""What is left of the model as heads go, beside the band of random orders."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference, plotting, stats
from mechinterp.nulls import Head
from mechinterp.results import Result


@dataclass(frozen=True, eq=False)
class PruningCurve(Result):
    """The metric against the number of heads taken out, on data that did not rank them.

    ``data["value"]`` has the axes ``ranked_by`` (a method), ``removed`` (heads, from 0 on) and
    ``prompt``, ``data["random"]`` the same with ``draw`` for random orders; ``data["order"]``
    names the heads of each method in the order in which they went. Several metrics add
    ``metric``.
    """

    @property
    def effect(self) -> xr.DataArray:
        """The metric minus that of the whole model, per method, heads removed and prompt."""
        value = self.data["value"]
        return (value - value.isel(removed=0, drop=True)).rename("effect")

    def removed(self, method: str, count: int) -> list[Head]:
        """Return the first ``count`` heads that a method took out, for ``mi.prune_heads``.

        Raises:
            ValueError: The method is not on the curve, or so many heads were not taken out.
        """
        methods = self.data["ranked_by"].values.tolist()
        if method not in methods:
            raise ValueError(f"{method!r} is not on this curve. It has {', '.join(methods)}.")
        order = self.data["order"].sel(ranked_by=method).values.tolist()
        if not 0 <= count <= len(order):
            raise ValueError(f"{count} heads were not taken out, but 0 to {len(order)}.")
        names = [name.split(".") for name in order[:count]]
        return [(int(layer), int(head)) for layer, head in names]

    def area(self, *, metric: str | None = None) -> xr.DataArray:
        """Return the mean of the metric along the curve, per method and prompt.

        The area under it by the trapezium rule, over the share of heads removed from 0 to the
        last, so a curve that never falls has the whole model's value.
        """
        return self._area(self.of_metric(self.data["value"], metric))

    def against_random(
        self, *, metric: str | None = None, n_flips: int = 10_000, seed: int = 0
    ) -> pd.DataFrame:
        """Return how each method's area compares with that of random orders, paired by prompt.

        Columns: ``method``, ``better`` (mean advantage in area over the mean of the random
        orders, positive where the method is better), ``low`` and ``high`` (95 % bootstrap
        interval over prompts), ``p`` (sign flips of prompts, two-sided), ``p_draws`` (share of
        random orders that are at least as good, plus one in each), ``below`` (steps at which
        the method is significantly worse at 0.05, max-T over steps; where no head is left all
        orders are one, so that step is left out).

        Args:
            metric: Which of several (default: the first).
            n_flips: How many sign patterns, at least 1; all where that suffices.
            seed: Of resamples and flips.
        """
        value = self.of_metric(self.data["value"], metric)
        random = self.of_metric(self.data["random"], metric)
        sign = self._sign(metric)
        chance = self._area(random)
        rows = []
        for method in self.data["ranked_by"].values.tolist():
            own = self._area(value.sel(ranked_by=method))
            gain = inference.per_case(sign * (own - chance.mean("draw"))).values
            step = sign * (value.sel(ranked_by=method) - random.mean("draw"))
            all_gone = self.convention.settings.get("min_heads_per_layer") == 0
            step = inference.per_case(step.isel(removed=slice(1, -1 if all_gone else None)))
            low, high = (ends[0] for ends in stats.bootstrap_interval(gain[None]))
            as_good = sign * (chance.mean("prompt") - own.mean("prompt")) >= 0
            at = inference.per_prompt(step)
            p = stats.max_t(at, None, n_flips, seed) if len(at) else np.ones(0)
            rows.append(
                {
                    "method": method,
                    "better": float(gain.mean()),
                    "low": float(low),
                    "high": float(high),
                    "p": float(stats.sign_flip_test(gain[None], None, n_flips, seed)[0]),
                    "p_draws": (1 + int(as_good.sum())) / (1 + random.sizes["draw"]),
                    "below": int(((p < 0.05) & (at.mean(-1) < 0)).sum()),
                }
            )
        return pd.DataFrame(rows)

    def between(
        self, *, metric: str | None = None, n_flips: int = 10_000, seed: int = 0
    ) -> pd.DataFrame:
        """Return how the areas of every two methods compare, paired by prompt.

        Columns: ``method``, ``than``, ``better`` (mean advantage in area, positive where the
        first keeps more), ``low`` and ``high`` (95 % bootstrap interval over prompts), ``p``
        (sign flips of prompts, two-sided), ``p_adjusted`` (Holm over the pairs).

        Args:
            metric: Which of several (default: the first).
            n_flips: How many sign patterns, at least 1; all where that suffices.
            seed: Of resamples and flips.

        Raises:
            ValueError: The curve has a single method.
        """
        names = self.data["ranked_by"].values.tolist()
        if len(names) < 2:
            raise ValueError(f"this curve has {names[0]} alone. Ask for several methods.")
        areas = inference.per_case(self._sign(metric) * self.area(metric=metric))
        rows, gains = [], []
        for first, other in combinations(names, 2):
            gain = areas.sel(ranked_by=first).values - areas.sel(ranked_by=other).values
            low, high = (ends[0] for ends in stats.bootstrap_interval(gain[None]))
            row = {"method": first, "than": other, "better": float(gain.mean())}
            rows.append(row | {"low": float(low), "high": float(high)})
            gains.append(gain)
        table = pd.DataFrame(rows)
        table["p"] = stats.sign_flip_test(np.stack(gains), None, n_flips, seed)
        table["p_adjusted"] = stats.holm(table["p"].to_numpy())
        return table

    def can_go(self, margin: float, *, metric: str | None = None) -> pd.DataFrame:
        """Return how many heads can go before the metric is worse than ``margin`` allows.

        The largest number such that there, and at every smaller one, the one-sided 95 %
        bootstrap bound of the mean loss over prompts stays below ``margin`` (in the metric's
        unit): non-inferiority at that margin. Columns: ``method``, ``heads``, ``share`` (of
        all heads of the model).

        Raises:
            ValueError: The margin is not positive.
        """
        if not margin > 0:
            raise ValueError(f"margin={margin} must be positive, in the metric's unit.")
        effect = self._sign(metric) * self.of_metric(self.effect, metric)
        most = int(self.data["removed"].values[-1])
        total = self.convention.settings.get("heads", most)  # not in older files
        rows = []
        for method in self.data["ranked_by"].values.tolist():
            lost = inference.per_case(-effect.sel(ranked_by=method)).transpose(
                "removed", "prompt"
            )
            _, high = stats.bootstrap_interval(lost.values, 0.90)
            fine = np.logical_and.accumulate([True, *(high[1:] < margin)])
            count = int(self.data["removed"].values[fine][-1])
            rows.append({"method": method, "heads": count, "share": count / total})
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Draw the metric against heads removed: a line per method, a band of random orders.

        Shades of the lines are 95 % intervals over prompts; the grey band holds the middle
        95 % of random orders, its line their mean.
        """
        ax = ax if ax is not None else plotting.new_axes(plotting.NOTEBOOK_WIDTH, 3.8)
        name = metric or next(iter(self.convention.metrics))
        x = self.data["removed"].values
        random = self.of_metric(self.data["random"], metric).mean("prompt").values
        low, high = np.quantile(random, [0.025, 0.975], axis=0)
        ax.fill_between(x, low, high, color="0.85", linewidth=0)
        ax.plot(x, random.mean(0), color="0.55", linestyle="--", label="random orders")
        value = self.of_metric(self.data["value"], metric)
        for i, method in enumerate(self.data["ranked_by"].values.tolist()):
            colour = plotting.COLOURS[i % len(plotting.COLOURS)]
            own = inference.per_case(value.sel(ranked_by=method)).transpose("removed", "prompt")
            ax.plot(x, own.mean("prompt"), color=colour, label=method.replace("_", " "))
            if own.sizes["prompt"] > 1:
                ends = stats.bootstrap_interval(own.values)
                ax.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0)
        unit = self.convention.metrics[name]
        ax.set_xlabel("heads removed")
        ax.set_ylabel(f"{name} ({unit})" if unit else name)
        ax.spines[["top", "right"]].set_visible(False)
        plotting.legend(ax)
        n = value.sizes["prompt"]
        plotting.title(
            ax,
            f"heads removed by {self.convention.ablation}-ablation · {self.convention.data}, "
            f"{n} prompt{'s' if n > 1 else ''}",
            f"grey: the middle 95 % of {len(random)} random orders; shades: 95 % intervals",
        )
        return ax

    def _sign(self, metric: str | None) -> float:
        name = metric or next(iter(self.convention.metrics))
        return -1.0 if name in self.convention.settings["worse"] else 1.0

    def _area(self, value: xr.DataArray) -> xr.DataArray:
        x = self.data["removed"].values.astype(float)
        return value.integrate("removed") / (x[-1] - x[0])
