"""Curves as panels: pruning, healing, loss in context, few-shot prompts, training."""

from collections.abc import Sequence
from functools import singledispatch

import numpy as np
import xarray as xr

from mechinterp import inference
from mechinterp.heads.few_shot_result import FewShotResult
from mechinterp.heads.healing import HealingCurve
from mechinterp.heads.icl_result import IclResult
from mechinterp.heads.pruning_curve_result import PruningCurve
from mechinterp.heads.training_result import TrainingCurve
from mechinterp.report.panels import Axis, Chart, Line, Lines, Panel
from mechinterp.results import Result
from mechinterp.stats import bootstrap_interval


@singledispatch
def curves_of(result: Result) -> list[Panel]:
    """Return the curves of a result, where it is about one."""
    return []


@curves_of.register
def _pruning(result: PruningCurve) -> list[Panel]:
    charts = []
    for metric in result.convention.metrics:
        value = result.of_metric(result.data["value"], metric)
        lines = [
            _line(str(method).replace("_", " "), value.sel(ranked_by=method), "removed")
            for method in value["ranked_by"].values.tolist()
        ]
        draws = result.of_metric(result.data["random"], metric).mean("prompt")
        draws = draws.transpose("draw", "removed").values
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        lines.append(Line("random orders", draws.mean(0), low, high))
        charts.append(Chart(_named(result, metric), lines))
    n = result.data.sizes["prompt"]
    note = f"Bands: 95 % intervals over {n} prompts; of random orders the middle 95 %."
    return [Lines("As heads go", _axis(result.data["removed"], "heads removed"), charts, note)]


@curves_of.register
def _healing(result: HealingCurve) -> list[Panel]:
    (metric,) = result.convention.metrics
    chart = Chart(_named(result, metric), [_line(metric, result.data["value"], "step")])
    return [
        Lines("As it heals", _axis(result.data["step"], "updates"), [chart], _bands(result))
    ]


@curves_of.register
def _context(result: IclResult) -> list[Panel]:
    chart = Chart("loss (nats)", [_line("loss", result.data["loss"], "token", by="template")])
    axis = _axis(result.data["token"], "token in context")
    return [Lines("Loss along the context", axis, [chart], _bands(result))]


@curves_of.register
def _few_shot(result: FewShotResult) -> list[Panel]:
    charts = []
    for metric in result.data["metric"].values.tolist():
        value = result.of_metric(result.data["value"], metric)
        lines = [
            _line(str(kind).replace("_", " "), value.sel(condition=kind), "shots")
            for kind in value["condition"].values.tolist()
        ]
        charts.append(Chart(_named(result, metric), lines))
    axis = _axis(result.data["shots"], "examples")
    return [Lines("More examples", axis, charts, _bands(result))]


@curves_of.register
def _training(result: TrainingCurve) -> list[Panel]:
    layer, head = result.best
    best = result.data["induction"].sel(layer=layer, head=head)
    charts = [
        Chart("prefix matching", [Line(f"head {layer}.{head}", best.transpose("step").values)])
    ]
    for name, label in (("icl", "in-context score (nats)"), ("loss", "loss (nats)")):
        charts.append(Chart(label, [_line(name, result.data[name], "step", by="template")]))
    axis = _axis(result.data["step"], "training step")
    return [Lines("Over training", axis, charts, _bands(result))]


def _line(name: str, values: xr.DataArray, along: str, by: str = "prompt") -> Line:
    """Return the mean over prompts with its interval; whole templates where there are any."""
    own = inference.per_case(values).transpose(along, "prompt")
    mean = own.mean("prompt").values
    if own.sizes["prompt"] == 1:
        return Line(name, mean)
    units = None if by == "prompt" else own[by].values.astype(str)
    clusters = units if units is not None and len(np.unique(units)) > 1 else None
    return Line(name, mean, *bootstrap_interval(inference.per_prompt(own), clusters=clusters))


def _bands(result: Result) -> str:
    n = result.data.sizes["prompt"]
    return "One prompt: no intervals." if n == 1 else f"Bands: 95 % intervals over {n} prompts."


def _axis(places: xr.DataArray, name: str) -> Axis:
    labels: Sequence[str] = [str(place) for place in places.values.tolist()]
    return Axis(name, labels)


def _named(result: Result, metric: str) -> str:
    unit = result.convention.metrics[metric]
    return f"{metric} ({unit})" if unit else metric
