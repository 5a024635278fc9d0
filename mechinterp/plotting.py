"""Pictures of labelled numbers: grids over layers, lines, attention patterns.

Every function draws on one ``Axes`` and returns it. Effects use a red-blue scale that is
centred on zero and safe for colour-blind readers; amounts (attention) use a scale from white
to blue. Labels come from the axes of the array, and are thinned where they would collide.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Literal

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from mechinterp.stats import bootstrap_interval

DIVERGING = "RdBu_r"
SEQUENTIAL = "Blues"
UP, DOWN = "#D6604D", "#4393C3"  # positive and negative, as the diverging scale has them
# Okabe and Ito's palette, without yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
NOTEBOOK_WIDTH = 9.0  # inches
_SMALL = 8
_LETTERS = 18  # of that size to an inch
_MOST_TICKS = 36
_MOST_SHAPES = 20_000


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches.

    In a notebook it is registered with pyplot, so that the cell shows it; elsewhere it is
    free-standing, needs no display and is freed with its last reference.
    """
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from matplotlib import pyplot

        return pyplot.figure(figsize=(width, height), layout="constrained")
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(width: float = 6.0, height: float = 3.2) -> Axes:
    """Return the axes of a new one-panel figure of this size in inches."""
    return new_figure(width, height).add_subplot()


def token_label(text: str) -> str:
    """Return a token as it can stand on an axis: visible spaces, no control characters."""
    shown = drawable(visible(text))
    return shown if len(shown) <= 14 else shown[:13] + "…"


def drawable(text: str) -> str:
    """Return a text as matplotlib draws it: no formulas, a box where the font has no sign."""
    shown = "".join(c if c.isascii() or _has_glyph(c) else "▯" for c in text)
    return re.sub(r"(?<!\\)\$", r"\\$", shown)  # matplotlib would read a formula


def _has_glyph(sign: str) -> bool:
    """Whether one of the fonts of ``rcParams["font.family"]`` has this sign."""
    return any(
        get_font(findfont(FontProperties(family=[family]))).get_char_index(ord(sign))
        for family in rcParams["font.family"]
    )


def visible(text: str) -> str:
    """Return a token with its spaces and line ends shown, and a box for what has no shape."""
    shown = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() and c != "�" else "▯" for c in shown)


def heat_grid(
    values: xr.DataArray,
    *,
    ax: Axes | None = None,
    label: str = "",
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    limit: float | None = None,
    marked: xr.DataArray | None = None,
    signed: bool = True,
) -> Axes:
    """Draw an array with two axes as a grid of colours, first axis upwards.

    ``label`` says what the colours mean, with the unit. ``columns`` and ``rows`` replace the
    tick labels of the two axes, ``limit`` the largest size on the scale (default: the largest
    value). Cells that are true in ``marked`` get a dot. NaN is hatched grey. Amounts, which
    are not ``signed``, are white at 0 and blue at the limit.
    """
    row_axis, column_axis = (str(dim) for dim in values.dims)
    columns = list(columns) if columns is not None else _ticks(values, column_axis)
    rows = list(rows) if rows is not None else _ticks(values, row_axis)
    if ax is None:
        longest = max(map(len, columns), default=1)
        width = min(NOTEBOOK_WIDTH, max(4.2, 1.8 + 0.32 * len(columns)))
        row = 0.26 if len(rows) <= 16 else 0.17
        height = min(8.0, max(2.9, 1.2 + row * len(rows))) + 0.05 * min(longest, 14)
        ax = new_axes(width, height)
    numbers = np.ma.masked_invalid(np.asarray(values.values, dtype=float))
    top = limit if limit is not None else _limit(numbers)
    colours = {"cmap": DIVERGING, "vmin": -top} if signed else {"cmap": SEQUENTIAL, "vmin": 0}
    many = numbers.size > _MOST_SHAPES  # as a picture inside the PDF, not as so many shapes
    mesh = ax.pcolormesh(numbers, vmax=top, edgecolors="white", rasterized=many, **colours)
    mesh.set_linewidth(0.4 if numbers.size <= 1200 else 0.0)
    _finish_grid(ax, mesh, label, columns, rows)
    if marked is not None:
        _dots(ax, marked.transpose(*values.dims).values, numbers / top)
    ax.set_xlabel(_axis_name(values, column_axis))
    ax.set_ylabel(_axis_name(values, row_axis))
    return ax


