"""The command of what a model loses without a part: ablate."""

from typing import Annotated, Any

import typer

from mechinterp.cli.shared import (
    Memory,
    MetricName,
    ModelArgument,
    Out,
    Prompts,
    Seed,
    app,
    check_out,
    examples,
    load_any,
    print_table,
    read_units,
    show,
    store,
)

_PARTS = {"heads": "head_ablation", "mlps": "mlp_ablation", "neurons": "neuron_ablation"}


@app.command(
    short_help="Take heads, MLPs or neurons out.",
    epilog=examples(
        "ablate embedded induction --kind mean --out heads.nc",
        "ablate embedded induction --only 0.3+1.7",
        "ablate smollm2-135m ioi --only 20.3 --repair",
    ),
)
def ablate(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A built-in task, a .jsonl (prompts, or text and label) or a .txt file.",
        ),
    ],
    parts: Annotated[str, typer.Option(help="heads, mlps or neurons.")] = "heads",
    only: Annotated[
        str | None,
        typer.Option(
            help="Which: pairs, layers, 3.1,3.2 one by one, or 3.1+3.2 together; all without."
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="zero, mean, position_mean, resample or corrupted.")
    ] = "zero",
    reference: Annotated[
        str | None, typer.Option(help="Data that means and resamples come from.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Split the effect: who makes up for the heads?")
    ] = False,
    screen: Annotated[
        str | None,
        typer.Option(help="bfloat16: look at all heads so first, then exactly at the largest."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per piece of a .txt file.")
    ] = None,
    metric: MetricName = None,
    n: Prompts = None,
    seed: Seed = 0,
    out: Out = None,
    memory: Memory = None,
) -> None:
    """Take parts of MODEL out, one by one or together, and measure what DATA loses."""
    check_out(out)
    if parts not in _PARTS:
        from mechinterp.names import unknown

        raise ValueError(unknown("kind of part", parts, tuple(_PARTS)))
    if repair and (parts != "heads" or metric is not None):
        raise ValueError("--repair splits the logit difference of heads. Leave the rest out.")
    if screen is not None and (parts != "heads" or repair):
        raise ValueError("--screen is for the effects of heads. Leave the rest out.")
    chosen = None if only is None else _read(only, parts)

    import mechinterp as mi

    loaded = mi.load_model(model)
    on = load_any(data, loaded, n, seed, context)
    options: dict[str, Any] = {"kind": kind, "seed": seed, "memory": memory}
    if reference is not None:
        options["reference"] = load_any(reference, loaded, None, seed, context)
    if screen is not None:
        options["screen"] = screen
    if not repair:
        found = getattr(mi, _PARTS[parts])(
            loaded, on, **{parts: chosen}, metric=metric, **options
        )
        show(found, f"{kind}-ablation of {parts}", out)
        return
    split = mi.self_repair(loaded, on, chosen, **options)
    means = split.data[["total", "direct", "rescaling"]].mean("prompt")
    frame = means.assign(repair=split.repair.mean("prompt")).to_dataframe().reset_index()
    print_table(f"self-repair after {kind}-ablation, {on.name}: {len(on)} prompts", frame)
    if len(on) > 1:
        table = split.compensators().head(10)
        print_table(f"{len(table)} components work against the loss", table)
    store(split, out)


def _read(text: str, parts: str) -> Any:
    """Read ``pairs``, ``layers``, ``3.1,3.2`` or ``3.1+3.2,0.4+1.5``; layers of MLPs."""
    if text in ("pairs", "layers"):
        return text
    sets = [[_part(name, parts) for name in one.split("+")] for one in text.split(",")]
    return [one[0] for one in sets] if all(len(one) == 1 for one in sets) else sets


def _part(name: str, parts: str) -> Any:
    if parts != "mlps":
        return read_units(name, "--only")[0]
    number = name.strip().removesuffix(".mlp")
    if not number.isdecimal():
        raise ValueError(f"--only {name!r} is no layer. Pass 3,5.")
    return int(number)
