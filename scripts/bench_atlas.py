"""Measure the redundancy atlas: seconds and peak memory.

    python scripts/fetch_models.py && python scripts/bench_atlas.py --text wiki.txt

Compares all pairs of heads of SmolLM2-135M on so many tokens of a text file (the embedded
model's own held-out text of the tests without), and measures the causal interaction of the
flagged pairs on IOI. Prints seconds by part and the peak memory of the process, beside what it
took with the model loaded, and stores them in ``scripts/results/bench_atlas.json``. Let
nothing else run meanwhile; "processor seconds" suffer less where something does.
"""

import argparse
import json
import platform
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import mechinterp as mi
from mechinterp.results import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "bench_atlas.json"
TEXT = HERE.parent / "tests" / "data" / "five_children.txt"


def text_of(model: Any, path: Path, tokens: int, context: int) -> mi.Text:
    """The first pieces of a file that have so many tokens together."""
    words = path.read_text(encoding="utf-8")[: 12 * tokens]
    text = mi.Text.from_strings(model, words, context=context, name=path.stem)
    sums = text.prompts.lengths.cumsum(0)
    return text[: int((sums < tokens).sum()) + 1]


def peak() -> int:
    """The largest memory that the process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=8, help="of the task; 0: no interaction")
    parser.add_argument("--flag", type=int, default=50)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="save atlas and figures in this folder")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = mi.load_model(asked.model)
    text = text_of(model, asked.text, asked.tokens, asked.context)
    mi.fingerprint(model)  # hashes the weights, once
    loaded = peak()
    task = mi.load_task("ioi", model, n=asked.prompts) if asked.prompts else None
    rows: list[dict[str, Any]] = []
    found = None
    for judge in [None, task] if task is not None else [None]:
        start, busy = time.perf_counter(), time.process_time()
        found = mi.redundancy_atlas(
            model,
            text,
            task=judge,
            queries=asked.queries,
            flag=asked.flag,
            memory=asked.memory,
        )
        rows.append(
            {
                "what": "views" if judge is None else "views and interaction",
                "seconds": time.perf_counter() - start,
                "processor_seconds": time.process_time() - busy,
                "peak_gb": peak() / 1e9,
                "pairs_ablated": found.data.sizes.get("pair", 0),
            }
        )
    assert found is not None
    about = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": asked.threads,
        "load": psutil.getloadavg()[0],
        "model": asked.model,
        "heads": len(found.heads),
        "text": text.name,
        "tokens": int(text.prompts.lengths.sum()),
        "context": asked.context,
        "queries": asked.queries,
        "passes": found.convention.settings["passes"],
        "memory": asked.memory,
        "loaded_gb": loaded / 1e9,
        "versions": versions(),
    }
    RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        found.save(asked.out / "atlas.nc")
    table = Table(title=f"{len(found.heads)} heads, {about['tokens']} tokens")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    Console().print(f"{loaded / 1e9:.2f} GB with the model loaded")


if __name__ == "__main__":
    main()
