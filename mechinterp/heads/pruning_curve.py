"""Pruning curves: what is left of the model as heads go, least important first.

One part of the data ranks the heads, another tells how good the model still is. Heads are
masked, not cut; ``mi.prune_heads`` cuts them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from numbers import Integral
from typing import Any

import numpy as np
import torch
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.causal.ablation import (
    MetricSpec,
    StandIns,
    captured_stand_ins,
    stand_ins,
)
from mechinterp.causal.grid import check_option, prompt_labels
from mechinterp.causal.parts import Part, every_part
from mechinterp.engine import Plan, plan
from mechinterp.engine.calls import Memory, check_answers, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.engine.runs import run_of
from mechinterp.heads.held_out import held_out
from mechinterp.heads.importance import METHODS, OPTIONS, check_slope, head_importance
from mechinterp.heads.pruning_curve_result import PruningCurve
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric, is_worse, resolve_metrics
from mechinterp.nulls import Head
from mechinterp.record import Data, convention_of, digest, source_of

RESCORED = ("ablation", "gradient")  # methods cheap enough to ask again at every step


def pruning_curve(
    model: TransformerBridge,
    data: Any,
    *,
    method: str | Sequence[str] = "gradient",
    steps: int = 20,
    rescore: bool = True,
    min_heads_per_layer: int = 0,
    evaluate_on: Any = None,
    kind: str = "zero",
    reference: Any = None,
    metric: MetricSpec = None,
    draws: int = 20,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    memory: Memory = None,
) -> PruningCurve:
    """Take heads out step by step, least important first, and measure what is left.

    Args:
        model: Left as it was. Edits in force on it apply.
        data: What ranks the heads: a ``Task``, a ``Text`` or ``Labelled`` texts.
        method: Of ``mi.head_importance``, or several. ``"random"`` needs no asking for: its
            band is always there.
        steps: In how many steps the heads go, as evenly as whole heads allow.
        rescore: Score the remaining heads anew before each step, with the others out. For
            ``"ablation"`` and ``"gradient"``; the other methods score once.
        min_heads_per_layer: Stop where each layer has no more than so many heads.
        evaluate_on: What tells how good the model still is: other data of the same kind. By
            default half of ``data`` judges: the second of a text, of other data every other
            prompt, evenly over labels.
        kind: What takes a pruned head's place, as in ``mi.head_ablation``.
        reference: Where means and resamples come from; what ranks by default.
        metric: What is measured, one or a mapping of several, the first of which ranks.
            Default: the data's own.
        draws: Random orders for the band to compare with.
        options: More for ``mi.head_importance``: ``{"unit": "token"}``, ``{"penalty": 0.05}``.
        seed: Of random orders and whatever else is drawn.
        memory: Bytes, or a size such as ``"2GB"``, to take beside the model.

    Returns:
        The metric of each prompt that judges, after each step, for every method and for the
        random orders; and the order in which each method takes heads out.

    Raises:
        TypeError: ``data`` is none of these, or ``evaluate_on`` of another kind.
        ValueError: A method or option is unknown; ``evaluate_on`` is the data that ranks;
            there is a single prompt to halve; nothing may be pruned; or as in
            ``mi.head_importance``.

    Source: Michel et al. 2019, arXiv:1905.10650, section 4.
    """
    asked = _checked(
        model,
        data,
        "pruning_curve",
        method=method,
        steps=steps,
        least=min_heads_per_layer,
        evaluate_on=evaluate_on,
        metric=metric,
        draws=draws,
        options=options,
    )
    methods, ranking, judging, metrics = (
        asked.methods,
        asked.ranking,
        asked.judging,
        asked.metrics,
    )
    every, counts = asked.every, asked.counts
    first = dict(list(metrics.items())[:1])
    if kind == "corrupted":
        run_of(judging, "corrupted")  # raises where there is none
    layers = sorted({part.layer for part in every})
    drawn_on = ranking if kind in ("mean", "position_mean", "resample") else None
    source = reference if reference is not None else drawn_on
    values = captured_stand_ins(model, ranking, kind, source, "z", layers, seed)
    told = {"kind": kind, "reference": values, "metric": first, "seed": seed}
    orders: dict[str, list[Part]] = {}
    for each in methods:
        ask = {**told, **dict(options or {}), "memory": memory}
        again = rescore and each in RESCORED
        orders[each] = _order(
            model, ranking, each, every, counts, values, min_heads_per_layer, ask, again
        )
    generator = torch.Generator().manual_seed(seed)
    chance = [
        _allowed(
            [every[i] for i in torch.randperm(len(every), generator=generator).tolist()],
            counts[-1],
            min_heads_per_layer,
        )
        for _ in range(draws)
    ]
    sequences = [*orders.values(), *chance]
    sets = [one[:count] for one in sequences for count in counts[1:]]
    judge = replace(values, others_only=False)  # other prompts than those that rank
    if kind == "corrupted":
        judge = stand_ins(model, judging, kind, None, "z", layers, seed)
    cells = [Cell(judge.edits(sorted(one))) for one in sets]
    found = metrics_of_cells(model, judging, cells, on="clean", metrics=metrics, memory=memory)
    settings = {
        "methods": methods,
        "rescored": [each for each in methods if rescore and each in RESCORED],
        "min_heads_per_layer": min_heads_per_layer,
        "heads": len(every),
        "ranked_on": {"name": ranking.name, "sha256": digest(ranking)},
        "reference": None if source is None else source_of(model, source),
        "worse": [name for name, each in metrics.items() if is_worse(name, each)],
        "draws": draws,
        "options": dict(options or {}),
        "path": found.path,
    }
    several = list(metrics) if isinstance(metric, Mapping) else None
    return PruningCurve(
        _labelled(found, counts, methods, orders, draws, judging, several),
        convention_of(
            "pruning_curve",
            model,
            judging,
            metrics,
            found.fingerprint,
            settings,
            site="z",
            positions="all",
            ablation=kind,
            seed=seed,
        ),
    )


def pruning_plan(
    model: TransformerBridge,
    data: Any,
    *,
    method: str | Sequence[str] = "gradient",
    steps: int = 20,
    rescore: bool = True,
    min_heads_per_layer: int = 0,
    evaluate_on: Any = None,
    metric: MetricSpec = None,
    draws: int = 20,
    options: Mapping[str, Any] | None = None,
    memory: Memory = None,
) -> Plan:
    """Return what ``mi.pruning_curve`` with these arguments will cost on this machine.

    Ranking and judging together, with zeros in the heads' places; ``cells`` are the runs of all
    prompts of either. Where a method trains or takes gradients, a run there and back counts as
    three cells, and reading for the atlas as two.

    Args:
        model: As in ``mi.pruning_curve``, like all arguments.
        data: As there.
        method: As there.
        steps: As there.
        rescore: As there.
        min_heads_per_layer: As there.
        evaluate_on: As there.
        metric: As there.
        draws: As there.
        options: As there.
        memory: As there.

    Raises:
        TypeError: As ``mi.pruning_curve``, for the arguments that both have.
        ValueError: Likewise.
    """
    asked = _checked(
        model,
        data,
        "pruning_plan",
        method=method,
        steps=steps,
        least=min_heads_per_layer,
        evaluate_on=evaluate_on,
        metric=metric,
        draws=draws,
        options=options,
    )
    ranking, judging, every, counts = asked.ranking, asked.judging, asked.every, asked.counts
    zero = StandIns("z", "zero")
    told = dict(options or {})

    def sets(n: int, sizes: Sequence[int]) -> list[Cell]:
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(len(every), generator=generator).tolist() for _ in range(n)]
        return [
            Cell(zero.edits([every[i] for i in sorted(order[:size])]))
            for order in orders
            for size in sizes
        ]

    alone = [Cell(zero.edits([part])) for part in every]
    again = counts[:-1] if rescore else counts[:1]
    batches = told.get("steps", 200) * told.get("batch_size", 16) / len(ranking)
    runs = {"gradient": 3 * len(again), "hard_concrete": ceil(3 * batches), "redundancy": 2}
    ranked: list[Cell] = []
    for each in asked.methods:
        if each == "ablation":
            ranked += [cell for count in again for cell in alone[count:]]
        elif each == "shapley":
            ranked += sets(told.get("orders", 8), range(1, len(every) + 1))
        ranked += alone[:1] * runs.get(each, 0)
    judged = sets(len(asked.methods) + draws, counts[1:])
    found = plan(model, judging, judged, memory=memory)
    return plan(model, ranking, ranked, memory=memory) + found if ranked else found


def check_options(options: Mapping[str, Any] | None) -> None:
    """Raise a ``ValueError`` where ``mi.head_importance`` has no such option of its methods."""
    for name in options or {}:
        check_option("option", name, OPTIONS)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a curve is of: the arguments, checked."""

    methods: list[str]
    ranking: Any
    judging: Any
    metrics: dict[str, Metric]
    every: list[Part]
    counts: list[int]


