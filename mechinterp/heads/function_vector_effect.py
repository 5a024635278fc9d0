"""What a function vector does in zero-shot, beside other vectors of the same norm."""

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

    ``data["with_vector"]`` and ``data["with_control"]`` (layer, prompt, metric),
    ``data["with_random"]`` (layer, draw, prompt, metric), ``data["zero_shot"]`` (prompt,
    metric). The control is what the same heads write under shuffled labels: where it does as
    much, the vector says what kind of word comes, not which. Metrics: ``log_prob`` in nats, and
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

    @property
    def control_effect(self) -> xr.DataArray:
        """With the control minus without."""
        return (self.data["with_control"] - self.data["zero_shot"]).rename("control_effect")

    def p_random(self, *, metric: str | None = None) -> xr.DataArray:
        """Return per layer how often a random vector does as much as this one, one-sided.

        ``(1 + draws whose mean effect is as large) / (1 + draws)``, as in a permutation test:
        100 draws can give 0.0099 at the least.

        ``metric`` is which of several (default: the first).
        """
        mine = self.of_metric(self.effect, metric).mean("prompt")
        theirs = self.of_metric(self.random_effect, metric).mean("prompt")
        draws = self.data.sizes["draw"]
        return ((1 + (theirs >= mine).sum("draw")) / (1 + draws)).rename("p_random")

    def summary(self) -> pd.DataFrame:
        """Return a row per layer and metric: zero-shot, with the vector, random, p-values.

        ``p_zero_shot``, ``p_control``: sign flips over queries, two-sided, of the vector
        against nothing and against the control; ``p_random``: see there. Each is of one layer:
        ``p_adjusted`` is ``p_random`` corrected for all layers (Holm).
        """
        rows = []
        for metric in self.convention.metrics:
            effect = self.of_metric(self.effect, metric).transpose("layer", "prompt")
            random = self.of_metric(self.random_effect, metric).mean(("prompt", "draw"))
            control = self.of_metric(self.control_effect, metric).transpose("layer", "prompt")
            base = float(self.of_metric(self.data["zero_shot"], metric).mean())
            values = inference.per_prompt(effect)
            low, high = stats.bootstrap_interval(values)
            p, p_random = stats.sign_flip_test(values), self.p_random(metric=metric)
            p_control = stats.sign_flip_test(values - inference.per_prompt(control))
            adjusted = stats.holm(p_random.values)
            for at, layer in enumerate(effect["layer"].values):
                rows.append(
                    {
                        "layer": int(layer),
                        "metric": metric,
                        "zero_shot": base,
                        "with_vector": base + float(values[at].mean()),
                        "with_control": base + float(control[at].mean()),
                        "with_random": base + float(random[at]),
                        "effect": float(values[at].mean()),
                        "low": float(low[at]),
                        "high": float(high[at]),
                        "p_zero_shot": float(p[at]),
                        "p_control": float(p_control[at]),
                        "p_random": float(p_random[at]),
                        "p_adjusted": float(adjusted[at]),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Draw zero-shot, the vector, its control and each random vector, per layer.

        Bars of the vector are 95 % bootstrap intervals over queries.

        ``metric`` is which of several (default: the first).
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
        control = self.of_metric(self.data["with_control"], metric).mean("prompt")
        ax.plot(
            layers,
            control.transpose("layer").values,
            "x",
            color=plotting.COLOURS[2],
            label="same heads, labels shuffled",
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
        ax.set_ylabel(f"{name.replace('_', ' ')}, first answer token ({unit})")
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        plotting.legend(ax)
        n = self.data.sizes["prompt"]
        p = float(stats.holm(self.p_random(metric=metric).values).min())
        plotting.title(
            ax,
            f"function vector · {self.convention.data}, {n} words",
            f"smallest p against {self.data.sizes['draw']} random vectors"
            f"{f', Holm over {len(layers)} layers' if len(layers) > 1 else ''}: {p:.3g}; "
            "bars: 95 %",
        )
        return ax
