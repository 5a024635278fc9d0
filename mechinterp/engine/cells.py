"""Cells: sets of edits applied together, resolved against a model and a run.

`resolve` turns each cell into writes: one edit at one layer, with the positions it selects in
each prompt. From these follows, with no forward pass, where each counterfactual run first
differs from the base run: its first layer and its first position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Activations
from mechinterp.edits import Add, Edit, Mean, Project, Replace, Resample, Scale, Zero
from mechinterp.engine.runs import Promised, Run
from mechinterp.hooks.editing import Pairs, Target, aim, pair
from mechinterp.models import fingerprint
from mechinterp.sites import resolve_layers
from mechinterp.tasks.positions import position_lists

NEVER = np.iinfo(np.int32).max  # a position or layer that is never reached
_PUTS = (Zero, Replace, Mean)  # kinds that forget what was there


@dataclass(frozen=True, eq=False, init=False)
class Cell:
    """Edits applied together: one counterfactual run of every prompt.

    ``fingerprint`` (optional) is that of the model the cell was made for; another model then
    refuses it.
    """

    edits: tuple[Edit, ...]
    fingerprint: str | None = None

    def __init__(self, edits: Edit | Sequence[Edit], fingerprint: str | None = None) -> None:
        listed = (edits,) if isinstance(edits, Edit) else tuple(edits)
        object.__setattr__(self, "edits", listed)
        object.__setattr__(self, "fingerprint", fingerprint)
        if not listed:
            raise ValueError("a cell without edits is the base run. Give it at least one edit.")


@dataclass(frozen=True, eq=False)
class Write:
    """One edit at one layer, with the positions it selects in each prompt (padded with -1).

    ``source`` are the positions that it reads, ``keys`` the key positions it acts on (None:
    all). Writes of equal ``kind`` differ in nothing but where they act, so one call of the
    edit serves them all.
    """

    edit: Edit
    layer: int | None
    target: Target
    own: Int[np.ndarray, "prompt slot"]
    source: Int[np.ndarray, "prompt slot"]
    keys: tuple[tuple[int, ...], ...] | None
    kind: tuple[Any, ...]

    @property
    def boundary(self) -> int:
        """The layer whose input is the last that this write leaves alone."""
        if self.layer is None:
            return 0
        return self.layer + (self.edit.site == "resid_post")

    @property
    def place(self) -> tuple[str, int]:
        """The site and layer, one name for what leaves a block and enters the next."""
        site = self.edit.site
        if site in ("resid_pre", "resid_post"):
            return "resid", self.boundary
        return site, -1 if self.layer is None else self.layer


class Resolver:
    """Resolves edits against one model and run; equal questions are answered once."""

    def __init__(self, model: TransformerBridge, run: Run) -> None:
        self.model, self.run = model, run
        self.lengths = run.prompts.lengths.tolist()
        self._layers: dict[Any, list[int | None]] = {}
        self._targets: dict[Any, Target] = {}
        self._pairs: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self._drawn: dict[Any, Activations] = {}

    def writes(self, edit: Edit) -> list[Write]:
        """Return the edit's writes, one per layer.

        Raises:
            ValueError: The model or the run has no such place.
        """
        asked = (edit.site, edit.layers)
        if asked not in self._layers:
            self._layers[asked] = resolve_layers(self.model, edit.site, edit.layers)
        own, source = self._positions(edit)
        if isinstance(edit, Resample):  # its donors depend on all the positions of a prompt
            drawn_by = (id(edit.source), edit.seed, edit.others_only)
            asked_of = (*drawn_by, edit.site, edit.layers, id(own))
            if asked_of not in self._drawn:
                self._drawn[asked_of] = edit.donors([row[row >= 0].tolist() for row in own])
            edit = edit.drawn(self._drawn[asked_of])
        keys = None
        if edit.key_positions != "all":
            listed = position_lists(edit.key_positions, self.lengths, self.run.roles)
            keys = tuple(map(tuple, listed))
        kind = _kind(edit)
        return [
            Write(edit, layer, self._target(edit, layer), own, source, keys, kind)
            for layer in self._layers[asked]
        ]

    def _target(self, edit: Edit, layer: int | None) -> Target:
        asked = (edit.site, layer, edit.heads, edit.neurons, id(edit.reads))
        if asked not in self._targets:
            self._targets[asked] = aim(self.model, edit, layer)
        return self._targets[asked]

    def _positions(self, edit: Edit) -> tuple[np.ndarray, np.ndarray]:
        spec, theirs = edit.positions, getattr(edit, "source_positions", None)
        align, aligned = getattr(edit, "align", None), isinstance(edit, Replace)
        asked = (_hashable(spec), _hashable(theirs), align, aligned, id(edit.reads))
        if asked not in self._pairs:
            self._pairs[asked] = padded(pair(edit, self.lengths, self.run.roles))
        return self._pairs[asked]


def padded(
    pairs: Pairs,
) -> tuple[Int[np.ndarray, "prompt slot"], Int[np.ndarray, "prompt slot"]]:
    """Return own and source positions as two arrays, padded with -1."""
    width = max((len(own) for own, _ in pairs), default=0)
    both = np.full((2, len(pairs), max(width, 1)), -1, dtype=np.int32)
    for prompt, (own, source) in enumerate(pairs):
        both[0, prompt, : len(own)] = own
        both[1, prompt, : len(source)] = source
    return both[0], both[1]


def resolve(
    model: TransformerBridge, run: Run, cells: Sequence[Any]
) -> list[tuple[Write, ...]]:
    """Return the writes of every cell, checked to fit the model and each other.

    Raises:
        TypeError: Something is not a cell.
        ValueError: There are no cells; one is of another model; an edit names what the model
            or a prompt does not have, or puts two values at the same place. All before any
            forward pass.
    """
    for number, cell in enumerate(cells):
        if not isinstance(cell, Cell):
            raise TypeError(
                f"cell {number} is a {type(cell).__name__}. Pass mi.Cell([edit, ...]) objects."
            )
    if not cells:
        raise ValueError("there are no cells to run. Pass at least one.")
    _check_model(model, cells)
    resolver = Resolver(model, run)
    writes = []
    for number, cell in enumerate(cells):
        found = [write for edit in cell.edits for write in resolver.writes(edit)]
        if len(found) > 1:
            _check_conflicts(number, found)
        writes.append(tuple(found))
    return writes


def _check_model(model: TransformerBridge, cells: Sequence[Cell]) -> None:
    sources = {id(edit.reads): edit.reads for cell in cells for edit in cell.edits}
    named = {cell.fingerprint: "a cell was" for cell in cells if cell.fingerprint}
    named |= {
        source.info["fingerprint"]: "the activations that a cell reads were"
        for source in sources.values()
        if source is not None and source.info.get("fingerprint")
    }
    if not named:
        return
    mine = fingerprint(model)
    for other, what in named.items():
        if other != mine:
            raise ValueError(
                f"{what} made with another model (fingerprint {other[:12]}…; this model is "
                f"{mine[:12]}…). Make the cells anew for this model."
            )


def _check_conflicts(number: int, writes: Sequence[Write]) -> None:
    """Raise where a write would silently undo an earlier one of the same cell."""
    by_place: dict[tuple[str, int], list[Write]] = {}
    for write in writes:
        by_place.setdefault(write.place, []).append(write)
    for there in by_place.values():
        # What leaves a block is written before what enters the next.
        there.sort(key=lambda write: write.edit.site == "resid_pre")
        for i, later in enumerate(there):
            if not isinstance(later.edit, _PUTS):
                continue
            for earlier in there[:i]:
                prompt = _overlap(earlier, later)
                if prompt is not None and not _says_the_same(earlier, later):
                    at = "" if later.layer is None else f" at layer {later.layer}"
                    undone, by = earlier.edit, later.edit
                    raise ValueError(
                        f"cell {number} edits {by.site}{at} of prompt {prompt} twice at the "
                        f"same place: {type(by).__name__} would undo {type(undone).__name__} "
                        f"of {undone.site}. Keep one of the two, or split them into two cells."
                    )


def _says_the_same(a: Write, b: Write) -> bool:
    """Whether two writes put the same values where both act."""
    if a.edit is b.edit or (isinstance(a.edit, Zero) and isinstance(b.edit, Zero)):
        return True
    same_values = a.kind == b.kind and isinstance(a.edit, _PUTS)
    return same_values and np.array_equal(a.own, b.own) and np.array_equal(a.source, b.source)


def _overlap(a: Write, b: Write) -> int | None:
    """Return the first prompt where two writes of one place touch the same numbers."""
    mine, theirs = a.target.units, b.target.units
    if mine is not None and theirs is not None and not set(mine) & set(theirs):
        return None
    for prompt in range(len(a.own)):
        shared = set(a.own[prompt][a.own[prompt] >= 0]) & set(b.own[prompt])
        if not shared:
            continue
        if a.keys is None or b.keys is None or set(a.keys[prompt]) & set(b.keys[prompt]):
            return prompt
    return None


def is_uniform(edit: Edit) -> bool:
    """Whether prompts that begin alike are edited alike as far as they do.

    Those that read a run, and noise, give every prompt something of its own.
    """
    same = isinstance(edit, Zero | Scale | Add | Project | Mean)
    if isinstance(edit, Replace):
        same = not isinstance(edit.source, Activations) and not edit.positional
    return same and _means_the_same(edit.positions) and edit.key_positions == "all"


def looks_ahead(write: Write) -> bool:
    """Whether a write may make a query attend to later positions.

    Only one of the pattern can: scores that are masked stay masked.
    """
    edit = write.edit
    if edit.site != "pattern" or isinstance(edit, Zero | Scale):
        return False
    if isinstance(edit, Replace) and isinstance(edit.source, Activations):
        return bool((write.source > write.own).any())  # a later query saw more
    if isinstance(edit, Replace):
        return not _is_zero(edit.source)
    return not (isinstance(edit, Mean) and edit.per_position)


def _is_zero(source: object) -> bool:
    return isinstance(source, int | float) and source == 0


def _means_the_same(spec: Any) -> bool:
    """Whether a position is the same number in every prompt, as far as it exists."""
    if isinstance(spec, str | int):
        return spec == "all" or (isinstance(spec, int) and spec >= 0)
    if isinstance(spec, slice):
        return min(spec.start or 0, spec.stop or 0) >= 0 and (spec.step or 1) > 0
    return all(map(_means_the_same, spec))


def acts_from(
    writes: Sequence[Write],
    ends: Int[np.ndarray, " prompt"],
    same: "Sameness | None" = None,
) -> tuple[Int[np.ndarray, " prompt"], Int[np.ndarray, " prompt"]]:
    """Return per prompt the first layer and the first position where a cell can differ.

    A write counts where it can change something up to the answer; ``NEVER`` marks prompts
    whose run is the base run.
    """
    layers = np.full(len(ends), NEVER, dtype=np.int32)
    positions = np.full(len(ends), NEVER, dtype=np.int32)
    for write in writes:
        acts = (write.own >= 0) & (write.own <= ends[:, None])
        if same is not None:
            acts &= ~same.unchanged(write)
        some = acts.any(1)
        first = np.where(acts, write.own, NEVER).min(1)
        layers = np.where(some, np.minimum(layers, write.boundary), layers)
        positions = np.minimum(positions, first)
    return layers, positions


class Sameness:
    """Where the activations that a write puts are the base run's own, known from the tokens.

    ``common[run]`` counts, per prompt, the positions up to which the base run and another one
    are the same computation; ``tokens[run]`` and ``base`` are their tokens, -1 where edits of
    a run may act.
    """

    def __init__(
        self,
        base: Int[np.ndarray, "prompt pos"],
        common: Mapping[str, Int[np.ndarray, " prompt"]],
        tokens: Mapping[str, Int[np.ndarray, "prompt pos"]],
    ) -> None:
        self.base, self.common, self.tokens = base, common, tokens
        self._found: dict[Any, np.ndarray] = {}

    def unchanged(self, write: Write) -> Bool[np.ndarray, "prompt slot"]:
        """Return which positions of a write put back what is there."""
        stored = getattr(write.edit.reads, "stored", None)
        run = stored.run if isinstance(stored, Promised) else None
        if not isinstance(write.edit, Replace) or run not in self.common or run is None:
            return np.zeros(write.own.shape, dtype=bool)
        # What enters the first block depends on nothing but the token and its position.
        site = write.edit.site
        entering = site == "embed" or (site == "resid_pre" and write.layer == 0)
        asked = (id(write.own), id(write.source), run, entering and site)
        if asked not in self._found:
            in_place = write.own == write.source
            free = in_place & (write.own < self.common[run][:, None])
            if entering:
                mine = np.take_along_axis(self.base, np.maximum(write.own, 0), 1)
                theirs = np.take_along_axis(self.tokens[run], np.maximum(write.source, 0), 1)
                free |= (mine == theirs) & (mine >= 0) & in_place
            self._found[asked] = free
        return self._found[asked]


def _kind(edit: Edit) -> tuple[Any, ...]:
    """Return what two edits share when one call of ``new`` can serve both."""
    where = {"layers", "heads", "neurons", "positions", "key_positions", "source_positions"}
    rest = [getattr(edit, f.name) for f in fields(edit) if f.name not in where]
    by_identity = [id(v) if isinstance(v, Tensor | Activations) else v for v in rest]
    if isinstance(edit, Add) and edit.direction.ndim > 1:
        return (id(edit),)  # a direction per head
    source = getattr(edit, "source", None)
    if isinstance(source, Tensor) and not edit.positional:
        return (id(edit),)  # its shape may be that of the selected heads
    return (type(edit), *by_identity)


def _hashable(spec: Any) -> Any:
    return (spec.start, spec.stop, spec.step) if isinstance(spec, slice) else spec
