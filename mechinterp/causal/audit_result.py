"""What an audit of an attribution found: estimates beside exact effects."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference, plotting
from mechinterp.causal.sampling import outside_total, weighted_spearman
from mechinterp.drawing import about
from mechinterp.results import NotedFrame, Result
from mechinterp.stats import bootstrap_interval


@dataclass(frozen=True, eq=False)
class AuditResult(Result):
    """Exact effects of some cells of an attribution, beside their estimates.

    The axis ``cell`` counts the cells that were computed, with the attribution's own axes
    (``layer``, ``head``, ``position``) as labels on it. ``data["estimate"]`` and
    ``data["exact"]`` are per prompt, in the metric's unit. ``chosen`` says why a cell was
    computed: it has one of the ``"top"`` estimates, was drawn into the ``"sample"``, came
    ``"next"`` by its estimate, or from the ``"stratum"`` of a drawn cell that turned out to be
    large. ``stratum`` counts from 1 for the largest estimates, 0 being the top itself, and
    ``weight`` is how many cells a cell of the top or the sample stands for (0 for the others).
    """

    @property
    def effect(self) -> xr.DataArray:
        """The exact effect of every computed cell, per prompt: metric after minus before."""
        return self.data["exact"].rename("effect")

    @property
    def n_cells(self) -> int:
        """How many cells the attribution has estimates for."""
        return int(self._told["cells"])

    @property
    def n_exact(self) -> int:
        """How many of them were computed exactly."""
        return self.data.sizes["cell"]

    @property
    def k(self) -> int:
        """How many cells the top has."""
        return int(self._told["k"])

    @property
    def spearman(self) -> float:
        """Rank correlation of the sizes of estimated and exact mean effects, over all cells.

        Estimated from the top and the sample, each cell weighted by those it stands for: the
        computed cells alone would flatter or damn, since they are mostly large. 1 is the same
        ranking. Exact when every cell was drawn.
        """
        return self._correlation(np.abs)

    @property
    def spearman_signed(self) -> float:
        """The same of the effects with their signs; NaN for estimates that have none."""
        return self._correlation(np.asarray) if self._told["signed"] else float("nan")

    @property
    def chosen_of(self) -> int:
        """All cells: those computed were chosen among them on the same prompts."""
        return self.n_cells

    @property
    def missed_mass(self) -> float:
        """Share of the total size of exact mean effects that the estimates' own top missed.

        The effects of cells that are among the ``k`` largest, but not among the ``k`` largest
        estimates. Estimated from the sample (Horvitz-Thompson), which also says how large an
        effect must be for the top of all cells, but no less than what is known of the computed
        cells: 0 says that no computed cell is one. NaN when all effects are 0.
        """
        return self._missed[0]

    @property
    def missed_mass_interval(self) -> tuple[float, float]:
        """The 95 % interval of ``missed_mass`` over other samples of the same cells."""
        return self._missed[1:]

    @property
    def outside_mass(self) -> float:
        """Share of the total size of exact mean effects that lies outside the audited top.

        The audited top are the ``k`` largest of all computed cells; a large share says that
        effects are spread over many cells, not that estimates are wrong. Estimated as
        ``missed_mass``; NaN when all effects are 0.
        """
        return self._outside[0]

    @property
    def outside_mass_interval(self) -> tuple[float, float]:
        """The 95 % interval of ``outside_mass`` over other samples of the same cells."""
        return self._outside[1:]

    def top(self, n: int | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Return the ``n`` computed cells with the largest exact effect (default: the top).

        Columns: the cell's labels, ``estimate`` and ``effect`` (means over prompts), ``low``
        and ``high``, the 95 % interval of the effect, ``p_adjusted``, its p-value corrected for
        all cells of the attribution (``statistics`` says how), ``rank``, the place of the
        estimate among all cells from 1, and ``chosen``. The line below the table is as in other
        results. ``metric`` is the audited one.
        """
        self.of_metric(self.effect, metric)  # raises for one that was not measured
        table = self._table().sort_values("size", ascending=False, kind="stable")
        table = table.head(self.k if n is None else n).reset_index(drop=True)
        effect = inference.per_case(self.effect)
        samples = inference.per_prompt(effect)[table["cell"]]
        table["low"], table["high"] = bootstrap_interval(samples)
        table["p_adjusted"] = inference.adjusted_p(effect, self.n_cells).values[table["cell"]]
        labels = [str(name) for name in self._told["axes"]]
        shown = ["estimate", "effect", "low", "high", "p_adjusted", "rank", "chosen"]
        noted = NotedFrame(table[[*labels, *shown]])
        noted.attrs["note"] = inference.table_note(effect, chosen_of=self.n_cells)
        return noted

    @property
    def missed(self) -> pd.DataFrame:
        """The cells of the audited top that are not among the ``k`` largest estimates."""
        top = self.top()
        return pd.DataFrame(top[top["rank"] > self.k]).reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per computed cell and prompt."""
        frame = self.data[["estimate", "exact"]].to_dataframe().reset_index()
        return frame.drop(columns=[name for name in ("template",) if name in frame])

    def summary(self) -> str:
        """Say in a few lines how far the estimates can be trusted."""
        signed = f", {self.spearman_signed:.2f} with signs" if self._told["signed"] else ""
        missed = _share(self.missed_mass, self.missed_mass_interval)
        outside = _share(self.outside_mass, self.outside_mass_interval)
        rounds = self._told["rounds"]
        return (
            f"{self.n_exact} of {self.n_cells} cells computed exactly; the top {self.k} was "
            f"settled after {rounds} round{'s' if rounds > 1 else ''}.\n"
            f"Rank correlation over all cells {self.spearman:.2f}{signed}.\n"
            f"{len(self.missed)} of the top {self.k} were not among the {self.k} largest "
            f"estimates: these missed {missed} of all effects.\n"
            f"{outside} of all effects lie outside the top {self.k}, in smaller cells."
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw exact against estimated effects, with the missed cells of the top marked.

        Bars are 95 % intervals of the exact mean effect over prompts, one cell at a time.
        """
        ax = ax if ax is not None else plotting.new_axes(4.8, 4.2)
        table, signed = self._table(), bool(self._told["signed"])
        shown = table["effect"] if signed else table["size"]
        estimate, exact = table["estimate"].to_numpy(), shown.to_numpy()
        missed = np.zeros(len(table), dtype=bool)
        missed[np.argsort(-table["size"].to_numpy(), kind="stable")[: self.k]] = True
        missed &= table["rank"].to_numpy() > self.k
        effect = inference.per_case(self.effect)
        n = effect.sizes["prompt"]
        low, high = bootstrap_interval(inference.per_prompt(effect))
        if not signed:
            turned = table["effect"].to_numpy() < 0
            low, high = np.where(turned, -high, low), np.where(turned, -low, high)
        ends = [*estimate, *exact, 0.0]
        ax.plot(*[[min(ends), max(ends)]] * 2, color="0.8", linewidth=0.8, zorder=0)
        for chosen, colour, name in (
            (~missed, plotting.COLOURS[0], "computed"),
            (missed, plotting.COLOURS[1], "in the top, missed by the estimate"),
        ):
            if bool(chosen.any()):
                ax.scatter(estimate[chosen], exact[chosen], s=14, color=colour, label=name)
                ax.vlines(estimate[chosen], low[chosen], high[chosen], color=colour, lw=0.8)
        (metric,) = self.convention.metrics
        unit = self.convention.metrics[metric]
        what = f"effect on {metric}" + (f" ({unit})" if unit else "")
        ax.set_xlabel(f"estimated {what}")
        ax.set_ylabel(f"exact {what}" if signed else f"size of the exact {what}")
        bars = "one prompt: no intervals"
        if n > 1:
            bars = inference.interval_note(n, "the exact mean, each cell by itself")
        plotting.title(
            ax,
            f"{self.convention.site or 'edges'} by {self._told['variant']} · "
            f"{about(self.convention, self.data.sizes['prompt'], n)}",
            f"{self.n_exact} of {self.n_cells} cells computed exactly\n{bars}",
        )
        ax.legend(fontsize=8, frameon=False, loc="upper left")  # off the diagonal
        return ax

    @property
    def _told(self) -> Any:
        return self.convention.settings

    def _table(self) -> pd.DataFrame:
        """One row per computed cell: labels, means over prompts, rank and why it was chosen."""
        mean = {
            name: inference.per_case(self.data[name]).mean("prompt", skipna=False)
            for name in ("estimate", "exact")
        }
        columns = {str(name): self.data[str(name)].values for name in self._told["axes"]}
        columns |= {"cell": np.arange(self.n_exact), "estimate": mean["estimate"].values}
        columns |= {"effect": mean["exact"].values, "size": np.abs(mean["exact"].values)}
        columns |= {name: self.data[name].values for name in ("rank", "chosen")}
        return pd.DataFrame(columns)

    def _correlation(self, of: Any) -> float:
        table, weight = self._table(), self.data["weight"].values
        kept = weight > 0
        estimate, exact = of(table["estimate"].values[kept]), of(table["effect"].values[kept])
        return weighted_spearman(estimate, exact, weight[kept])

    @property
    def _missed(self) -> tuple[float, float, float]:
        """The share of ``missed_mass``, and both ends of its interval."""
        size, belongs = self._table()["size"].to_numpy(), self._belongs
        missed = np.where(self.data["stratum"].values > 0, size * belongs, 0.0)
        return _of_all(self._total(missed), self._total(size - missed)[0])

    @property
    def _outside(self) -> tuple[float, float, float]:
        """The share of ``outside_mass``, and both ends of its interval."""
        size = self._table()["size"].to_numpy()
        top = np.argsort(-size, kind="stable")[: self.k]
        outside = size.copy()
        outside[top] = 0.0
        return _of_all(self._total(outside), float(size[top].sum()))

    @property
    def _belongs(self) -> np.ndarray:
        """How much of each computed cell is in the top ``k`` of all cells: 1, 0, once between.

        The top and the sample stand for all cells, each by its weight; the largest are in the
        top until ``k`` are. What else was computed is in it where it is larger than the last.
        """
        size, weight = self._table()["size"].to_numpy(), self.data["weight"].values
        order = np.argsort(-size, kind="stable")
        before = weight[order].cumsum() - weight[order]
        share = np.divide(
            self.k - before, weight[order], out=np.ones(len(size)), where=weight[order] > 0
        )
        found = np.empty(len(size))
        found[order] = np.where(before < self.k, np.clip(share, 0.0, 1.0), 0.0)
        return found

    def _total(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all cells and its ends; those computed have these values."""
        stratum, weight = self.data["stratum"].values, self.data["weight"].values
        numbers = np.unique(stratum[stratum > 0])
        drawn = [values[(stratum == n) & (weight > 0)] for n in numbers]
        counts = [round(float(weight[stratum == n].sum())) for n in numbers]
        total = np.array(outside_total(drawn, counts)) + values[stratum == 0].sum()
        return np.maximum(total, values.sum())


def _of_all(mass: np.ndarray, rest: float) -> tuple[float, float, float]:
    """Return masses as shares of themselves and the rest; NaN where there is nothing at all."""
    total = mass + rest
    share = np.divide(mass, total, out=np.full(3, np.nan), where=total > 0)
    return float(share[0]), float(share[1]), float(share[2])


def _share(share: float, interval: tuple[float, float]) -> str:
    if np.isnan(share):
        return "an unknown share (there are no effects)"
    return f"{share:.0%} ({interval[0]:.0%} to {interval[1]:.0%})"
