"""Measure what the engine gains from oneDNN's matrix products, on and off in turns.

    python scripts/fetch_models.py && python scripts/bench_products.py

All single heads of SmolLM2-135M ablated on IOI prompts, and all of the embedded model on 4,096
tokens of text. On processors where MKL is not held back both rows are the same code. Prints a
table and stores it in ``scripts/results/bench_products.json``. Let nothing else run meanwhile.
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
from mechinterp.engine.products import mkl_is_held_back
from mechinterp.results import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "bench_products.json"
BOOK = HERE.parent / "tests" / "data" / "goblin.txt"


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    load = psutil.getloadavg()[0]
    if not mkl_is_held_back():
        print("MKL takes all of this processor: oneDNN is not used, on or off.")
    rows = [measured(*work, asked.repeats) for work in works(asked.prompts)]
    shown = Table("what", "MKL, s", "oneDNN, s", "times as fast", "largest difference")
    for row in rows:
        numbers = (f"{row['mkl']:.1f}", f"{row['onednn']:.1f}", f"{row['ratio']:.2f}")
        shown.add_row(row["what"], *numbers, f"{row['difference']:.1e}")
    Console().print(shown)
    found = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "held_back": mkl_is_held_back(),
        "threads": asked.threads,
        "load": load,
        "rows": rows,
        "versions": versions(),
    }
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


def works(prompts: int) -> list[tuple[str, Callable[[], mi.Result]]]:
    """What is measured, and how to run it."""
    smol, small = mi.load_model("smollm2-135m"), mi.load_model("embedded")
    task = mi.load_task("ioi", smol, n=prompts)
    words = BOOK.read_text(encoding="utf-8")
    text = mi.Text.from_strings(small, [words], context=128)[:32]
    tokens = int(text.prompts.lengths.sum())
    return [
        (f"SmolLM2-135M, {prompts} prompts", lambda: mi.head_ablation(smol, task)),
        (f"embedded, {tokens} tokens", lambda: mi.head_ablation(small, text)),
    ]


def measured(what: str, call: Callable[[], mi.Result], repeats: int) -> dict[str, Any]:
    """Medians of runs in turns, after one that checks and warms up."""
    call()
    spent: dict[bool, list[float]] = {False: [], True: []}
    values = {}
    for _ in range(repeats):
        for on in (False, True):
            torch.backends.mkldnn.set_flags(_enabled=on)
            start = time.perf_counter()
            found = call()
            spent[on].append(time.perf_counter() - start)
            values[on] = found.data["ablated"].values
    mkl, onednn = (float(np.median(spent[on])) for on in (False, True))
    return {
        "what": what,
        "mkl": mkl,
        "onednn": onednn,
        "ratio": mkl / onednn,
        "difference": float(np.abs(values[True] - values[False]).max()),
        "runs": {"mkl": spent[False], "onednn": spent[True]},
    }


if __name__ == "__main__":
    main()
