"""The command that reads states out: lens, with --attribution for shares of the logits."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli.shared import (
    Heads,
    Layers,
    Memory,
    ModelArgument,
    Out,
    Prompts,
    Seed,
    app,
    check_out,
    examples,
    load_any,
    read_integers,
    read_positions,
    show,
)


@app.command(
    short_help="Read out a prediction at every layer.",
    epilog=examples(
        "lens smollm2-135m ioi --n 8 --out lens.nc", "lens smollm2-135m ioi --attribution"
    ),
)
def lens(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(metavar="TASK", help="A built-in task, a .jsonl file or a .txt file."),
    ],
    site: Annotated[
        str,
        typer.Option(
            help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, result, mlp_post."
        ),
    ] = "resid_post",
    layers: Layers = None,
    heads: Heads = None,
    neurons: Annotated[
        str | None, typer.Option(help="Neurons of mlp_post: 3, 1,4 or 0:6.")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Where to read: the answer of a task, each of a text by default."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="A token to follow; again for another.")
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Translate by the tuned lens in this file first.")
    ] = None,
    attribution: Annotated[
        bool,
        typer.Option("--attribution", help="Shares of heads and MLPs in the logits instead."),
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="Tokens per piece of a .txt file.")
    ] = None,
    n: Prompts = None,
    seed: Seed = 0,
    out: Out = None,
    memory: Memory = None,
) -> None:
    """Read out what MODEL would predict at each layer of TASK, or attribute its logits."""
    check_out(out)
    read: dict[str, Any] = {
        "layers": read_integers("layers", layers),
        "heads": read_integers("heads", heads),
        "neurons": read_integers("neurons", neurons),
        "positions": None if positions is None else read_positions(positions),
        "targets": targets or None,
    }
    given = [name for name, value in read.items() if value is not None]
    if attribution and (given or tuned is not None or site != "resid_post"):
        raise ValueError(
            "--attribution is of all components at the answer. Leave "
            f"{', '.join(f'--{name}' for name in given) or '--site and --tuned'} out."
        )
    if attribution and data.endswith(".txt"):
        raise ValueError("--attribution needs answers. Pass a task, not a .txt file.")

    import mechinterp as mi

    loaded = mi.load_model(model)
    chosen = load_any(data, loaded, n, seed, context)
    if attribution:
        found = mi.direct_logit_attribution(loaded, chosen, memory=memory)
        show(found, "direct logit attribution", out)
        return
    by = None if tuned is None else mi.TunedLens.load(tuned, loaded)
    result = mi.logit_lens(loaded, chosen, site=site, **read, lens=by, memory=memory)
    show(result, f"{site}, {result.convention.settings['lens']} lens", out)
