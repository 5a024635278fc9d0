"""The command that makes saved results readable: report."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp.cli.shared import app, examples


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
