"""How often a nominal 95 % bootstrap interval of so many samples truly covers the mean.

Simulated by ``scripts/coverage.py``, which wrote the table, for three shapes of distribution.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.names import unknown
from mechinterp.stats.intervals import METHODS

TABLE = Path(__file__).parent.parent / "data" / "coverage.json"


def true_coverage(n: int, method: str = METHODS[0]) -> tuple[float, float]:
    """Return the lowest and highest true coverage of a nominal 95 % interval by ``method``.

    Over normal, skewed (exponential) and heavy-tailed (t with 3 degrees of freedom) samples of
    size ``n``, or ``n`` clusters of equal size; between sizes of the table by 1 / n, in which
    the error is about linear.

    Raises:
        ValueError: An unknown method, or fewer than 2 samples, which have no interval.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    if n < 2:
        raise ValueError(f"n is {n}, but an interval needs at least 2 samples. Pass more.")
    table = _table()
    inverse = 1 / np.array(table["n"][::-1])
    found = [
        float(np.interp(1 / n, inverse, shares[::-1])) for shares in table[method].values()
    ]
    return min(found), max(found)


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
