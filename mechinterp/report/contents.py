"""What a report shows of a result: its own panels, every cell, the largest, a figure."""

from mechinterp.causal.attribution_result import AttributionResult
from mechinterp.causal.diagram import has_edges
from mechinterp.causal.patching_result import PatchingResult
from mechinterp.heads.redundancy_result import RedundancyAtlas
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
    return [*drawn, *_diagrams(result), _largest(result), _picture(result)]


def _largest(result: Result) -> Table:
    table = result.top(_ROWS)
    return Table.of("Largest effects", table, str(table.attrs.get("note", "")))


def _diagrams(result: Result) -> list[Picture]:
    """Return the circuit of edges or paths, and heads by likeness with their dendrogram."""
    if isinstance(result, RedundancyAtlas):
        drawn = result.figure()
        return [Picture("Heads by likeness", png_of(drawn), described(result))]
    if not isinstance(result, PatchingResult | AttributionResult):
        return []
    if not has_edges(result.effect, result.convention):
        return []
    return [Picture("The circuit", png_of(result.diagram()), described(result))]


def _picture(result: Result) -> Picture:
    try:
        drawn = result.plot()
    except ValueError as error:
        return Picture("Figure", b"", "", f"Cannot be drawn: {error}")
    return Picture("Figure for print", png_of(drawn), described(result))
