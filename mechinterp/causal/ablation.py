"""Ablation: what the model loses without a head, an MLP or a neuron.

A cell is a set of parts taken out together, over the whole prompt: their output is replaced by
zeros, a mean, another prompt's or the corrupted run's. The engine computes all cells at once,
exactly.

Source: Michel et al. 2019, arXiv:1905.10650 (zero); Wang et al. 2022, arXiv:2211.00593 (mean,
over a reference distribution); Chan et al. 2022, "Causal Scrubbing" (resample).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.ablation_result import AblationResult
from mechinterp.causal.grid import check_option, prompt_labels, steps_of
from mechinterp.causal.parts import Part, PartSets, sets_of
from mechinterp.edits import Edit, Mean, Replace, Resample, Zero
from mechinterp.engine.calls import MEASURED, Memory, check_answers, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.engine.runs import run_activations, run_of
from mechinterp.engine.screening import Screened, check_screen, screened_cells
from mechinterp.hooks import HookManager
from mechinterp.metrics import resolve_metrics
from mechinterp.record import Data, convention_of, source_of
from mechinterp.tasks import Prompts, Task, as_data, as_prompts

KINDS = ("zero", "mean", "position_mean", "resample", "corrupted")
MetricSpec = str | Callable | Mapping[str, str | Callable] | None


def head_ablation(
    model: TransformerBridge,
    data: Any,
    *,
    kind: str = "zero",
    reference: Any = None,
    heads: Any = None,
    metric: MetricSpec = None,
    seed: int = 0,
    memory: Memory = None,
    screen: str | None = None,
) -> AblationResult:
    """Take attention heads out and measure what that does.

    A head's ``z`` is replaced at every position of the prompt.

    Args:
        model: Left as it was. Edits in force on it apply to every run.
        data: A ``Task`` (measured at its answers), a ``Text`` (loss per token) or ``Labelled``
            texts (a classifier's loss).
        kind: What takes a head's place: ``"zero"``; its ``"mean"`` over all positions of the
            reference, or its ``"position_mean"``; ``"resample"``, that of a random other
            prompt of the reference at the same position; ``"corrupted"``, that of the task's
            corrupted run.
        reference: Where means and resamples come from: data or prompts; ``data`` by default.
        heads: None for every head by itself; ``"pairs"`` for every two heads together;
            ``"layers"`` for all heads of each layer together; a list of pairs (layer, head),
            each by itself; or a list of such lists, each a set.
        metric: A name, a function of (logits, targets), or a mapping of several. Default: the
            data's own, which is ``"loss"`` for text and labelled texts.
        seed: Of the resampled prompts.
        memory: Bytes, or a size such as ``"2GB"``, to take beside the model.
        screen: ``"bfloat16"`` ranks the cells in bfloat16 and computes the top ones again in
            the model's own dtype, as in ``mi.activation_patching``.

    Returns:
        The metric ``ablated``, with the axes ``prompt``, ``layer`` and ``head`` (or ``set``),
        beside ``intact``, per prompt and in the metric's unit. ``effect`` is the difference.

    Raises:
        TypeError: ``data`` is none of these.
        ValueError: A head does not exist or is named twice in a set; the kind or metric is
            unknown, or the data has none of what it needs: before the model runs.

    Source: Michel et al. 2019, arXiv:1905.10650 (zeros); Wang et al. 2022, arXiv:2211.00593
    (means over a reference); Chan et al. 2022, Causal Scrubbing (resampling).
    """
    return _ablation(
        model,
        data,
        site="z",
        asked=heads,
        method="head_ablation",
        kind=kind,
        reference=reference,
        metric=metric,
        seed=seed,
        memory=memory,
        screen=screen,
    )


def mlp_ablation(
    model: TransformerBridge,
    data: Any,
    *,
    kind: str = "zero",
    reference: Any = None,
    mlps: Any = None,
    metric: MetricSpec = None,
    seed: int = 0,
    memory: Memory = None,
) -> AblationResult:
    """Take whole MLPs out (``mlp_out``) and measure what that does.

    Args:
        model: As in ``mi.head_ablation``, like all arguments not named here.
        data: As there.
        kind: As there.
        reference: As there.
        mlps: None for each layer's by itself, ``"pairs"`` for every two, a list of layers, or
            a list of lists of layers.
        metric: As there.
        seed: As there.
        memory: As there.

    Returns:
        As ``mi.head_ablation``, with the axis ``layer`` (or ``set``).

    Raises:
        TypeError: As in ``mi.head_ablation``.
        ValueError: As there.

    Source: As for ``mi.head_ablation``.
    """
    return _ablation(
        model,
        data,
        site="mlp_out",
        asked=mlps,
        method="mlp_ablation",
        kind=kind,
        reference=reference,
        metric=metric,
        seed=seed,
        memory=memory,
    )


def neuron_ablation(
    model: TransformerBridge,
    data: Any,
    *,
    kind: str = "zero",
    reference: Any = None,
    neurons: Any = None,
    metric: MetricSpec = None,
    seed: int = 0,
    memory: Memory = None,
) -> AblationResult:
    """Take MLP neurons (``mlp_post``) out and measure what that does.

    Args:
        model: As in ``mi.head_ablation``, like all arguments not named here.
        data: As there.
        kind: As there.
        reference: As there.
        neurons: None for every neuron by itself, ``"layers"`` for all of each layer, a list of
            pairs (layer, neuron), or a list of such lists.
        metric: As there.
        seed: As there.
        memory: As there.

    Returns:
        As ``mi.head_ablation``, with the axes ``layer`` and ``neuron`` (or ``set``).

    Raises:
        TypeError: As in ``mi.head_ablation``.
        ValueError: As there.

    Source: As for ``mi.head_ablation``.
    """
    return _ablation(
        model,
        data,
        site="mlp_post",
        asked=neurons,
        method="neuron_ablation",
        kind=kind,
        reference=reference,
        metric=metric,
        seed=seed,
        memory=memory,
    )


def ablation_cells(
    model: TransformerBridge,
    data: Any,
    *,
    kind: str = "zero",
    reference: Any = None,
    heads: Any = None,
    seed: int = 0,
) -> list[Cell]:
    """Return the cells that ``mi.head_ablation`` with these arguments runs.

    For ``mi.plan`` and for sweeps that combine them. Means and resamples are computed.

    Args:
        model: As in ``mi.head_ablation``, like all arguments.
        data: As there.
        kind: As there.
        reference: As there.
        heads: As there.
        seed: As there.

    Raises:
        TypeError: As in ``mi.head_ablation``.
        ValueError: As there.
    """
    measured = as_data(data, MEASURED, "ablation_cells")
    found = sets_of(model, "z", heads)
    values = stand_ins(model, measured, kind, reference, "z", found.layers, seed)
    return [Cell(values.edits(one)) for one in found.sets]


@dataclass(frozen=True, eq=False)
class StandIns:
    """What takes the place of parts at one site: makes the edits for a set of them."""

    site: str
    kind: str
    source: Any = None
    seed: int = 0
    others_only: bool = False  # resamples: of the very prompts that are run

    def edits(self, parts: Sequence[Part]) -> list[Edit]:
        """Return the edits that take the parts out, one per layer."""
        return [
            self._edit(layer, [part.index for part in parts if part.layer == layer])
            for layer in sorted({part.layer for part in parts})
        ]

    def _edit(self, layer: int, units: Sequence[int | None]) -> Edit:
        where: dict[str, Any] = {"layers": layer}
        if self.site != "mlp_out":
            where["heads" if self.site == "z" else "neurons"] = list(units)
        if self.kind == "zero":
            return Zero(self.site, **where)
        if self.kind == "resample":
            told = {"seed": self.seed, "others_only": self.others_only}
            return Resample(self.site, self.source, **told, **where)
        if self.kind == "corrupted":
            return Replace(self.site, self.source, **where)
        by_position = self.kind == "position_mean"
        return Mean(self.site, self.source, per_position=by_position, **where)


def stand_ins(
    model: TransformerBridge,
    data: Data,
    kind: str,
    reference: Any,
    site: str,
    layers: Sequence[int],
    seed: int = 0,
) -> StandIns:
    """Return what takes the place of parts of ``site`` at some layers.

    ``reference`` may be ready stand-ins, made when other edits or none were in force.

    Raises:
        ValueError: The kind is unknown, draws on no reference, or needs a corrupted run.
    """
    check_option("kind", kind, KINDS)
    if isinstance(reference, StandIns):
        return reference
    if kind in ("zero", "corrupted") and reference is not None:
        raise ValueError(f"kind={kind!r} draws on no reference. Leave reference out.")
    if kind == "zero":
        return StandIns(site, kind)
    at = sorted(set(layers))
    if kind == "corrupted":
        corrupted = run_of(data, "corrupted")
        steps_of(site, "all", run_of(data, "clean"), corrupted, "exact")
        assert isinstance(data, Task)
        return StandIns(site, kind, run_activations(model, data, "corrupted", site, layers=at))
    manager, drawn_on = HookManager(model), data if reference is None else reference
    if kind == "resample":
        own = run_of(data, "clean").prompts
        itself = as_prompts(model, drawn_on).rows == own.rows
        if itself:
            _check_others(own)
        donors = manager.capture(drawn_on, site, layers=at)
        return StandIns(site, kind, donors, seed, others_only=itself)
    by_position = kind == "position_mean"
    return StandIns(
        site, kind, manager.mean(drawn_on, site, layers=at, per_position=by_position)
    )


def _check_others(prompts: Prompts) -> None:
    """Refuse a single prompt, which could but draw itself; warn of one longer than others."""
    lengths = prompts.lengths
    if len(lengths) < 2:
        raise ValueError(
            "kind='resample' takes the values of another prompt, but there is one. Pass more "
            "prompts, or reference= with others."
        )
    longest = lengths.argmax()
    if (lengths == lengths[longest]).sum() == 1:
        warnings.warn(
            f"prompt {int(longest)} is longer than all others, so it has itself to draw from "
            "when resampling, and its effect is 0. Pass reference= with longer prompts, or "
            "leave it out.",
            stacklevel=5,
        )


def captured_stand_ins(
    model: TransformerBridge,
    data: Data,
    kind: str,
    reference: Any,
    site: str,
    layers: Sequence[int],
    seed: int = 0,
) -> StandIns:
    """Return stand-ins that plain runs can use, too: a corrupted run's values are captured.

    Raises:
        ValueError: As ``stand_ins``.
    """
    values = stand_ins(model, data, kind, reference, site, layers, seed)
    if kind != "corrupted":
        return values
    run, manager = run_of(data, "corrupted"), HookManager(model)
    with run.in_force(manager):
        return replace(values, source=manager.capture(run, site, layers=sorted(set(layers))))


def _ablation(
    model: TransformerBridge,
    data: Any,
    *,
    site: str,
    asked: Any,
    method: str,
    kind: str,
    reference: Any,
    metric: MetricSpec,
    seed: int,
    memory: Memory,
    screen: str | None = None,
) -> AblationResult:
    measured: Any = as_data(data, MEASURED, method)
    check_screen(model, screen)
    metrics = resolve_metrics(metric, measured.metric)
    check_answers(model, measured)
    chosen = sets_of(model, site, asked)

    def cells_of(model: TransformerBridge) -> list[Cell]:
        values = stand_ins(model, measured, kind, reference, site, chosen.layers, seed)
        return [Cell(values.edits(one)) for one in chosen.sets]

    told = {"on": "clean", "metrics": metrics, "memory": memory}
    if screen is None:
        found = metrics_of_cells(model, measured, cells_of(model), **told)
    else:
        found = screened_cells(model, measured, cells_of, **told)
    settings: dict[str, Any] = {
        "kind": kind,
        "sets": "every part by itself" if chosen.grid else len(chosen.sets),
        "path": found.path,
        "why": found.why,
    }
    if isinstance(found, Screened):
        settings["screen"] = screen
    if reference is not None and not isinstance(reference, StandIns):
        settings["reference"] = source_of(model, reference)
    several = isinstance(metric, Mapping)
    return AblationResult(
        _labelled(chosen, found, measured, list(metrics) if several else None),
        convention_of(
            method,
            model,
            measured,
            metrics,
            found.fingerprint,
            settings,
            site=site,
            positions="all",
            ablation=_said(kind),
            seed=seed if kind == "resample" else None,
        ),
    )


def _labelled(
    chosen: PartSets, found: Any, data: Data, metrics: Sequence[str] | None
) -> xr.Dataset:
    """Return the values with their axes: those of the parts, or ``set``."""
    values = found.values.double().cpu().numpy()  # cell prompt metric
    intact = found.runs["clean"].double().cpu().numpy()
    coords: dict[str, Any] = prompt_labels(data)
    axes: dict[str, list[Any]] = {**chosen.axes} if chosen.grid else {"set": chosen.labels}
    coords |= axes
    whole = _spread(chosen, axes, values, np.nan)
    arrays = {
        "ablated": xr.DataArray(whole, dims=(*axes, "prompt", "metric")).transpose(
            "prompt", ...
        ),
        "intact": xr.DataArray(intact, dims=("prompt", "metric")),
    }
    if isinstance(found, Screened):
        exact = _spread(chosen, axes, found.exact.numpy(), False)
        arrays["exact"] = xr.DataArray(exact, dims=tuple(axes))
    made = xr.Dataset(arrays).assign_coords(coords)
    return made.isel(metric=0) if metrics is None else made.assign_coords(metric=list(metrics))


def _spread(
    chosen: PartSets, axes: Mapping[str, list[Any]], values: np.ndarray, empty: Any
) -> np.ndarray:
    """Return one value per cell on the axes of the parts; ``empty`` where there is none."""
    if not chosen.grid:
        return values
    whole = np.full((*map(len, axes.values()), *values.shape[1:]), empty)
    for (part,), value in zip(chosen.sets, values, strict=True):
        at = [axes["layer"].index(part.layer)]
        at += [axes[name].index(part.index) for name in axes if name != "layer"]
        whole[tuple(at)] = value
    return whole


def _said(kind: str) -> str:
    return {
        "zero": "zero",
        "mean": "mean over all positions",
        "position_mean": "mean per position",
        "resample": "a random prompt's, same position",
        "corrupted": "the corrupted run's",
    }[kind]
