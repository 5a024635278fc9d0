"""What commands share: options, how their text is read, and how a result is shown."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.results import Result
    from mechinterp.tasks import PositionSpec

app = typer.Typer(
    name="mechinterp",
    help="Find the circuit behind a transformer's behaviour, and prove it causally.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="embedded, smollm2-135m, a hub name, a folder or a .gguf file.",
    ),
]


TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="A built-in task, or a .jsonl file.")
]
Direction = Annotated[str, typer.Option(help="denoising or noising.")]
Positions = Annotated[
    str, typer.Option(help="each, all, role names, integers or start:stop, with commas.")
]
Layers = Annotated[str | None, typer.Option(help="Layers: 3, 1,4 or 0:6.")]
Heads = Annotated[str | None, typer.Option(help="Heads: 3, 1,4 or 0:6.")]
MetricName = Annotated[str | None, typer.Option(help="A metric; the task's by default.")]
Align = Annotated[str, typer.Option(help="How unequal spans pair: exact or last.")]
Prompts = Annotated[int | None, typer.Option(help="How many prompts; all by default.")]
Seed = Annotated[int, typer.Option(help="Which prompts are drawn.")]
FirstToken = Annotated[
    bool,
    typer.Option("--first-token", help="Let an answer of several tokens stand for its first."),
]
Memory = Annotated[
    str | None, typer.Option(help="How much to take, such as 2GB; 60 % of free by default.")
]
Out = Annotated[
    Path | None, typer.Option(help="Save the result here (.nc), and its figure beside it.")
]


def examples(*lines: str) -> str:
    """Return what stands below a command's help: calls of it, as they are typed."""
    return "\b\nExamples:\n" + "\n".join(f"  mechinterp {line}" for line in lines)


def check_out(out: Path | None) -> None:
    """Raise a ``ValueError`` unless a result can be saved there."""
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"the folder {out.absolute().parent} does not exist. Create it first.")
    if out is not None and out.suffix != ".nc":
        raise ValueError(f"--out {out} must end in .nc; the figure goes beside it as .png.")


def load_data(
    name: str, model: Any, n: int | None, seed: int, first_token: bool = False
) -> Any:
    """Return a built-in task or one from a file, ``n`` prompts of it."""
    from mechinterp.tasks.named import load_prompts

    return load_prompts(name, model, n, seed, first_token)


def load_any(
    name: str, model: Any, n: int | None, seed: int, context: int | None = None
) -> Any:
    """Return the data of that name: a task, the text in a .txt file, or labelled texts."""
    from mechinterp.tasks.named import load_named

    return load_named(name, model, n, seed, context)


def read_text(path: Path, model: Any, context: int | None = None) -> Any:
    """Return a file's text in pieces of so many tokens, or as many as the model holds."""
    from mechinterp.tasks.named import load_text

    return load_text(path, model, context)


def show(result: "Result", title: str, out: Path | None, rows: int = 10) -> None:
    """Print the largest effects, and save the result and its figure where one is wanted."""
    name, unit = next(iter(result.convention.metrics.items()))
    means = [
        f"{run} {float(result.of_metric(result.data[run]).mean()):.3f}"
        for run in ("clean", "corrupted", "intact")
        if run in result.data
    ]
    about = _counted(result) if "prompt" in result.data.sizes else ""
    heading = ". ".join(
        part
        for part in (
            f"{title}, {result.convention.data}" + (f": {about}" if about else ""),
            f"Mean {name} ({unit}): {', '.join(means)}" if means else "",
            f"Effect: {'change of ' if means else ''}{name}" + (f" ({unit})" if unit else ""),
        )
        if part
    )
    top = result.top(rows)
    print_table(heading, top)
    if note := top.attrs.get("note"):
        typer.echo(note)
    store(result, out)


def store(result: "Result", out: Path | None) -> None:
    """Save the result and its figure, where they are wanted."""
    if out is not None:
        result.save(out)
        figure = result.plot().get_figure(root=True)
        assert figure is not None
        save_figure(figure, out)


def save_figure(figure: Any, out: Path) -> None:
    """Save the figure of a result beside it, with all that stands around its axes."""
    figure.savefig(out.with_suffix(".png"), dpi=150, bbox_inches="tight")
    typer.echo(f"Saved {out} and {out.with_suffix('.png')}")


def _counted(result: "Result") -> str:
    """Return over how many prompts a result is; draws of one are not prompts of their own."""
    n = result.data.sizes["prompt"]
    cases = len(set(result.data["case"].values.tolist())) if "case" in result.data else n
    prompts = f"{cases} prompt{'' if cases == 1 else 's'}"
    return prompts if cases == n else f"{n} draws of {prompts}"


def read_names(text: str) -> str | list[str]:
    """Read ``q`` or ``9.6.q,9.9.q``."""
    parts = [part.strip() for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def read_units(text: str, option: str) -> list[tuple[int, int]]:
    """Read ``3.1,3.2``: heads or neurons by layer and number."""
    found = []
    for name in text.split(","):
        numbers = name.strip().split(".")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{option} {name!r} is no layer and number. Pass 3.1,3.2.")
        found.append((int(numbers[0]), int(numbers[1])))
    return found


def read_positions(text: str) -> "PositionSpec":
    """Read ``each``, ``all``, ``end``, ``io,end``, ``-1``, ``3,5`` or ``2:6``."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1:
        return _slice(text) or _name_or_integer(parts[0])
    return [_name_or_integer(part) for part in parts]


def _name_or_integer(part: str) -> str | int:
    return int(part) if part.removeprefix("-").isdecimal() else part


def read_integers(option: str, text: str | None) -> int | list[int] | None:
    """Read ``3``, ``1,4`` or ``0:6``."""
    if text is None:
        return None
    span = _slice(text)
    if span is not None and span.stop is not None:
        return list(range(span.start or 0, span.stop, span.step or 1))
    parts = [_name_or_integer(part.strip()) for part in text.split(",")]
    numbers = [part for part in parts if isinstance(part, int)]
    if len(numbers) < len(parts):
        raise ValueError(f"--{option} {text!r} is not a list of numbers. Pass 3, 1,4 or 0:6.")
    return numbers


def _slice(text: str) -> slice | None:
    bounds = [bound.strip() for bound in text.split(":")]
    if not 2 <= len(bounds) <= 3:
        return None
    if any(bound and not bound.removeprefix("-").isdecimal() for bound in bounds):
        return None
    return slice(*[int(bound) if bound else None for bound in bounds])


def print_table(title: str, frame: "pd.DataFrame") -> None:
    """Print a frame as a table as wide as the terminal; 160 columns where there is none."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in frame.columns:
        table.add_column(str(column), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*[_cell(value) for value in row])
    console.print(title, style="italic", soft_wrap=True, markup=False)
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