def _checked(
    model: TransformerBridge,
    data: Any,
    caller: str,
    *,
    method: str | Sequence[str],
    steps: int,
    least: int,
    evaluate_on: Any,
    metric: MetricSpec,
    draws: int,
    options: Mapping[str, Any] | None,
) -> _Asked:
    methods = _methods(method)
    check_options(options)
    ranking, judging = held_out(data, evaluate_on, 0.5, caller)
    check_answers(model, ranking)
    check_answers(model, judging)
    metrics = resolve_metrics(metric, ranking.metric)
    if "gradient" in methods:
        check_slope(dict(list(metrics.items())[:1]))
    every = every_part(model, "z")
    counts = _counts(every, steps, least)
    if draws < 1:
        raise ValueError(f"draws={draws} gives no band to compare with. Pass at least 1.")
    return _Asked(methods, ranking, judging, metrics, every, counts)


def _methods(method: str | Sequence[str]) -> list[str]:
    methods = [method] if isinstance(method, str) else list(method)
    for each in methods:
        check_option("method", each, METHODS)
    if len(set(methods)) < len(methods) or not methods:
        raise ValueError("method must name at least one method, and each once.")
    return methods


def _counts(every: Sequence[Part], steps: int, least: int) -> list[int]:
    """Return how many heads are out after each step, from none on."""
    for name, number, fewest in (("steps", steps, 1), ("min_heads_per_layer", least, 0)):
        if not isinstance(number, Integral) or number < fewest:
            raise ValueError(f"{name}={number!r} must be a whole number, at least {fewest}.")
    per_layer = [sum(p.layer == layer for p in every) for layer in {p.layer for p in every}]
    most = sum(max(0, count - least) for count in per_layer)
    if not most:
        raise ValueError(
            f"min_heads_per_layer={least} leaves nothing to prune: layers have at most "
            f"{max(per_layer, default=0)} heads."
        )
    return sorted({round(i * most / steps) for i in range(steps + 1)})


