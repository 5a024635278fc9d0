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
    examples,
    load_any,
    print_table,
    read_names,
    read_units,
    store,
)
from mechinterp.names import unknown


@app.command(
    short_help="Cut heads out, and get a smaller model.",
    epilog=examples(
        "prune embedded induction --steps 8 --dry-run",
        "prune smollm2-135m book.txt --share 0.2 --fold mean --heal 100 --out smaller",
    ),
)
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
        float | None, typer.Option(help="Cut this share of all heads out, 0.2 for a fifth.")
    ] = None,
    neurons: Annotated[
        str | None, typer.Option(help="Cut these MLP neurons out as well: 3.17,3.20.")
    ] = None,
    fold: Annotated[
        str, typer.Option(help="What a head's place keeps: zero, or the mean of what ranks.")
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
        bool, typer.Option("--dry-run", help="Say what the curve costs, and stop.")
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
    """Rank MODEL's heads on DATA, show what is left as they go, and cut a share of them out.

    What ranks the heads gives their means and heals the model; what judges does neither.
    """
    check_out(curve)
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--share {share} must lie between 0 and 1. Pass 0.2 for a fifth.")
    if out is not None and share is None:
        raise ValueError("--out saves the smaller model, so say how much goes: --share 0.2.")
    if heal < 0 or (heal and share is None):
        raise ValueError("--heal fine-tunes the smaller model, so say how much goes: --share.")
    if neurons is not None and share is None:
        raise ValueError("--neurons go together with a share of the heads. Pass --share, too.")
    if fold not in ("zero", "mean"):
        raise ValueError(unknown("fold", fold, ("zero", "mean")))
    units = [] if neurons is None else read_units(neurons, "--neurons")
    asked = read_names(method)
    methods = [asked] if isinstance(asked, str) else asked

    import pandas as pd

    import mechinterp as mi
    from mechinterp.heads.held_out import held_out
    from mechinterp.models.save import check_replaceable

    if out is not None:
        check_replaceable(out)
    loaded = mi.load_model(model)
    count, total = (0, 0) if share is None else _count(loaded, share, min_heads)
    on = load_any(data, loaded, n, seed, context)
    other = None if evaluate is None else load_any(evaluate, loaded, n, seed, context)
    ranking, judging = held_out(on, other, 0.5, "prune")
    told: dict[str, Any] = {
        "method": methods,
        "steps": steps,
        "rescore": rescore,
        "min_heads_per_layer": min_heads,
        "evaluate_on": judging,
        "draws": draws,
        "memory": memory,
    }
    if dry_run:
        typer.echo(mi.pruning_plan(loaded, ranking, **told))
        return
    found = mi.pruning_curve(loaded, ranking, kind=fold, metric=metric, seed=seed, **told)
    mean = found.data["value"].mean("prompt").transpose("removed", "ranked_by")
    table = mean.to_pandas().assign(random=found.data["random"].mean(("draw", "prompt")).values)
    name = next(iter(found.convention.metrics))
    print_table(f"{name} on {found.convention.data} as heads go", table.reset_index())
    if found.data.sizes["prompt"] > 1:
        print_table("area against random orders (better: above 0)", found.against_random())
    store(found, curve)
    if not count:
        return
    heads = found.removed(methods[0], count)
    folded: dict[str, Any] = {"fold": fold, "mean_data": ranking if fold == "mean" else None}
    smaller = mi.prune_heads(loaded, heads, **folded)
    if units:
        smaller = mi.prune_neurons(smaller, units, **folded)
    costs = {"before": mi.cost(loaded), "after": mi.cost(smaller)}
    rows = [{"model": which, **_numbers(cost)} for which, cost in costs.items()]
    also = f" and {len(units)} neurons" if units else ""
    title = f"{count} of {total} heads{also} cut out, by {methods[0]}"
    print_table(title, pd.DataFrame(rows))
    parts: list[Any] = [found]
    if heal:
        healed = mi.heal(smaller, ranking, evaluate_on=judging, steps=heal, seed=seed)
        smaller = healed.model
        value = healed.curve.data["value"].mean("prompt")
        typer.echo(f"Healed in {heal} steps: {name} {value[0]:.4g} -> {value[-1]:.4g}.")
        parts.append(healed.curve)
    if out is not None:
        typer.echo(f"Saved the smaller model in {mi.save_model(smaller, out, card=parts)}")


def _count(model: Any, share: float, least: int) -> tuple[int, int]:
    """Return how many heads a share of all is, if so many may go, and how many there are."""
    from mechinterp.causal.parts import every_part

    layers = [part.layer for part in every_part(model, "z")]
    count = max(1, round(share * len(layers)))
    removable = sum(max(0, layers.count(layer) - least) for layer in set(layers))
    if count > removable or count == len(layers):
        most = min(removable, len(layers) - 1)
        raise ValueError(
            f"--share {share} is {count} of {len(layers)} heads, but at most {most} can go: "
            f"every layer keeps {least}, and one is left. Lower --share or --min-heads."
        )
    return count, len(layers)


def _numbers(cost: Any) -> dict[str, Any]:
    """Return the totals of a cost; what is told layer by layer is in the model's card."""
    return {name: value for name, value in vars(cost).items() if isinstance(value, int | float)}
