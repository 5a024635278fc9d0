"""Path patching: what one component does to the metric through chosen paths alone.

A sender writes what it wrote in the other run. Everything between it and the receivers is
held at the base run's values (with ``through_mlps``, attention only), so that the change
reaches the receivers along the residual stream and nowhere else. The receivers compute from
what they then read, and the rest of the model runs on from them. Norms are computed anew.

Source: Wang et al. 2022, arXiv:2211.00593, section 3.1 (which lets MLPs answer); Goldowsky-Dill
et al. 2023, arXiv:2304.05969.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.grid import check_option, labelled, step_tokens, steps_of
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.causal.path_nodes import Nodes, label
from mechinterp.causal.routes import edge_routes, routes_of
from mechinterp.causal.sending import Sending
from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.engine.execute import Outcome
from mechinterp.engine.frozen import refuse_edits_inside
from mechinterp.engine.runs import Run, run_of
from mechinterp.engine.sizes import TooLittleMemoryError, as_bytes, default_budget, size
from mechinterp.metrics import resolve_metrics
from mechinterp.models import input_device
from mechinterp.record import convention_of
from mechinterp.tasks import Task, as_data
from mechinterp.tasks.positions import PositionSpec

_SHARE = 0.25  # of the memory, for what the receivers read
_EDGES_AT_ONCE = int(1e9)  # bytes on their way at once


def path_patching(
    model: TransformerBridge,
    data: Any,
    receivers: Nodes | Mapping[str, Nodes],
    *,
    senders: Nodes = "z",
    via: Nodes | Sequence[Nodes] | None = None,
    direction: str = "denoising",
    through_mlps: bool = False,
    positions: PositionSpec = "all",
    metric: str | Callable | Mapping[str, str | Callable] | None = None,
    align: str = "exact",
    memory: Memory = None,
) -> PatchingResult:
    """Patch one sender at a time into the receivers, along direct paths, and measure.

    Args:
        model: Left as it was.
        data: A ``Task`` with a corrupted run.
        receivers: Nodes that take the change in: ``"9.6.q"``, ``mi.Site("q", layer=9, head=6,
            position="end")``, ``"3.mlp_out"`` (the MLP's input), ``"logits"`` (the final
            residual stream). A list is one set, patched together. A mapping of sets gives a
            ``receiver`` axis, and so does the name ``"q"``, ``"k"``, ``"v"`` or ``"mlp_out"``,
            or a list of such names alone (``["q", "k"]``), for each such node on its own.
            Under grouped queries ``k`` and ``v`` are key/value heads. The logits take no
            position: they are read where the task is answered.
        senders: A site, all of whose nodes send one at a time (``"z"``: every head,
            ``"mlp_out"``, ``"attn_out"``, ``"embed"``, ``"resid_pre"``: the residual stream
            entering a layer), or a list of nodes and sites, which gives a ``sender`` axis.
        via: What the paths go through on the way, one node or list of nodes per stop: with
            ``["7.3.q"]`` sender to the query of 7.3, and what head 7.3 then writes to the
            receivers. Nodes are as among the receivers, without ``"logits"``.
        direction: ``"denoising"`` sends what the clean run wrote into the corrupted one,
            ``"noising"`` the other way.
        through_mlps: Let the MLPs on the way answer to the change; attention stays frozen.
        positions: Where a sender writes something else: ``"all"`` at once, or one step each.
        metric: As in ``mi.activation_patching``.
        align: As in ``mi.activation_patching``.
        memory: Bytes, or a size such as ``"2GB"``, that this may take beside the model; 60 %
            of what is free by default.

    Returns:
        A result with axes ``layer`` and ``head`` (or ``sender``), and ``position`` and
        ``receiver`` where there are several. NaN where no path leads from one node of a whole
        site to a receiver.

    Raises:
        TypeError: ``data`` is not a task, or a node is neither a string nor a site.
        ValueError: A node, role, position or metric does not exist; a named sender has no path
            to any receiver, or no sender one to a named receiver or stop; edits are in force
            inside the blocks. All before any forward pass. Later: the memory is too small for a
            single path.

    Source: Wang et al. 2022, arXiv:2211.00593, section 3.1; Goldowsky-Dill et al. 2023,
    arXiv:2304.05969.
    """
    task = as_data(data, accepts=(Task,), method="path_patching")
    check_option("direction", direction, ("denoising", "noising"))
    check_option("align", align, ("exact", "last"))
    metrics = resolve_metrics(metric, task.metric)
    clean, corrupted = run_of(task, "clean"), run_of(task, "corrupted")
    base, source = _runs(task, direction)
    routes = routes_of(model, base, senders, via, receivers)
    steps = steps_of("z", positions, clean, corrupted, align)
    refuse_edits_inside(model, base)
    budget = default_budget(input_device(model)) if memory is None else as_bytes(memory)
    rest = None if memory is None else int((1 - _SHARE) * budget)

    shape = (len(routes.each), len(steps), len(routes.sets))
    patched = np.full((len(task), *shape, len(metrics)), np.nan)
    found: Outcome | None = None
    sending = Sending(model, base, source, routes, steps, align, through_mlps)
    for cells, places in sending.cells(int(_SHARE * budget)):
        try:
            found = metrics_of_cells(
                model, task, cells, on=base.name, metrics=metrics, memory=rest
            )
        except TooLittleMemoryError as error:
            raise ValueError(
                f"memory={size(budget)} is too small for a single path. "
                f"{size(error.enough / (1 - _SHARE))} is enough: allow that much, or run fewer "
                "or shorter prompts."
            ) from error
        alone = found.runs[base.name].cpu().numpy()
        for values, (i, j, k) in zip(found.values.cpu().numpy(), places, strict=True):
            patched[:, i, j, k] = np.where(sending.sends(j)[:, None], values, alone)
    assert found is not None

    axes, spread = routes.spread(patched)
    axes["position"] = None if positions == "all" else [name for name, _ in steps]
    axes["receiver"] = list(routes.sets) if routes.has_receiver_axis else None
    axes["metric"] = list(metrics) if isinstance(metric, Mapping) else None
    arrays = {"patched": spread} | {n: v.cpu().numpy() for n, v in found.runs.items()}
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(found.runs, ("prompt", "metric")) | {
        "patched": ("prompt", *axes)
    }
    settings = {
        "senders": routes.site or routes.senders,
        "receivers": {name: [label(n) for n in nodes] for name, nodes in routes.sets.items()},
        "via": [[label(node) for node in stop] for stop in routes.stops],
        "frozen": "attention" if through_mlps else "attention and MLPs",
        "align": align,
        "path": found.path,
        "why": found.why,
    }
    return PatchingResult(
        labelled(arrays, dims, axes, task, step_tokens(model, task, steps)),
        convention_of(
            "path_patching",
            model,
            task,
            metrics,
            found.fingerprint,
            settings,
            site=routes.site,
            direction=direction,
            positions=positions,
            normaliser="mean clean minus mean corrupted",
        ),
    )


def edge_cells(
    model: TransformerBridge,
    task: Task,
    edges: Sequence[tuple[str, str]],
    *,
    direction: str,
    positions: PositionSpec = "all",
    align: str = "exact",
) -> list[Cell]:
    """Return one cell per edge, a sender and a receiver: the one patched into the other alone.

    They are applied ``on="corrupted"`` when denoising, ``on="clean"`` when noising; what the
    receivers read is computed here. ``positions`` are where senders write, all together.
    """
    base, source = _runs(task, direction)
    refuse_edits_inside(model, base)
    routes = edge_routes(model, edges)
    step = ("all" if positions == "all" else str(positions), positions)
    sending = Sending(model, base, source, routes, [step], align, through_mlps=False)
    ends, senders = list(routes.sets), routes.senders
    found = {
        (senders[i], ends[k]): cell
        for cells, places in sending.cells(_EDGES_AT_ONCE)
        for cell, (i, _, k) in zip(cells, places, strict=True)
    }
    return [found[edge] for edge in edges]


def _runs(task: Task, direction: str) -> tuple[Run, Run]:
    """Return the run that is patched, and the one that the values come from."""
    clean, corrupted = run_of(task, "clean"), run_of(task, "corrupted")
    return (corrupted, clean) if direction == "denoising" else (clean, corrupted)
