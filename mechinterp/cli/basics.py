"""Commands to begin with: the quickstart, and what a model offers."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp.cli.shared import ModelArgument, app, examples, print_table


@app.command(
    short_help="Find a circuit in ten seconds, on the embedded model.",
    epilog=examples("quickstart --out first-circuit"),
)
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for figures and results.")] = Path(
        "mechinterp-quickstart"
    ),
) -> None:
    """Find the induction heads of the embedded model, and see what they are for."""
    from mechinterp.quickstart import quickstart as run

    run(out)


@app.command(
    "sites",
    short_help="List what can be read and changed in a model.",
    epilog=examples("sites smollm2-135m"),
)
def list_sites(model: ModelArgument = "embedded") -> None:
    """List where MODEL's activations can be read and changed, and why not elsewhere."""
    import mechinterp as mi

    found = mi.sites(mi.load_model(model))
    print_table(f"Sites of {found.model_name}", found.to_frame())


@app.command(
    "tasks", short_help="List what a model can do.", epilog=examples("tasks smollm2-135m")
)
def list_tasks(model: ModelArgument = "embedded") -> None:
    """List which tasks MODEL can run, on how many prompts, and how well."""
    import mechinterp as mi

    found = mi.tasks(mi.load_model(model))
    frame = found.to_frame()
    frame["accuracy"] = [f"{x:.0%}" if x == x else "" for x in frame["accuracy"].astype(float)]
    print_table(f"Tasks for {found.model_name}", frame)
