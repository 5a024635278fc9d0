"""Clustered heat maps: heads against heads, in the order of a merge tree, and the tree."""

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from mechinterp import plotting
from mechinterp.heads.redundancy_tree import Tree


def clustered_grid(
    values: xr.DataArray,
    order: list[int],
    ax: Axes | None,
    label: str,
    signed: bool,
    title: str,
    note: str,
) -> Axes:
    """Draw all pairs of heads, both axes in this order."""
    ax = ax if ax is not None else plotting.new_axes(*_size(len(order)))
    _grid(values, order, ax, label, signed)
    ax.set_aspect("equal")
    plotting.title(ax, title, note)
    return ax


def clustered_figure(
    values: xr.DataArray,
    tree: Tree,
    label: str,
    signed: bool,
    title: str,
    note: str,
    distance: str,
) -> Figure:
    """Draw all pairs of heads with the merge tree on the left."""
    width, height = _size(len(tree.distance))
    figure = plotting.new_figure(width + 1.3, height)
    left, right = figure.subplots(1, 2, width_ratios=[1.3, width], sharey=False)
    _grid(values, tree.leaves, right, label, signed)
    right.set_ylabel("")
    _draw_tree(left, tree)
    left.set_xlabel(distance, fontsize=8)
    left.set_ylabel("head (layer.head)")
    plotting.title(right, title, note)
    return figure


def _size(heads: int) -> tuple[float, float]:
    side = float(np.clip(1.4 + 0.14 * heads, 3.6, 7.2))
    return side + 1.3, side + 0.5


def _grid(values: xr.DataArray, order: list[int], ax: Axes, label: str, signed: bool) -> None:
    shown = values.isel(head_a=order, head_b=order).transpose("head_a", "head_b")
    names = [str(name) for name in shown["head_a"].values]
    # What a head has in common with itself would set the scale of what pairs have.
    numbers = shown.values.astype(float).copy()
    np.fill_diagonal(numbers, np.nan)
    own = xr.DataArray(
        numbers,
        dims=("head_a", "head_b"),
        coords={"head_a": names, "head_b": names},
    )
    for axis in own.dims:
        own[axis].attrs["long_name"] = "head (layer.head)"
    plotting.heat_grid(own, ax=ax, label=label, signed=signed)


def _draw_tree(ax: Axes, tree: Tree) -> None:
    """Draw the tree with its leaves on the right, at the rows of the grid."""
    lines = _brackets(tree)
    thick = 0.8 if len(lines) <= 100 else 0.5
    ax.add_collection(LineCollection(list(lines), colors="0.35", linewidths=thick))
    ax.set_xlim(max(float(lines[..., 0].max()) * 1.03, 1e-9), 0)
    ax.set_ylim(0, len(tree.distance))
    ax.set_yticks([])
    ax.tick_params(axis="x", labelsize=7)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _brackets(tree: Tree) -> Float[np.ndarray, "merge 4 2"]:
    """Return every merge as four points: up from one half, across, down to the other."""
    n = len(tree.distance)
    place = {head: i + 0.5 for i, head in enumerate(tree.leaves)}
    height = dict.fromkeys(range(n), 0.0)
    found = np.empty((n - 1, 4, 2))
    for i, (a, b, distance, _) in enumerate(tree.linkage):
        one, other = int(a), int(b)
        found[i, :, 0] = height[one], distance, distance, height[other]
        found[i, :, 1] = place[one], place[one], place[other], place[other]
        place[n + i] = (place[one] + place[other]) / 2
        height[n + i] = float(distance)
    return found
