"""What kinds of head there are: scores, and what untrained heads score."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechinterp import inference, plotting
from mechinterp.results import Result

_CASES = "case_of_"


@dataclass(frozen=True, eq=False)
class HeadScores(Result):
    """Scores of every head, one variable of ``data`` per kind.

    A kind has axes ``prompt``, ``layer`` and ``head``; those from weights have no ``prompt``,
    those from words have cases of their own, ``case_of_<kind>``. ``p`` and ``p_adjusted`` are
    the probabilities of such a score in an untrained model of the same shape, the second
    corrected for all heads (Holm, kind by kind); NaN where scores are of a single prompt.
    ``null_mean`` and ``null_sd`` describe the
    untrained heads. Where a layer has fewer heads than others the rest is NaN.
    """

    @property
    def kinds(self) -> list[str]:
        """The kinds that were scored."""
        return list(self.convention.metrics)

    def __getitem__(self, kind: str) -> xr.DataArray:
        """Return one kind's scores, with a ``prompt`` axis where it has cases."""
        return self.effect_of(kind)

    @property
    def effect(self) -> xr.DataArray:
        """The scores of the first kind."""
        return self.effect_of(None)

    @property
    def signed(self) -> bool:
        """Scores are compared with untrained heads, not with zero."""
        return False

    def effect_of(self, metric: str | None) -> xr.DataArray:
        """Return the scores of the kind ``metric`` (default: the first) of prompts with any.

        Raises:
            ValueError: It was not scored.
        """
        if metric is not None and metric not in self.kinds:
            raise ValueError(f"{metric!r} was not scored, only {', '.join(self.kinds)}.")
        kind = metric or self.kinds[0]
        values = self.data[kind]
        if cases_of(kind) in values.dims:
            values = values.rename({cases_of(kind): "prompt"})
        values = values.drop_vars([name for name in values.coords if name not in values.dims])
        return values.dropna("prompt", how="all") if "prompt" in values.dims else values

    def mean(self) -> xr.Dataset:
        """Return every kind's scores averaged over prompts, on ``layer`` and ``head``."""
        return xr.Dataset(
            {
                kind: (own.mean("prompt") if "prompt" in own.dims else own).reset_coords(
                    drop=True
                )
                for kind, own in ((kind, self[kind]) for kind in self.kinds)
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row per kind, prompt (or case) and head: ``score`` and its p-values."""
        frames = []
        for kind in self.kinds:
            frame = self[kind].rename("score").to_dataframe().reset_index()
            if "p" in self.data:
                p = self.data[["p", "p_adjusted"]].sel(kind=kind, drop=True).to_dataframe()
                frame = frame.merge(p.reset_index(), on=["layer", "head"])
            frame.insert(0, "kind", kind)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def top(self, n: int = 10, *, metric: str | None = None) -> pd.DataFrame:
        """Return the ``n`` heads that score highest on the kind ``metric`` (or the first).

        ``low`` and ``high`` are the 95 % bootstrap interval of the mean over prompts,
        ``p_adjusted`` says how probable it is that any untrained head scores so high.
        """
        kind = metric or self.kinds[0]
        table = super().top(n, metric=kind).rename(columns={"effect": kind})
        if "p_adjusted" in self.data:
            p = self.data["p_adjusted"].sel(kind=kind)
            table["p_adjusted"] = [
                float(p.sel(layer=layer, head=head))
                for layer, head in zip(table["layer"], table["head"], strict=True)
            ]
        return table

    def found(
        self, kind: str, alpha: float = 0.05, least: float = -np.inf
    ) -> list[tuple[int, int]]:
        """Return the heads that score higher than untrained ones would, the highest first.

        Args:
            kind: Of score.
            alpha: The largest p-value, corrected over heads.
            least: The smallest score, in its unit: many prompts make a difference sure that is
                too small to matter. ``induction_dossier`` asks for a tenth of the attention.

        Returns:
            Pairs (layer, head).

        Raises:
            ValueError: No untrained heads were scored.
        """
        if "p_adjusted" not in self.data:
            raise ValueError("there is nothing to compare with. Score with nulls=1 or more.")
        above = self.mean()[kind] > self.data["null_mean"].sel(kind=kind)
        large = self.mean()[kind] >= least
        chosen = (self.data["p_adjusted"].sel(kind=kind) < alpha) & above & large
        return [
            (layer, head)
            for layer, head in self.ranked(kind)
            if bool(chosen.sel(layer=layer, head=head))
        ]

    def ranked(self, kind: str) -> list[tuple[int, int]]:
        """Return all heads as pairs (layer, head), the highest score of a ``kind`` first."""
        mean = self.mean()[kind].transpose("layer", "head")
        order = np.argsort(-mean.values, axis=None, kind="stable")  # NaN goes last
        where = zip(*np.unravel_index(order, mean.shape), strict=True)
        layers = mean["layer"].values
        return [(int(layers[i]), int(j)) for i, j in where if np.isfinite(mean.values[i, j])]

    def plot(self, ax: Axes | None = None, *, kind: str | None = None) -> Axes:
        """Draw one kind (default: the first) on layers and heads; a dot where p < 0.05."""
        kind = kind or self.kinds[0]
        unit = self.convention.metrics[kind]
        ax = self._grid(kind, ax, f"{_words(kind)} ({unit})")
        over = "mean over prompts" if "prompt" in self[kind].dims else "from weights"
        caption = "\n".join(filter(None, [over, self._said()]))
        plotting.title(ax, f"{_words(kind)} · {self.convention.data}", caption)
        return ax

    def figure(self, kinds: Sequence[str] | None = None) -> Figure:
        """Draw several kinds (default: all) beside each other."""
        shown = list(kinds or self.kinds)
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        layers, heads = self.data.sizes["layer"], self.data.sizes["head"]
        width = columns * max(2.6, min(3.4, 1.5 + 0.2 * heads))
        figure = plotting.new_figure(width, 0.4 + rows * max(2.0, min(4.5, 1 + 0.12 * layers)))
        for i, kind in enumerate(shown):
            ax = self._grid(kind, figure.add_subplot(rows, columns, i + 1), "")
            ax.set_title(f"{_words(kind)} ({self.convention.metrics[kind]})", fontsize=8)
        heading = " · ".join(filter(None, [self.convention.data, self._said()]))
        figure.suptitle(heading, fontsize=9)
        return figure

    def _grid(self, kind: str, ax: Axes | None, label: str) -> Axes:
        mean = self.mean()[kind].transpose("layer", "head")
        marked = None
        if "p_adjusted" in self.data:
            marked = self.data["p_adjusted"].sel(kind=kind).transpose("layer", "head") < 0.05
        signed = bool((mean < 0).any())
        return plotting.heat_grid(mean, ax=ax, label=label, marked=marked, signed=signed)

    def _said(self) -> str:
        if "p_adjusted" not in self.data:
            return ""
        family = max(map(self._family, self.kinds))
        return f"dot: p < 0.05 against untrained heads, Holm over {family} heads"

    def _note(self, effect: xr.DataArray, metric: str | None) -> str:
        n, kind = effect.sizes["prompt"], metric or self.kinds[0]
        lines = [f"low, high: 95 % bootstrap interval over {n} prompts."] if n > 1 else []
        if "p_adjusted" in self.data:
            family = self._family(kind)
            null = self.data[["null_mean", "null_sd"]].sel(kind=kind)
            mean, spread = float(null["null_mean"]), float(null["null_sd"])
            lines.append(
                f"Untrained heads score {mean:.3g} ± {spread:.2g} (standard deviation); "
                f"p_adjusted: against them, Holm over {family} heads."
                if family
                else "No p-values: one prompt, or fewer than eight untrained heads."
            )
        if caution := inference.caution(n):
            lines.append(f"{caution}.")
        return "\n".join(lines)

    def _rank(self, mean: np.ndarray) -> np.ndarray:
        return mean

    def _family(self, kind: str) -> int:
        return int(self.data["p"].sel(kind=kind).notnull().sum())


def _words(kind: str) -> str:
    return kind.replace("_", " ").replace("ov ", "OV ")


def cases_of(kind: str) -> str:
    """Return the name of the axis of a kind that has cases of its own."""
    return f"{_CASES}{kind}"
