"""Activation patching, plainly: one hooked run of the model per cell.

A cell is one place (layer, head, position). Each prompt has two runs, ``clean`` and
``corrupted``; patching takes the activation at the cell from one and puts it into the other.
This form is slow and obviously correct, and stays as the reference for faster ones.

Source: Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262. The directions
are named after Heimersheim and Nanda 2024, arXiv:2404.15255.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.edits import Apply, Edit, Replace
from mechinterp.hooks import HookManager
from mechinterp.hooks.running import first_row
from mechinterp.metrics import (
    METRICS,
    UNITS,
    Metric,
    Targets,
    apply_metric,
    resolve_metrics,
)
from mechinterp.models import fingerprint, forward, processed_weights
from mechinterp.names import unknown
from mechinterp.results import Convention
from mechinterp.sites import AXES, head_axis, resolve_heads, resolve_layers
from mechinterp.tasks import Prompts, Task, answer_logits, as_data
from mechinterp.tasks.positions import PositionSpec, Roles, position_axis, position_lists
from mechinterp.tasks.prompts import token_strings

BATCH = 64  # prompts run at once: whole logits are held for no more
Steps = list[tuple[str | int, PositionSpec]]


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

    Raises:
        TypeError: ``data`` is not a task.
        ValueError: A site, layer, head, role, position or metric does not exist; the task has
            no corrupted run; positions of the two runs do not correspond. All of these before
            the model runs. Later: an activation or a metric is NaN or infinite.
    """
    task = as_data(data, accepts=(Task,), method="activation_patching")
    _check_option("direction", direction, ("denoising", "noising"))
    _check_option("align", align, ("exact", "last"))
    align = cast(Literal["exact", "last"], align)
    metrics = resolve_metrics(metric, task.metric)
    swept = resolve_layers(model, site, layers)
    heads_at = {layer: resolve_heads(model, site, layer, heads) or [None] for layer in swept}
    units = list(dict.fromkeys(unit for each in heads_at.values() for unit in each))
    clean, corrupted = _runs(task)
    steps = _steps(site, positions, clean, corrupted, align)
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)

    manager = HookManager(model)
    with torch.no_grad():
        reference = clean.answers(manager)
        targets = task.targets(reference)
        baselines = {
            "clean": _measure(reference, metrics, targets),
            "corrupted": _measure(corrupted.answers(manager), metrics, targets),
        }
        with source.in_force(manager):
            values = manager.capture(source, site, layers=layers, heads=heads)
        # NaN stays where a layer has fewer heads than others.
        patched = np.full((len(task), len(swept), len(units), len(steps), len(metrics)), np.nan)
        cells = list(product(enumerate(swept), enumerate(units), enumerate(steps)))
        for (i, layer), (j, head), (k, (_, spec)) in progress(
            cells, len(cells), f"patching {site}"
        ):
            if head in heads_at[layer]:
                edit = Replace(
                    site, values, layers=layer, heads=head, positions=spec, align=align
                )
                patched[:, i, j, k] = _measure(base.answers(manager, edit), metrics, targets)

    swept_axes = {
        "layer": None if site == "embed" else swept,
        head_axis(site) or "head": units if head_axis(site) else None,
        "position": None if positions == "all" else [label for label, _ in steps],
        "metric": list(metrics) if isinstance(metric, Mapping) else None,
    }
    return PatchingResult(
        _dataset(patched, baselines, swept_axes, task, _step_tokens(model, clean, steps)),
        Convention(
            method="activation_patching",
            model=str(model.cfg.model_name),
            fingerprint=fingerprint(model),
            processed_weights=processed_weights(model),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            data=task.name,
            bos=task.clean.bos,
            metrics={name: _unit(fn) for name, fn in metrics.items()},
            site=site,
            direction=direction,
            positions=str(positions) if isinstance(positions, slice) else positions,
            normaliser="mean clean minus mean corrupted",
            settings={
                "align": align,
                "corruption": [_described(edit) for edit in task.corruption],
            },
        ),
    )


@dataclass(frozen=True)
class _Run:
    """The clean or the corrupted run: its prompts, and the edits that are part of it."""

    clean: Prompts  # the name by which prompts are found in any data
    roles: Roles
    answer_positions: Any
    edits: tuple[Edit, ...] = ()

    @contextmanager
    def in_force(self, manager: HookManager, *more: Edit) -> Iterator[None]:
        """Keep the run's own edits, and ``more`` after them, in force while a block runs."""
        edits = (*self.edits, *more)
        if not edits:
            yield
            return
        with manager.edit(*edits, data=self):
            yield

    def answers(self, manager: HookManager, *edits: Edit) -> Float[Tensor, "prompt d_vocab"]:
        """Return the logits at the answer positions, with ``edits`` on top of the run's own."""
        parts = []
        with self.in_force(manager, *edits):
            for start in range(0, len(self.clean), BATCH):
                rows = slice(start, start + BATCH)
                with first_row(manager.model, start):
                    logits = forward(
                        manager.model, self.clean.tokens[rows], self.clean.mask[rows]
                    )
                parts.append(answer_logits(logits, self.answer_positions[rows]))
        return torch.cat(parts)