def line(
    values: xr.DataArray,
    *,
    low: xr.DataArray | None = None,
    high: xr.DataArray | None = None,
    ax: Axes | None = None,
    label: str = "",
    marked: xr.DataArray | None = None,
) -> Axes:
    """Draw one number per place of a single axis, with a band from ``low`` to ``high``.

    Numbered axes (layers) get a line, named ones (roles) get points. ``label`` is the name of
    the vertical axis, with the unit. Points that are false in ``marked`` are hollow.
    """
    (axis,) = (str(dim) for dim in values.dims)
    ticks = _ticks(values, axis)
    ax = ax if ax is not None else new_axes(min(NOTEBOOK_WIDTH, max(4.2, 2 + 0.3 * len(ticks))))
    x = np.arange(len(ticks))
    y = np.asarray(values.values, dtype=float)
    ordered = values[axis].dtype.kind in "iu"
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.plot(x, y, marker="o", markersize=4, color=COLOURS[0], linestyle="-" if ordered else "")
    if marked is not None:
        hollow = ~marked.values
        ax.plot(x[hollow], y[hollow], "o", ms=4, mec=COLOURS[0], mfc="white", zorder=3)
    if low is not None and high is not None:
        bottom, top = low.values.astype(float), high.values.astype(float)
        if ordered:
            ax.fill_between(x, bottom, top, color=COLOURS[0], alpha=0.2, linewidth=0)
        else:
            ax.vlines(x, bottom, top, color=COLOURS[0], linewidth=1.5)
    _set_ticks(ax, "x", x, ticks)
    ax.set_xlim(-0.5, len(ticks) - 0.5)
    ax.set_xlabel(_axis_name(values, axis))
    ax.set_ylabel(label)
    _open_frame(ax)
    return ax


def word_grid(
    values: xr.DataArray,
    words: Sequence[Sequence[str]],
    *,
    ax: Axes | None = None,
    label: str = "",
    columns: Sequence[str] | None = None,
    limit: float | None = None,
) -> Axes:
    """Draw amounts with two axes as a grid from white to blue, with a word in each cell.

    The first axis runs upwards. ``label`` says what the colours mean, with the unit,
    ``columns`` replace the tick labels of the second axis, and ``limit`` is the top of the
    scale (default: the largest value). NaN is hatched grey.
    """
    row_axis, column_axis = (str(dim) for dim in values.dims)
    columns = list(columns) if columns is not None else _ticks(values, column_axis)
    if ax is None:
        width = max(4.2, 1.9 + 0.66 * len(columns))
        ax = new_axes(width, max(2.9, 1.3 + 0.24 * len(words)))
    numbers = np.ma.masked_invalid(np.asarray(values.values, dtype=float))
    top = limit if limit is not None else _limit(numbers)
    mesh = ax.pcolormesh(
        numbers, cmap=SEQUENTIAL, vmin=0, vmax=top, edgecolors="white", linewidth=0.4
    )
    _finish_grid(ax, mesh, label, columns, _ticks(values, row_axis))
    for (row, column), amount in np.ndenumerate(numbers.filled(0.0)):
        shown = token_label(str(words[row][column]))
        colour = "white" if amount > 0.6 * top else "0.15"
        ax.text(
            column + 0.5,
            row + 0.5,
            shown if len(shown) <= 9 else shown[:8] + "…",
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
        )
    ax.set_xlabel(_axis_name(values, column_axis))
    ax.set_ylabel(_axis_name(values, row_axis))
    return ax


