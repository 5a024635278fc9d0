"""The command line: parse, call one public function, show or save what it returns.

torch and the models are imported inside the commands, so that ``--help`` answers at once.
"""

import sqlite3
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from mechinterp._version import __version__
from mechinterp.cli import ablation as ablation
from mechinterp.cli import basics as basics
from mechinterp.cli import causal as causal
from mechinterp.cli import heads as heads
from mechinterp.cli import icl as icl
from mechinterp.cli import lens as lens
from mechinterp.cli import pruning as pruning
from mechinterp.cli import redundancy as redundancy
from mechinterp.cli import reporting as reporting
from mechinterp.cli import sweeps as sweeps
from mechinterp.cli.shared import app


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"mechinterp {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what the user got wrong is one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = get_command(app)(given, standalone_mode=False)
    except typer.TyperException as error:
        _fail(error.format_message())
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(str(error))
    except sqlite3.Error as error:
        _fail(f"the run's ledger: {error}. Try again; if a process hangs, end it.")
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("mechinterp: interrupted", err=True)
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    typer.echo("mechinterp: " + " ".join(message.split()), err=True)
    sys.exit(2)
