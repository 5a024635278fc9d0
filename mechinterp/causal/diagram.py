"""Which nodes and edges a path-patching or edge-attribution result has, and their diagram."""

import re
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference, plotting
from mechinterp.circuit_plot import Edge, Node, path_diagram
from mechinterp.drawing import about
from mechinterp.results import Convention

_NAMED = re.compile(r"(?:(\d+)\.)?(?:(\d+)\.)?([a-z_]+)(@.+)?$")
_INPUTS = ("q", "k", "v")


def diagram(
    effect: xr.DataArray,
    convention: Convention,
    *,
    n: int,
    label: str,
    signed: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the ``n`` edges with the largest mean effect as arrows between their nodes.

    Raises:
        ValueError: The result is not about edges, or ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} draws no edge. Pass at least 1.")
    prompts = effect.sizes["prompt"]
    effect = inference.per_case(effect)
    cases = effect.sizes["prompt"]
    edges = edges_of(effect, convention, signed)
    shown = sorted(edges, key=lambda edge: -abs(edge.weight))[:n]
    ax = path_diagram(shown, ax=ax, label=label)
    said = [f"the {len(shown)} largest of {len(edges)} edges"]
    if any(not edge.significant for edge in shown):
        said.append(f"dashed: not p < {inference.ALPHA} after correction for all")
    plotting.title(ax, f"paths · {about(convention, prompts, cases)}", "; ".join(said))
    return ax


def has_edges(effect: xr.DataArray, convention: Convention) -> bool:
    """Whether a result is about edges, not places."""
    return "receiver" in effect.dims or "receivers" in convention.settings


def edges_of(effect: xr.DataArray, convention: Convention, signed: bool = True) -> list[Edge]:
    """Return every measured edge of a result with its mean effect over prompts.

    Raises:
        ValueError: The result is not about edges.
    """
    told = convention.settings
    if not has_edges(effect, convention):
        raise ValueError(
            f"{convention.method} measured places, not edges, so there are no paths to draw. "
            "Use mi.path_patching, or mi.attribution_patching(method='eap')."
        )
    mean = effect.mean("prompt", skipna=False)
    tested = signed and effect.sizes["prompt"] > 1
    p = inference.adjusted_p(effect) if tested else mean * 0 + (0.0 if not signed else 1.0)
    axes = [str(dim) for dim in mean.dims]
    found = []
    for where in np.argwhere(np.isfinite(mean.values)):
        at = {axis: mean[axis].values[i] for axis, i in zip(axes, where, strict=True)}
        sender, _ = _node([_sender(at, convention)], _sender(at, convention))
        named = str(at["receiver"]) if "receiver" in at else next(iter(told["receivers"]))
        members = told["receivers"][named] if "receivers" in told else [named]
        receiver, goes_into = _node(members, named)
        weight, chance = float(mean.values[tuple(where)]), float(p.values[tuple(where)])
        found.append(Edge(sender, receiver, weight, goes_into, chance < inference.ALPHA))
    return found


def _sender(at: dict[str, Any], convention: Convention) -> str:
    """Return the name of a cell's sender, with its position where there are several."""
    place = f"@{at['position']}" if "position" in at else ""
    if "sender" in at:
        return f"{at['sender']}{place}"
    parts = [at["layer"], *(at[name] for name in ("head", "kv_head") if name in at)]
    return ".".join([*map(str, parts), str(convention.site)]) + place


def _node(members: list[str], named: str) -> tuple[Node, str]:
    """Return the node that names stand for together, and which input of it they are."""
    read = [_NAMED.match(member) for member in members]
    parts = [match.groups() for match in read if match is not None]
    layers = [_layer(layer, site) for layer, _, site, _ in parts]
    read_in = dict.fromkeys(site for _, _, site, _ in parts if site in _INPUTS)
    inputs = "" if len(read_in) == len(_INPUTS) else ", ".join(read_in)  # all: nothing to tell
    names = list(dict.fromkeys(_name(*each) for each in parts))
    shown = names[0] if len(names) == 1 else named
    return Node(shown, max(layers, default=float("inf"))), inputs


def _layer(layer: str | None, site: str) -> float:
    if layer is not None:
        return float(layer)
    return float("-inf") if site == "embed" else float("inf")


def _name(layer: str | None, head: str | None, site: str, at: str | None) -> str:
    """Return ``9.6`` for a head, ``3 mlp`` for an MLP, with the position behind it."""
    if head is not None:
        return f"{layer}.{head}{at or ''}"
    return " ".join(filter(None, [layer, site.removesuffix("_out")])) + (at or "")
