"""The command that makes a model smaller: prune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli.shared import (
    Memory,
    MetricName,
    ModelArgument,
    Prompts,
    Seed,
    app,
    check_out,
    load_any,
    print_table,
    read_names,
    store,
)


@app.command()
def prune(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A built-in task, a .jsonl (prompts, or text and label) or a .txt file.",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            help="ablation, gradient, hard_concrete, redundancy, shapley, random; with commas."
        ),
    ] = "gradient",
    share: Annotated[
        float | None, typer.Option(help="Cut this share of the heads out, 0.2 for a fifth.")
    ] = None,
    fold: Annotated[
        str, typer.Option(help="What a head's place keeps: zero, or the mean of DATA.")
    ] = "zero",
    heal: Annotated[int, typer.Option(help="Fine-tune for so many steps afterwards.")] = 0,
    steps: Annotated[int, typer.Option(help="Points of the curve.")] = 20,
    rescore: Annotated[
        bool, typer.Option(help="Score the heads that are left anew before each step.")
    ] = True,
    min_heads: Annotated[int, typer.Option(help="Heads that each layer keeps.")] = 0,
    evaluate: Annotated[
        str | None, typer.Option(help="Data that judges; half of DATA without.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Random orders to compare with.")] = 20,
    context: Annotated[
        int | None, typer.Option(help="Tokens per piece of a .txt file.")
    ] = None,
    metric: MetricName = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what ranking by ablation costs, and stop.")
    ] = False,
    n: Prompts = None,
    seed: Seed = 0,
    curve: Annotated[
        Path | None, typer.Option(help="Save the curve here (.nc), its figure beside it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the smaller model, with its card.")
    ] = None,
    memory: Memory = None,
) -> None:
    """Rank MODEL's heads on DATA, show what is left as they go, and cut a share of them out."""
    check_out(curve)
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--share {share} must lie between 0 and 1.")
    if out is not None and share is None:
        raise ValueError("--out saves the smaller model, so say how much goes: --share 0.2.")
    if out is not None and out.is_file():
        raise ValueError(f"--out {out} is a file. Name a folder.")
    if heal < 0 or (heal and share is None):
        raise ValueError("--heal fine-tunes the smaller model, so say how much goes: --share.")
    asked = read_names(method)
    methods = [asked] if isinstance(asked, str) else asked

    import mechinterp as mi

    loaded = mi.load_model(model)
    on = load_any(data, loaded, n, seed, context)
    judged = None if evaluate is None else load_any(evaluate, loaded, n, seed, context)
    if dry_run:
        plan = mi.pruning_plan(
            loaded, on, steps=steps, rescore=rescore, min_heads_per_layer=min_heads
        )
        typer.echo(plan)
        return
    found = mi.pruning_curve(
        loaded,
        on,
        method=methods,
        steps=steps,
        rescore=rescore,
        min_heads_per_layer=min_heads,
        evaluate_on=judged,
        kind=fold,
        metric=metric,
        draws=draws,
        seed=seed,
        memory=memory,
    )
    mean = found.data["value"].mean("prompt").transpose("removed", "ranked_by")
    table = mean.to_pandas().assign(random=found.data["random"].mean(("draw", "prompt")).values)
    name = next(iter(found.convention.metrics))
    print_table(f"{name} on {found.convention.data} as heads go", table.reset_index())
    if found.data.sizes["prompt"] > 1:
        print_table("area against random orders (better: above 0)", found.against_random())
    store(found, curve)
    if share is not None:
        _cut(loaded, on, found, methods[0], share, fold, heal, seed, out)


def _cut(
    model: Any,
    data: Any,
    curve: Any,
    method: str,
    share: float,
    fold: str,
    heal: int,
    seed: int,
    out: Path | None,
) -> None:
    """Cut the heads that went first out of the model, heal and save it."""
    import pandas as pd

    import mechinterp as mi

    total = int(curve.data["removed"].values[-1])
    heads = curve.removed(method, max(1, round(share * total)))
    means = data if fold == "mean" else None
    smaller = mi.prune_heads(model, heads, fold=fold, mean_data=means)
    parts: list[Any] = [curve]
    costs = {"before": mi.cost(model), "after": mi.cost(smaller)}
    rows = [{"model": which, **_numbers(cost)} for which, cost in costs.items()]
    print_table(f"{len(heads)} of {total} heads cut out, by {method}", pd.DataFrame(rows))
    if heal:
        healed = mi.heal(smaller, data, steps=heal, seed=seed)
        smaller = healed.model
        value = healed.curve.data["value"].mean("prompt")
        name = next(iter(healed.curve.convention.metrics))
        typer.echo(f"Healed in {heal} steps: {name} {value[0]:.4g} -> {value[-1]:.4g}.")
        parts.append(healed.curve)
    if out is not None:
        typer.echo(f"Saved the smaller model in {mi.save_model(smaller, out, card=parts)}")


def _numbers(cost: Any) -> dict[str, Any]:
    """Return the totals of a cost; what is told layer by layer is in the model's card."""
    return {name: value for name, value in vars(cost).items() if isinstance(value, int | float)}
