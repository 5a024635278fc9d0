"""Shares of the logit difference: numbers per prompt and component, and their picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes

from mechinterp import inference, plotting
from mechinterp.results import Result
from mechinterp.tasks import Task

if TYPE_CHECKING:
    from mechinterp.lens.attribution import Component


@dataclass(frozen=True, eq=False)
class DirectAttributionResult(Result):
    """What each component adds to the logit difference directly, per prompt.

    ``data["share"]`` has the axes ``prompt`` and ``component``: ``embed``, ``pos_embed``,
    ``3.2`` for a head, ``3.attn bias``, ``5.mlp``, ``final bias``. The coordinates ``kind``,
    ``layer`` and ``head`` (-1 where there is none) select among them. Shares of a prompt add
    up to ``total``, which is ``attributed``, the model's own difference: ``logit_diff``, or
    under a soft-cap the difference before the cap. ``scale`` is what the final norm divided
    by; all shares but the final bias go with 1 / scale.
    """

    @property
    def effect(self) -> xr.DataArray:
        """The shares, in nats of log-odds (logits, without distractors)."""
        return self.data["share"].drop_vars(["kind", "layer", "head"]).rename("effect")

    @property
    def heads(self) -> xr.DataArray:
        """The heads' shares with axes ``prompt``, ``layer`` and ``head``; NaN for no head."""
        share = self.data["share"]
        own = share.isel(component=np.flatnonzero(self.data["kind"].values == "head"))
        layers, heads = (sorted(set(own[name].values.tolist())) for name in ("layer", "head"))
        whole = np.full((own.sizes["prompt"], len(layers), len(heads)), np.nan)
        for i, (layer, head) in enumerate(
            zip(own["layer"].values, own["head"].values, strict=True)
        ):
            whole[:, layers.index(layer), heads.index(head)] = own.values[:, i]
        coords = {"prompt": share["prompt"], "layer": layers, "head": heads}
        return xr.DataArray(whole, coords, ("prompt", "layer", "head"), name="share")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the mean share of every component: layers by heads, attention bias and MLP.

        A dot: significant at 0.05 after correction for all components by max-T. Embedding and
        final bias stand in the line below the title.
        """
        effect = inference.per_case(self.effect)
        mean = effect.mean("prompt")
        n = effect.sizes["prompt"]
        marked = inference.adjusted_p(effect) < inference.ALPHA
        layers = sorted({layer for layer in self.data["layer"].values.tolist() if layer >= 0})
        heads = sorted({head for head in self.data["head"].values.tolist() if head >= 0})
        kinds = [k for k in ("attn bias", "mlp") if k in self.data["kind"].values]
        columns = [*map(str, heads), *kinds]
        grid = np.full((len(layers), len(columns)), np.nan)
        dots = np.zeros_like(grid, dtype=bool)
        apart = []
        for i, kind in enumerate(self.data["kind"].values.tolist()):
            layer, head = (int(self.data[name].values[i]) for name in ("layer", "head"))
            if layer < 0:
                apart.append(f"{kind} {float(mean[i]):+.2f}")
                continue
            at = layers.index(layer), columns.index(str(head) if head >= 0 else kind)
            grid[at], dots[at] = float(mean[i]), bool(marked[i])
        axes = {"layer": layers, "component": columns}
        (name, unit), *_ = self.convention.metrics.items()
        shown = xr.DataArray(grid, axes, ("layer", "component"))
        shown["component"].attrs["long_name"] = "head, and the rest of the layer"
        ax = plotting.heat_grid(
            shown,
            ax=ax,
            label=f"share of {name} ({unit})",
            marked=shown.copy(data=dots) if n > 1 else None,
        )
        total = f"total {float(self.data['total'].mean()):+.2f}"
        note = inference.plot_note(effect, "dot:")
        plotting.title(
            ax,
            f"direct attribution of {self.convention.settings['attributed']} · "
            f"{self.convention.data}, {n} prompt{'s' if n > 1 else ''}",
            f"{', '.join([*apart, total])}\n{note}",
        )
        return ax

    def waterfall(self, ax: Axes | None = None, *, n: int = 12) -> Axes:
        """Draw how the largest shares, in the order of the model, add up to the total.

        Lines are 95 % intervals of the means over prompts; all but the ``n`` largest shares are
        one bar.

        Raises:
            ValueError: ``n`` is below 1.
        """
        if n < 1:
            raise ValueError(f"n={n} draws no share. Pass at least 1.")
        share = inference.per_case(self.effect).transpose("component", "prompt")
        order = np.argsort(-np.abs(share.mean("prompt").values), kind="stable")
        named, rest = np.sort(order[:n]), share.isel(component=order[n:])
        bars = {str(share["component"].values[i]): share.values[i] for i in named}
        if rest.size:
            bars[f"{rest.sizes['component']} others"] = rest.sum("component").values
        bars["total"] = share.sum("component").values
        (name, unit), *_ = self.convention.metrics.items()
        ax = plotting.waterfall(bars, ax=ax, label=f"share of {name} ({unit})")
        count = share.sizes["prompt"]
        plotting.title(
            ax,
            f"direct attribution of {self.convention.settings['attributed']} · "
            f"{self.convention.data}",
            inference.interval_note(count, "means") if count > 1 else "one prompt",
        )
        return ax


def labelled(
    task: Task,
    components: Sequence["Component"],
    shares: Float[np.ndarray, "prompt component"],
    per_prompt: Mapping[str, Float[np.ndarray, " prompt"]],
) -> xr.Dataset:
    """Return the shares with named axes, and what they add up to."""
    coords = {
        "prompt": np.arange(len(task)),
        "component": [c.label for c in components],
        "kind": ("component", [c.kind for c in components]),
        "layer": ("component", [c.layer for c in components]),
        "head": ("component", [c.head for c in components]),
        "template": ("prompt", list(task.templates)),
    }
    if len(set(task.cases)) < len(task):
        coords["case"] = ("prompt", list(task.cases))
    return xr.Dataset(
        {
            "share": (("prompt", "component"), shares),
            "total": ("prompt", shares.sum(1)),
            **{name: ("prompt", values) for name, values in per_prompt.items()},
        },
        coords,
    )
