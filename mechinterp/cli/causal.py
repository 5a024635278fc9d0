"""Commands of what causes a behaviour: patch, paths, attribute."""

from typing import Annotated, Any

import typer

from mechinterp.cli.shared import (
    Align,
    Direction,
    FirstToken,
    Heads,
    Layers,
    Memory,
    MetricName,
    ModelArgument,
    Out,
    Positions,
    Prompts,
    Seed,
    TaskArgument,
    app,
    check_out,
    examples,
    load_data,
    read_integers,
    read_names,
    read_positions,
    show,
)


@app.command(
    short_help="Patch activations, one place at a time.",
    epilog=examples(
        "patch embedded induction z --out z.nc",
        "patch smollm2-135m ioi resid_pre --positions subject,end --n 32",
        "patch smollm2-135m known_facts mlp_out --noise subject --window 10 --dry-run",
    ),
)
def patch(
    model: ModelArgument,
    task: TaskArgument,
    site: Annotated[str, typer.Argument(metavar="SITE", help="z, resid_pre, pattern, ...")],
    direction: Direction = "denoising",
    positions: Positions = "each",
    layers: Layers = None,
    heads: Heads = None,
    window: Annotated[
        int, typer.Option(help="Layers around each to patch together (causal tracing).")
    ] = 1,
    noise: Annotated[
        str | None,
        typer.Option(help="Corrupt by noise on this role's embedding, ten draws a prompt."),
    ] = None,
    metric: MetricName = None,
    align: Align = "exact",
    n: Prompts = None,
    first_token: FirstToken = False,
    seed: Seed = 0,
    out: Out = None,
    memory: Memory = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will cost, and stop.")
    ] = False,
) -> None:
    """Patch SITE of MODEL on TASK, one cell at a time, and rank the cells."""
    check_out(out)
    swept: dict[str, Any] = {
        "direction": direction,
        "positions": read_positions(positions),
        "layers": read_integers("layers", layers),
        "heads": read_integers("heads", heads),
        "align": align,
        "window": window,
    }

    import mechinterp as mi

    loaded = mi.load_model(model)
    data = load_data(task, loaded, n, seed, first_token)
    if noise is not None:
        data = mi.noise_corruption(loaded, data, role=read_positions(noise), seed=seed)
    if dry_run:
        cells = mi.patching_cells(loaded, data, site, **swept)
        on = "corrupted" if direction == "denoising" else "clean"
        typer.echo(mi.plan(loaded, data, cells, on=on, metric=metric, memory=memory))
        return
    result = mi.activation_patching(loaded, data, site, **swept, metric=metric, memory=memory)
    show(result, f"{site}, {direction}", out)


@app.command(
    short_help="Patch along the paths between parts.",
    epilog=examples(
        "paths embedded induction 1.7.k --senders z",
        "paths smollm2-135m ioi logits --n 32 --out paths.nc",
    ),
)
def paths(
    model: ModelArgument,
    task: TaskArgument,
    receivers: Annotated[
        str,
        typer.Argument(
            metavar="RECEIVERS",
            help="9.6.q,9.9.q@end (patched together), logits, or q,k,v,mlp_out for each node.",
        ),
    ],
    senders: Annotated[
        str, typer.Option(help="A site (z, mlp_out, embed, ...) or nodes, with commas.")
    ] = "z",
    via: Annotated[
        list[str] | None,
        typer.Option(help="Nodes that the paths go through, with commas; again per stop."),
    ] = None,
    through_mlps: Annotated[
        bool, typer.Option("--through-mlps", help="Let MLPs on the way answer.")
    ] = False,
    direction: Direction = "denoising",
    positions: Positions = "all",
    metric: MetricName = None,
    align: Align = "exact",
    n: Prompts = None,
    first_token: FirstToken = False,
    seed: Seed = 0,
    out: Out = None,
    memory: Memory = None,
) -> None:
    """Patch senders of MODEL into RECEIVERS on TASK, along direct paths, and rank them."""
    check_out(out)
    where = read_positions(positions)

    import mechinterp as mi

    loaded = mi.load_model(model)
    result = mi.path_patching(
        loaded,
        load_data(task, loaded, n, seed, first_token),
        read_names(receivers),
        senders=read_names(senders),
        via=[read_names(stop) for stop in via or ()],
        direction=direction,
        through_mlps=through_mlps,
        positions=where,
        metric=metric,
        align=align,
        memory=memory,
    )
    show(result, f"{senders} to {receivers}, {direction}", out)


@app.command(
    short_help="Estimate all patches from gradients.",
    epilog=examples(
        "attribute embedded induction z --audit 10",
        "attribute embedded induction --method eap-ig --steps 5",
    ),
)
def attribute(
    model: ModelArgument,
    task: TaskArgument,
    site: Annotated[
        str | None, typer.Argument(metavar="[SITE]", help="z, q, ...; none for edges.")
    ] = None,
    method: Annotated[str, typer.Option(help="atp, atp*, ig, eap or eap-ig.")] = "atp",
    direction: Direction = "denoising",
    positions: Positions = "each",
    layers: Layers = None,
    heads: Heads = None,
    metric: MetricName = None,
    align: Align = "exact",
    steps: Annotated[int, typer.Option(help="Points of the path of ig and eap-ig.")] = 5,
    interpolate: Annotated[
        str, typer.Option(help="What ig and eap-ig move: inputs or activations.")
    ] = "inputs",
    grad_drop: Annotated[
        bool, typer.Option(help="Drop layers from the gradient of atp*, which leaves sizes.")
    ] = True,
    audit: Annotated[
        int | None, typer.Option(min=1, help="Compute the top so many, and a sample, exactly.")
    ] = None,
    n: Prompts = None,
    first_token: FirstToken = False,
    seed: Seed = 0,
    out: Out = None,
    memory: Memory = None,
) -> None:
    """Estimate patches of SITE, or of edges, from gradients; --audit says how well."""
    check_out(out)
    where = read_positions(positions)
    layer_list, head_list = read_integers("layers", layers), read_integers("heads", heads)

    import mechinterp as mi

    loaded = mi.load_model(model)
    data = load_data(task, loaded, n, seed, first_token)
    result = mi.attribution_patching(
        loaded,
        data,
        site,
        method=method,
        direction=direction,
        positions=where,
        layers=layer_list,
        heads=head_list,
        metric=metric,
        align=align,
        steps=steps,
        interpolate=interpolate,
        grad_drop=grad_drop,
    )
    show(result, f"{site or 'edges'} by {method}, {direction}", out)
    if audit is not None:
        found = mi.audit(loaded, data, result, audit, memory=memory)
        place = None if out is None else out.with_name(f"{out.stem}.audit.nc")
        title = f"The top {found.k} of {site or 'edges'} by {method}, {direction}, exactly"
        show(found, title, place, rows=found.k)
        typer.echo(found.summary())
