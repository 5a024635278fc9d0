"""A circuit as a diagram: nodes at the height of their layer, arrows as wide as weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import FancyArrowPatch

from mechinterp import plotting

_BENDS = {"q": 0.1, "k": 0.0, "v": -0.1}


@dataclass(frozen=True)
class Node:
    """A part of a model: its name, and its layer (infinite for what comes after all)."""

    name: str
    layer: float


@dataclass(frozen=True)
class Edge:
    """What flows from one node to another, by which input of it, and whether it is certain."""

    sender: Node
    receiver: Node
    weight: float
    input: str = ""
    significant: bool = True


def path_diagram(edges: Sequence[Edge], *, ax: Axes | None = None, label: str = "") -> Axes:
    """Draw edges from below upwards; red helps, blue hinders, dashed may be chance.

    ``label`` says what weights are, with the unit. The number at an arrow is its weight, behind
    the input of the receiver (q, k, v) that it goes into.

    Raises:
        ValueError: There are no edges.
    """
    if not edges:
        raise ValueError("there are no edges to draw. Pass at least one.")
    places = _places(edges)
    heights = sorted({node.layer for node in places})
    widest = max(sum(node.layer == height for node in places) for height in heights)
    if ax is None:
        width = float(np.clip(2.4 + 1.15 * widest, 5.0, plotting.NOTEBOOK_WIDTH))
        ax = plotting.new_axes(width, float(np.clip(1.8 + 1.15 * len(heights), 4.2, 8.0)))
    top = max(abs(edge.weight) for edge in edges) or 1.0
    colours = ScalarMappable(Normalize(-top, top), colormaps[plotting.DIVERGING])
    for i, edge in enumerate(sorted(edges, key=lambda edge: places[edge.receiver])):
        together = sum(
            (other.sender, other.receiver) == (edge.sender, edge.receiver) for other in edges
        )
        _arrow(ax, edge, places, colours, top, i, together > 1)
    for node, (x, y) in places.items():
        ax.text(
            x,
            y,
            plotting.drawable(node.name),
            ha="center",
            va="center",
            fontsize=9,
            zorder=5,
            bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "0.35", "lw": 0.9},
        )
    ax.set_xlim(-0.05, 1.05)
    ax.set_ylim(-0.45, len(heights) - 0.55)
    ax.set_xticks([])
    ax.set_yticks(range(len(heights)), [_height_name(height) for height in heights])
    ax.tick_params(axis="y", labelsize=8, length=0)
    ax.spines[:].set_visible(False)
    ax.set_ylabel("layer")
    ax.set_xlabel("arrows from sender to receiver")
    bar = ax.figure.colorbar(colours, ax=ax, pad=0.02, fraction=0.06, aspect=30)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return ax


def _height_name(layer: float) -> str:
    if np.isinf(layer):
        return "" if layer < 0 else "end"
    return f"{layer:g}"


def _places(edges: Sequence[Edge]) -> dict[Node, tuple[float, float]]:
    """Return where nodes stand: by layer, and near those that they hear from."""
    nodes = list(dict.fromkeys(end for edge in edges for end in (edge.sender, edge.receiver)))
    heights = sorted({node.layer for node in nodes})
    found: dict[Node, tuple[float, float]] = {}
    for y, height in enumerate(heights):
        own = [node for node in nodes if node.layer == height]

        def pull(node: Node) -> float:
            near = [
                found[edge.sender][0]
                for edge in edges
                if edge.receiver == node and edge.sender in found
            ]
            return float(np.mean(near)) if near else 0.5

        own = sorted(own, key=lambda node: (pull(node), node.name)) if y else own
        for i, node in enumerate(own):
            found[node] = ((i + 0.5) / len(own), float(y))
    for height in heights[1:-1]:
        _step_aside(found, [node for node in nodes if node.layer == height], edges)
    return found


def _step_aside(
    places: dict[Node, tuple[float, float]], row: Sequence[Node], edges: Sequence[Edge]
) -> None:
    """Move a row of nodes sideways, off the arrows that pass between others."""
    y = places[row[0]][1]
    passing = [
        (x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        for (x0, y0), (x1, y1) in ((places[e.sender], places[e.receiver]) for e in edges)
        if y0 < y < y1
    ]
    own = np.array([places[node][0] for node in row])
    shifts = np.array(sorted(np.linspace(-0.45, 0.45, 31) / len(row), key=abs))
    gaps = own[:, None] + shifts - np.array(passing)[:, None, None]  # passing node shift
    crowded = np.exp(-((gaps / 0.07) ** 2)).sum((0, 1)) + 0.02 * np.abs(shifts)
    for node, x in zip(row, own + shifts[crowded.argmin()], strict=True):
        places[node] = (float(np.clip(x, 0.02, 0.98)), y)


def _arrow(
    ax: Axes,
    edge: Edge,
    places: dict[Node, tuple[float, float]],
    colours: ScalarMappable,
    top: float,
    turn: int,
    several: bool,
) -> None:
    """Draw one edge, bent apart from others where ``several`` lead from node to node."""
    share = abs(edge.weight) / top
    (x0, y0), (x1, y1) = places[edge.sender], places[edge.receiver]
    bend = _BENDS.get(edge.input, 0.0) if several else 0.0
    colour = colours.to_rgba(np.sign(edge.weight) * max(abs(edge.weight), 0.35 * top))
    ax.add_patch(
        FancyArrowPatch(
            (x0, y0),
            (x1, y1),
            arrowstyle="-|>",
            connectionstyle=f"arc3,rad={bend}",
            mutation_scale=9 + 6 * share,
            linewidth=0.8 + 4.2 * share,
            linestyle="-" if edge.significant else (0, (3, 2)),
            color=colour,
            shrinkA=11,
            shrinkB=12,
            zorder=2,
        )
    )
    at = 0.3 + 0.13 * (turn % 4)  # at different heights, so that neighbours part
    digits = max(0, 1 - int(np.floor(np.log10(top))))
    ax.text(
        x0 + at * (x1 - x0),
        y0 + at * (y1 - y0),
        " ".join(filter(None, [edge.input, f"{edge.weight:+.{digits}f}"])),
        fontsize=7,
        color="0.15",
        ha="center",
        va="center",
        zorder=4,
        bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
    )
