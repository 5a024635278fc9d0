"""The command of in-context learning: loss against context, or few-shot curves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp.cli.shared import (
    ModelArgument,
    Out,
    Seed,
    app,
    check_out,
    examples,
    print_table,
    read_integers,
    store,
)

if TYPE_CHECKING:
    from mechinterp.tasks.pairs import Pairs


@app.command(
    short_help="Measure learning in context.",
    epilog=examples(
        "icl smollm2-135m book.txt",
        "icl smollm2-135m country-capital --shots 0,1,2,4 --out few.nc",
    ),
)
def icl(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="TEXT_OR_PAIRS",
            help="A .txt file or a folder of them, for the score; a list of pairs "
            "(country-capital, ...) or a .json file of them, for few-shot curves.",
        ),
    ],
    late: Annotated[int, typer.Option(help="Which token of the text is late.")] = 500,
    early: Annotated[int, typer.Option(help="Which is early.")] = 50,
    context: Annotated[
        int | None, typer.Option(help="Tokens in a piece of text; the least needed by default.")
    ] = None,
    shots: Annotated[str, typer.Option(help="Numbers of examples.")] = "0,1,2,4,8",
    n: Annotated[int, typer.Option(help="How many queries.")] = 100,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Measure what MODEL learns in context: from running text, or from examples."""
    check_out(out)
    counts = read_integers("shots", shots)
    documents = _documents(data)

    import mechinterp as mi

    pairs = _pairs(data) if documents is None else None
    loaded = mi.load_model(model)
    result: Any
    if documents is not None:
        needed = min(late + 1, loaded.cfg.n_ctx)
        cut = needed if context is None else context
        text = mi.Text.from_strings(loaded, documents, context=cut, name=Path(data).stem)
        result = mi.icl_score(loaded, text, late=late, early=early)
        print_table(f"Loss at token {late} minus at {early} (nats)", result.summary())
    else:
        numbers = [counts] if isinstance(counts, int) else counts
        result = mi.few_shot(loaded, pairs, shots=numbers or [], n=n, seed=seed)
        frame = result.accuracy.to_pandas().reset_index()
        title = f"{result.convention.data}: whole answers right, by number of examples"
        print_table(title, frame)
    store(result, out)


def _documents(data: str) -> list[str] | None:
    """Return the texts of a .txt file or of a folder of them; None where it is no text.

    Raises:
        FileNotFoundError: There is no such file, or none in the folder.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise FileNotFoundError(
                f"{path} has no .txt files in it. Name a folder that has, or one file."
            )
        return [file.read_text(encoding="utf-8") for file in files]
    return [path.read_text(encoding="utf-8")] if path.suffix == ".txt" else None


def _pairs(data: str) -> "Pairs":
    """Return a packaged list of pairs, or one from a .json file.

    Raises:
        ValueError: There is no such list, or the file holds something else.
    """
    from mechinterp.tasks.pairs import Pairs, load_pairs

    if not data.endswith(".json"):
        return load_pairs(data)
    path = Path(data)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        words = tuple((str(row["input"]), str(row["output"])) for row in rows)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is no list of {{"input": ..., "output": ...}} objects ({error!r}).'
        ) from error
    return Pairs(path.stem, words)
