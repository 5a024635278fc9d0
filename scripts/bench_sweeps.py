"""What the ledger costs, and what a second worker brings: measured beside the cost model.

    python scripts/bench_sweeps.py            # everything: ten minutes on two idle cores
    python scripts/bench_sweeps.py --quick    # small sizes, to see that it works
    python scripts/bench_sweeps.py --predict  # the table of docs/scaling.md, from the model

Stores every number in ``scripts/results/bench_sweeps.json``. Let nothing else run meanwhile.

- *Ledger*: a sweep of 10,000 cells. Its overhead is the wall time of claiming, writing
  (Parquet, two syncs) and entering all items, as a share of the whole.
- *Workers*: the same items by one worker and by two (processes of one thread each), on a model
  that is small enough to leave a core idle. Start-up, which each worker pays once, is measured
  apart. The prediction is that of docs/scaling.md, fed with the run of one worker.
"""

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import mechinterp as mi
from mechinterp.results import versions
from mechinterp.sweeps import local
from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.run import run

OUT = Path(__file__).parent / "results" / "bench_sweeps.json"


def main() -> None:
    """Measure, compare with the model, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--predict", action="store_true")
    told = parser.parse_args()
    if told.predict:
        print(table())
        return
    quick = told.quick
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"quick": quick, "ledger": ledger(Path(folder) / "ledger", quick)}
        found["workers"] = workers(Path(folder), quick)
    found |= {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }
    OUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def wall(
    start: float, item: float, items: int, workers: int, ledger_seconds: float = 0.0
) -> float:
    """Return the seconds that a sweep takes: the cost model of docs/scaling.md.

    Every worker starts in ``start`` seconds, then takes the next of ``items`` items of ``item``
    seconds until none is left; the ledger takes ``ledger_seconds`` for each, one at a time.
    """
    rounds = -(-items // workers)
    return start + max(rounds * (item + ledger_seconds), items * ledger_seconds + item)


# A 7-billion-parameter model, 100,000 cells on 32 prompts of 32 tokens, in bfloat16.
PARAMETERS, CELLS, PROMPTS, TOKENS = 7e9, 100_000, 32, 32
SHARE = 0.5  # of the layers that a cell runs through, on average over layers
FLOPS = 150e12  # a second, of a GPU at bfloat16 that keeps 40 % of its peak
LOAD, DISK, COPY = 60.0, 1e9, 10e9  # imports and cluster; bytes a second from disk, to a GPU
NETWORK, PER_NODE = 3e9, 8  # bytes a second into a machine; GPUs of a machine
ITEM, LEDGER = 5.0, 0.03  # seconds of an item, and of its entry by the driver


def table() -> str:
    """Return what the model predicts for 7 billion parameters on many GPUs, as Markdown."""
    flop = 2 * PARAMETERS * CELLS * PROMPTS * TOKENS * SHARE
    items = round(flop / FLOPS / ITEM)
    size = 2 * PARAMETERS
    lines = [
        "| GPUs | start s | work s | whole s | speed-up | share of the time at work |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    alone = None
    for n in (1, 2, 8, 16, 32, 64, 128, 256, 512):
        machines = -(-n // PER_NODE)
        hops = max(0, (machines - 1).bit_length())  # machines pass the weights on
        start = LOAD + size / DISK + hops * size / NETWORK + size / COPY
        whole = wall(start, ITEM, items, n, LEDGER)
        alone = whole if alone is None else alone
        busy = items * ITEM / (n * whole)
        lines.append(
            f"| {n} | {start:.0f} | {whole - start:,.0f} | {whole:,.0f} | "
            f"{alone / whole:.1f} | {busy:.0%} |"
        )
    return "\n".join(lines)


def ledger(out: Path, quick: bool) -> dict[str, Any]:
    """Return what the ledger costs on a sweep of 10,000 cells (fewer if quick)."""
    # 25 positions x 4 layers x 8 heads = 800 cells a call, 24 prompts: some seconds an item.
    spec = {
        "models": "embedded",
        "tasks": "induction",
        "prompts": 4 if quick else 24,
        "seeds": list(range(1 if quick else 13)),
        "methods": [{"method": "activation_patching", "sites": "z"}],
        "split": {"prompts": 4 if quick else 24},
    }
    spent = {"claim": 0.0, "write": 0.0, "enter": 0.0, "compute": 0.0}
    kept = Ledger.claim, local.write_values, Ledger.done, local.Workbench.do
    Ledger.claim = _timed(Ledger.claim, spent, "claim")
    local.write_values = _timed(local.write_values, spent, "write")
    Ledger.done = _timed(Ledger.done, spent, "enter")
    local.Workbench.do = _timed(local.Workbench.do, spent, "compute")
    try:
        start = time.perf_counter()
        done = run(spec, out, output="quiet")
        wall = time.perf_counter() - start
    finally:
        Ledger.claim, local.write_values, Ledger.done, local.Workbench.do = kept
    now = done.status()
    overhead = spent["claim"] + spent["write"] + spent["enter"]
    return {
        "cells": now.cells,
        "items": now.items,
        "wall_seconds": wall,
        **{f"{name}_seconds": seconds for name, seconds in spent.items()},
        "overhead_seconds_per_item": overhead / now.items,
        "overhead": overhead / (overhead + spent["compute"]),
        "target": 0.01,
        "bytes": sum(path.stat().st_size for path in (out / "values").iterdir()),
    }


def _timed(before: Callable[..., Any], spent: dict[str, float], name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return before(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    return call


def workers(folder: Path, quick: bool) -> dict[str, Any]:
    """Return seconds of one worker and two, and what the cost model says of two."""
    spec = {
        "models": "embedded",
        "tasks": "induction",
        "prompts": 8 if quick else 32,
        "seeds": list(range(2 if quick else 16)),
        "methods": [{"method": "activation_patching", "sites": "z", "positions": "all"}],
        "split": {"prompts": 8},
    }
    # Threads are shared: with two in all, one worker has two of them, two have one each.
    seconds: dict[str, dict[str, float]] = {}
    for name, count, threads in (("one", 1, 1), ("one_of_two_threads", 1, 2), ("two", 2, 2)):
        torch.set_num_threads(threads)
        seconds[name] = _pool(spec, folder / name, count)
    torch.set_num_threads(1)
    one, two = seconds["one"], seconds["two"]
    items = int(one["items"])
    predicted = wall(one["start"], one["working"] / items, items, 2)
    return {
        **seconds,
        "speed_up_working": one["working"] / two["working"],
        "speed_up_with_start": one["wall"] / two["wall"],
        "speed_up_over_one_worker_of_two_threads": (
            seconds["one_of_two_threads"]["working"] / two["working"]
        ),
        "predicted_wall_of_two": predicted,
        "target": 1.6,
    }


def _pool(spec: dict[str, Any], out: Path, count: int) -> dict[str, float]:
    """Run with worker processes, one too, so that the start is the same for all."""
    from mechinterp.sweeps.opening import open_ledger
    from mechinterp.sweeps.places import place_of
    from mechinterp.sweeps.planning import planned
    from mechinterp.sweeps.pool import work_in_processes
    from mechinterp.sweeps.spec import read_spec
    from mechinterp.sweeps.workbench import Workbench

    place, bench, times = place_of(out, make=True), Workbench(), []

    def report(event: Any) -> None:
        times.append(time.perf_counter())

    plan = planned(read_spec(spec), bench)
    with open_ledger(place) as ledger:
        ledger.plan(plan.name, "{}", plan.items)
        start = time.perf_counter()
        work_in_processes(place, ledger, plan.name, bench, report, count)
        wall = time.perf_counter() - start
    assert mi.open_run(out).status().complete
    # From the first item's start to the last one's end.
    return {
        "wall": wall,
        "start": times[0] - start,
        "working": times[-1] - times[0],
        "items": len(plan.items),
    }


if __name__ == "__main__":
    main()
