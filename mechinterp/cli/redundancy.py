"""The command of which heads do the same: redundancy."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp.cli.shared import (
    Memory,
    MetricName,
    ModelArgument,
    Seed,
    app,
    examples,
    load_any,
    print_table,
)


@app.command(
    short_help="Say which heads do the same.",
    epilog=examples(
        "redundancy embedded induction --n 16 --out atlas",
        "redundancy smollm2-135m book.txt --task ioi",
    ),
)
def redundancy(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A .txt, a built-in task or a .jsonl of prompts."),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="A task to measure causal interaction on; DATA itself if it is one."),
    ] = None,
    n: Annotated[int | None, typer.Option(help="How many prompts or pieces of text.")] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts of --task.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens of a piece of text.")] = 512,
    queries: Annotated[
        int | None, typer.Option(help="Query positions to compare attention at; 512 or all.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Interaction of all, flagged or none of the pairs.")
    ] = None,
    flag: Annotated[int, typer.Option(help="Pairs that each view flags.")] = 50,
    kind: Annotated[
        str, typer.Option(help="Ablation: zero, mean, position_mean, resample or corrupted.")
    ] = "zero",
    metric: MetricName = None,
    view: Annotated[
        str, typer.Option(help="What clusters and order are by: mean, js, cka, cosine, ...")
    ] = "mean",
    clusters: Annotated[
        int | None,
        typer.Option(help="How many clusters; those nearer than half the mean distance."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Lines of each table.")] = 10,
    memory: Memory = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the atlas, its figures and tables.")
    ] = None,
) -> None:
    """Say which heads of MODEL do the same, and in which order they could go."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file. Name a folder.")
    if rows < 1:
        raise ValueError(f"--rows {rows} shows nothing. Pass at least 1.")
    from mechinterp.heads.redundancy_distance import check_view

    check_view(view)  # before anything runs

    import mechinterp as mi
    from mechinterp.causal.parts import every_part

    loaded = mi.load_model(model)
    heads = len(every_part(loaded, "z"))
    if clusters is not None and not 1 <= clusters <= heads:
        raise ValueError(f"--clusters {clusters} cannot be made of {heads} heads.")
    read = load_any(data, loaded, n, seed, context)
    judge = None if task is None else load_any(task, loaded, prompts, seed, context)
    atlas = mi.redundancy_atlas(
        loaded,
        read,
        queries=queries,
        task=judge,
        pairs=pairs,
        flag=flag,
        kind=kind,
        metric=metric,
        seed=seed,
        memory=memory,
    )
    top = atlas.top(rows)
    print_table(f"Pairs most alike, {atlas.convention.data}", top)
    typer.echo(top.attrs["note"])
    views = ["redundancy" if view == "mean" else view]
    if "together" in atlas.data:
        unit = atlas.convention.metrics["interaction"]
        causal = atlas.top(rows, metric="interaction")
        print_table(f"Largest interactions ({unit})", causal)
        views.append("interaction")
    found = atlas.clusters(view, n=clusters)
    joined = found.assign(heads=[" ".join(heads) for heads in found["heads"]])
    several = joined.query("size > 1")
    if len(several):
        print_table(f"Clusters by {view}, {len(joined)} in all", several.head(rows))
    else:
        typer.echo(f"No two heads are nearer than half the mean distance by {view}.")
    order = [f"{layer}.{head}" for layer, head in atlas.pruning_order(view)]
    shown = order[: 3 * rows]
    more = f" ... ({len(order)} in all)" if len(order) > len(shown) else ""
    typer.echo(f"Suggested order of pruning: {' '.join(shown)}{more}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        atlas.save(out / "atlas.nc")
        joined.to_csv(out / "clusters.csv", index=False)
        (out / "order.txt").write_text("\n".join(order) + "\n", encoding="utf-8")
        for each in views:
            figure = atlas.figure(each)
            figure.savefig(out / f"{each}.png", dpi=150, bbox_inches="tight")
        typer.echo(f"Saved the atlas in {out}")
