"""Kill a small sweep with ``kill -9`` at random moments, many times, and compare the numbers.

    python scripts/sweep_killing.py --kills 500

Each round starts a sweep in a new folder, kills it at random moments (several times, until so
many kills are made or it is through), finishes it, and compares every number bit for bit with
an uninterrupted run. What came out is stored in ``scripts/results/sweep_killing.json`` after
each round. One process works at a time, on one thread.
"""

import argparse
import json
import logging
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from sweeping import ITEMS, killed_at_random, run_small, stored

import mechinterp as mi
from mechinterp.results import versions

OUT = Path(__file__).parent / "results" / "sweep_killing.json"
PER_ROUND = 10  # kills of one run, at most


def main() -> None:
    """Kill, finish, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--longest", type=float, default=0.8, help="seconds before a kill")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    generator = random.Random(told.seed)
    found = {
        "kills": 0,
        "rounds": 0,
        "kills_while_items_were_done": 0,
        "items_finished_before_the_last_kill": 0,
        "rounds_with_other_numbers": 0,
        "items_lost": 0,
        "items_doubled": 0,
        "finished_items_done_again": 0,
    }
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        run_small(whole)
        expected = stored(whole)
        while found["kills"] < told.kills:
            one_round(Path(folder) / "run", expected, generator, told, found)
            store(found, told, time.time() - start)
    sys.exit(any(found[name] for name in list(found)[4:]))


def one_round(
    out: Path,
    expected: dict[str, str],
    generator: random.Random,
    told: argparse.Namespace,
    found: dict[str, int],
) -> None:
    """Kill one run some times, finish it, and count what is wrong."""
    shutil.rmtree(out, ignore_errors=True)
    wanted = min(told.kills - found["kills"], generator.randint(1, PER_ROUND))
    kills = 0
    for _ in range(wanted):
        before = len(list(out.glob("values/*.parquet")))
        if not killed_at_random(out, generator, told.longest):
            break
        kills += 1
        found["kills_while_items_were_done"] += len(list(out.glob("values/*.parquet"))) > before
    if not kills:
        return
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("values/*.parquet")}
    run_small(out)
    numbers = stored(out)
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("values/*.parquet")}
    attempts = sum(row.attempts for row in mi.open_run(out).rows())
    found["kills"] += kills
    found["rounds"] += 1
    found["items_finished_before_the_last_kill"] += len(kept)
    found["rounds_with_other_numbers"] += numbers != expected
    found["items_lost"] += len(expected.keys() - numbers.keys())
    found["items_doubled"] += max(0, attempts - ITEMS - kills)
    found["finished_items_done_again"] += sum(again[name] != at for name, at in kept.items())


def store(found: dict[str, int], told: argparse.Namespace, seconds: float) -> None:
    """Write what came out so far."""
    about = {
        "asked": told.kills,
        "seed": told.seed,
        "items_of_a_run": ITEMS,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions(),
    }
    OUT.write_text(json.dumps({**found, **about}, indent=2) + "\n", encoding="utf-8")
    print(f"{found['kills']} kills in {found['rounds']} rounds, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
