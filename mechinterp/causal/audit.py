"""Auditing an attribution: the top and a sample of its cells computed exactly.

Estimates from gradients miss what saturates: a head whose softmax is flat where it is may turn
round when it is patched. An audit computes the cells with the largest estimates and some of
every size, says how good the ranking is and how much it misses, and ranks anew until the top
is settled.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.attribution_result import AttributionResult
from mechinterp.causal.audit_result import AuditResult
from mechinterp.causal.candidates import Candidates, candidates_of
from mechinterp.causal.grid import prompt_labels
from mechinterp.causal.sampling import Design, design
from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.metrics import METRICS, Metric, resolve_metrics
from mechinterp.models import fingerprint
from mechinterp.record import convention_of, digest
from mechinterp.results import Result
from mechinterp.tasks import Task, as_data


def audit(
    model: TransformerBridge,
    data: Any,
    result: Result,
    k: int = 10,
    *,
    per_stratum: int = 8,
    strata: int = 5,
    seed: int = 0,
    metric: str | Callable | None = None,
    memory: Memory = None,
) -> AuditResult:
    """Return exact effects of the cells that matter in an attribution, and how good it is.

    The ``k`` cells with the largest estimates are computed exactly, and a sample of the
    others: ``per_stratum`` of each of ``strata`` groups, from few cells with large estimates to
    many with small ones. The cells are ranked by their exact effects. Then, in rounds, the next
    ``k`` cells by estimate are computed, and ``per_stratum`` more of each stratum from which a
    drawn cell has come into the top, until a whole round brings no new member.

    Args:
        model: The model that the attribution is of, with the edits that were in force.
        data: The task that the attribution is of.
        result: What ``mi.attribution_patching`` returned.
        k: How many cells the top has.
        per_stratum: How many cells are drawn from each stratum.
        strata: Into how many groups the cells outside the top fall.
        seed: Says which cells are drawn.
        metric: Which of the result's metrics (default: the first), by name; or the user's own
            function, which a result cannot store.
        memory: As in ``mi.activation_patching``.

    Raises:
        TypeError: ``data`` is not a task, or ``result`` no attribution.
        ValueError: Model, data or metric are not those of the result; a number is too small.

    Source: Nanda 2023, neelnanda.io/attribution-patching, compares estimates with exact
    patches; totals over a stratified sample: Horvitz and Thompson 1952.
    """
    task = as_data(data, accepts=(Task,), method="audit")
    if not isinstance(result, AttributionResult):
        raise TypeError(
            "audit takes the result of mi.attribution_patching, not a "
            f"{type(result).__name__}. Pass that."
        )
    for name, value in (("k", k), ("per_stratum", per_stratum), ("strata", strata)):
        if value < 1:
            raise ValueError(f"{name}={value} audits nothing. Pass at least 1.")
    _check_same(model, task, result)
    name, fn = _metric(task, result, metric)
    candidates = candidates_of(model, task, result, name)
    sizes = np.abs(_weights(task) @ candidates.estimate)
    plan = design(sizes, min(k, len(candidates)), strata, per_stratum, seed)
    work = _Work(model, task, result, candidates, {name: fn}, memory)
    work.compute(dict.fromkeys(plan.sample, "sample") | dict.fromkeys(plan.top, "top"))
    rounds = _settle(work, plan)
    told = {"k": plan.k, "per_stratum": per_stratum, "strata": len(plan.strata)}
    told |= {"cells": len(candidates), "rounds": rounds, "axes": list(candidates.labels)}
    told |= {"signed": result.signed, "variant": result.convention.settings["variant"]}
    told |= {"audited": dict(result.convention.settings), "path": work.path}
    made = result.convention
    return AuditResult(
        _labelled(work, plan),
        convention_of(
            "audit",
            model,
            task,
            {name: fn},
            made.fingerprint,
            told,
            site=made.site,
            direction=made.direction,
            positions=made.positions,
            seed=seed,
        ),
    )


class _Work:
    """The cells computed by now: their exact effects, and why each was chosen."""

    def __init__(
        self,
        model: TransformerBridge,
        task: Task,
        result: AttributionResult,
        candidates: Candidates,
        metrics: dict[str, Metric],
        memory: Memory,
    ) -> None:
        self.model, self.task, self.result = model, task, result
        self.candidates, self.metrics, self.memory = candidates, metrics, memory
        self.exact: dict[int, np.ndarray] = {}
        self.chosen: dict[int, str] = {}
        self.runs: dict[str, np.ndarray] = {}
        self.path = ""

    def compute(self, chosen: dict[int, str]) -> None:
        """Compute the effects of these cells per prompt."""
        if not chosen:
            return
        source, on = self.candidates, self.candidates.on
        found = metrics_of_cells(
            self.model,
            self.task,
            source.cells(list(chosen)),
            on=on,
            metrics=self.metrics,
            memory=self.memory,
        )
        self.path = found.path
        self.runs = {run: each[:, 0].cpu().numpy() for run, each in found.runs.items()}
        _check_baselines(self.result, self.runs, next(iter(self.metrics)))
        values = found.values[:, :, 0].cpu().numpy() - self.runs[on]
        self.exact |= dict(zip(chosen, values, strict=True))
        self.chosen |= chosen

    def top(self, k: int) -> set[int]:
        """Return the cells with the largest exact mean effects."""
        cells = list(self.exact)
        size = [abs(float(_weights(self.task) @ self.exact[cell])) for cell in cells]
        return {cells[i] for i in np.argsort(np.negative(size), kind="stable")[:k]}


def _weights(task: Task) -> Float[np.ndarray, " prompt"]:
    """Return what each prompt counts in a mean over cases: draws of one share its weight."""
    _, which, draws = np.unique(task.cases, return_inverse=True, return_counts=True)
    return 1 / (len(draws) * draws[which])


def _settle(work: _Work, plan: Design) -> int:
    """Compute further cells until a round brings no new member of the top; count the rounds."""
    rounds, stratum_of = 0, plan.stratum_of
    while True:
        rounds += 1
        before = work.top(plan.k)
        open_ = {stratum_of[c] for c in before if work.chosen[c] in ("sample", "stratum")}
        more: dict[int, str] = {}
        for number in sorted(open_):
            left = [c for c in plan.strata[number - 1].tolist() if c not in work.exact]
            more |= dict.fromkeys(left[: plan.per_stratum], "stratum")
        left = [c for c in plan.ranked.tolist() if c not in work.exact]
        more |= dict.fromkeys(left[: plan.k], "next")
        work.compute(more)
        if not more or work.top(plan.k) == before:
            return rounds


def _labelled(work: _Work, plan: Design) -> xr.Dataset:
    source = work.candidates
    rank = {cell: number for number, cell in enumerate(plan.ranked.tolist(), 1)}
    cells = sorted(work.exact, key=rank.__getitem__)
    weight_of, stratum_of = plan.weight_of, plan.stratum_of
    coords: dict[str, Any] = {
        axis: ("cell", [labels[cell] for cell in cells])
        for axis, labels in source.labels.items()
    }
    coords |= {"cell": np.arange(len(cells))} | prompt_labels(work.task)
    coords |= {"chosen": ("cell", [work.chosen[cell] for cell in cells])}
    return xr.Dataset(
        {
            "estimate": (("prompt", "cell"), source.estimate[:, cells]),
            "exact": (("prompt", "cell"), np.stack([work.exact[c] for c in cells], axis=1)),
            "rank": ("cell", [rank[cell] for cell in cells]),
            "stratum": ("cell", [stratum_of[cell] for cell in cells]),
            "weight": ("cell", [weight_of.get(cell, 0.0) for cell in cells]),
        }
        | {run: ("prompt", each) for run, each in work.runs.items()},
        coords=coords,
    )


def _metric(
    task: Task, result: AttributionResult, metric: str | Callable | None
) -> tuple[str, Metric]:
    """Return the metric to audit: its name in the result, and its function.

    Raises:
        ValueError: The result has no such metric, or one that cannot be called by its name.
    """
    names = list(result.convention.metrics)
    own = {} if isinstance(task.metric, str) else resolve_metrics(task.metric)
    if metric is not None and not isinstance(metric, str):
        ((name, fn),) = resolve_metrics(metric).items()
        return (name if name in names else names[0]), fn
    name = names[0] if metric is None else metric
    if name not in names:
        raise ValueError(f"metric {name!r} was not measured, only {', '.join(names)}.")
    if name not in own and name not in METRICS:
        raise ValueError(
            f"metric {name!r} is a function, which a result cannot store. Pass it: metric=..."
        )
    return name, own[name] if name in own else METRICS[name]


def _check_same(model: TransformerBridge, task: Task, result: AttributionResult) -> None:
    made, mine = result.convention, fingerprint(model)
    if made.fingerprint != mine:
        raise ValueError(
            f"the result is of another model (fingerprint {made.fingerprint[:12]}…; this model "
            f"is {mine[:12]}…). Audit it on that model, or attribute anew on this one."
        )
    if made.settings["data_sha256"] != digest(task):
        raise ValueError(
            "the result is of other data: its prompts, answers or corruption differ. Pass the "
            "task that it was made on."
        )


def _check_baselines(
    result: AttributionResult, runs: dict[str, np.ndarray], metric: str
) -> None:
    """Raise where the metric of a plain run is another number than in the result."""
    for run, found in runs.items():
        theirs = result.of_metric(result.data[run], metric).values
        off = np.abs(found - theirs).max()
        if off > 1e-2 * max(1.0, float(np.abs(theirs).max())):
            raise ValueError(
                f"the {run} run's {metric} differs by {off:.3g} from the result's, so metric, "
                "weights or edits in force are not the same. Audit under what it was made with."
            )
