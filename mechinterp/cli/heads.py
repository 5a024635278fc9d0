"""Commands of what heads do: heads, induction."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp.cli.shared import (
    ModelArgument,
    Out,
    Seed,
    app,
    check_out,
    examples,
    load_any,
    print_table,
    read_names,
    read_text,
    save_figure,
)


@app.command(
    short_help="Score what every head does.",
    epilog=examples(
        "heads smollm2-135m --kinds induction,previous_token",
        "heads embedded book.txt --out scores.nc",
    ),
)
def heads(
    model: ModelArgument = "embedded",
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="A built-in task, a .jsonl of prompts or a .txt; random tokens without.",
        ),
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help="induction, previous_token, copying, ... with commas.")
    ] = None,
    n: Annotated[int, typer.Option(help="Draws of random tokens, or prompts.")] = 50,
    nulls: Annotated[int, typer.Option(help="Untrained models to compare with.")] = 1,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Score every head of MODEL for what it does, and say which stand out."""
    check_out(out)
    asked = None if kinds is None else read_names(kinds)

    import mechinterp as mi

    loaded = mi.load_model(model)
    on = None if data is None else load_any(data, loaded, n, seed, context=256)
    scores = mi.head_scores(loaded, on, kinds=asked, n=n, nulls=nulls, seed=seed)
    tables = {kind: scores.top(5, metric=kind) for kind in scores.kinds}
    for kind, top in tables.items():
        print_table(f"{kind.replace('_', ' ')} ({scores.convention.metrics[kind]})", top)
    for note in dict.fromkeys(top.attrs.get("note") for top in tables.values()):
        if note:
            typer.echo(note)
    if out is not None:
        scores.save(out)
        save_figure(scores.figure(), out)


@app.command(
    short_help="Gather the evidence on induction heads.",
    epilog=examples("induction embedded --out dossier"),
)
def induction(
    model: ModelArgument = "embedded",
    k: Annotated[int, typer.Option(help="How many candidate heads.")] = 5,
    least: Annotated[
        float, typer.Option(help="A head matches prefixes from so much attention above chance.")
    ] = 0.1,
    n: Annotated[int, typer.Option(help="Draws of random tokens.")] = 50,
    length: Annotated[int, typer.Option(help="Different tokens of a draw.")] = 25,
    sets: Annotated[int, typer.Option(help="Different random sets of heads.")] = 1000,
    prompts: Annotated[int, typer.Option(help="Prompts of knock-outs and paths.")] = 16,
    text: Annotated[
        Path | None, typer.Option(help="A .txt for the in-context-learning score.")
    ] = None,
    late: Annotated[int, typer.Option(help="Which token of it is late.")] = 500,
    early: Annotated[int, typer.Option(help="Which is early.")] = 50,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the account, figure and results.")
    ] = None,
) -> None:
    """Gather the evidence on MODEL's induction heads in one account."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file. Name a folder.")

    import mechinterp as mi

    loaded = mi.load_model(model)
    most = late + 12  # room for special tokens
    read = None if text is None else read_text(text, loaded, most)
    dossier = mi.induction_dossier(
        loaded,
        text=read,
        late=late,
        early=early,
        k=k,
        least=least,
        n=n,
        length=length,
        n_sets=sets,
        n_prompts=prompts,
        seed=seed,
    )
    typer.echo(dossier.summary())
    if out is not None:
        typer.echo(f"Saved the dossier in {dossier.save(out)}")
