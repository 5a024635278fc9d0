"""Parts: rows that go through the model together, and how wide their bins should be."""

from dataclasses import dataclass

import numpy as np

from mechinterp.engine.packing import Beginnings, Packing, Rows, pack
from mechinterp.engine.sizes import Shape
from mechinterp.engine.sweep import Sweep

_SHARING_ROWS = 4096  # rows that share beginnings in one part: their table is rows by rows


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that go through the model together, in bins of ``width``."""

    rows: Rows
    width: int

    def packed(self, beginnings: Beginnings | None) -> Packing:
        """Return the rows in their bins."""
        return pack(self.rows, self.width, beginnings)


def parts(sweep: Sweep, rows: Rows, capacity: int, shape: Shape) -> list[Part]:
    """Split rows into parts of at most ``capacity`` columns, like lengths together.

    Within a length class, rows are in the order of their start, so that a part is either the
    whole sweep, joining layer by layer, or rows that enter together.
    """
    if not len(rows):
        return []
    beginnings = sweep.prompts.beginnings if sweep.shares else None
    longest = np.zeros(len(sweep.prompts), dtype=np.int64)
    np.maximum.at(longest, rows.prompt, rows.lengths)
    found = []
    remaining = np.arange(len(rows))
    while len(remaining):
        reach = longest[rows.prompt[remaining]]
        widest = int(reach.max())
        mine = reach > 0.85 * widest - 1
        chosen = rows[remaining[mine]]
        remaining = remaining[~mine]
        rank = sweep.prompts.beginnings.rank[chosen.prompt]
        chosen = chosen[np.lexsort((-chosen.lengths, rank, chosen.family, chosen.start))]
        if beginnings is None:
            chosen = chosen[np.lexsort((-chosen.lengths, chosen.prompt, chosen.start))]
        width = best_width(chosen, widest, capacity, shape, beginnings)
        total = np.cumsum(chosen.lengths)
        n_parts = max(1, -(-int(total[-1]) // max(capacity, width)))
        if beginnings is not None:  # what rows share is a table of rows by rows
            n_parts = max(n_parts, -(-len(chosen) // _SHARING_ROWS))
        which = np.minimum((total - 1) * n_parts // int(total[-1]), n_parts - 1)
        found += [Part(chosen[which == i], width) for i in range(n_parts) if (which == i).any()]
    return found


def best_width(
    rows: Rows, widest: int, capacity: int, shape: Shape, beginnings: Beginnings | None
) -> int:
    """Return the width of bins at which the rows cost least.

    Wider bins waste fewer columns and share base keys (or beginnings) among more rows, but
    attention is over the whole bin.
    """
    sample = rows[rows.start == rows.start[0]]
    if beginnings is not None:
        sample = rows[rows.family == rows.family[0]]
    total = int(sample.lengths.sum())
    options = {widest}
    for factor in (1.5, 2, 3, 4, 8, 16, 32):
        width = int(factor * widest)
        if width <= min(max(total, widest), capacity):
            options.add(width)
    sample = sample[np.arange(min(len(sample), 512))]
    costs = {}
    for width in sorted(options):
        packing = pack(sample, width, beginnings)
        keys = packing.prefix + width
        columns = packing.n_bins * width
        attention = (
            40 * shape.heads * (columns * keys + 0.5 * packing.n_bins * keys * shape.d_head)
        )
        costs[width] = columns * shape.flops + attention
    return min(costs, key=lambda width: costs[width])
