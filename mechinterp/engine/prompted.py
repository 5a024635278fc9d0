"""All prompts of all runs, numbered together, and what they have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mechinterp.engine.cells import NEVER, Write, acts_from, is_uniform
from mechinterp.engine.packing import Beginnings
from mechinterp.engine.runs import Run


@dataclass(frozen=True, eq=False)
class Prompted:
    """The prompts of all runs, numbered one after the other.

    ``offset[run]`` is the first number of a run's prompts; ``alike`` the position up to which
    a prompt's run does what any other run of the same tokens does (edits end that).
    """

    runs: tuple[Run, ...]
    tokens: Int[np.ndarray, "prompt pos"]
    lengths: Int[np.ndarray, " prompt"]
    offset: dict[str, int]
    alike: Int[np.ndarray, " prompt"]
    beginnings: Beginnings
    writes: tuple[tuple[Write, ...], ...]  # per run: edits in force, then its own

    def __len__(self) -> int:
        return len(self.tokens)

    def run_index(self, prompt: int) -> int:
        """Return which run a numbered prompt belongs to."""
        starts = [self.offset[run.name] for run in self.runs]
        return int(np.searchsorted(starts, prompt, side="right")) - 1

    def unedited(self, run: str) -> Int[np.ndarray, "prompt pos"]:
        """Return a run's tokens, -1 on padding and from where its edits act."""
        rows = slice(self.offset[run], self.offset[run] + len(self.runs[0]))
        reach = np.minimum(self.lengths[rows], self.alike[rows])[:, None]
        inside = np.arange(self.tokens.shape[1]) < reach
        return np.where(inside, self.tokens[rows], -1)

    def common(self, base: str, other: str) -> Int[np.ndarray, " prompt"]:
        """Return per prompt up to which position two runs are the same computation."""
        n = len(self.runs[0])
        if base == other:
            return np.full(n, NEVER)
        a, b = (self.offset[name] + np.arange(n) for name in (base, other))
        met = [
            self.beginnings.common(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ]
        return np.minimum.reduce([np.array(met), self.alike[a], self.alike[b]])


def prompted(runs: Sequence[Run], writes: Sequence[tuple[Write, ...]]) -> Prompted:
    """Number the prompts of the runs; ``writes`` are the edits under which each run is."""
    width = max(run.prompts.tokens.shape[1] for run in runs)
    tokens = np.concatenate(
        [
            np.pad(
                run.prompts.tokens.cpu().numpy(),
                ((0, 0), (0, width - run.prompts.tokens.shape[1])),
            )
            for run in runs
        ]
    )
    lengths = np.concatenate([run.prompts.lengths.cpu().numpy() for run in runs])
    counts = np.cumsum([0, *(len(run) for run in runs)])
    offset = {run.name: int(n) for run, n in zip(runs, counts, strict=False)}
    alike = []
    for run, under in zip(runs, writes, strict=True):
        own_edits = set(map(id, run.edits))
        apart = [w for w in under if id(w.edit) in own_edits or not is_uniform(w.edit)]
        ends = run.prompts.lengths.cpu().numpy() - 1
        _, first = acts_from(apart, ends)
        alike.append(first)
    return Prompted(
        tuple(runs),
        tokens,
        lengths,
        offset,
        np.concatenate(alike),
        Beginnings(tokens, lengths.tolist()),
        tuple(writes),
    )
