"""Induction, in-context learning and loss over training, and their figure."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechinterp import plotting, stats
from mechinterp.results import Result

Value = Literal["induction", "icl", "loss"]
_LABELS = {
    "induction": "prefix matching",
    "icl": "in-context score (nats)",
    "loss": "loss (nats)",
}


@dataclass(frozen=True, eq=False)
class TrainingCurve(Result):
    """What a model can do at each checkpoint of its training.

    ``data["induction"]`` (step, layer, head) is the prefix-matching score, ``data["icl"]`` and
    ``data["loss"]`` (step, prompt) are per piece of text, in nats.
    """

    @property
    def effect(self) -> xr.DataArray:
        """How much each head's induction score has risen since the first checkpoint."""
        induction = self.data["induction"]
        return (induction - induction.isel(step=0, drop=True)).rename("effect")

    @property
    def best(self) -> tuple[int, int]:
        """The head with the largest induction score at the last checkpoint."""
        last = self.data["induction"].isel(step=-1)
        layer, head = np.unravel_index(int(np.nanargmax(last.values)), last.shape)
        return int(last["layer"][layer]), int(last["head"][head])

    def means(self) -> xr.Dataset:
        """Return per step the best head's induction, and mean in-context score and loss."""
        layer, head = self.best
        means = self.data[["icl", "loss"]].mean("prompt")
        best = self.data["induction"].sel(layer=layer, head=head, drop=True)
        return means.assign(induction=best)

    def plot(self, ax: Axes | None = None, *, value: Value = "induction") -> Axes:
        """Draw one ``value`` of the three against training steps.

        ``"induction"`` has a line per head; the others a band, 95 % over documents (or pieces).
        """
        steps = self.data["step"].values.astype(float)
        if value == "induction":
            ax = self._heads(steps, ax)
        else:
            numbers = self.data[value].transpose("step", "prompt")
            documents = self.data["template"].values.astype(str)
            units = documents if len(np.unique(documents)) > 1 else None
            low, high = stats.bootstrap_interval(numbers.values, clusters=units)
            several = numbers.sizes["prompt"] > 1
            ax = plotting.curve(
                steps,
                numbers.mean("prompt").values,
                low=low if several else None,
                high=high if several else None,
                ax=ax,
            )
        ax.set_xlabel("training step")
        ax.set_ylabel(_LABELS[value])
        told, n = self.convention.settings, self.data.sizes["prompt"]
        caption = {
            "induction": f"random tokens, {told['random_tokens']}; {told['n_draws']} draws",
            "icl": f"loss at token {told['late']} minus at {told['early']}; {n} pieces of text",
            "loss": f"mean over tokens; {n} pieces of text",
        }[value]
        plotting.title(ax, f"{_LABELS[value]} · {self.convention.data}", caption)
        return ax

    def figure(self) -> Figure:
        """Return one figure: induction, in-context score and loss under each other."""
        figure = plotting.new_figure(6.4, 7.6)
        panels = figure.subplots(3, 1, sharex=True)
        for panel, value in zip(panels, ("induction", "icl", "loss"), strict=True):
            self.plot(panel, value=value)
        for panel in panels[:-1]:
            panel.set_xlabel("")
        return figure

    def _heads(self, steps: np.ndarray, ax: Axes | None) -> Axes:
        induction, best = self.data["induction"], self.best
        for layer in induction["layer"].values:
            for head in induction["head"].values:
                values = induction.sel(layer=layer, head=head).values
                if np.isnan(values).all() or (layer, head) == best:
                    continue
                ax = plotting.curve(steps, values, ax=ax, colour="0.75", marker="")
        line = induction.sel(layer=best[0], head=best[1]).values
        ax = plotting.curve(steps, line, ax=ax, label=f"head {best[0]}.{best[1]}")
        ax.set_ylim(-0.02, 1.02)
        plotting.legend(ax)
        return ax
