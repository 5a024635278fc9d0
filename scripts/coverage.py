"""Measure how often bootstrap intervals of few samples cover the mean, and store the table.

    python scripts/coverage.py             measure, print and store
    python scripts/coverage.py --page      write the stored table into the page on statistics

Stores ``mechinterp/data/coverage.json``, which ``mechinterp.stats.true_coverage`` reads. Then
measures clusters of unequal sizes, which the table does not hold. A share of 10,000 intervals
is uncertain by about 0.4 percentage points (two standard errors at 95 %).
"""

import argparse
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.stats import bootstrap_interval
from mechinterp.stats.coverage import TABLE
from mechinterp.stats.intervals import METHODS

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

SIZES = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 100, 200)
SHAPES: Mapping[str, Draw] = {  # all with mean 0
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
    "heavy-tailed": lambda rng, shape: rng.standard_t(3, size=shape),
}
PAGE = Path(__file__).parents[1] / "docs" / "methods" / "statistics.md"
MARKS = "<!-- coverage:start -->", "<!-- coverage:end -->"
SHOWN = (3, 5, 10, 20, 40, 100, 200)  # on the page
BLOCK = 500  # intervals that share their resamples


def coverage(
    draw: Draw, n: int, method: str, intervals: int, clusters: np.ndarray | None = None
) -> float:
    """Return the share of nominal 95 % intervals of ``n`` values that contain 0, the mean."""
    covered = 0
    for block in range(intervals // BLOCK):
        values = draw(np.random.default_rng([n, block]), (BLOCK, n))
        low, high = bootstrap_interval(values, seed=block, clusters=clusters, method=method)
        covered += int(((low <= 0) & (high >= 0)).sum())
    return covered / (intervals // BLOCK * BLOCK)


def clustered(draw: Draw, sizes: np.ndarray) -> Draw:
    """Return a way to draw values of which half the variance is shared by their cluster."""

    def both(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        shared = draw(rng, (shape[0], len(sizes))).repeat(sizes, axis=1)
        return shared + draw(rng, shape)

    return both


def markdown(table: dict[str, Any]) -> str:
    """Return the stored table as percentages, in Markdown."""
    lines = [
        "| method | effects | " + " | ".join(f"{n} prompts" for n in SHOWN) + " |",
        "| --- | --- |" + " --: |" * len(SHOWN),
    ]
    for method in METHODS:
        for name, row in table[method].items():
            shares = [f"{100 * row[table['n'].index(n)]:.1f} %" for n in SHOWN]
            lines.append(f"| {method} | {name} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def write_page() -> None:
    """Write the stored table into the page on statistics, between its marks."""
    table = markdown(json.loads(TABLE.read_text(encoding="utf-8")))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    made = "\n".join([before + MARKS[0], table, MARKS[1] + after])
    PAGE.write_text(made, encoding="utf-8")


def main() -> None:
    """Simulate, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--intervals", type=int, default=10_000, help="per number")
    parser.add_argument("--page", action="store_true", help="write the stored table there")
    arguments = parser.parse_args()
    if arguments.page:
        write_page()
        return
    intervals = arguments.intervals
    table = {
        "nominal": 0.95,
        "intervals": intervals,
        "n_resamples": 2000,
        "scipy": version("scipy"),
        "n": list(SIZES),
    }
    print(f"{'':24}" + "".join(f"{n:>7}" for n in SIZES))
    for method in METHODS:
        table[method] = {}
        for name, draw in SHAPES.items():
            row = [coverage(draw, n, method, intervals) for n in SIZES]
            table[method][name] = row
            print(f"{method:11} {name:12}" + "".join(f"{x:7.3f}" for x in row), flush=True)
    TABLE.write_text(json.dumps(table) + "\n", encoding="utf-8")
    print("clusters of 1 to 9 samples, half of the variance shared")
    for count in (10, 20, 40, 100):
        sizes = np.arange(count) % 9 + 1
        labels = np.arange(count).repeat(sizes)
        for method in METHODS:
            row = [
                coverage(clustered(draw, sizes), len(labels), method, intervals, labels)
                for draw in SHAPES.values()
            ]
            print(f"{count:4} clusters {method:11}" + "".join(f"{x:7.3f}" for x in row))


if __name__ == "__main__":
    main()
