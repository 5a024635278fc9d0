"""What a user calls: metrics or logits of many cells, and what they will cost."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.engine.cells import Cell
from mechinterp.engine.execute import Engine, Outcome
from mechinterp.engine.planning import Plan, plan_of
from mechinterp.engine.reading import Reader, reader, text_reader
from mechinterp.engine.runs import run_of, runs_of
from mechinterp.engine.sizes import shape_of
from mechinterp.engine.sweep import Sweep, sweep
from mechinterp.metrics import Metric, Targets, resolve_metrics
from mechinterp.models import is_causal
from mechinterp.models.adapters import answers_once
from mechinterp.tasks import Labelled, Task, Text, as_data

Memory = int | float | str | None
MEASURED = (Task, Text, Labelled)


def cell_metrics(
    model: TransformerBridge,
    data: Any,
    cells: Iterable[Cell],
    *,
    on: str = "clean",
    metric: str | Callable | Mapping[str, str | Callable] | None = None,
    memory: Memory = None,
) -> Float[Tensor, "cell prompt metric"]:
    """Return what each cell does to the metric, per prompt: the exact counterfactual values.

    Args:
        model: Left as it was. Edits in force on it apply to every run.
        data: A ``Task``, measured at its answers; a ``Text``, where a prompt's value is the
            mean over its tokens; ``Labelled`` texts, whose answer is the class.
        cells: Sets of edits, each applied together on every prompt.
        on: The run that the cells are applied to, ``"clean"`` or ``"corrupted"``.
        metric: As in ``mi.activation_patching``; several give several columns.
        memory: Bytes, or a size such as ``"2GB"``, that the sweep may take beside the model;
            60 % of what is free by default. Splitting the work changes no number beyond
            rounding.

    Raises:
        TypeError: ``data`` is none of these.
        ValueError: A cell, a place or a metric does not fit, or the memory is too small for a
            single cell: before any forward pass. Later: a metric is NaN or infinite.
    """
    measured = as_data(data, MEASURED, "cell_metrics")
    metrics = resolve_metrics(metric, measured.metric)
    found = metrics_of_cells(model, measured, cells, on=on, metrics=metrics, memory=memory)
    return found.values


def cell_logits(
    model: TransformerBridge,
    data: Any,
    cells: Iterable[Cell],
    *,
    on: str = "clean",
    memory: Memory = None,
) -> Float[Tensor, "cell prompt d_vocab"]:
    """Return the logits at the answers under each cell.

    Unit: logits. The result alone takes cells x prompts x vocabulary numbers.

    Args:
        model: As in ``mi.cell_metrics``, like all arguments.
        data: A ``Task``.
        cells: As there.
        on: As there.
        memory: As there.

    Raises:
        TypeError: ``data`` is not a task.
        ValueError: As there.
    """
    chosen = _sweep(model, as_data(data, (Task,), "cell_logits"), cells, on)
    with torch.no_grad():
        return Engine(chosen, memory).run(_logits_reader).values


def plan(
    model: TransformerBridge,
    data: Any,
    cells: Iterable[Cell],
    *,
    on: str = "clean",
    metric: str | Callable | Mapping[str, str | Callable] | None = None,
    memory: Memory = None,
) -> Plan:
    """Return what ``mi.cell_metrics`` with these arguments will cost on this machine.

    Cells, token-layers, arithmetic, seconds and peak bytes. Nothing of the sweep runs; the
    model's blocks are timed for about a second.

    Args:
        model: As in ``mi.cell_metrics``, like all arguments.
        data: As there.
        cells: As there.
        on: As there.
        metric: As there.
        memory: As there; the peak is that within this limit.

    Raises:
        TypeError: As in ``mi.cell_metrics``.
        ValueError: As there.
    """
    measured = as_data(data, MEASURED, "plan")
    metrics = resolve_metrics(metric, measured.metric)
    engine = Engine(_sweep(model, measured, cells, on), memory)
    return plan_of(engine, metric_reader(model, measured, metrics)(None))


def metrics_of_cells(
    model: TransformerBridge,
    data: Task | Text | Labelled,
    cells: Iterable[Cell],
    *,
    on: str,
    metrics: Mapping[str, Metric],
    memory: Memory = None,
) -> Outcome:
    """Return the metrics of cells, of the data's runs, and how they were computed."""
    make_reader = metric_reader(model, data, metrics)
    engine = Engine(_sweep(model, data, cells, on), memory)
    with torch.no_grad():
        return engine.run(make_reader)


def metric_reader(
    model: TransformerBridge, data: Task | Text | Labelled, metrics: Mapping[str, Metric]
) -> Callable[[Tensor | None], Reader]:
    """Return what makes a reader of the metrics, given the clean run's logits or None."""
    shape = shape_of(model)
    check_answers(model, data)
    if isinstance(data, Text):
        read = text_reader(metrics, data.prompts, shape.d_vocab)
        return lambda _: read
    tried = reader(metrics, data.targets(), shape.d_vocab, partial=shape.unembeds_some)
    return partial(_with_reference, tried, data)


def check_answers(model: TransformerBridge, data: Task | Text | Labelled) -> None:
    """Raise a ``ValueError`` where the model does not answer what the data asks."""
    if isinstance(data, Text) and not is_causal(model):
        raise ValueError(
            "loss per token is that of predicting the next one, but this model sees both sides "
            "of a token. Use a causal language model, or a Task with the mask token."
        )
    if isinstance(data, Labelled):
        if not answers_once(model):
            raise ValueError(
                f"{data.name!r} asks for a class, but {model.cfg.model_name} answers with a "
                "word at every position. Load a sequence classifier, or make a Task whose "
                "answers are words."
            )
        if len(data.classes) != model.cfg.d_vocab_out:
            raise ValueError(
                f"{data.name!r} has {len(data.classes)} classes "
                f"({', '.join(data.classes[:5])}), but {model.cfg.model_name} tells "
                f"{model.cfg.d_vocab_out} apart. Pass classes= in the model's order."
            )


def _with_reference(tried: Reader, data: Task | Labelled, logits: Tensor | None) -> Reader:
    if logits is None:
        return tried
    targets: Targets = data.targets(logits)
    return Reader(tried.metrics, targets, tried.vocabulary, tried.by_row)


def _logits_reader(_: Tensor | None) -> Reader:
    return Reader({}, None)


def _sweep(
    model: TransformerBridge, data: Task | Text | Labelled, cells: Iterable[Cell], on: str
) -> Sweep:
    run_of(data, on)
    runs = list(runs_of(data).values())
    return sweep(model, runs, on, tuple(cells), everywhere=isinstance(data, Text))