def _order(
    model: TransformerBridge,
    data: Data,
    method: str,
    every: Sequence[Part],
    counts: Sequence[int],
    values: StandIns,
    least: int,
    ask: Mapping[str, Any],
    again: bool,
) -> list[Part]:
    """Return the heads in the order in which they go."""
    if not again:
        scores = head_importance(model, data, method=method, **ask)
        return _allowed(_parts(scores.order), counts[-1], least)
    out: list[Part] = []
    manager = HookManager(model)
    for count in progress(counts[1:], len(counts) - 1, f"ranking by {method}"):
        left = [part for part in every if part not in out]
        asked = [part.pair for part in left]
        if out:
            with manager.edit(*values.edits(sorted(out)), data=data):
                scores = head_importance(model, data, method=method, heads=asked, **ask)
        else:
            scores = head_importance(model, data, method=method, heads=asked, **ask)
        out = _allowed([*out, *_parts(scores.order)], count, least)
    return out


def _parts(order: Sequence[Head]) -> list[Part]:
    return [Part(layer, head) for layer, head in order]


def _allowed(order: Sequence[Part], count: int, least: int) -> list[Part]:
    """Return the first ``count`` heads that leave every layer its least."""
    left = {layer: sum(p.layer == layer for p in order) for layer in {p.layer for p in order}}
    out: list[Part] = []
    for part in order:
        if len(out) < count and left[part.layer] > least:
            left[part.layer] -= 1
            out.append(part)
    return out


def _labelled(
    found: Any,
    counts: Sequence[int],
    methods: Sequence[str],
    orders: Mapping[str, Sequence[Part]],
    draws: int,
    data: Data,
    metrics: Sequence[str] | None,
) -> xr.Dataset:
    values = found.values.double().cpu().numpy()
    values = values.reshape(-1, len(counts) - 1, *values.shape[1:])
    intact = np.broadcast_to(
        found.runs["clean"].double().cpu().numpy(), (len(values), 1, *values.shape[2:])
    )
    whole = np.concatenate([intact, values], axis=1)
    dims = ("removed", "prompt", "metric")
    names = [[part.label for part in orders[each]] for each in methods]
    arrays = {
        "value": (("ranked_by", *dims), whole[: len(methods)]),
        "random": (("draw", *dims), whole[len(methods) :]),
        "order": (("ranked_by", "place"), np.array(names, dtype=str)),
    }
    coords: dict[str, Any] = {
        "ranked_by": list(methods),
        "removed": list(counts),
        "draw": np.arange(draws),
        "place": np.arange(1, counts[-1] + 1),
    }
    made = xr.Dataset(arrays, coords | prompt_labels(data))
    return made.isel(metric=0) if metrics is None else made.assign_coords(metric=list(metrics))