def trajectories(
    mean: xr.DataArray,
    low: xr.DataArray,
    high: xr.DataArray,
    *,
    ax: Axes | None = None,
    label: str = "",
    logarithmic: bool = False,
) -> Axes:
    """Draw a line per entry of the second axis over the first, each with its band.

    ``label`` is the name of the vertical axis, with the unit; names of the lines are those of
    the second axis, in a legend where there are several.
    """
    row_axis, line_axis = (str(dim) for dim in mean.dims)
    ticks, names = _ticks(mean, row_axis), _ticks(mean, line_axis)
    ax = ax if ax is not None else new_axes(min(NOTEBOOK_WIDTH, max(4.6, 2 + 0.2 * len(ticks))))
    x = np.arange(len(ticks))
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        each = [np.asarray(part.values[:, i], dtype=float) for part in (mean, low, high)]
        shown = token_label(name) if len(names) > 1 else None
        ax.plot(x, each[0], marker="o", markersize=3.5, color=colour, label=shown)
        ax.fill_between(x, each[1], each[2], color=colour, alpha=0.2, linewidth=0)
    if logarithmic:
        ax.set_yscale("log")
    if len(names) > 1:
        legend(ax)
    _set_ticks(ax, "x", x, ticks)
    ax.set_xlim(-0.5, len(ticks) - 0.5)
    ax.set_xlabel(_axis_name(mean, row_axis))
    ax.set_ylabel(label)
    _open_frame(ax)
    return ax


def attention_pattern(
    pattern: Float[np.ndarray, "query_pos key_pos"],
    tokens: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    colour_bar: bool = True,
) -> Axes:
    """Draw one head's attention, queries downwards and keys to the right, white 0 to blue 1."""
    labels = [token_label(t) for t in tokens] if tokens is not None else None
    n_query, n_key = pattern.shape
    columns = labels if labels is not None else [str(i) for i in range(n_key)]
    rows = labels if labels is not None else [str(i) for i in range(n_query)]
    ax = ax if ax is not None else new_axes(5.6, 5.0)
    many = pattern.size > _MOST_SHAPES  # as a picture inside the PDF, not as so many shapes
    mesh = ax.pcolormesh(pattern, cmap=SEQUENTIAL, vmin=0, vmax=1, rasterized=many)
    _finish_grid(ax, mesh, "attention (share)" if colour_bar else None, columns, rows)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")
    ax.set_title(title, fontsize=10, loc="left")
    return ax


def legend(ax: Axes) -> None:
    """Name the lines to the right of the axes, where they hide nothing."""
    # matplotlib's search for the best place warns, on a busy machine, that it is slow.
    ax.legend(fontsize=_SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def waterfall(
    bars: Mapping[str, Float[np.ndarray, " prompt"]],
    *,
    ax: Axes | None = None,
    label: str = "",
    ends: int = 1,
) -> Axes:
    """Draw what adds up to a total: every bar starts where the last one ended.

    ``bars`` maps names to values per prompt, the last one being the total, which stands on the
    axis. The first ``ends - 1`` bars are grey like the total; others are red upwards and blue
    downwards, as in grids. Lines are 95 % intervals of the means. A part with NaN is said not
    to have been measured. ``label`` is the unit's axis.
    """
    ax = ax if ax is not None else new_axes(NOTEBOOK_WIDTH, 1.1 + 0.26 * len(bars))
    values = np.stack([np.asarray(each, dtype=float) for each in bars.values()])
    missing = np.asarray(np.isnan(values).any(1))
    values[missing] = 0.0
    means = values.mean(1)
    y = np.arange(len(bars))
    starts = np.concatenate([[0.0], np.cumsum(means[:-1])])
    starts[-1] = 0.0  # the total stands on the axis
    signs = [DOWN if mean < 0 else UP for mean in means]
    colours = ["0.35" if i < ends - 1 or i == len(y) - 1 else c for i, c in enumerate(signs)]
    ax.barh(y, means, left=starts, color=colours, height=0.7)
    reached = np.cumsum(means[:-1])
    ax.vlines(reached, y[:-1] + 0.35, y[1:] - 0.35, color="0.6", linewidth=0.7)
    if values.shape[1] > 1:
        low, high = bootstrap_interval(values)
        low, high = (np.where(missing, np.nan, starts + end) for end in (low, high))
        ax.hlines(y, low, high, color="0.1", linewidth=1.2)
    for place in y[missing].tolist():
        at = float(starts[place])
        ax.text(at, place, " not measured", fontsize=_SMALL, va="center", color="0.4")
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set_yticks(y, [drawable(name) for name in bars], fontsize=_SMALL)
    ax.invert_yaxis()
    ax.set_ylabel("component")
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=_SMALL)
    return ax


