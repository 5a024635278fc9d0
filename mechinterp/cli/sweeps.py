"""Commands of long runs: init, run, status, results, diff."""

import json
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp.cli.shared import app, examples, print_table

if TYPE_CHECKING:
    from mechinterp.sweeps.opened import Found, Status, SweepRun

FAILED, STOPPED = 1, 3  # exit codes: some items failed; the disk is full or the like
_SHOWN = 30

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")]


@app.command(
    short_help="Write a spec to start a sweep from.", epilog=examples("init sweep.yaml")
)
def init(
    path: Annotated[Path, typer.Argument(metavar="SPEC.yaml")] = Path("sweep.yaml"),
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of specs, and stop.")
    ] = False,
) -> None:
    """Write a spec with comments to start from."""
    if schema:
        from mechinterp.sweeps.spec import json_schema

        typer.echo(json.dumps(json_schema(), indent=2))
        return
    from mechinterp.sweeps.template import TEMPLATE

    if path.exists():
        raise ValueError(f"{path} is there already. Name another file.")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} must end in .yaml.")
    path.write_text(TEMPLATE, encoding="utf-8")
    typer.echo(f"Wrote {path}. Next: mechinterp run {path} --out {path.stem} --dry-run")


@app.command(
    short_help="Run a sweep, from where it stopped.",
    epilog=examples(
        "run sweep.yaml --out runs/first --dry-run",
        "run sweep.yaml --out runs/first --workers 2",
    ),
)
def run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="A .yaml or .toml file.")],
    out: Annotated[Path, typer.Option(help="The run's folder, on a local disk.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will cost, and stop.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes; actors of a cluster, one per GPU or CPU by default."),
    ] = None,
    backend: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do failed items again.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights, which can run code.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Tell what happens in lines of JSON.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> int:
    """Run the sweep in SPEC from where it stopped; exit code 1: some failed, 3: disk full."""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise ValueError(f"--log-level {log_level}: pass debug, info, warning or error.")
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    from mechinterp.sweeps.spec import read_spec

    chosen = read_spec(spec)  # before torch is loaded
    trusted: dict[str, Any] = {
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        from mechinterp.sweeps.estimate import estimated

        typer.echo(estimated(chosen, out, **trusted))
        return 0
    import mechinterp as mi
    from mechinterp.sweeps.local import ChangedError, DiskFullError, StoppedError

    signal.signal(signal.SIGTERM, _ended)
    try:
        found = mi.run(
            chosen,
            out,
            workers=workers,
            backend=backend,
            address=address,
            retry_failed=retry_failed,
            output="json" if json_lines else "quiet" if quiet else "progress",
            **trusted,
        )
    except (DiskFullError, ChangedError, StoppedError) as error:
        typer.echo("mechinterp: " + " ".join(str(error).split()), err=True)
        return STOPPED
    now = found.status()
    if not (json_lines or quiet):
        typer.echo(_account(now))
    if now.failed:
        typer.echo(
            f"mechinterp: {now.failed} items failed. `mechinterp status {out}` says why, "
            "--retry-failed does them again.",
            err=True,
        )
    return FAILED if now.failed else 0


def _ended(*_: object) -> None:
    raise KeyboardInterrupt


@app.command(short_help="Say how far a sweep is.", epilog=examples("status runs/first"))
def status(
    folder: RunFolder,
    json_lines: Annotated[bool, typer.Option("--json", help="As one line of JSON.")] = False,
    tracebacks: Annotated[
        bool, typer.Option("--tracebacks", help="Whole tracebacks of failures.")
    ] = False,
) -> int:
    """Say how far the run in DIR is, how fast, and what failed; exit code 1 if anything did."""
    found = _opened(folder)
    now = found.status()
    if json_lines:
        told = {name: getattr(now, name) for name in now.__dataclass_fields__}
        typer.echo(json.dumps(told | {"items": now.items, "failures": found.failures}))
        return FAILED if now.failed else 0
    typer.echo(_account(now))
    for what, error in found.failures.items():
        last = error.strip().splitlines()[-1:] or [""]
        typer.echo(f"failed: {what}\n" + (error if tracebacks else f"  {last[0]}"))
    return FAILED if now.failed else 0


def _account(now: "Status") -> str:
    from mechinterp.sweeps.progress import span

    parts = [f"{now.name}: {now.done} of {now.items} items done"]
    parts += [
        f"{getattr(now, n)} {n}" for n in ("running", "todo", "failed") if getattr(now, n)
    ]
    lines = [", ".join(parts), f"{now.cells_done:,} of {now.cells:,} cells"]
    if now.rate:
        lines[-1] += f", {now.rate:,.1f} cells per second and worker"
    if now.left:
        who = f"{now.workers} workers" if now.workers > 1 else "one worker"
        lines.append(f"about {span(now.left)} left for {who}")
    return "\n".join(lines)


@app.command(
    short_help="Show what a sweep found.",
    epilog=examples(
        "results runs/first",
        "results runs/first --sql 'SELECT method, count(*) AS n FROM numbers GROUP BY method'",
        "results runs/first --csv numbers.csv",
    ),
)
def results(
    folder: RunFolder,
    sql: Annotated[
        str | None, typer.Option(help="DuckDB's SQL over the table `numbers`.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write the table here; all numbers without --sql.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Lines of the table that is shown.")] = _SHOWN,
    everything: Annotated[
        bool, typer.Option("--all", help="What earlier specs made there, too.")
    ] = False,
) -> None:
    """Show what the run in DIR found: calls and the size of their effects, or a query."""
    found = _opened(folder, everything)
    if csv is not None and not csv.absolute().parent.is_dir():
        raise ValueError(f"the folder {csv.absolute().parent} does not exist. Create it first.")
    if csv is not None:
        from mechinterp._files import written_beside

        table = found.to_frame() if sql is None else found.sql(sql)
        with written_beside(csv) as part:
            table.to_csv(part, index=False)
        typer.echo(f"Wrote {len(table):,} rows to {csv}")
        return
    if sql is not None:
        table = found.sql(sql)
        print_table(f"{len(table):,} rows", table.head(rows))
        return
    import pandas as pd

    from mechinterp.sweeps.opened import telling

    listed = found.results()
    if not listed:
        typer.echo("Nothing is done yet.")
        return
    labels = telling([each.item for each in listed])
    lines = [_line(listed[i], labels[i]) for i in range(min(rows, len(listed)))]
    table = pd.DataFrame(lines)
    table = table.dropna(axis="columns", how="all").astype(object)
    table = table.where(table.notna(), "")
    print_table(f"{len(listed):,} results", table)


def _line(found: "Found", labels: dict[str, Any]) -> dict[str, Any]:
    """Return what a table says of one call: its labels and its largest effect."""
    shown = dict(labels)
    result: Any = found.result
    try:
        best = result.top(1)
    except (ValueError, KeyError):
        best = None
    if best is not None and len(best):
        first = best.iloc[0]
        name = "effect" if "effect" in best.columns else None
        if name is not None:
            place = [f"{c} {first[c]}" for c in best.columns if c in result.data.dims]
            shown |= {"largest effect": float(first[name]), "at": ", ".join(place)}
    return shown | {"complete": "yes" if found.complete else "no"}


@app.command(
    short_help="Compare two sweeps number by number.",
    epilog=examples("diff runs/first runs/second --tolerance 1e-5"),
)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The folder of a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The folder of another.")],
    rows: Annotated[int, typer.Option(help="Lines of the table.")] = _SHOWN,
    tolerance: Annotated[float, typer.Option(help="Differences up to here are none.")] = 0.0,
) -> int:
    """Compare two runs cell by cell; exit code 1 if any number differs or is in one alone."""
    from mechinterp.sweeps.compare import compared

    found = compared(_opened(a), _opened(b), tolerance=tolerance)
    print_table(found.summary, found.calls.head(rows))
    if len(found.cells):
        print_table("The largest differences", found.cells.head(rows))
    return 0 if found.same else FAILED


def _opened(folder: Path, everything: bool = False) -> "SweepRun":
    from mechinterp.sweeps.opened import open_run

    return open_run(folder, all_plans=everything)
