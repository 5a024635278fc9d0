"""What the evidence on a head comes to: numbers, partners, and a verdict on each step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechinterp import inference, stats
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.heads.composition import Composition
from mechinterp.heads.knockout import KnockOut
from mechinterp.heads.scores_result import HeadScores
from mechinterp.inference import ALPHA
from mechinterp.nulls import Head

VERDICTS = {
    "matches": "attends to what followed the last occurrences",
    "copies": "raises the logits of what it attends to",
    "path": "an earlier head's output reaches its keys",
    "from_previous": "that head attends to the token before",
    "needed": "the second copy loses without it",
}
NONE = "none"
_YES, _NO, _UNKNOWN = "yes", "no", "unknown"


def heads_that(scores: HeadScores, kind: str, least: float) -> list[Head]:
    """Return the heads significantly above untrained ones, by ``least`` or more, best first."""
    mean, null = scores.mean()[kind], float(scores.data["null_mean"].sel(kind=kind))
    return [
        (layer, head)
        for layer, head in scores.found(kind)
        if float(mean.sel(layer=layer, head=head)) - null >= least
    ]


def evidence(
    candidates: Sequence[Head],
    scores: HeadScores,
    composition: Composition,
    knock_out: KnockOut,
    paths: PatchingResult | None,
    least: float,
) -> pd.DataFrame:
    """Return one row per candidate; see ``InductionDossier.to_frame``."""
    matching = heads_that(scores, "induction", least)
    copying = heads_that(scores, "copying", 0.0)
    previous = heads_that(scores, "previous_token", least)
    means, p = scores.mean(), scores.data["p_adjusted"].sel(kind="induction")
    lost = knock_out.top(len(candidates)).set_index("place")
    rows = []
    for layer, head in candidates:
        name, at = f"{layer}.{head}", {"layer": layer, "head": head}
        row: dict[str, Any] = {"head": name}
        row |= dict.fromkeys(VERDICTS, _NO)
        row["induction"] = float(means["induction"].sel(at))
        row["p_adjusted"] = float(p.sel(at))
        row |= {kind: float(means[kind].sel(at)) for kind in ("copying", "ov_copying")}
        rise = lost.loc[name]
        row |= {
            "rise": float(rise["effect"]),
            "rise_low": float(rise["low"]),
            "rise_high": float(rise["high"]),
            "rise_p": float(rise["p_adjusted"]),
        }
        row |= _by_weights(scores, composition, layer, head)
        row |= _by_path(scores, composition, paths, layer, head)
        row["matches"] = _YES if (layer, head) in matching else _NO
        row["copies"] = _YES if (layer, head) in copying else _NO
        row["needed"] = _NO if row["rise"] <= 0 else _tested(row["rise_p"], knock_out)
        if paths is not None and np.isfinite(row["path_p"]):
            row["path"] = _YES if row["path_partner"] != NONE else _tested(1.0, paths)
            partners = [f"{a}.{b}" for a, b in previous]
            known = _YES if row["path_partner"] in partners else _NO
            row["from_previous"] = known if row["path"] != _UNKNOWN else _UNKNOWN
        rows.append(row)
    return pd.DataFrame(rows)


def _tested(p: float, result: KnockOut | PatchingResult) -> str:
    if inference.no_p_exists(result.data.sizes["prompt"]):
        return _UNKNOWN
    return _YES if p < ALPHA else _NO


def _by_weights(
    scores: HeadScores, composition: Composition, layer: int, head: int
) -> dict[str, Any]:
    best = composition.partners(layer, head, "K", n=1)
    if not len(best):
        return {"k_partner": NONE, "k_composition": np.nan, "k_partner_previous": np.nan}
    a, b = int(best["layer"].iloc[0]), int(best["head"].iloc[0])
    previous = scores.mean()["previous_token"].sel(layer=a, head=b)
    return {
        "k_partner": f"{a}.{b}",
        "k_composition": float(best["K"].iloc[0]),
        "k_partner_previous": float(previous),
    }


def _by_path(
    scores: HeadScores,
    composition: Composition,
    paths: PatchingResult | None,
    layer: int,
    head: int,
) -> dict[str, Any]:
    """Return the head whose path into the keys restores most, if that is significant."""
    found: dict[str, Any] = {"path_partner": NONE} | dict.fromkeys(
        ("path_effect", "path_low", "path_high", "path_p", "path_partner_previous"), np.nan
    )
    found |= {"path_k_composition": np.nan, "path_k_rank": np.nan}
    if paths is None or f"{layer}.{head}" not in paths.data["receiver"].values:
        return found
    own = paths.effect.sel(receiver=f"{layer}.{head}").transpose("prompt", "layer", "head")
    mean = own.mean("prompt").values
    p = inference.adjusted_p(own).transpose("layer", "head").values
    works = (p < ALPHA) & (mean > 0)
    among = np.where(works, mean, -np.inf) if works.any() else np.nan_to_num(mean, nan=-np.inf)
    i, j = np.unravel_index(int(among.argmax()), mean.shape)
    low, high = stats.bootstrap_interval(own.values[:, i, j].astype(np.float64))
    found |= {
        "path_effect": float(mean[i, j]),
        "path_low": float(low),
        "path_high": float(high),
    }
    found["path_p"] = float(p[i, j])
    if works.any():
        a, b = int(own["layer"].values[i]), int(own["head"].values[j])
        strengths = composition.effect_of("K").sel(layer=layer, head=head)
        strength = float(strengths.sel(sender_layer=a, sender_head=b))
        previous = scores.mean()["previous_token"].sel(layer=a, head=b)
        found |= {
            "path_partner": f"{a}.{b}",
            "path_partner_previous": float(previous),
            "path_k_composition": strength,
            "path_k_rank": 1 + int((strengths.values > strength).sum()),
        }
    return found
