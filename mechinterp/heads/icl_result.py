"""Loss against position in context: the score, the curve, and how they are drawn."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes

from mechinterp import plotting, stats
from mechinterp.results import Result

_MOST_POINTS = 60  # of a curve, before tokens are put into bins


@dataclass(frozen=True, eq=False)
class IclResult(Result):
    """How loss falls with context.

    ``data["loss"]`` has the axes ``prompt`` (a piece of text) and ``token`` (counted from 1
    within the piece, without a BOS), in nats. ``template`` says which document a piece is
    from. Intervals resample whole documents; pieces, where there is only one document.
    """

    @property
    def effect(self) -> xr.DataArray:
        """Loss of every token minus that of the early one, per piece, in nats.

        At the late token this is the in-context-learning score. Negative: context helps.
        """
        loss = self.data["loss"]
        return (loss - loss.sel(token=self._early, drop=True)).rename("effect")

    @property
    def score(self) -> float:
        """The in-context-learning score in nats: the mean over pieces at the late token."""
        return float(self.effect.sel(token=self._late).mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bootstrap interval of the score with a ``confidence``, by document.

        NaN for a single piece of a single document.
        """
        values = self.effect.sel(token=self._late).values
        low, high = stats.bootstrap_interval(values, confidence, clusters=self._units)
        return float(low), float(high)

    def summary(self) -> pd.DataFrame:
        """Return one row: the score with its interval, and what it was measured on."""
        low, high = self.interval()
        mean = self.data["loss"].mean("prompt")
        row = {
            "score": self.score,
            "low": low,
            "high": high,
            f"loss at {self._early}": float(mean.sel(token=self._early)),
            f"loss at {self._late}": float(mean.sel(token=self._late)),
            "pieces": self.data.sizes["prompt"],
            "documents": len(np.unique(self.data["template"])),
        }
        return pd.DataFrame([row])

    def top(self, n: int = 10, *, metric: str | None = None) -> pd.DataFrame:
        """Return the ``n`` tokens whose loss differs most from the early one's.

        ``low`` and ``high`` are the 95 % bootstrap interval of the mean, by document. There is
        one metric, the loss, so ``metric`` says nothing.
        """
        effect = self.of_metric(self.effect, metric).transpose("token", "prompt")
        low, high = stats.bootstrap_interval(effect.values, clusters=self._units)
        table = pd.DataFrame(
            {
                "token": effect["token"].values,
                "effect": effect.mean("prompt").values,
                "low": low,
                "high": high,
            }
        )
        order = np.argsort(-table["effect"].abs().to_numpy(), kind="stable")[:n]
        return table.iloc[order].reset_index(drop=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw loss against the number of the token, with a band and the two tokens marked.

        Long curves are averaged over bins of equal width on a log scale. The band is the 95 %
        bootstrap interval of the mean, by document.
        """
        tokens, loss = _binned(self.data["loss"].transpose("prompt", "token"))
        low, high = stats.bootstrap_interval(loss.T, clusters=self._units)
        several = len(loss) > 1
        ax = plotting.curve(
            tokens,
            loss.mean(0),
            low=low if several else None,
            high=high if several else None,
            ax=ax,
            marker="" if len(tokens) > 30 else "o",
        )
        mean = self.data["loss"].mean("prompt")
        for token in (self._early, self._late):
            ax.axvline(token, color="0.5", linestyle=":", linewidth=1)
            ax.plot(
                [token],
                [float(mean.sel(token=token))],
                marker="D",
                markersize=5,
                color=plotting.COLOURS[1],
                zorder=4,
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("token in context, counted from 1")
        ax.set_ylabel("loss (nats)")
        ends = self.interval()
        said = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if np.isfinite(ends).all() else ""
        plotting.title(
            ax,
            f"in-context learning · {self.convention.data} · score {self.score:.3f} nats{said}",
            f"diamonds: tokens {self._early} and {self._late}; {self._over()}",
        )
        return ax

    @property
    def _early(self) -> int:
        return self.convention.settings["early"]

    @property
    def _late(self) -> int:
        return self.convention.settings["late"]

    @property
    def _units(self) -> Shaped[np.ndarray, " prompt"] | None:
        """What is resampled as a whole: documents, or pieces where there is one document."""
        documents = self.data["template"].values.astype(str)
        return documents if len(np.unique(documents)) > 1 else None

    def _over(self) -> str:
        pieces = self.data.sizes["prompt"]
        units = self._units
        if pieces == 1:
            return "one piece: no interval"
        by = "pieces of one document" if units is None else f"{len(np.unique(units))} documents"
        return f"band: 95 % by {by}" + ("" if units is None else f" ({pieces} pieces)")


def _binned(
    loss: xr.DataArray,
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, "prompt point"]]:
    """Return token numbers and losses, in bins of equal log width where there are many."""
    tokens, values = loss["token"].values.astype(np.float64), loss.values
    there = ~np.isnan(values).any(0)  # without a BOS nothing predicts the first token
    tokens, values = tokens[there], values[:, there]
    if len(tokens) <= _MOST_POINTS:
        return tokens, values
    edges = np.unique(np.geomspace(tokens[0], tokens[-1] + 1, _MOST_POINTS).round())
    starts = np.searchsorted(tokens, edges[:-1])
    counts = np.diff([*starts, len(tokens)])
    return (
        np.exp(np.add.reduceat(np.log(tokens), starts) / counts),
        np.add.reduceat(values, starts, axis=1) / counts,
    )