def _runs(task: Task) -> tuple[_Run, _Run]:
    clean = _Run(task.clean, task.roles, task.answer_positions)
    if task.corrupted is not None:
        return clean, _Run(
            task.corrupted, task.corrupted_roles or {}, task.corrupted_answer_positions
        )
    if task.corruption:
        return clean, _Run(task.clean, task.roles, task.answer_positions, task.corruption)
    raise ValueError(
        f"the task {task.name!r} has no corrupted run to patch from or into. Build it with "
        "corrupted=[...] prompts, or with corruption=(edits of the clean prompts)."
    )


def _steps(
    site: str, positions: PositionSpec, clean: _Run, corrupted: _Run, align: str
) -> Steps:
    """Return the steps of the position axis, checked to mean the same place in both runs."""
    ours, theirs = clean.clean.lengths.tolist(), corrupted.clean.lengths.tolist()
    unequal = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    if unequal and ("key_pos" in AXES[site] or not all(map(_is_relative, _parts(positions)))):
        advice = (
            f"{site} has keys, which roles cannot align. Use prompts of equal length."
            if "key_pos" in AXES[site]
            else f"Patch by role: positions={sorted(clean.roles)}."
            if clean.roles
            else "Name roles in the task, or use a corruption of equal length."
        )
        raise ValueError(
            f"clean has {unequal[0][0]} tokens but corrupted has {unequal[0][1]}, so positions "
            f"do not correspond. {advice}"
        )
    steps = position_axis(positions, ours, clean.roles)
    for label, spec in steps:
        pairs = zip(
            position_lists(spec, ours, clean.roles),
            position_lists(spec, theirs, corrupted.roles),
            strict=True,
        )
        for prompt, (a, b) in enumerate(pairs):
            if len(a) != len(b) and align == "exact":
                raise ValueError(
                    f"{label!r} is {len(a)} tokens in clean prompt {prompt} but {len(b)} in "
                    "the corrupted one. Pass align='last' to pair the spans from their ends."
                )
    return steps


def _parts(positions: PositionSpec) -> list[Any]:
    return [positions] if isinstance(positions, str | int | slice) else list(positions)


def _is_relative(part: str | int | slice) -> bool:
    """Whether a position means the same place in prompts of different lengths."""
    return (
        part < 0
        if isinstance(part, int)
        else part not in ("each", "all") and isinstance(part, str)
    )


def _check_option(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(unknown(name, value, known))


def _measure(
    logits: Float[Tensor, "prompt d_vocab"], metrics: Mapping[str, Metric], targets: Targets
) -> Float[np.ndarray, "prompt metric"]:
    columns = [apply_metric(name, fn, logits, targets) for name, fn in metrics.items()]
    return torch.stack([c.double().cpu() for c in columns], dim=1).numpy()


def _unit(fn: Metric) -> str:
    return next((UNITS[name] for name, known in METRICS.items() if known is fn), "")


def _described(edit: Edit) -> dict[str, Any]:
    if isinstance(edit, Apply):  # a function has a name, but cannot be stored
        return {"kind": edit.kind, "site": edit.site, "name": edit.name}
    return edit.to_dict()


def _step_tokens(model: TransformerBridge, clean: _Run, steps: Steps) -> list[str]:
    """Return the token at each numbered step where all clean prompts share it, else ``""``."""
    lengths = clean.clean.lengths.tolist()
    shared = []
    for label, spec in steps:
        places = position_lists(spec, lengths, clean.roles)
        ids = {int(clean.clean.tokens[i, pos]) for i, (pos, *_) in enumerate(places)}
        one = isinstance(label, int) and len(ids) == 1
        shared.append(token_strings(model, [ids.pop()])[0].replace("\0", "␀") if one else "")
    return shared


def _dataset(
    patched: Float[np.ndarray, "prompt layer head position metric"],
    baselines: Mapping[str, Float[np.ndarray, "prompt metric"]],
    axes: Mapping[str, Sequence[Any] | None],
    task: Task,
    tokens: Sequence[str],
) -> xr.Dataset:
    """Label the numbers; an axis without labels was not swept and is left out."""
    dims = ("prompt", *axes)
    coords: dict[str, Any] = {
        axis: labels for axis, labels in axes.items() if labels is not None
    }
    if "position" in coords:
        if not all(isinstance(label, int) for label in coords["position"]):
            coords["position"] = [str(label) for label in coords["position"]]
        if any(tokens):
            coords["token"] = ("position", list(tokens))
    coords["prompt"] = np.arange(len(task))
    if task.templates:
        coords["template"] = ("prompt", list(task.templates))
    unswept = [axis for axis, labels in axes.items() if labels is None]
    arrays = {"patched": xr.DataArray(patched, dims=dims)} | {
        name: xr.DataArray(values, dims=("prompt", "metric"))
        for name, values in baselines.items()
    }
    return xr.Dataset(
        {
            name: array.squeeze([axis for axis in unswept if axis in array.dims], drop=True)
            for name, array in arrays.items()
        },
        coords=coords,
    )
