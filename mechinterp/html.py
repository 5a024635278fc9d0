"""Results in notebooks: what was measured, the largest numbers, and an inline picture.

All text is escaped: a prompt is text, whatever it contains.
"""

import sys
from base64 import b64encode
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mechinterp.results import Convention, Result

_ROWS = 8


def figure_of(drawn: Axes | Figure) -> Figure:
    """Return the whole figure of what a ``plot`` or ``figure`` drew, taken off any display."""
    figure = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    assert figure is not None
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:  # in a notebook the cell would show it a second time
        pyplot.close(figure)
    return figure


def png_of(drawn: Axes | Figure, dpi: int = 110) -> bytes:
    """Return a picture as PNG, with all that stands around its axes."""
    held = BytesIO()
    figure_of(drawn).savefig(held, format="png", dpi=dpi, bbox_inches="tight")
    return held.getvalue()


def image(png: bytes, described: str) -> str:
    """Return an ``<img>`` that carries its own bytes."""
    data = b64encode(png).decode("ascii")
    return (
        f'<img alt="{escape(described)}" src="data:image/png;base64,{data}" '
        'style="max-width:100%;background:white">'
    )


def words_of(name: str) -> str:
    """Return the name of a class as words: ``PatchingResult`` is a patching result."""
    parts = "".join(f" {c.lower()}" if c.isupper() else c for c in name).split()
    return " ".join(parts).capitalize()


def about(convention: "Convention") -> list[tuple[str, str]]:
    """Return what a reader asks first of a result, as pairs of a name and a value."""
    metrics = ", ".join(
        name + (f" ({unit})" if unit else "") for name, unit in convention.metrics.items()
    )
    told = {
        "method": convention.method,
        "model": convention.model,
        "data": convention.data,
        "site": convention.site,
        "direction": convention.direction,
        "ablation": convention.ablation,
        "metric": metrics,
    }
    return [(name, str(value)) for name, value in told.items() if value]


def result_html(result: "Result") -> str:
    """Return what a notebook shows of a result.

    What cannot be drawn or ranked is named with its reason and leaves the rest alone.
    """
    told = ", ".join(
        f"<b>{escape(name)}</b>&nbsp;{escape(value)}"
        for name, value in about(result.convention)
    )
    return (
        f"<div><p><b>{escape(type(result).__name__)}</b><br>{told}</p>"
        f"{_table(result)}{_picture(result)}</div>"
    )


def _table(result: "Result") -> str:
    try:
        table = result.top(_ROWS)
    except ValueError as error:
        return _reason("No table", error)
    return str(table.to_html(index=False, escape=True, float_format="{:.4g}".format)) + "".join(
        f"<p><small>{escape(line)}</small></p>"
        for line in table.attrs.get("note", "").splitlines()
    )


def _picture(result: "Result") -> str:
    try:
        return image(png_of(result.plot()), described(result))
    except ValueError as error:
        return _reason("No picture", error)


def described(result: "Result") -> str:
    """Return what stands in place of a result's picture for those who cannot see it."""
    told: Any = dict(about(result.convention))
    return f"{words_of(type(result).__name__)}: " + ", ".join(map(str, told.values()))


def _reason(what: str, error: Exception) -> str:
    return f"<p><small>{what}: {escape(str(error))}</small></p>"
