"""What an ablation did directly, what other components changed, and what the norm did."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference, plotting
from mechinterp.results import Result

_MOST_BARS = 8


@dataclass(frozen=True, eq=False)
class SelfRepair(Result):
    """The effect of taking heads out on the logit difference, split without rest.

    Per ``prompt`` and ``set`` (what was taken out): ``data["total"]``, read off the model's
    logits (under a soft-cap before the cap); ``direct``, the change of the heads' own terms
    with the final norm at the scale it had; ``change``, that of every other ``component``'s own
    term (NaN for the heads themselves); ``rescaling``, what the final norm's new scale makes of
    it all. ``total = direct + sum of change + rescaling``. ``intact`` is the logit difference
    of the whole model.
    """

    @property
    def effect(self) -> xr.DataArray:
        """The change of every other component's own term, in nats of log-odds."""
        kept = self.data["change"].drop_vars(["kind", "layer", "head"])
        return kept.rename("effect")

    @property
    def repair(self) -> xr.DataArray:
        """Total minus direct effect: what the model made up for, or made worse."""
        return (self.data["total"] - self.data["direct"]).rename("repair")

    def compensators(self, alpha: float = 0.05) -> pd.DataFrame:
        """Return the components that work against the loss of each set.

        A set has any only if its direct effect is significant at ``alpha``, corrected for all
        sets; then a component compensates whose own term moves the other way, significantly
        after correction for all components and sets (both max-T). Columns: ``set``,
        ``component``, ``change`` (mean over prompts), ``p_adjusted``; the largest first.

        Raises:
            ValueError: There is one prompt only, so that nothing is significant.
        """
        effect = inference.per_case(self.effect)
        if effect.sizes["prompt"] < 2:
            raise ValueError("one prompt says nothing about chance. Run more prompts.")
        p = inference.adjusted_p(effect)
        mean = effect.mean("prompt", skipna=False)
        direct = inference.per_case(self.data["direct"])
        lost = inference.adjusted_p(direct) <= alpha
        against = -np.sign(direct.mean("prompt")) * lost
        found = ((p <= alpha) & (mean * against > 0)).transpose("set", "component").values
        rows = [
            {
                "set": str(mean["set"].values[i]),
                "component": str(mean["component"].values[j]),
                "change": float(mean.transpose("set", "component").values[i, j]),
                "p_adjusted": float(p.transpose("set", "component").values[i, j]),
            }
            for i, j in zip(*np.nonzero(found), strict=True)
        ]
        rows.sort(key=lambda row: -abs(row["change"]))
        return pd.DataFrame(rows, columns=["set", "component", "change", "p_adjusted"])

    def plot(self, ax: Axes | None = None, *, of: str | None = None) -> Axes:
        """Draw how one set's total effect comes about, from the direct effect on.

        ``of`` names the set (default: the one with the largest direct effect). The largest
        changes of other components have a bar each, the rest one together; lines are 95 %
        intervals over prompts.

        Raises:
            ValueError: There is no such set.
        """
        sets = self.data["set"].values.tolist()
        if of is None:
            of = sets[int(np.abs(self.data["direct"].mean("prompt").values).argmax())]
        if of not in sets:
            raise ValueError(f"{of!r} was not taken out. Sets: {', '.join(sets[:8])}.")
        one = self.data.sel(set=of)
        change = one["change"].dropna("component", how="all")
        order = np.argsort(-np.abs(change.mean("prompt").values), kind="stable")
        named = sorted(order[:_MOST_BARS].tolist())
        rest = change.isel(component=order[_MOST_BARS:])
        bars = {f"without {of}": one["direct"]}
        bars |= {str(change["component"].values[i]): change.isel(component=i) for i in named}
        bars[f"{rest.sizes['component']} others"] = rest.sum("component")
        bars["final norm's scale"] = one["rescaling"]
        bars["total"] = one["total"]
        values = {label: inference.per_case(bar).values for label, bar in bars.items()}
        (name, unit), *_ = self.convention.metrics.items()
        ax = plotting.waterfall(values, ax=ax, label=f"change of {name} ({unit})", ends=2)
        n = len(values["total"])
        plotting.title(
            ax,
            f"self-repair after {self.convention.ablation}-ablation · {self.convention.data}",
            f"{n} prompt{'s' if n > 1 else ''}; line: 95 % interval",
        )
        return ax
