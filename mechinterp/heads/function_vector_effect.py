"""What a function vector does in zero-shot, beside random vectors of the same norm."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference, plotting, stats
from mechinterp.results import Result


@dataclass(frozen=True, eq=False)
class FunctionVectorEffect(Result):
    """What adding a vector does to the answer's first token, with no example in the prompt.

    ``data["with_vector"]`` (layer, prompt, metric), ``data["with_random"]`` (layer, draw,
    prompt, metric), ``data["zero_shot"]`` (prompt, metric). Metrics: ``log_prob`` in nats, and
    ``accuracy``, 1 where the token is the model's first choice.
    """

    @property
    def effect(self) -> xr.DataArray:
        """With the vector minus without, per layer, prompt and metric."""
        return (self.data["with_vector"] - self.data["zero_shot"]).rename("effect")

    @property
    def random_effect(self) -> xr.DataArray:
        """With each random vector minus without."""
        return (self.data["with_random"] - self.data["zero_shot"]).rename("random_effect")

    def p_random(self, *, metric: str | None = None) -> xr.DataArray:
        """Return per layer how often a random vector does as much as this one, one-sided.

        ``(1 + draws whose mean effect is as large) / (1 + draws)``, as in a permutation test:
        100 draws can give 0.0099 at the least.
        """
        mine = self.of_metric(self.effect, metric).mean("prompt")
        theirs = self.of_metric(self.random_effect, metric).mean("prompt")
        draws = self.data.sizes["draw"]
        return ((1 + (theirs >= mine).sum("draw")) / (1 + draws)).rename("p_random")

    def summary(self) -> pd.DataFrame:
        """Return a row per layer and metric: zero-shot, with the vector, random, p-values.

        ``p_zero_shot``: sign flips over queries, two-sided; ``p_random``: see there.
        """
        rows = []
        for metric in self.convention.metrics:
            effect = self.of_metric(self.effect, metric).transpose("layer", "prompt")
            random = self.of_metric(self.random_effect, metric).mean(("prompt", "draw"))
            base = float(self.of_metric(self.data["zero_shot"], metric).mean())
            values = inference.per_prompt(effect)
            low, high = stats.bootstrap_interval(values)
            p, p_random = stats.sign_flip_test(values), self.p_random(metric=metric)
            for at, layer in enumerate(effect["layer"].values):
                rows.append(
                    {
                        "layer": int(layer),
                        "metric": metric,
                        "zero_shot": base,
                        "with_vector": base + float(values[at].mean()),
                        "with_random": base + float(random[at]),
                        "effect": float(values[at].mean()),
                        "low": float(low[at]),
                        "high": float(high[at]),
                        "p_zero_shot": float(p[at]),
                        "p_random": float(p_random[at]),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Draw zero-shot, the vector and each random vector, per layer.

        Bars of the vector are 95 % bootstrap intervals over queries.
        """
        value = self.of_metric(self.data["with_vector"], metric).transpose("layer", "prompt")
        random = self.of_metric(self.data["with_random"], metric).mean("prompt")
        base = float(self.of_metric(self.data["zero_shot"], metric).mean())
        layers = value["layer"].values.astype(float)
        low, high = stats.bootstrap_interval(inference.per_prompt(value))
        mean = value.mean("prompt").values
        ax = ax if ax is not None else plotting.new_axes()
        draws = random.transpose("layer", "draw").values
        for at, layer in enumerate(layers):
            ax.plot(
                np.full(draws.shape[1], layer),
                draws[at],
                "_",
                color="0.6",
                label="random, same norm" if not at else None,
            )
        ax.axhline(
            base, color=plotting.COLOURS[6], linestyle="--", linewidth=1, label="zero-shot"
        )
        ax.errorbar(
            layers,
            mean,
            yerr=np.nan_to_num(np.stack([mean - low, high - mean])).clip(0),
            fmt="o",
            color=plotting.COLOURS[1],
            capsize=3,
            label="function vector",
        )
        name = metric or next(iter(self.convention.metrics))
        unit = self.convention.metrics[name]
        ax.set_xticks(layers)
        ax.set_xlim(layers.min() - 1, layers.max() + 1)
        ax.set_xlabel("layer at which it is added")
        ax.set_ylabel(f"{name.replace('_', ' ')} of the answer's first token ({unit})")
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        plotting.legend(ax)
        n, p = self.data.sizes["prompt"], float(self.p_random(metric=metric).min())
        plotting.title(
            ax,
            f"function vector · {self.convention.data}, {n} words",
            f"smallest p against {self.data.sizes['draw']} random vectors: {p:.3g}; bars: 95 %",
        )
        return ax
