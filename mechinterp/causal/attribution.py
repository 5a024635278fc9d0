"""Attribution patching: what patching each place would do, estimated from gradients.

Where activation patching runs the model once per place, one backward pass estimates all of
them, ``(source - base) * gradient``. The estimate is exact where the model is linear between
the place and the metric, and may be far off where it is not: ``mi.audit`` checks it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.activations import Key
from mechinterp.causal.attribution_result import AttributionResult
from mechinterp.causal.edge_methods import EDGES, Edges, eap, edges_of
from mechinterp.causal.grid import Grid, check_option, grid_of, labelled, step_tokens
from mechinterp.causal.node_methods import (
    SOFTMAX_AGAIN,
    STREAM,
    Found,
    atp,
    atp_star,
    ig,
)
from mechinterp.causal.nodes import Nodes, nodes_of
from mechinterp.causal.path_nodes import label
from mechinterp.engine.calls import metric_reader
from mechinterp.hooks import HookManager
from mechinterp.metrics import METRICS, Metric, kl, resolve_metrics
from mechinterp.models import fingerprint
from mechinterp.record import convention_of
from mechinterp.sites import locate
from mechinterp.tasks import Task, as_data
from mechinterp.tasks.positions import PositionSpec

NODE_METHODS = ("atp", "atp*", "ig")
EDGE_METHODS = ("eap", "eap-ig")
PATH_METHODS = ("ig", "eap-ig")
INTERPOLATIONS = ("inputs", "activations")
STEPS = 5


def attribution_patching(
    model: TransformerBridge,
    data: Any,
    site: str | None = None,
    *,
    method: str = "atp",
    direction: str = "denoising",
    positions: PositionSpec = "each",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    metric: str | Callable | Mapping[str, str | Callable] | None = None,
    align: str = "exact",
    steps: int = STEPS,
    interpolate: str = INTERPOLATIONS[0],
    grad_drop: bool = True,
    batch_size: int = 16,
) -> AttributionResult:
    """Estimate what ``mi.activation_patching`` with the same arguments would find.

    The score of a place is the estimated metric after the patch minus before it, per prompt
    and in the metric's unit: the axes and the sign of ``activation_patching(...).effect``.

    - ``"atp"``: ``(source - base) . d metric / d activation`` at the base run, which is the
      corrupted run when denoising and the clean one when noising. Two forward passes and one
      backward pass for everything.
    - ``"atp*"``: for ``q``, ``k`` and ``scores`` the softmax is taken again and only what lies
      behind the pattern is linearised, so that a saturated head is seen. With ``grad_drop``
      there is one backward pass per layer, through which what this layer adds is skipped, and
      the score is the mean size over the other layers: it has no sign.
    - ``"ig"``: the gradient is averaged over ``steps`` points of a path from base to source.
      With ``interpolate="inputs"`` all embeddings move (the scores of ``embed`` sum to the
      difference of the runs), with ``"activations"`` the swept places of one layer at a time
      (their scores sum to the effect of patching all of them).
    - ``"eap"`` and ``"eap-ig"`` score edges instead of nodes, from every sender (embedding,
      heads, MLPs) to every receiver (``q``, ``k``, ``v``, MLPs, the end of the residual
      stream), summed over positions: axes ``sender`` and ``receiver``, NaN where no path
      leads. The scores of the edges out of a sender sum to its node score by ``"atp"`` (for
      ``"eap-ig"``, by ``"ig"``). Between ``sender`` and ``receiver`` nothing else answers.

    Args:
        model: Left as it was, with its hooks. Edits in force on it apply to every run.
        data: A ``Task`` with a corrupted run: corrupted prompts, or edits of the clean ones.
        site: Where the nodes are, ``"z"`` or ``"resid_pre"`` for instance; not for edges.
        method: ``"atp"``, ``"atp*"``, ``"ig"``, ``"eap"`` or ``"eap-ig"``.
        direction: As in ``mi.activation_patching``, like all the following ones.
        positions: Which positions to score, one step each; gradients are summed over a step.
        layers: Layers to score; all that have the site by default.
        heads: Heads to score; all by default.
        metric: A metric that has a gradient, of each prompt by itself; or a mapping of several.
        align: How to pair a role's span with one of another length in the other prompt.
        steps: Of ``"ig"`` and ``"eap-ig"``: points of the path, at the middles of as many
            equal parts.
        interpolate: Of the same two: ``"inputs"`` or ``"activations"``.
        grad_drop: Of ``"atp*"``: whether to drop layers from the gradient.
        batch_size: Prompts run at once; the numbers do not depend on it. A graph of the whole
            model is held for so many.

    Returns:
        Estimated effects (``score``) with the axes ``prompt`` and those swept, or ``sender``
        and ``receiver``, in the metric's unit.

    Raises:
        TypeError: ``data`` is not a task.
        ValueError: As for ``mi.activation_patching``; a metric has no gradient or looks at
            several prompts together; a path between the inputs does not exist; ``steps``,
            ``interpolate`` or ``grad_drop`` is changed for a method that has none. All of these
            before the model runs. Later: no gradient of a metric reaches the logits, or a
            score is NaN or infinite.

    Source: Nanda 2023, neelnanda.io/attribution-patching; AtP*: Kramár et al. 2024,
    arXiv:2403.00745; integrated gradients: Hanna et al. 2024, arXiv:2403.17806. Hanna's scores
    have the opposite sign and expand at the clean run.
    """
    task = as_data(data, accepts=(Task,), method="attribution_patching")
    check_option("method", method, (*NODE_METHODS, *EDGE_METHODS))
    check_option("interpolate", interpolate, INTERPOLATIONS)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} runs nothing. Pass at least 1.")
    _check_options_of(method, steps, interpolate, grad_drop)
    of_edges = method in EDGE_METHODS
    if site is None and not of_edges:
        raise ValueError(
            f"method={method!r} scores nodes, so it needs to know where they are. "
            "Pass a site, 'z' for instance."
        )
    if of_edges and not (site is layers is heads is None):
        raise ValueError(
            f"method={method!r} scores all edges between components, so it takes no site, "
            "layers or heads. Leave them out, or pass method='atp' for nodes."
        )
    metrics = resolve_metrics(metric, task.metric)
    edges = edges_of(model) if of_edges else None
    grid = grid_of(
        model,
        task,
        "embed" if site is None else site,
        direction=direction,
        positions=positions,
        layers=layers,
        heads=heads,
        align=align,
    )
    nodes = nodes_of(HookManager(model), task, grid, metrics)
    _check_metrics(model, task, metrics)
    settings: dict[str, Any] = {"align": align, "variant": method, "signed": True}
    if method in PATH_METHODS:
        settings |= {"steps": steps, "interpolate": interpolate, "rule": "midpoint"}
        if interpolate == "inputs":
            _check_inputs_have_a_path(nodes)
    else:
        _check_not_at_its_minimum(nodes)
        settings["expanded_at"] = grid.base
    if of_edges or (method == "ig" and interpolate == "activations"):
        nodes.spots.check_one_source()
    if edges is not None:
        path = interpolate if method == "eap-ig" else None
        score = partial(eap, edges=edges, steps=steps, interpolate=path)
    elif method == "ig":
        score = partial(ig, steps=steps, interpolate=interpolate)
    elif method == "atp*":
        _check_star(nodes, grad_drop)
        score = partial(atp_star, grad_drop=grad_drop)
        settings |= {"grad_drop": grad_drop, "signed": not grad_drop}
    else:
        score = atp

    if edges is None:
        arrays = _scored(nodes, score, batch_size, grid.shape, partial(_on_grid, grid))
        axes = grid.axes(positions)
        tokens = step_tokens(model, task, grid.steps)
    else:
        shape = tuple(edges.exist.shape)
        arrays = _scored(nodes, score, batch_size, shape, partial(_on_edges, edges))
        axes: dict[str, list[Any] | None] = {"sender": list(map(label, edges.senders))}
        axes["receiver"] = list(map(label, edges.receivers))
        tokens = []
        positions = _labels(grid, positions)
    axes["metric"] = list(metrics) if isinstance(metric, Mapping) else None
    dims: dict[str, tuple[str, ...]] = {"score": ("prompt", *axes)}
    dims |= dict.fromkeys(("clean", "corrupted"), ("prompt", "metric"))
    return AttributionResult(
        labelled(arrays, dims, axes, task, tokens),
        convention_of(
            "attribution_patching",
            model,
            task,
            metrics,
            fingerprint(model),
            settings,
            site=site,
            direction=direction,
            positions=positions,
        ),
    )


def _labels(grid: Grid, positions: PositionSpec) -> PositionSpec:
    """Return the positions in a form that a result can store and an audit can read."""
    return "all" if positions in ("all", "each") else [name for name, _ in grid.steps]


def _on_grid(grid: Grid, scores: Mapping[Key, Tensor], start: int) -> np.ndarray:
    """Return ``prompt layer head step``; NaN where a layer has fewer heads than others."""
    first = next(iter(scores.values()))
    whole = np.full((first.shape[1], *grid.shape), np.nan)
    for i, layer in enumerate(grid.layers):
        found = scores[grid.site, layer].cpu()
        _check_finite(grid.site, layer, found, start)
        for j in {j for at, j, _ in grid.places if at == i}:
            whole[:, i, j] = found[:, :, grid.units[j] or 0].T.numpy()
    return whole


def _on_edges(edges: Edges, scores: Mapping[Key, Tensor], start: int) -> np.ndarray:
    """Return ``prompt sender receiver``; NaN where no path leads."""
    found = scores[EDGES]
    _check_finite("an edge", None, found.movedim(0, 1), start)
    return found.masked_fill(~edges.exist, torch.nan).numpy()


def _scored(
    nodes: Nodes,
    score: Callable[[Nodes], Found],
    batch_size: int,
    shape: tuple[int, ...],
    place: Callable[[Mapping[Key, Tensor], int], np.ndarray],
) -> dict[str, np.ndarray]:
    """Return scores (prompt, ``shape``, metric) and both baselines, in batches.

    Raises:
        ValueError: No prompt's metric has a gradient, or a score is NaN or infinite.
    """
    n, names = len(nodes.task), list(nodes.metrics)
    whole = np.full((n, *shape, len(names)), np.nan)
    runs: dict[str, list[np.ndarray]] = {"clean": [], "corrupted": []}
    moved: set[str] = set()
    starts = range(0, n, batch_size)
    for start in progress(starts, len(starts), "attribution"):
        rows = slice(start, min(start + batch_size, n))
        some = nodes.some(rows)
        found = score(some)
        moved |= found.moved
        targets = some.targets(found.answers["clean"])
        for run, answers in found.answers.items():
            runs[run].append(some.measured(answers, targets).numpy())
        for m, name in enumerate(names):
            whole[rows, ..., m] = place(found.scores[name], start)
    if still := [name for name in names if name not in moved]:
        raise ValueError(
            f"the gradient of {', '.join(map(repr, still))} is zero on every prompt, so it "
            "says nothing about any place. The metric may be cut off from the logits, or flat "
            "where they are. Use a smooth metric such as 'logit_diff'."
        )
    return {"score": whole} | {name: np.concatenate(parts) for name, parts in runs.items()}


def _check_finite(site: str, layer: int | None, scores: torch.Tensor, first: int) -> None:
    if not bool(scores.isfinite().all()):
        _, prompt, _ = (~scores.isfinite()).nonzero()[0].tolist()
        where = site if layer is None else f"{site} at layer {layer}"
        raise ValueError(
            f"a score of {where} is NaN or infinite on prompt {first + prompt}. The weights "
            "may be damaged, or the dtype's range too small: load the model with "
            "dtype=torch.float32."
        )


def _check_metrics(model: TransformerBridge, task: Task, metrics: Mapping[str, Metric]) -> None:
    """Raise unless each metric has a gradient, and is of each prompt by itself."""
    for name, fn in metrics.items():
        tried = metric_reader(model, task, {name: fn})(None)
        if not tried.by_row:
            raise ValueError(
                f"metric {name!r} looks at several prompts together, so what one of them does "
                "to it cannot be told apart. Pass a metric of each prompt by itself."
            )
        generator = torch.Generator().manual_seed(0)
        width = model.cfg.d_vocab_out if model.cfg.d_vocab_out > 0 else model.cfg.d_vocab
        with torch.inference_mode(False), torch.enable_grad():
            logits = torch.randn(len(task), width, generator=generator)
            logits.requires_grad_()
            value = fn(logits, task.targets(torch.randn(len(task), width, generator=generator)))
        if not value.requires_grad:
            smooth = [each for each in METRICS if each not in ("rank", "accuracy")]
            raise ValueError(
                f"metric {name!r} has no gradient with respect to the logits: it counts or "
                f"compares them, or detaches them. Use a smooth one: {', '.join(smooth)}."
            )


def _check_not_at_its_minimum(nodes: Nodes) -> None:
    if nodes.grid.direction == "noising" and any(fn is kl for fn in nodes.metrics.values()):
        raise ValueError(
            "noising expands at the clean run, where kl, the distance from it, is at its "
            "minimum and has no gradient. Use method='ig', or direction='denoising'."
        )


def _check_options_of(method: str, steps: int, interpolate: str, grad_drop: bool) -> None:
    """Raise where something was changed that the method does not have."""
    given: dict[str, Any] = {}
    if method not in PATH_METHODS:
        given |= {"steps": (steps, STEPS), "interpolate": (interpolate, INTERPOLATIONS[0])}
    if method != "atp*":
        given["grad_drop"] = (grad_drop, True)
    if changed := [f"{name}={asked!r}" for name, (asked, own) in given.items() if asked != own]:
        other = "atp*" if "grad_drop=False" in changed else "ig"
        other = "eap-ig" if method == "eap" and other == "ig" else other
        raise ValueError(
            f"method={method!r} has no {', '.join(changed)}: it would change nothing. Leave it "
            f"out, or pass method={other!r}."
        )


def _check_inputs_have_a_path(nodes: Nodes) -> None:
    ours, theirs = (run.prompts.lengths.tolist() for run in (nodes.base, nodes.source))
    instead = "Pass interpolate='activations', which moves the swept places alone."
    if unequal := [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]:
        a, b = unequal[0]
        raise ValueError(
            f"the prompts of a pair have {a} and {b} tokens, so there is no path from the "
            f"inputs of one to those of the other. {instead}"
        )
    inside = [edit.site for edit in nodes.task.corruption if edit.site != "embed"]
    if inside:
        raise ValueError(
            f"the runs differ by an edit of {inside[0]}, not in their inputs, so there is no "
            f"path from the inputs of one to those of the other. {instead}"
        )


def _check_star(nodes: Nodes, grad_drop: bool) -> None:
    """Raise where the model or the places do not allow for what AtP* does."""
    site, model = nodes.grid.site, nodes.manager.model
    if grad_drop and len(model.blocks) < 2 and site not in STREAM:
        raise ValueError(
            "the model has a single layer, so there is no other one to drop from the gradient. "
            "Pass grad_drop=False."
        )
    if site in SOFTMAX_AGAIN:
        nodes.spots.check_one_source()
        for layer in nodes.grid.layers:
            locate(model, "scores", layer)
            locate(model, "pattern", layer)
