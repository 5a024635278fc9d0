"""What a report shows of a result: its own panels, every cell, the largest, a figure."""

from mechinterp.html import described, png_of
from mechinterp.report.cells import cells_of
from mechinterp.report.curves import curves_of
from mechinterp.report.own import has_own_cells, own_panels
from mechinterp.report.panels import Panel, Picture, Table
from mechinterp.results import Result

_ROWS = 200


def panels_of(result: Result) -> list[Panel]:
    """Return what a report shows of a result, in the order in which it is read."""
    cells = None if has_own_cells(result) else cells_of(result)
    effects = [cells] if cells is not None else []
    drawn = [*own_panels(result), *curves_of(result), *effects]
    return [*drawn, _largest(result), _picture(result)]


def _largest(result: Result) -> Table:
    table = result.top(_ROWS)
    return Table.of("Largest effects", table, str(table.attrs.get("note", "")))


def _picture(result: Result) -> Picture:
    try:
        drawn = result.plot()
    except ValueError as error:
        return Picture("Figure", b"", "", f"Cannot be drawn: {error}")
    return Picture("Figure for print", png_of(drawn), described(result))
