"""Causal interaction of two heads: what losing both costs beyond what losing each does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.ablation import KINDS, MetricSpec, head_ablation
from mechinterp.engine.calls import Memory, check_answers
from mechinterp.engine.runs import run_of
from mechinterp.metrics import Metric, resolve_metrics
from mechinterp.names import unknown
from mechinterp.nulls import Head
from mechinterp.record import Data, unit_of

Pair = tuple[Head, Head]


@dataclass(frozen=True, eq=False)
class Interactions:
    """What ablating heads alone and two at a time does to a metric: ablated less intact."""

    alone: Float[np.ndarray, "prompt head"]
    together: Float[np.ndarray, "prompt pair"]
    metric: str
    unit: str


def check_measurable(
    model: TransformerBridge, kind: str, metric: MetricSpec, task: Data
) -> None:
    """Raise a ``ValueError`` unless heads can be ablated so, and judged by one metric."""
    if kind not in KINDS:
        raise ValueError(unknown("ablation", kind, KINDS))
    check_answers(model, task)
    if kind == "corrupted":
        run_of(task, "corrupted")  # raises where there is none
    metrics = resolve_metrics(metric, task.metric)
    if len(metrics) > 1:
        raise ValueError(
            f"interaction is by one metric, but {', '.join(metrics)} were given. Pass one."
        )


def interactions(
    model: TransformerBridge,
    task: Data,
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
    data: Data,
    sets: Sequence[Sequence[Head]],
    kind: str,
    metrics: Mapping[str, Metric],
    memory: Memory,
) -> Float[np.ndarray, "prompt set"]:
    """Return ``metric(ablated) - metric(intact)`` with each set of heads out together."""
    sets = [list(heads) for heads in sets]
    found = head_ablation(model, data, kind=kind, heads=sets, metric=metrics, memory=memory)
    return found.effect.isel(metric=0).transpose("prompt", "set").values
