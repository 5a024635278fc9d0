"""Causal interaction of two heads: what losing both costs beyond what losing each does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.edits import Edit, Mean, Zero
from mechinterp.engine import Cell
from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric, resolve_metrics
from mechinterp.names import unknown
from mechinterp.nulls import Head
from mechinterp.record import unit_of
from mechinterp.tasks import Task

KINDS = ("zero", "mean")
MetricSpec = str | Callable | Mapping[str, str | Callable] | None
Pair = tuple[Head, Head]


@dataclass(frozen=True, eq=False)
class Interactions:
    """What ablating heads alone and two at a time does to a metric: ablated less intact."""

    alone: Float[np.ndarray, "prompt head"]
    together: Float[np.ndarray, "prompt pair"]
    metric: str
    unit: str


def check_measurable(kind: str, metric: MetricSpec, task: Task) -> None:
    """Raise a ``ValueError`` unless heads can be ablated so, and judged by one metric."""
    if kind not in KINDS:
        raise ValueError(unknown("ablation", kind, KINDS))
    metrics = resolve_metrics(metric, task.metric)
    if len(metrics) > 1:
        raise ValueError(
            f"interaction is by one metric, but {', '.join(metrics)} were given. Pass one."
        )


def interactions(
    model: TransformerBridge,
    task: Task,
    heads: Sequence[Head],
    pairs: Sequence[Pair],
    kind: str,
    metric: MetricSpec,
    memory: Memory,
) -> Interactions:
    """Return the effects of every head alone and of every pair."""
    ((name, fn),) = resolve_metrics(metric, task.metric).items()
    sets = [*([head] for head in heads), *(list(pair) for pair in pairs)]
    effects = _deltas(model, task, sets, kind, {name: fn}, memory)
    n = len(heads)
    return Interactions(effects[:, :n], effects[:, n:], name, unit_of(fn))


def _deltas(
    model: TransformerBridge,
    data: Task,
    sets: Sequence[Sequence[Head]],
    kind: str,
    metrics: Mapping[str, Metric],
    memory: Memory,
) -> Float[np.ndarray, "prompt set"]:
    """Return ``metric(ablated) - metric(intact)`` with each set of heads out together."""
    layers = sorted({layer for heads in sets for layer, _ in heads})
    mean = kind == "mean"
    source = HookManager(model).mean(data.clean, "z", layers=layers) if mean else None

    def cell(out: Sequence[Head]) -> Cell:
        edits: list[Edit] = []
        for layer in sorted({layer for layer, _ in out}):
            told = {"layers": layer, "heads": [head for at, head in out if at == layer]}
            edits.append(Zero("z", **told) if source is None else Mean("z", source, **told))
        return Cell(edits)

    found = metrics_of_cells(
        model, data, map(cell, sets), on="clean", metrics=metrics, memory=memory
    )
    effects = found.values[..., 0].double() - found.runs["clean"][None, :, 0].double()
    return effects.T.cpu().numpy()
