"""Measure head ablation: every head of SmolLM2-135M on 64 prompts, beside loops by hand.

    python scripts/fetch_models.py && python scripts/bench_ablation.py

Rows: the engine in float32 and, with ``--screen``, with bfloat16 screening (which pays on
machines that multiply it fast); plain Hugging Face with sdpa, one forward of all prompts per
head with the head's part of the output projection's input set to zero and logits at the last
position only; the hooked bridge the same way; the bridge one prompt at a time. The
loops are timed on a sample of heads spread over the layers and scaled; their numbers must agree
with the engine's. ``--greedy`` instead times a full greedy curve of the embedded model, every
remaining head scored again before each goes, on 4,096 tokens of text. Prints a table and stores
it in ``scripts/results/bench_ablation.json``. Let nothing else run meanwhile.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

import mechinterp as mi
from mechinterp.models import forward
from mechinterp.results import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "bench_ablation.json"
BOOK = HERE.parent / "tests" / "data" / "goblin.txt"

AGREED = 1e-3  # nats of log-odds: loops and engine, in float32
Head = tuple[int, int]
Ablated = Callable[[Head], torch.Tensor]


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument(
        "--sample", type=int, default=10, help="heads that the loops are timed on"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--screen", action="store_true")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    load = psutil.getloadavg()[0]
    rows = greedy(asked) if asked.greedy else ablations(asked)
    shown = Table("what", "seconds", "times the engine", "largest difference")
    for row in rows:
        ratio, gap = row.get("ratio"), row.get("difference")
        shown.add_row(
            row["what"],
            f"{row['seconds']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if gap is None else f"{gap:.1e}",
        )
    Console().print(shown)
    found = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "threads": asked.threads,
        "load": load,
        "rows": rows,
        "versions": versions(),
    }
    stored = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    stored["greedy" if asked.greedy else "single heads"] = found
    asked.out.write_text(json.dumps(stored, indent=1) + "\n")


def ablations(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every head's ablation by the engine and by hand, in turns."""
    model = mi.load_model("smollm2-135m")
    every = mi.load_task("ioi", model)
    lengths = every.clean.lengths.tolist()
    common = max(set(lengths), key=lengths.count)  # no padding, so that the loops waste nothing
    task = every[[i for i, n in enumerate(lengths) if n == common][: asked.prompts]]
    module: Any = mi.unwrap(mi.load_model("smollm2-135m"))
    module.set_attn_implementation("sdpa")
    tokens, ends, targets = task.clean.tokens, list(task.answer_positions), task.targets()
    assert set(ends) == {common - 1}
    d_head, manager = model.cfg.d_head, mi.HookManager(model)

    def of_hugging_face(head: Head) -> torch.Tensor:
        layer, index = head
        own = slice(index * d_head, (index + 1) * d_head)

        def zero(_: Any, args: tuple) -> tuple:
            z = args[0].clone()
            z[..., own] = 0
            return (z, *args[1:])

        handle = module.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
        logits = module(tokens, logits_to_keep=1, use_cache=False).logits[:, -1]
        handle.remove()
        return mi.metrics.logit_diff(logits, targets)

    def of_bridge(head: Head) -> torch.Tensor:
        with manager.ablate("z", layers=head[0], heads=head[1]):
            logits = forward(model, tokens)[:, -1]
        return mi.metrics.logit_diff(logits, targets)

    def one_by_one(head: Head) -> torch.Tensor:
        with manager.ablate("z", layers=head[0], heads=head[1]):
            rows = [forward(model, row[None])[:, -1] for row in tokens]
        return mi.metrics.logit_diff(torch.cat(rows), targets)

    heads = [
        (layer, h) for layer in range(model.cfg.n_layers) for h in range(model.cfg.n_heads)
    ]
    sample = heads[:: max(1, len(heads) // asked.sample)]
    loops: dict[str, Ablated] = {
        "Hugging Face, a forward of all prompts per head": of_hugging_face,
        "hooked bridge, a forward of all prompts per head": of_bridge,
        "hooked bridge, a forward per head and prompt": one_by_one,
    }
    mi.head_ablation(model, task, heads=[heads[-1]])  # hashes the weights, checks the engine
    seconds: dict[str, list[float]] = {}
    gaps: dict[str, float] = {}
    for turn in range(asked.repeats):
        spent, result = timed(lambda: mi.head_ablation(model, task))
        seconds.setdefault("engine", []).append(spent)
        mine = result.data["ablated"]
        if asked.screen:
            name = "engine, screened in bfloat16"
            spent, screened = timed(lambda: mi.head_ablation(model, task, screen="bfloat16"))
            seconds.setdefault(name, []).append(spent)
            gaps[name] = float(np.abs(screened.data["ablated"] - mine).max())
        for name, ablated in loops.items():
            some = sample[::5] if ablated is one_by_one else sample
            with torch.no_grad():
                spent, found = timed(lambda a=ablated, s=some: [a(head) for head in s])
            seconds.setdefault(name, []).append(spent * len(heads) / len(some))
            if turn == 0:
                gaps[name] = max(
                    float(np.abs(mine.sel(layer=at, head=h).values - each.numpy()).max())
                    for (at, h), each in zip(some, found, strict=True)
                )
        off = max(gap for name, gap in gaps.items() if name in loops)
        assert off < AGREED, f"a loop's numbers are {off:.2g} nats from the engine's"
    base = np.array(seconds["engine"])
    return [
        {
            "what": name,
            "prompts": len(task),
            "tokens": common,
            "cells": len(heads),
            "seconds": float(np.median(each)),
            "ratio": float(np.median(np.array(each) / base)),
            "difference": gaps.get(name),
            "runs": each,
        }
        for name, each in seconds.items()
    ]


def greedy(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Time greedy curves of the embedded model, all remaining heads scored anew at each step.

    With 20 steps, as by default, and with one head a step.
    """
    model = mi.load_model("embedded")
    words = BOOK.read_text(encoding="utf-8")
    text = mi.Text.from_strings(model, [words], context=128)
    ranking, judging = text[:32], text[32:36]
    every = model.cfg.n_layers * model.cfg.n_heads
    tokens = int(ranking.prompts.lengths.sum())

    def curve(steps: int) -> mi.PruningCurve:
        told: dict[str, Any] = {"method": "ablation", "steps": steps, "draws": 1}
        return mi.pruning_curve(model, ranking, evaluate_on=judging, **told)

    rows = []
    for steps in (20, every):
        runs = [timed(lambda n=steps: curve(n))[0] for _ in range(asked.repeats)]
        what = f"greedy curve of {every} heads in {steps} steps on {tokens} tokens"
        seconds = float(np.median(runs))
        rows.append({"what": what, "tokens": tokens, "seconds": seconds, "runs": runs})
    return rows


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return a call's seconds and what it returned."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    main()
