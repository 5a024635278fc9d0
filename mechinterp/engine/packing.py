"""Packing: the tokens to compute, laid out in bins of one width.

A row is one counterfactual run of one prompt: the tokens from its first changed position to
its answer. Rows are put into bins, several where they fit, so that a block sees one dense
``[bin, column]`` rectangle. A query sees the keys of its own row in its bin, and the base
run's keys for the positions before the row's first. Rows of one sweep that begin alike are
computed together up to where they part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int, Shaped


@dataclass(frozen=True, eq=False)
class Rows:
    """Counterfactual runs, as parallel arrays.

    ``first`` and ``last`` are the positions to compute, both inclusive; ``start`` is the layer
    at which the row enters. Rows of equal ``family`` are alike where their prompts are, up to
    position ``alike``.
    """

    cell: Int[np.ndarray, " row"]
    prompt: Int[np.ndarray, " row"]
    first: Int[np.ndarray, " row"]
    last: Int[np.ndarray, " row"]
    start: Int[np.ndarray, " row"]
    family: Int[np.ndarray, " row"]
    alike: Int[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, index: Shaped[np.ndarray, " chosen"]) -> "Rows":
        return Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def lengths(self) -> Int[np.ndarray, " row"]:
        """Tokens of each row."""
        return self.last - self.first + 1


@dataclass(frozen=True, eq=False)
class Packing:
    """Rows in bins. Column ``j`` of ``bin[r]`` holds position ``j + shift[r]`` of row ``r``.

    A row holds the positions from ``own_from`` on; earlier ones are held by the row
    ``parent[r]`` or a parent of that. Row ``r`` sees the positions of row ``s`` before
    ``shared[r, s]``. Bins are in the order of their rows' start, ``bin_start``; ``owner`` is
    the prompt whose base keys stand before the bin.
    """

    rows: Rows
    width: int
    bin: Int[np.ndarray, " row"]
    shift: Int[np.ndarray, " row"]
    own_from: Int[np.ndarray, " row"]
    parent: Int[np.ndarray, " row"]
    shared: Int[np.ndarray, "row row"] | None
    bin_start: Int[np.ndarray, " bin"]
    owner: Int[np.ndarray, " bin"]
    prefix: int = field(default=0)

    @property
    def n_bins(self) -> int:
        """How many bins there are."""
        return len(self.bin_start)

    def active(self, layer: int) -> int:
        """Return how many bins have entered by ``layer``."""
        return int(np.searchsorted(self.bin_start, layer, side="right"))

    @cached_property
    def row(self) -> Int[np.ndarray, "bin column"]:
        """Which row each column belongs to, -1 where none."""
        filled = np.full((self.n_bins, self.width), -1, dtype=np.int64)
        for r in range(len(self.rows)):
            start = self.own_from[r] - self.shift[r]
            stop = self.rows.last[r] + 1 - self.shift[r]
            filled[self.bin[r], start:stop] = r
        return filled

    @cached_property
    def position(self) -> Int[np.ndarray, "bin column"]:
        """The position of each column in its prompt, -1 on padding."""
        shift = np.append(self.shift, 0)[self.row]
        return np.where(self.row >= 0, np.arange(self.width) + shift, -1)

    @cached_property
    def prompt(self) -> Int[np.ndarray, "bin column"]:
        """The prompt of each column, 0 on padding."""
        return np.append(self.rows.prompt, 0)[self.row]

    def flat(self, row: int, positions: Int[np.ndarray, " slot"]) -> Int[np.ndarray, " slot"]:
        """Return the flat index of positions that the row itself holds."""
        return self.bin[row] * self.width + positions - self.shift[row]

    def holder(self, row: int, position: int) -> int:
        """Return the row that computes ``position`` for ``row``."""
        while position < self.own_from[row]:
            row = int(self.parent[row])
        return row

    def sees(self) -> tuple[Bool[np.ndarray, "bin column key"], Int[np.ndarray, "bin key"]]:
        """Return which keys each column may see by causality, and the keys' positions.

        Keys are the ``prefix`` base positions, then the bin's own columns. A column of
        padding sees everything, so that its softmax stays finite.
        """
        position, row = self.position, self.row
        before = position[:, None, :] <= position[:, :, None]
        same = row[:, None, :] == row[:, :, None]
        if self.shared is not None:
            until = self.shared[row[:, :, None], row[:, None, :]]
            same |= position[:, None, :] < until
        inside = before & same & (row >= 0)[:, None, :]
        first = np.append(self.rows.first, 0)[row]
        base = np.arange(self.prefix)[None, None, :] < first[:, :, None]
        both = np.concatenate([base, inside], axis=2)
        both |= (row < 0)[:, :, None]
        prefix = np.broadcast_to(np.arange(self.prefix), (self.n_bins, self.prefix))
        return both, np.concatenate([prefix, np.maximum(position, 0)], axis=1)

    def key_columns(self, width: int) -> Int[np.ndarray, "token position"]:
        """Return, for each flat column, where the keys of its prompt's positions are.

        -1 where a position has no key that the column sees.
        """
        sees, positions = self.sees()
        found = np.full((self.n_bins, self.width, width), -1, dtype=np.int64)
        b, column, key = (sees & (self.row >= 0)[:, :, None]).nonzero()
        found[b, column, positions[b, key]] = key
        return found.reshape(-1, width)


class Beginnings:
    """How much of their beginning prompts share; ``rank`` orders them so that the like meet."""

    def __init__(self, tokens: Int[np.ndarray, "prompt pos"], lengths: Sequence[int]) -> None:
        inside = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
        self.tokens = np.where(inside, tokens, -1)
        self.rank = np.empty(len(tokens), dtype=np.int64)
        self.rank[np.lexsort(self.tokens.T[::-1])] = np.arange(len(tokens))

    def common(self, a: int, b: int) -> int:
        """Return how many tokens two prompts share at their beginning."""
        same = (self.tokens[a] == self.tokens[b]) & (self.tokens[a] >= 0)
        return len(same) if same.all() else int(same.argmin())


def pack(rows: Rows, width: int, beginnings: Beginnings | None = None) -> Packing:
    """Return the rows in bins of ``width``, in the order of their start.

    With ``beginnings``, rows of one family share what their prompts share.
    """
    prefix = int(rows.first.max(initial=0))
    if beginnings is None:
        rows = rows[np.lexsort((-rows.lengths, rows.prompt, rows.start))]
        bins, shift, starts, owners = _fit(rows, width, by_prompt=prefix > 0)
        own_from, parent, shared = rows.first.copy(), np.arange(len(rows)), None
    else:
        rank = beginnings.rank[rows.prompt]
        rows = rows[np.lexsort((rank, rows.first, rows.family, rows.start))]
        fitted = _fit_shared(rows, width, beginnings)
        bins, shift, starts, owners, own_from, parent, shared = fitted
    return Packing(rows, width, bins, shift, own_from, parent, shared, starts, owners, prefix)


def _fit(
    rows: Rows, width: int, by_prompt: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First-fit decreasing within each start (and prompt, where bins have base keys)."""
    bins = np.zeros(len(rows), dtype=np.int64)
    shift = np.zeros(len(rows), dtype=np.int64)
    starts: list[int] = []
    owners: list[int] = []
    room: list[list[int]] = [[] for _ in range(width + 1)]  # open bins by columns left
    group: tuple[int, int] | None = None
    lengths, begin = rows.lengths.tolist(), rows.start.tolist()
    prompts, first = rows.prompt.tolist(), rows.first.tolist()
    for r, length in enumerate(lengths):
        mine = (begin[r], prompts[r] if by_prompt else -1)
        if mine != group:
            group, room = mine, [[] for _ in range(width + 1)]
        left = next((n for n in range(length, width) if room[n]), None)
        if left is None:
            b, left = len(starts), width
            starts.append(begin[r])
            owners.append(prompts[r])
        else:
            b = room[left].pop()
        bins[r], shift[r] = b, first[r] - (width - left)
        room[left - length].append(b)
    return bins, shift, np.array(starts), np.array(owners)


