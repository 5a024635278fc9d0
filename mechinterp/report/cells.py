"""Effects as a panel: means, intervals and p-values of every cell, and values per prompt."""

import warnings
from collections.abc import Mapping

import numpy as np
import xarray as xr

from mechinterp import inference
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.report.panels import Axis, Cells, token
from mechinterp.results import Result
from mechinterp.stats import bootstrap_interval

_MOST_PER_PROMPT = 150_000  # numbers of single prompts that a panel carries: 0.8 MB
_MOST_TESTED = 40_000  # cells whose intervals are computed


def cells_of(result: Result) -> Cells | None:
    """Return the panel of a result's effects; None if they have no axes but prompts."""
    effect = result.effect
    effect = inference.per_case(effect)
    axes = [str(dim) for dim in effect.dims if dim != "prompt"]
    if not axes or not effect.size:
        return None
    effect = effect.transpose("prompt", *axes) if "prompt" in effect.dims else effect
    values, note = _values(result, effect)
    prompts, per_prompt = [], None
    if effect.sizes.get("prompt", 1) > 1:
        kept = min(effect.sizes["prompt"], _MOST_PER_PROMPT // max(1, effect[0].size))
        prompts = [f"prompt {label}" for label in effect["prompt"].values[:kept]]
        per_prompt = effect.values[:kept]
        if kept < effect.sizes["prompt"]:
            note.append(f"Of single prompts, the first {kept} are in this file.")
    return Cells(
        "Effect of every cell",
        [axis_of(effect, name, result.convention.metrics) for name in axes],
        values,
        _scales(result),
        result.signed or bool((effect < 0).any()),
        " ".join(note),
        prompts,
        per_prompt if prompts else None,
    )


def axis_of(values: xr.DataArray, name: str, metrics: Mapping[str, str] | None = None) -> Axis:
    """Return an axis with a label for every place; positions show tokens, metrics units."""
    labels = [str(label) for label in values[name].values]
    words = values.coords.get("token")
    if name == "position" and words is not None and words.dims == ("position",):
        labels = [
            f"{place} {token(str(word))}".strip()
            for place, word in zip(labels, words.values, strict=True)
        ]
    if name == "metric" and metrics is not None:
        labels = [_with_unit(label, metrics.get(label, "")) for label in labels]
    said = str(values[name].attrs.get("long_name", name.replace("_", " ")))
    return Axis(said, labels, values[name].dtype.kind in "iu")


def _values(result: Result, effect: xr.DataArray) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the numbers of every cell, and what has to be said of them."""
    if "prompt" not in effect.dims:
        return {"mean": np.asarray(effect.values, dtype=float)}, []
    n = effect.sizes["prompt"]
    mean = effect.mean("prompt", skipna=False).values
    if n == 1:
        return {"mean": mean}, ["One prompt: no intervals, no p-values."]
    if mean.size > _MOST_TESTED:
        return {"mean": mean}, [f"{mean.size} cells: intervals are left out of this file."]
    low, high = bootstrap_interval(inference.per_prompt(effect))
    found = {"mean": mean, "low": low, "high": high}
    if result.signed:
        found["p"] = inference.adjusted_p(effect, result.chosen_of).values
    return found, [inference.table_note(effect, result.signed, result.chosen_of)]


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _scales(result: Result) -> list[tuple[str, float]]:
    """Return the units that effects can be shown in: the metric's, and the share of the gap."""
    metrics = result.convention.metrics
    changed = not {"clean", "intact"}.isdisjoint(result.data) and result.signed
    if "metric" in result.effect.dims:  # its own axis says which
        return [("effect" if changed else "value", 1.0)]
    name = next(iter(metrics))
    scales = [(("effect on " if changed else "") + _with_unit(name, metrics[name]), 1.0)]
    if isinstance(result, PatchingResult):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the share of a doubtful gap is not offered
            gap = float(inference.mean_gap(result.data))
        if np.isfinite(gap):
            denoising = result.convention.direction == "denoising"
            said = "recovered" if denoising else "destroyed"
            scales.insert(0, (f"{said} share of {name}", (1 if denoising else -1) / gap))
    return scales
