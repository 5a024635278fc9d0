"""A sweep: many cells over many prompts, as few computations as exactness allows.

The base runs come first. Then the rows (a cell on a prompt, from its first changed layer and
position on) go through the model in passes that fit the memory. A row that changes nothing has
the base run's value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.edits import Resample
from mechinterp.engine.cells import (
    NEVER,
    Cell,
    Resolver,
    Sameness,
    Write,
    acts_from,
    is_uniform,
    padded,
    resolve,
)
from mechinterp.engine.packing import Rows
from mechinterp.engine.prompted import Prompted, prompted
from mechinterp.engine.runs import Promised, Run
from mechinterp.hooks.editing import Action, aim, pair
from mechinterp.hooks.taps import attached
from mechinterp.models import fingerprint, input_device, is_causal
from mechinterp.tasks.positions import PositionSpec, Roles, position_lists


@dataclass(frozen=True, eq=False)
class Sweep:
    """Cells resolved against the runs they are applied to, and what follows from the tokens.

    The cells are applied to ``runs[on]``. ``writes[cell]`` are a cell's own; those of the edits
    ``in_force`` on the model and of the run itself, which come first, are with the prompts.
    ``everywhere``: every position is an answer, so whole prompts are computed.
    """

    model: TransformerBridge
    runs: tuple[Run, ...]
    on: int
    cells: tuple[Cell, ...]
    writes: tuple[tuple[Write, ...], ...]
    prompts: Prompted
    in_force: tuple[Action, ...]
    everywhere: bool = False

    @property
    def whole(self) -> bool:
        """Whether rows are whole prompts: all is read, or a position sees all others."""
        return self.everywhere or not is_causal(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model wants its tokens."""
        return input_device(self.model)

    @property
    def run(self) -> Run:
        """The run that the cells are applied to."""
        return self.runs[self.on]

    @cached_property
    def fingerprint(self) -> str:
        """The model's, at the time of the sweep."""
        return fingerprint(self.model)

    @cached_property
    def ends(self) -> np.ndarray:
        """The position of each prompt's answer."""
        return np.array(self.run.answer_positions)

    @cached_property
    def rows(self) -> Rows:
        """Every counterfactual run that can differ from the base run."""
        offset = self.prompts.offset[self.run.name]
        whole = self.whole
        common = {run.name: self.prompts.common(self.run.name, run.name) for run in self.runs}
        if whole:  # a position depends on the whole prompt
            starts = {name: self.prompts.offset[name] for name in common}
            lengths = {
                name: self.prompts.lengths[at : at + len(self.run)]
                for name, at in starts.items()
            }
            mine = lengths[self.run.name]
            common = {
                name: np.where((n >= mine) & (lengths[name] == mine), n, 0)
                for name, n in common.items()
            }
        tokens = {run.name: self.prompts.unedited(run.name) for run in self.runs}
        same = Sameness(tokens[self.run.name], common, tokens)
        parts: list[list[np.ndarray]] = []
        for number, writes in enumerate(self.writes):
            ends = self.prompts.lengths[offset : offset + len(self.run)] - 1
            layers, first = acts_from(writes, ends if whole else self.ends, same)
            prompts = (first < NEVER).nonzero()[0]
            apart = [w for w in writes if len(self.run) > 1 and not is_uniform(w.edit)]
            alike = np.full(len(self.run), NEVER, dtype=np.int32)
            if apart:  # prompts part where edits that differ between them act
                alike = acts_from(apart, ends)[1]
            alike = np.minimum(alike, self.prompts.alike[offset : offset + len(self.run)])
            n = len(prompts)
            parts.append(
                [
                    np.full(n, number),
                    prompts + offset,
                    np.zeros(n, dtype=np.int64) if whole else first[prompts],
                    ends[prompts] if whole else self.ends[prompts],
                    layers[prompts],
                    np.full(n, number),
                    alike[prompts],
                ]
            )
        return Rows(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    @cached_property
    def shares(self) -> bool:
        """Whether some rows of one cell begin alike and are edited alike."""
        rows = self.rows
        return len(self.run) > 1 and bool((rows.alike > rows.first).any())

    def promised(self) -> dict[tuple[str, str, int | None], list[Promised]]:
        """Return the activations that the cells read of runs, by run, site and layer."""
        found: dict[tuple[str, str, int | None], list[Promised]] = {}
        for writes in self.writes:
            for write in writes:
                stored = getattr(write.edit.reads, "stored", None)
                if isinstance(stored, Promised):
                    key = (stored.run, write.edit.site, write.layer)
                    sources = found.setdefault(key, [])
                    if not any(each is stored for each in sources):
                        sources.append(stored)
        return found

    def row_writes(self, cell: int) -> tuple[Write, ...]:
        """Return everything written in a cell's rows, in order."""
        return (*self.prompts.writes[self.on], *self.writes[cell])


def sweep(
    model: TransformerBridge,
    runs: Sequence[Run],
    on: str,
    cells: Sequence[Any],
    *,
    everywhere: bool = False,
) -> Sweep:
    """Resolve cells against a run and the runs they read from.

    ``everywhere``: what is measured reads every position, not the answer alone.

    Raises:
        ValueError: A cell does not fit the model, the run or itself; before any forward pass.
    """
    names = [run.name for run in runs]
    in_force = tuple(f for f in attached(model) if isinstance(f, Action))
    under = []
    for run in runs:
        resolver = Resolver(model, run)
        own = [write for edit in run.edits for write in resolver.writes(edit)]
        under.append((*(_of_action(model, action, run) for action in in_force), *own))
    index = names.index(on)
    writes = resolve(model, runs[index], cells)
    _check_promises(cells, runs)
    made = prompted(runs, under)
    return Sweep(
        model, tuple(runs), index, tuple(cells), tuple(writes), made, in_force, everywhere
    )


def _check_promises(cells: Sequence[Cell], runs: Sequence[Run]) -> None:
    by_name = {run.name: run for run in runs}
    for number, cell in enumerate(cells):
        for edit in cell.edits:
            stored = getattr(edit.reads, "stored", None)
            if not isinstance(stored, Promised):
                continue
            if stored.run not in by_name:
                raise ValueError(
                    f"cell {number} reads the {stored.run} run, which this data does not have "
                    f"(it has {', '.join(by_name)}). Give data with that run."
                )
            if not torch.equal(stored.tokens, by_name[stored.run].prompts.tokens):
                raise ValueError(
                    f"cell {number} reads the {stored.run} run of other prompts than these. "
                    "Make it with mi.run_activations on the data that you pass."
                )


def _of_action(model: TransformerBridge, action: Action, run: Run) -> Write:
    """Return an edit that is in force on the model as a write on the run's prompts."""
    lengths = run.prompts.lengths.tolist()
    pairs = None if action.everywhere else action.pairs
    if pairs is None:  # positions beyond some prompts are allowed, and left out
        lenient = partial(_reaching, lengths=lengths, roles=action.roles)
        pairs = pair(action.edit, lengths, action.roles, select=lenient)
    if len(pairs) < len(lengths):
        raise ValueError(
            f"the edit of {action.edit.site} in force was given data of {len(pairs)} prompts, "
            f"but the sweep runs on {len(lengths)}. Put it in force on the same prompts."
        )
    own, source = padded(pairs[: len(lengths)])
    reach = np.array(lengths)[:, None]
    own = np.where(own < reach, own, -1)
    keys = None
    if action.edit.key_positions != "all" and action.key_lists is not None:
        keys = tuple(map(tuple, action.key_lists))
    elif action.edit.key_positions != "all":
        listed = position_lists(action.edit.key_positions, lengths, action.roles)
        keys = tuple(map(tuple, listed))
    edit = action.edit
    if isinstance(edit, Resample):
        edit = edit.drawn(edit.donors([row[row >= 0].tolist() for row in own]))
    target = aim(model, edit, action.layer)
    return Write(edit, action.layer, target, own, source, keys, (id(edit),))


def _reaching(
    spec: PositionSpec, lengths: Sequence[int], roles: Roles | None
) -> list[list[int]]:
    """Return the positions of a specification; a number may lie beyond a prompt."""
    parts = [spec] if isinstance(spec, str | int | slice) else spec
    lists: list[list[int]] = [[] for _ in lengths]
    for part in parts:
        beyond = isinstance(part, int) and part >= 0
        if isinstance(part, slice):
            found = [list(range(n))[part] for n in lengths]
        else:
            found = [[part]] * len(lengths) if beyond else position_lists(part, lengths, roles)
        for have, more in zip(lists, found, strict=True):
            have += [p for p in more if p not in have]
    return lists
