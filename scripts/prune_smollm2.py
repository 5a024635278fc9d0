"""Heads of SmolLM2-135M: all ways of ranking them, on text and IOI, and a fifth cut for real.

    python scripts/fetch_models.py && python scripts/prune_smollm2.py

On running text (loss per token) and on IOI (logit difference, accuracy), heads go by every
method of ``mi.head_importance`` and by chance; other text, other prompts judge. What is asked:

- ``text``, ``ioi``: which ranking keeps most? Do redundant heads first (the atlas) beat
  importance at the same count?
- ``gates``: of the gates of Voita et al., trained at three prices of an open head: which kinds
  of head stay?
- ``cut``: a fifth of the heads removed from the weights by the gradient's order: perplexity
  before, after and healed, speed of decoding, key/value cache.

Ranks on one children's book, chooses the fold and heals on other parts of it, judges on another
book. Writes ``prune_smollm2_*.json`` and figures into ``scripts/results/``.
"""

import argparse
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from bench_pruning import in_turns
from scipy.stats import mannwhitneyu

import mechinterp as mi
from mechinterp import stats
from mechinterp.results import versions

HERE = Path(__file__).parent
BOOKS = HERE.parent / "tests" / "data"
METHODS = ("gradient", "ablation", "redundancy", "hard_concrete", "shapley")
# A head is of a kind from this score on. Voita et al. 2019: positional from 0.9.
KINDS = {"positional": 0.9, "previous_token": 0.4, "induction": 0.3, "rare_token": 0.3}
PRICES = (0.005, 0.02, 0.08)  # nats that an open head must be worth


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["ioi", "text", "gates", "cut"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4, help="pieces of text that rank")
    parser.add_argument("--judge", type=int, default=40, help="pieces of text that judge")
    parser.add_argument(
        "--prompts", type=int, default=16, help="of IOI, to rank; twice to judge"
    )
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--orders", type=int, default=4, help="permutations of Shapley values")
    parser.add_argument("--gates", type=int, default=300, help="steps of training them")
    parser.add_argument("--heal", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    model = mi.load_model(asked.model)
    parts = {"ioi": ioi, "text": text, "gates": gates, "cut": cut}
    for name in asked.parts:
        start = time.perf_counter()
        found = parts[name](model, asked)
        record = {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "asked": {k: v for k, v in vars(asked).items() if k not in ("out", "parts")},
            **found,
            "seconds": round(time.perf_counter() - start),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        out = asked.out / f"prune_smollm2_{name}.json"
        out.write_text(json.dumps(record, indent=1, default=float) + "\n")
        print(json.dumps(found, indent=1, default=float), flush=True)


def pieces(model: Any, asked: argparse.Namespace, book: str, n: int, first: int = 0) -> mi.Text:
    """Return ``n`` pieces of a book."""
    words = (BOOKS / f"{book}.txt").read_text(encoding="utf-8")
    every = mi.Text.from_strings(model, [words], context=asked.context, name=book)
    return every[first : first + n]


def text(model: Any, asked: argparse.Namespace) -> dict:
    """Return what all methods keep on text."""
    curve = mi.pruning_curve(
        model,
        pieces(model, asked, "goblin", asked.rank),
        method=METHODS,
        steps=asked.points,
        evaluate_on=pieces(model, asked, "five_children", asked.judge),
        draws=asked.draws,
        options={"orders": asked.orders, "steps": asked.gates, "batch_size": 4},
    )
    return told(curve, asked, "text")


def ioi(model: Any, asked: argparse.Namespace) -> dict:
    """Return what all methods keep on indirect object identification."""
    task = mi.load_task("ioi", model)[: 3 * asked.prompts]
    first = len(task) // 3
    curve = mi.pruning_curve(
        model,
        task[:first],
        method=METHODS,
        steps=asked.points,
        evaluate_on=task[first:],
        metric={"logit_diff": "logit_diff", "accuracy": "accuracy"},
        draws=asked.draws,
        options={"orders": asked.orders, "steps": asked.gates},
    )
    return told(curve, asked, "ioi")


# Of every metric: what a mean loss of so much counts as, for the heads that can go.
MARGINS = {"loss": 0.05, "logit_diff": 0.25, "accuracy": 0.05}


def told(curve: mi.PruningCurve, asked: Any, name: str) -> dict:
    """Return the curve's numbers by metric, and save it with a picture of each."""
    curve.save(asked.out / f"prune_smollm2_{name}.nc")
    found: dict[str, Any] = {"removed": curve.data["removed"].values.tolist()}
    for metric in curve.convention.metrics:
        figure = curve.plot(metric=metric).get_figure(root=True)
        assert figure is not None
        picture = asked.out / f"prune_smollm2_{name}_{metric}.png"
        figure.savefig(picture, dpi=150, bbox_inches="tight")
        margin = MARGINS[metric]
        found[metric] = {
            "mean": means(curve, metric),
            "against_random": curve.against_random(metric=metric).to_dict("records"),
            "between_methods": curve.between(metric=metric).to_dict("records"),
            f"can_go_at_{margin}": curve.can_go(margin, metric=metric).to_dict("records"),
        }
    return found


def means(curve: mi.PruningCurve, metric: str) -> dict[str, list[float]]:
    """Return each method's mean metric along the curve, and that of random orders."""
    value = curve.of_metric(curve.data["value"], metric).mean("prompt")
    random = curve.of_metric(curve.data["random"], metric).mean(("prompt", "draw"))
    methods = value["ranked_by"].values.tolist()
    found = {m: value.sel(ranked_by=m).values.round(4).tolist() for m in methods}
    return found | {"random": random.values.round(4).tolist()}


def gates(model: Any, asked: argparse.Namespace) -> dict:
    """Return which heads' gates stay open at each price, by kind of head."""
    training = pieces(model, asked, "goblin", 128)
    trained = {
        price: mi.head_importance(
            model,
            training,
            method="hard_concrete",
            penalty=price,
            steps=asked.gates,
            batch_size=4,
        )
        for price in PRICES
    }
    book = pieces(model, asked, "five_children", 8, first=asked.judge)
    on_text = mi.head_scores(model, book, kinds=["positional", "previous_token", "rare_token"])
    scores = {kind: on_text.mean()[kind].values for kind in on_text.kinds}
    scores["induction"] = (
        mi.head_scores(model, n=20, kinds="induction").mean()["induction"].values
    )
    of_kind = {kind: scores[kind] >= least for kind, least in KINDS.items()}
    prices = {}
    for price, found in trained.items():
        gate = found.data["gate"].values
        prices[str(price)] = {
            "open": int((gate > 0).sum()),
            "loss_in_training": found.convention.settings["last_loss"],
            "share_open": {
                kind: float((gate[own] > 0).mean()) for kind, own in of_kind.items()
            },
            "gates": gate.round(3).tolist(),
        }
    figure = survival(trained, of_kind)
    figure.savefig(asked.out / "prune_smollm2_gates.png", dpi=150, bbox_inches="tight")
    lasting = np.mean([found.effect.values for found in trained.values()], axis=0)
    return {"prices": prices, "kinds": kinds(lasting, of_kind)}


def survival(trained: dict[float, mi.HeadImportance], of_kind: dict[str, np.ndarray]) -> Any:
    """Draw the probability that heads of each kind are open, along the training."""
    figure, axes = plt.subplots(1, len(trained), figsize=(9, 3), sharey=True)
    for ax, (price, found) in zip(axes, trained.items(), strict=True):
        chances = found.data["open"].transpose("step", "layer", "head")
        everything = np.ones_like(next(iter(of_kind.values())))
        for name, own in {"all heads": everything, **of_kind}.items():
            label = f"{name.replace('_', ' ')} ({own.sum()})"
            style = "--" if name == "all heads" else "-"
            ax.plot(chances["step"], chances.values[:, own].mean(1), style, label=label)
        ax.set_title(f"an open head costs {price} nats", fontsize="medium")
        ax.set_xlabel("steps of training")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean probability of being open")
    axes[0].set_ylim(0, 1)
    axes[-1].legend(frameon=False, fontsize="small")
    return figure


def kinds(lasting: np.ndarray, of_kind: dict[str, np.ndarray]) -> dict:
    """Return whether heads of each kind last longer than all others.

    ``lasting`` is a head's probability of being open, a mean over the prices.
    """
    found = {
        kind: {
            "at_least": KINDS[kind],
            "heads": int(own.sum()),
            "mean_open": float(lasting[own].mean()),
            "mean_open_of_others": float(lasting[~own].mean()),
            "p_against_other_heads": float(mannwhitneyu(lasting[own], lasting[~own]).pvalue),
        }
        for kind, own in of_kind.items()
        if own.any() and not own.all()
    }
    adjusted = stats.holm(np.array([each["p_against_other_heads"] for each in found.values()]))
    for each, p in zip(found.values(), adjusted, strict=True):
        each["p_adjusted"] = float(p)
    return found


def cut(model: Any, asked: argparse.Namespace) -> dict:
    """Return what removing a share of the heads costs and gains, before and after healing."""
    ranking = pieces(model, asked, "goblin", asked.rank)
    choosing = pieces(model, asked, "goblin", asked.judge, first=asked.rank)
    training = pieces(model, asked, "goblin", 10_000, first=asked.rank + asked.judge)
    judging = pieces(model, asked, "five_children", asked.judge)
    ranked = mi.pruning_curve(model, ranking, steps=10, evaluate_on=choosing[:4], draws=1)
    count = round(asked.share * int(ranked.data["removed"].values[-1]))
    heads = ranked.removed("gradient", count)
    by_fold: dict[str, Any] = {
        "zero": mi.prune_heads(model, heads),
        "mean": mi.prune_heads(model, heads, fold="mean", mean_data=ranking),
    }
    loss = {"whole": model} | by_fold
    losses = {name: float(judging.loss(one).mean()) for name, one in loss.items()}
    best = min(by_fold, key=lambda fold: float(choosing.loss(by_fold[fold]).mean()))
    healed = mi.heal(
        by_fold[best], training, evaluate_on=judging, steps=asked.heal, batch_size=4
    )
    also = mi.heal(model, training, evaluate_on=judging, steps=asked.heal, batch_size=4)
    losses |= {
        f"{best}, healed": float(judging.loss(healed.model).mean()),
        "whole, trained as long": float(judging.loss(also.model).mean()),
    }
    figure = healed.curve.plot().get_figure(root=True)
    assert figure is not None
    figure.savefig(asked.out / "prune_smollm2_heal.png", dpi=150, bbox_inches="tight")
    timed = argparse.Namespace(batch=1, prompt=asked.context, new=16, repeats=5, seed=0)
    both = {"whole": model, "pruned": healed.model}
    return {
        "heads": len(heads),
        "of": int(ranked.data["removed"].values[-1]),
        "loss": losses,
        "perplexity": {name: float(np.exp(nats)) for name, nats in losses.items()},
        "cost": {n: asdict(mi.cost(one, context=asked.context)) for n, one in both.items()},
        "seconds_in_turns": in_turns(both, timed),
    }


if __name__ == "__main__":
    main()