def _fit_shared(rows: Rows, width: int, beginnings: Beginnings) -> tuple[np.ndarray, ...]:
    """Fill one bin after the other; a row leaves out what the bin holds already."""
    n = len(rows)
    bins, shift = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    own_from = rows.first.astype(np.int64)
    shared = np.zeros((n, n), dtype=np.int32)
    covered = np.zeros(n, dtype=np.int64)
    parent = np.arange(n)
    starts: list[int] = []
    owners: list[int] = []
    inside: list[int] = []
    used = 0
    for r in range(n):
        fits = bool(inside) and all(
            getattr(rows, name)[r] == getattr(rows, name)[inside[0]]
            for name in ("start", "family", "first")
        )
        meets = reach = np.zeros(0, dtype=np.int64)
        from_here = int(rows.first[r])
        if fits:
            meets = np.array([_meeting(rows, beginnings, r, s) for s in inside])
            reach = np.minimum(meets, covered[inside])
            from_here = max(from_here, int(reach.max()))
            reaches = int(meets[0]) >= int(rows.first[r])
            cost = max(0, int(rows.last[r]) + 1 - from_here)
            fits = reaches and used + cost <= width
        if not fits:
            inside, used = [], 0
            starts.append(int(rows.start[r]))
            owners.append(int(rows.prompt[r]))
            from_here = int(rows.first[r])
        else:
            shared[r, inside] = shared[inside, r] = meets
            parent[r] = inside[int(reach.argmax())]
        cost = max(0, int(rows.last[r]) + 1 - from_here)
        bins[r], own_from[r], shift[r] = len(starts) - 1, from_here, from_here - used
        covered[r] = max(int(rows.last[r]) + 1, from_here)
        inside.append(r)
        used += cost
    return bins, shift, np.array(starts), np.array(owners), own_from, parent, shared


def _meeting(rows: Rows, beginnings: Beginnings, r: int, s: int) -> int:
    """Return the position at which two rows of one family part."""
    alike = min(int(rows.alike[r]), int(rows.alike[s]))
    return min(beginnings.common(int(rows.prompt[r]), int(rows.prompt[s])), alike)
