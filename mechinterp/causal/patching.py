"""Activation patching: what one place, taken from the other run, does to the metric.

A cell is one place (layer, head, position). Each prompt has two runs, ``clean`` and
``corrupted``; patching takes the activation at the cell from one and puts it into the other.
The engine computes all cells at once, exactly; ``method="reference"`` runs the whole hooked
model once per cell, slow and obviously correct.

Source: Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262. The directions
are named after Heimersheim and Nanda 2024, arXiv:2404.15255.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.causal.grid import Grid, check_option, grid_of, labelled, step_tokens
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.engine.execute import Outcome
from mechinterp.engine.runs import runs_of
from mechinterp.engine.screening import Screened, check_screen, screened_cells
from mechinterp.hooks import HookManager
from mechinterp.metrics import Metric, Targets, apply_metric, resolve_metrics
from mechinterp.models import fingerprint
from mechinterp.record import convention_of
from mechinterp.tasks import Task, as_data
from mechinterp.tasks.positions import PositionSpec


def activation_patching(
    model: TransformerBridge,
    data: Any,
    site: str,
    *,
    direction: str = "denoising",
    positions: PositionSpec = "each",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    metric: str | Callable | Mapping[str, str | Callable] | None = None,
    align: str = "exact",
    window: int = 1,
    method: str = "engine",
    memory: Memory = None,
    screen: str | None = None,
) -> PatchingResult:
    """Patch one place at a time from one run into the other and measure what it does.

    Sweeps the site's layers, its heads where it has any (key/value heads for ``k`` and ``v``),
    and ``positions``: ``"each"`` position, ``"all"`` of them at once (no position axis), roles
    by name, integers, a slice. On ``scores`` and ``pattern`` they are query positions.

    Args:
        model: Left as it was, with its hooks. Edits in force on it apply to every run.
        data: A ``Task`` with a corrupted run: corrupted prompts, or edits of the clean ones.
        site: What to patch, ``"z"`` or ``"resid_pre"`` for instance.
        direction: ``"denoising"`` patches clean into corrupted (is it sufficient?),
            ``"noising"`` corrupted into clean (is it necessary?).
        positions: Which positions to patch, one step of the sweep each.
        layers: Layers to sweep; all that have the site by default.
        heads: Heads to sweep; all by default.
        metric: A name, a function of (logits, targets), or a mapping of several, which gives
            a ``metric`` axis from the same runs. Default: the task's own.
        align: How to pair a role's span with one of another length in the other prompt:
            ``"exact"`` refuses, ``"last"`` pairs them from their ends.
        window: How many layers around each to patch together, as in causal tracing.
        method: ``"engine"`` computes only what each patch changes; ``"reference"`` runs the
            whole model once per cell. The numbers are the same up to rounding.
        memory: Bytes, or a size such as ``"2GB"``, that the engine may take beside the model;
            60 % of what is free by default.
        screen: ``"bfloat16"`` ranks the cells in bfloat16 and computes the top ones again in
            the model's own dtype; ``data["exact"]`` says which. Default: all are exact.

    Returns:
        The metric under every patch, ``patched``, with the axes ``prompt`` and those swept,
        beside ``clean`` and ``corrupted``, the two runs'; all per prompt, in the metric's unit.
        ``effect`` and ``recovered`` (``destroyed`` when noising) are computed from them.

    Raises:
        TypeError: ``data`` is not a task.
        ValueError: A site, layer, head, role, position or metric does not exist; the task has
            no corrupted run; positions of the two runs do not correspond; the memory is too
            small for a single cell. All of these before the model runs. Later: an activation
            or a metric is NaN or infinite.

    Source: Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262; the two
    directions: Heimersheim and Nanda 2024, arXiv:2404.15255.
    """
    task = as_data(data, accepts=(Task,), method="activation_patching")
    check_option("method", method, ("engine", "reference"))
    check_screen(model, screen, method)
    metrics = resolve_metrics(metric, task.metric)
    grid = grid_of(
        model,
        task,
        site,
        direction=direction,
        positions=positions,
        layers=layers,
        heads=heads,
        align=align,
        window=window,
    )
    if method == "reference":
        found = _by_reference(model, task, grid, metrics)
    else:
        measured = {"on": grid.base, "metrics": metrics, "memory": memory}
        cells_of = partial(grid.cells, task=task)
        if screen is None:
            found = metrics_of_cells(model, task, cells_of(model), **measured)
        else:
            found = screened_cells(model, task, cells_of, **measured)

    axes = grid.axes(positions)
    axes["metric"] = list(metrics) if isinstance(metric, Mapping) else None
    arrays = {"patched": grid.spread(found.values.cpu().numpy())}
    arrays |= {name: each.cpu().numpy() for name, each in found.runs.items()}
    dims: dict[str, tuple[str, ...]] = {"patched": ("prompt", *axes)}
    dims |= dict.fromkeys(found.runs, ("prompt", "metric"))
    settings: dict[str, Any] = {
        "align": align,
        "window": window,
        "method": method,
        "path": found.path,
        "why": found.why,
    }
    if isinstance(found, Screened):
        settings["screen"] = screen
        exact = np.zeros(grid.shape, dtype=bool)
        exact[tuple(np.array(grid.places).T)] = found.exact.numpy()
        arrays["exact"], dims["exact"] = exact, tuple(axes)[:3]
    return PatchingResult(
        labelled(arrays, dims, axes, task, step_tokens(model, task, grid.steps)),
        convention_of(
            "activation_patching",
            model,
            task,
            metrics,
            found.fingerprint,
            settings,
            site=site,
            direction=direction,
            positions=positions,
            normaliser="mean clean minus mean corrupted",
        ),
    )


def patching_cells(
    model: TransformerBridge,
    data: Any,
    site: str,
    *,
    direction: str = "denoising",
    positions: PositionSpec = "each",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    align: str = "exact",
    window: int = 1,
) -> list[Cell]:
    """Return the cells that ``mi.activation_patching`` with these arguments runs.

    For ``mi.plan`` (how long will it take?) and for sweeps that combine them. They are applied
    ``on="corrupted"`` when denoising, ``on="clean"`` when noising. Nothing runs.

    Args:
        model: As in ``mi.activation_patching``, like all arguments.
        data: As there.
        site: As there.
        direction: As there.
        positions: As there.
        layers: As there.
        heads: As there.
        align: As there.
        window: As there.

    Raises:
        TypeError: As in ``mi.activation_patching``.
        ValueError: As there.
    """
    task = as_data(data, accepts=(Task,), method="patching_cells")
    grid = grid_of(
        model,
        task,
        site,
        direction=direction,
        positions=positions,
        layers=layers,
        heads=heads,
        align=align,
        window=window,
    )
    return grid.cells(model, task)


@torch.no_grad()
def _by_reference(
    model: TransformerBridge, task: Task, grid: Grid, metrics: Mapping[str, Metric]
) -> Outcome:
    """Run the whole hooked model once per cell."""
    manager = HookManager(model)
    runs = runs_of(task)
    reference = runs["clean"].answers(manager)
    targets = task.targets(reference)
    of_runs = {
        "clean": _measure(reference, metrics, targets),
        "corrupted": _measure(runs["corrupted"].answers(manager), metrics, targets),
    }
    source = runs[grid.source]
    with source.in_force(manager):
        values = manager.capture(source, grid.site, layers=grid.read_layers)
    found = [
        _measure(runs[grid.base].answers(manager, grid.edit(place, values)), metrics, targets)
        for place in progress(grid.places, len(grid.places), f"patching {grid.site}")
    ]
    return Outcome(torch.stack(found), of_runs, "reference", "", fingerprint(model))


def _measure(
    logits: Float[Tensor, "prompt d_vocab"], metrics: Mapping[str, Metric], targets: Targets
) -> Float[Tensor, "prompt metric"]:
    columns = [apply_metric(name, fn, logits, targets) for name, fn in metrics.items()]
    return torch.stack([c.double().cpu() for c in columns], dim=1)