def title(ax: Axes, text: str, caption: str = "") -> None:
    """Write a title over the left edge, and under it a caption whose lines fit the picture."""
    width = ax.get_window_extent().width / ax.figure.dpi  # inches
    wrapped = [wrap(line, max(24, int(_LETTERS * width))) for line in caption.splitlines()]
    caption = "\n".join(line for lines in wrapped for line in lines)
    lines = caption.count("\n") + 1 if caption else 0
    ax.set_title(text, fontsize=10, loc="left", pad=6 + 1.35 * _SMALL * lines)
    if caption:
        note = ax.annotate(
            caption,
            (0, 1),
            (0, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            va="bottom",
            fontsize=_SMALL,
            color="0.35",
        )
        note.set_in_layout(False)  # the title's padding has made room for it


def _dots(ax: Axes, marked: np.ndarray, share: np.ma.MaskedArray) -> None:
    """Put a dot on each marked cell, light on strong colours and dark on pale ones."""
    rows, columns = np.nonzero(marked)
    size = float(np.clip(0.2 * _height(ax) / len(marked), 1.0, 3.2))
    strong = np.abs(share.filled(0)[rows, columns]) > 0.6
    ax.scatter(
        columns + 0.5, rows + 0.5, s=size**2, c=np.where(strong, "white", "0.2"), linewidths=0
    )


def _height(ax: Axes) -> float:
    """Return how high the axes are, in points."""
    return ax.get_window_extent().height / ax.figure.dpi * 72


def _width(ax: Axes) -> float:
    """Return how wide the axes are, in points."""
    return ax.get_window_extent().width / ax.figure.dpi * 72


def _finish_grid(
    ax: Axes, mesh: QuadMesh, label: str | None, columns: Sequence[str], rows: Sequence[str]
) -> None:
    """Label a grid and, unless ``label`` is None, its colours."""
    _set_ticks(ax, "x", np.arange(len(columns)) + 0.5, columns)
    _set_ticks(ax, "y", np.arange(len(rows)) + 0.5, rows)
    ax.patch.set(facecolor="0.9", hatch="////", edgecolor="0.7", linewidth=0)
    ax.spines[:].set_visible(False)
    if label is not None:
        bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, fraction=0.08, aspect=30)
        missing = np.ma.is_masked(mesh.get_array())
        bar.set_label(f"{label}; hatched: not measured" if missing else label, fontsize=9)
        bar.ax.tick_params(labelsize=_SMALL, length=2)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _set_ticks(
    ax: Axes, which: Literal["x", "y"], places: np.ndarray, labels: Sequence[str]
) -> None:
    most = _MOST_TICKS
    size = _height(ax) if which == "y" else _width(ax)
    most = min(most, max(4, int(size / (1.1 * _SMALL))))  # a line of small print each
    step = max(1, -(-len(labels) // most))
    axis = ax.xaxis if which == "x" else ax.yaxis
    shown = list(labels[::step])
    axis.set_ticks(places[::step], shown)
    letters = max(map(len, shown), default=0) * len(shown)
    turn = which == "x" and letters > min(60, _width(ax) / (0.6 * _SMALL))
    ax.tick_params(axis=which, labelsize=_SMALL, length=0, labelrotation=90 if turn else 0)


def _open_frame(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92", zorder=0)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=_SMALL)


def _ticks(values: xr.DataArray, axis: str) -> list[str]:
    return [drawable(str(label)) for label in values[axis].values]


def _axis_name(values: xr.DataArray, axis: str) -> str:
    return str(values[axis].attrs.get("long_name", axis.replace("_", " ")))


def _limit(numbers: np.ma.MaskedArray) -> float:
    top = float(np.abs(numbers).max()) if numbers.count() else 0.0
    return top or 1.0


def curve(
    x: Float[np.ndarray, " point"],
    values: Float[np.ndarray, " point"],
    *,
    low: Float[np.ndarray, " point"] | None = None,
    high: Float[np.ndarray, " point"] | None = None,
    ax: Axes | None = None,
    label: str = "",
    colour: str = COLOURS[0],
    marker: str = "o",
) -> Axes:
    """Draw numbers against a quantity (tokens, examples, steps), with a band where given.

    Called again on the same axes it adds a line; ``label`` names the line for a legend.
    """
    ax = ax if ax is not None else new_axes()
    ax.plot(x, values, marker=marker, markersize=4, color=colour, label=label)
    if low is not None and high is not None:
        ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    _open_frame(ax)
    return ax
