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

_OPTIONS: dict[str, type] = {
    "unit": str,
    "normalize_layers": bool,
    "orders": int,
    "penalty": float,
    "steps": int,
    "batch_size": int,
}


@app.command(
    short_help="Cut heads out, and get a smaller model.",
    epilog=examples(
        "prune embedded induction --steps 8 --dry-run",
        "prune embedded induction --heads 0.1,2.5 --fold mean --out smaller",
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
    heads: Annotated[
        str | None, typer.Option(help="Cut these heads out instead, unranked: 0.1,2.5.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the method: unit=token, normalize_layers=true, orders=16, penalty=0.05, "
            "steps=400, batch_size=4; again for more."
        ),
    ] = None,
    neurons: Annotated[
        str | None, typer.Option(help="Cut these MLP neurons out as well: 3.17,3.20.")
    ] = None,
    fold: Annotated[
        str, typer.Option(help="What a head's place keeps: zero, or the mean of what ranks.")
    ] = "zero",
    heal: Annotated[int, typer.Option(help="Fine-tune for so many steps afterwards.")] = 0,
    lora_rank: Annotated[
        int | None, typer.Option(help="Heal by low-rank changes of this rank (needs peft).")
    ] = None,
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
    if share is not None and heads is not None:
        raise ValueError("--share and --heads both say what goes. Pass one of them.")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--share {share} must lie between 0 and 1. Pass 0.2 for a fifth.")
    whole = share is None and heads is None and neurons is None
    if out is not None and whole:
        raise ValueError("--out saves the smaller model, so say how much goes: --share 0.2.")
    if heal < 0 or (heal and whole):
        raise ValueError("--heal fine-tunes the smaller model, so say how much goes: --share.")
    if lora_rank is not None and not heal:
        raise ValueError("--lora-rank says how to heal. Pass --heal 100, too.")
    if (curve is not None or dry_run) and (heads is not None or (neurons and share is None)):
        raise ValueError(
            "--heads and --neurons are cut as named, without a curve. Pass --share."
        )
    if fold not in ("zero", "mean"):
        raise ValueError(unknown("fold", fold, ("zero", "mean")))
    named = [] if heads is None else read_units(heads, "--heads")
    units = [] if neurons is None else read_units(neurons, "--neurons")
    asked = read_names(method)
    methods = [asked] if isinstance(asked, str) else asked
    options = _options(option or [])

    import mechinterp as mi
    from mechinterp.causal.parts import every_part
    from mechinterp.heads.held_out import held_out
    from mechinterp.heads.pruning import checked_heads, checked_neurons
    from mechinterp.models.save import check_replaceable

    if out is not None:
        check_replaceable(out)
    loaded = mi.load_model(model)
    layers = [part.layer for part in every_part(loaded, "z")]
    total = len(layers)
    count = 0 if share is None else _count(layers, share, min_heads)
    if named:
        checked_heads(loaded, named)
    if units:
        checked_neurons(loaded, units)
    on = load_any(data, loaded, n, seed, context)
    other = None if evaluate is None else load_any(evaluate, loaded, n, seed, context)
    ranking, judging = held_out(on, other, 0.5, "prune")
    parts: list[Any] = []
    if not named and not (units and share is None):
        told: dict[str, Any] = {
            "method": methods,
            "steps": steps,
            "rescore": rescore,
            "min_heads_per_layer": min_heads,
            "evaluate_on": judging,
            "metric": metric,
            "draws": draws,
            "options": options,
            "memory": memory,
        }
        if dry_run:
            typer.echo(mi.pruning_plan(loaded, ranking, **told))
            return
        found = mi.pruning_curve(loaded, ranking, kind=fold, seed=seed, **told)
        _show(found)
        store(found, curve)
        parts.append(found)
        named = found.removed(methods[0], count)
    if not named and not units:
        return
    folded: dict[str, Any] = {"fold": fold, "mean_data": ranking if fold == "mean" else None}
    smaller = mi.prune_heads(loaded, named, **folded) if named else loaded
    if units:
        smaller = mi.prune_neurons(smaller, units, **folded)
    cut = [f"{len(named)} of {total} heads"] if named else []
    cut += [f"{len(units)} neurons"] if units else []
    by = f", by {methods[0]}" if count else ""
    _compare(f"{' and '.join(cut)} cut out{by}", mi.cost(loaded), mi.cost(smaller))
    if heal:
        healed = mi.heal(
            smaller,
            ranking,
            evaluate_on=judging,
            steps=heal,
            lora_rank=lora_rank,
            metric=metric,
            seed=seed,
        )
        smaller = healed.model
        value = healed.curve.data["value"].mean("prompt")
        name = next(iter(healed.curve.convention.metrics))
        typer.echo(f"Healed in {heal} steps: {name} {value[0]:.4g} -> {value[-1]:.4g}.")
        parts.append(healed.curve)
    if out is not None:
        typer.echo(f"Saved the smaller model in {mi.save_model(smaller, out, card=parts)}")


def _show(found: Any) -> None:
    """Print a curve, and how it compares with chance."""
    mean = found.data["value"].mean("prompt").transpose("removed", "ranked_by")
    table = mean.to_pandas().assign(random=found.data["random"].mean(("draw", "prompt")).values)
    name = next(iter(found.convention.metrics))
    print_table(f"{name} on {found.convention.data} as heads go", table.reset_index())
    if found.data.sizes["prompt"] > 1:
        print_table("area against random orders (better: above 0)", found.against_random())


def _compare(title: str, before: Any, after: Any) -> None:
    """Print the totals of two costs; what is told layer by layer is in the model's card."""
    import pandas as pd

    rows = [
        {"model": which}
        | {name: value for name, value in vars(cost).items() if isinstance(value, int | float)}
        for which, cost in (("before", before), ("after", after))
    ]
    print_table(title, pd.DataFrame(rows))


def _options(given: list[str]) -> dict[str, Any]:
    """Read ``unit=token`` and the like, as ``mi.pruning_curve`` takes them."""
    from pydantic import TypeAdapter, ValidationError

    found: dict[str, Any] = {}
    for one in given:
        name, _, text = (part.strip() for part in one.partition("="))
        if name not in _OPTIONS:
            raise ValueError(unknown("option", name, _OPTIONS))
        try:
            found[name] = TypeAdapter(_OPTIONS[name]).validate_python(text)
        except ValidationError:
            kind = _OPTIONS[name].__name__
            raise ValueError(f"--option {one!r} gives {name} no {kind}.") from None
    return found


def _count(layers: list[int], share: float, least: int) -> int:
    """Return how many heads a share of all is, if so many may go."""
    count = max(1, round(share * len(layers)))
    removable = sum(max(0, layers.count(layer) - least) for layer in set(layers))
    if count > removable or count == len(layers):
        most = min(removable, len(layers) - 1)
        raise ValueError(
            f"--share {share} is {count} of {len(layers)} heads, but at most {most} can go: "
            f"every layer keeps {least}, and one is left. Lower --share or --min-heads."
        )
    return count
