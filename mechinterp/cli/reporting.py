"""Commands that show saved results: plot and report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli.shared import app, examples

FORMATS = (".png", ".svg", ".pdf")


@app.command(
    short_help="Draw a saved result.",
    epilog=examples("plot z.nc -o z.pdf", "plot paths.nc --diagram -o circuit.svg"),
)
def plot(
    source: Annotated[Path, typer.Argument(metavar="RESULT", help="A saved result (.nc).")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The .png, .svg or .pdf to write.")
    ] = Path("figure.pdf"),
    diagram: Annotated[
        bool, typer.Option("--diagram", help="Paths or edges as arrows between their nodes.")
    ] = False,
) -> None:
    """Draw a saved result as a picture for a paper."""
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out} must end in one of {', '.join(FORMATS)}.")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"the folder {out.absolute().parent} does not exist. Create it first.")
    import mechinterp as mi
    from mechinterp._files import written_beside
    from mechinterp.html import figure_of

    result: Any = mi.load_result(source)
    if diagram and not hasattr(result, "diagram"):
        kind = type(result).__name__
        raise ValueError(f"{source} holds a {kind}, which has no edges. Leave --diagram out.")
    drawn = figure_of(result.diagram() if diagram else result.plot())
    with written_beside(out) as part:
        drawn.savefig(part, format=out.suffix[1:].lower(), dpi=150, bbox_inches="tight")
    typer.echo(f"Wrote {out}")


@app.command(
    short_help="Write results as one HTML file.",
    epilog=examples("report z.nc -o z.html", "report runs/heads -o heads.html"),
)
def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RESULT_OR_FOLDER",
            help="A saved result (.nc), a folder of them, or the folder of a run.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option(help="What stands at the top.")] = None,
) -> None:
    """Write saved results as one interactive HTML file that needs no network."""
    import mechinterp as mi

    mi.report(source, out, title=title)
    typer.echo(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB). Open it in any browser.")
