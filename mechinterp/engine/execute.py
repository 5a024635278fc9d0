"""Executing a sweep: base runs, self-check, parts, and plain runs where those fail.

Three ways lead to the same numbers: ``fast`` computes what changed, from its first layer and
position on; ``layers`` computes whole prompts from the first changed layer on (encoders, and
text that is read everywhere);
``full`` runs the whole model. The first two are checked against plain hooked runs before they
are trusted.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp._progress import bar
from mechinterp.edits import Edit
from mechinterp.engine.base import (
    answer_columns,
    base_rows,
    embedded_rows,
    fulfil,
    run_base,
    scheduled,
)
from mechinterp.engine.cells import looks_ahead
from mechinterp.engine.checking import check
from mechinterp.engine.packing import Rows
from mechinterp.engine.parts import Part, parts
from mechinterp.engine.passes import Pass
from mechinterp.engine.reading import Reader
from mechinterp.engine.runs import BATCH, Run
from mechinterp.engine.sizes import (
    as_bytes,
    base_bytes,
    capacity,
    default_budget,
    pass_bytes,
    shape_of,
)
from mechinterp.engine.store import Base
from mechinterp.engine.sweep import Sweep
from mechinterp.engine.whole import run_in_full, run_whole_base, run_whole_rows
from mechinterp.engine.wiring import UnknownWiringError, Wiring
from mechinterp.hooks import HookManager
from mechinterp.hooks.taps import foreign_hooks, muted
from mechinterp.metrics import METRICS, kl
from mechinterp.tasks import answer_logits

# What a module raises that is not made for a part of its positions or another cache.
_NOT_MADE_FOR_THIS = (AttributeError, TypeError, IndexError, KeyError, NotImplementedError)
_LOGIT_BYTES = 64e6  # logits held at once


class SlowPathWarning(UserWarning):
    """The engine runs the whole model for every cell, and says why."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a sweep found: values per cell and prompt, and those of the runs themselves.

    ``path`` says how they were computed, ``why`` what kept it from the fast path.
    """

    values: Float[Tensor, "cell prompt value"]
    runs: Mapping[str, Float[Tensor, "prompt value"]]
    path: str
    why: str
    fingerprint: str


class Engine:
    """One sweep on its model, within a memory budget (bytes, or a size such as ``"2GB"``).

    Raises:
        ValueError: The budget is too small for a single row, or no size.
    """

    def __init__(self, sweep: Sweep, memory: int | float | str | None = None) -> None:
        self.sweep = sweep
        self.shape = shape_of(sweep.model)
        self.budget = default_budget(sweep.device) if memory is None else as_bytes(memory)
        self.foreign = foreign_hooks(sweep.model)
        self.path = "layers" if sweep.whole else "fast"
        self.why = ""
        if self.foreign:
            some = ", ".join(self.foreign[:3])
            self.path, self.why = "full", f"hooks that are not ours are in place ({some})"
        elif self.path == "fast" and (ahead := _looking_ahead(sweep)):
            self.path, self.why = "full", ahead

    @cached_property
    def wiring(self) -> Wiring:
        """The model's parts, as the longest prompt sees them."""
        prompts = self.sweep.prompts
        longest = int(prompts.lengths.argmax())
        tokens = torch.from_numpy(prompts.tokens[longest, : prompts.lengths[longest]])
        return Wiring(self.sweep.model, tokens)

    def capacity(self, reader: Reader) -> int:
        """Return how many columns a pass may have."""
        return capacity(self.sweep, self.shape, self.budget, self.n_logits(reader))

    # ------------------------------------------------------------------------------- running

    def run(
        self, reader_of: Callable[[Float[Tensor, "prompt d_vocab"] | None], Reader]
    ) -> Outcome:
        """Run everything; ``reader_of`` makes the reader from the first run's logits.

        It is asked first without logits, and only again with them if its metrics want them.

        Raises:
            ValueError: A metric or an activation is NaN or infinite, or has a wrong shape.
        """
        reader = reader_of(None)
        try:
            if self.path != "full":
                try:
                    return self._quickly(reader, reader_of, self.capacity(reader))
                except _CannotError as error:
                    self.path, self.why = "full", str(error)
            warnings.warn(
                f"every cell runs the whole model: {self.why}. The numbers are the same.",
                SlowPathWarning,
                stacklevel=_callers(),
            )
            return self._in_full(reader, reader_of)
        finally:
            for promises in self.sweep.promised().values():
                for stored in promises:
                    stored.values_found.clear()

    def _quickly(
        self, reader: Reader, reader_of: Callable[..., Reader], columns: int
    ) -> Outcome:
        sweep = self.sweep
        with muted(sweep.model):
            base, final = self._base(columns)
        self._check(base, final)
        with muted(sweep.model):
            reader, of_runs = self._read_runs(reader, reader_of, final)
            values = of_runs[sweep.run.name].expand(len(sweep.cells), -1, -1).clone()
            rows = sweep.rows
            work = parts(sweep, rows, columns, self.shape)
            total = sum(self.token_layers(part) for part in work)
            late: list[tuple[Rows, Tensor]] = []
            with bar(total, f"{len(sweep.cells)} cells") as advance:
                while work:
                    part = work.pop(0)
                    try:
                        done, ends = self._ends(base, part)
                        if reader.by_row:
                            self._read(reader, done, ends, values)
                        else:
                            late.append((done, ends))
                    except RuntimeError as error:
                        work[:0] = _halved(part, error)
                        continue
                    advance(self.token_layers(part))
            if late:
                self._read_by_cell(reader, late, final, values)
        for i, action in enumerate(sweep.in_force):
            action.fired = True
            action.acted |= any((under[i].own >= 0).any() for under in sweep.prompts.writes)
        return Outcome(values, of_runs, self.path, self.why, sweep.fingerprint)

    def _base(self, columns: int) -> tuple[Base, Tensor]:
        try:
            if self.path == "fast":
                base, final = self._suffix_base(columns)
            else:
                base, final = run_whole_base(self.sweep, self.wiring, columns)
        except UnknownWiringError as error:
            raise _CannotError(str(error)) from error
        except _NOT_MADE_FOR_THIS as error:
            raise _CannotError(f"its blocks cannot be called in part ({error!r})") from error
        fulfil(self.sweep, base)
        return base, final

    def _suffix_base(self, columns: int) -> tuple[Base, Tensor]:
        """Run the base runs, with half the columns where the memory does not suffice."""
        while True:
            try:
                return run_base(self.sweep, self.wiring, columns)
            except RuntimeError as error:
                if not _no_memory(error) or columns <= self.wiring.width:
                    raise
                columns //= 2

    def _ends(self, base: Base, part: Part) -> tuple[Rows, Tensor]:
        """Return a part's rows, in the order in which their final residual stream comes."""
        sweep, wiring = self.sweep, self.wiring
        if self.path == "layers":
            packing, ends = run_whole_rows(sweep, wiring, base, part.rows)
            return packing.rows, ends
        packing = part.packed(sweep.prompts.beginnings if sweep.shares else None)
        rows = packing.rows
        keys = packing.width + packing.prefix
        taken = pass_bytes(self.shape, packing.n_bins, packing.width, keys, len(rows), 1)
        if taken > self.budget - base_bytes(sweep, self.shape) and len(rows) > 1:
            raise torch.OutOfMemoryError("this part would take more than the budget")
        writes = {cell: sweep.row_writes(cell) for cell in set(rows.cell.tolist())}
        schedule = scheduled(sweep, packing, writes)
        enter = embedded_rows(sweep, wiring, packing)
        width = sweep.run.prompts.tokens.shape[1]
        one = Pass(wiring, packing, schedule, base, enter, by_row=True, key_width=width)
        numbers = rows.prompt - sweep.prompts.offset[sweep.run.name]
        return rows, one.run(answer_columns(packing, sweep.ends[numbers]))

    def _logits(
        self, reader: Reader | None, ends: Tensor, prompts: Int[np.ndarray, " row"]
    ) -> Float[Tensor, "row *pos d_vocab"]:
        """Return the logits of final residual streams, ``prompts`` numbered over all runs.

        Those at the answer, unless the reader wants text's, everywhere.
        """
        vocabulary = None if reader is None else reader.vocabulary
        if self.path == "fast":
            return self.wiring.close(ends[:, None], vocabulary=vocabulary)[:, 0]
        made = self.sweep.prompts
        lengths = torch.from_numpy(made.lengths[prompts])
        mask = torch.arange(ends.shape[1]) < lengths[:, None]
        positions = [
            made.runs[made.run_index(p)].answer_positions[
                p - made.offset[made.runs[made.run_index(p)].name]
            ]
            for p in prompts.tolist()
        ]
        logits = self.wiring.close(ends, mask)
        if reader is not None and reader.text is not None:
            return logits
        return answer_logits(logits, positions)

    def n_logits(self, reader: Reader) -> int:
        """Return how many logits of a row the reader needs."""
        return self.shape.d_vocab if reader.vocabulary is None else len(reader.vocabulary)

    def _chunks(self, reader: Reader, n: int) -> list[slice]:
        per_row = self.n_logits(reader)
        if self.path == "layers":  # every position has logits
            per_row *= self.sweep.prompts.tokens.shape[1]
        each = max(1, int(_LOGIT_BYTES / (4 * per_row)))
        return [slice(start, min(start + each, n)) for start in range(0, n, each)]

    def _read(self, reader: Reader, rows: Rows, ends: Tensor, values: Tensor) -> None:
        offset = self.sweep.prompts.offset[self.sweep.run.name]
        for some in self._chunks(reader, len(rows)):
            numbers = rows.prompt[some] - offset
            logits = self._logits(reader, ends[some], rows.prompt[some])
            found = reader.read(logits, numbers.tolist())
            cells = torch.from_numpy(rows.cell[some])
            values[cells, torch.from_numpy(numbers)] = found.to(values)

    def _read_by_cell(
        self, reader: Reader, late: Sequence[tuple[Rows, Tensor]], final: Tensor, values: Tensor
    ) -> None:
        """Read cell by cell, all prompts together, for metrics that need them so."""
        sweep, n = self.sweep, len(self.sweep.run)
        offset = sweep.prompts.offset[sweep.run.name]
        cell = np.concatenate([rows.cell for rows, _ in late])
        prompt = np.concatenate([rows.prompt for rows, _ in late])
        ends = torch.cat([each for _, each in late])
        own = final[offset : offset + n]
        for number in np.unique(cell).tolist():
            mine = (cell == number).nonzero()[0]
            whole = own.clone()
            whole[torch.from_numpy(prompt[mine] - offset)] = ends[torch.from_numpy(mine)]
            logits = self._logits(reader, whole, np.arange(offset, offset + n))
            values[number] = reader.read(logits, list(range(n))).to(values)

    def _read_runs(
        self, reader: Reader, reader_of: Callable[..., Reader], final: Tensor
    ) -> tuple[Reader, dict[str, Tensor]]:
        """Return the runs' own values, and the reader, made anew if it wants their logits."""
        sweep = self.sweep
        first = sweep.runs[0]
        if wants_reference(reader):
            logits = self._logits(None, final[: len(first)], np.arange(len(first)))
            reader = reader_of(logits)
        found = {}
        for run in sweep.runs:
            start = sweep.prompts.offset[run.name]
            numbers = np.arange(start, start + len(run))
            pieces = []
            slices = self._chunks(reader, len(run)) if reader.by_row else [slice(0, len(run))]
            for some in slices:
                logits = self._logits(
                    reader, final[start : start + len(run)][some], numbers[some]
                )
                pieces.append(reader.read(logits, list(range(len(run)))[some]))
            found[run.name] = torch.cat(pieces)
        return reader, found

    def token_layers(self, part: Part) -> float:
        """Return the tokens of a part times the layers that each goes through."""
        return float((part.rows.lengths * (self.shape.n_layers - part.rows.start)).sum())

    # ----------------------------------------------------------------------------- the check

    def _check(self, base: Base, final: Tensor) -> None:
        of_run = partial(self._run_logits, final)
        reason = check(self.sweep, self.path, of_run, partial(self._logits_of, base))
        if reason:
            raise _CannotError(reason)

    def _run_logits(self, final: Tensor, prompt: int) -> Float[Tensor, " d_vocab"]:
        """Return the logits of one numbered prompt of the base runs."""
        with muted(self.sweep.model):
            return self._logits(None, final[prompt : prompt + 1], np.array([prompt]))[0]

    def _logits_of(self, base: Base, rows: Rows) -> tuple[Rows, Float[Tensor, "row d_vocab"]]:
        """Return the logits of a few rows, by this engine's path."""
        work, found = [Part(rows, int(rows.lengths.max()))], []
        with muted(self.sweep.model):
            while work:
                part = work.pop(0)
                try:
                    done, ends = self._ends(base, part)
                except RuntimeError as error:
                    work[:0] = _halved(part, error)
                    continue
                found.append((done, self._logits(None, ends, done.prompt)))
        every = (
            np.concatenate(each)
            for each in zip(*(vars(d).values() for d, _ in found), strict=True)
        )
        return Rows(*every), torch.cat([logits for _, logits in found])

    # ------------------------------------------------------------------------------ in full

    def _in_full(self, reader: Reader, reader_of: Callable[..., Reader]) -> Outcome:
        """Run the whole model for every cell: plain hooked runs, batched over cells.

        With foreign hooks in place, one cell at a time, as their owner expects.
        """
        sweep = self.sweep
        manager = HookManager(sweep.model)
        at_once = self._prompts_at_once()
        if wants_reference(reader):
            reader = reader_of(sweep.runs[0].answers(manager, at_once=at_once))
        reader = replace(reader, vocabulary=None)
        n = len(sweep.run)
        everyone = list(range(n))

        def read_plainly(run: Run, *edits: Edit) -> Float[Tensor, "prompt value"]:
            if reader.text is None:
                return reader.read(run.answers(manager, *edits, at_once=at_once), everyone)
            pieces = run.logits(manager, *edits, at_once=at_once)
            return torch.cat([reader.read(logits, everyone[rows]) for rows, logits in pieces])

        of_runs = {run.name: read_plainly(run) for run in sweep.runs}
        for (name, site, layer), promises in sweep.promised().items():
            run = next(run for run in sweep.runs if run.name == name)
            with run.in_force(manager):
                found = manager.capture(run, site, layers=layer)
            for stored in promises:
                stored.values_found[site, layer] = found.stored[site, layer]
        values = torch.empty(len(sweep.cells), n, *of_runs[sweep.run.name].shape[1:])
        values = values.to(of_runs[sweep.run.name])
        most = min(1024 // sweep.run.prompts.tokens.numel(), at_once // n)
        each = 1 if self.foreign or sweep.everywhere else max(1, most)
        with bar(len(sweep.cells), f"{len(sweep.cells)} cells") as advance:
            for start in range(0, len(sweep.cells), each):
                numbers = range(start, min(start + each, len(sweep.cells)))
                if len(numbers) == 1:
                    values[start] = read_plainly(sweep.run, *sweep.cells[start].edits)
                else:
                    with muted(sweep.model):
                        logits = self._batched(numbers)
                    for i, number in enumerate(numbers):
                        values[number] = reader.read(logits[i * n : (i + 1) * n], everyone)
                advance(len(numbers))
        return Outcome(values, of_runs, self.path, self.why, sweep.fingerprint)

    def _prompts_at_once(self) -> int:
        """Return how many whole prompts, with their logits, the budget has room for."""
        width = self.sweep.prompts.tokens.shape[1]
        one = pass_bytes(self.shape, 1, width, width, 1, width * self.shape.d_vocab)
        return max(1, min(BATCH, self.budget // one))

    def _batched(self, numbers: Sequence[int]) -> Float[Tensor, "row d_vocab"]:
        """Return the logits of some cells, run together: every prompt of each."""
        sweep, n = self.sweep, len(self.sweep.run)
        own = base_rows(sweep.prompts)
        start = sweep.prompts.offset[sweep.run.name]
        mine = own[np.tile(np.arange(start, start + n), len(numbers))]
        cell = np.repeat(np.array(numbers), n)
        rows = Rows(cell, mine.prompt, mine.first, mine.last, mine.start, cell, mine.alike)
        _, logits = run_in_full(sweep, rows)
        return logits


class _CannotError(RuntimeError):
    """The quick paths do not work here; the message says why."""


def _looking_ahead(sweep: Sweep) -> str:
    for number, writes in enumerate(sweep.writes):
        if any(map(looks_ahead, writes)):
            return f"cell {number} may attend to later positions, with values of its own"
    if any(looks_ahead(write) for writes in sweep.prompts.writes for write in writes):
        return "an edit in force may attend to later positions"
    return ""


def wants_reference(reader: Reader) -> bool:
    """Whether a metric may read the logits of another run."""
    plain = [fn for fn in METRICS.values() if fn is not kl]
    return reader.text is None and any(
        all(fn is not known for known in plain) for fn in reader.metrics.values()
    )


def _no_memory(error: RuntimeError) -> bool:
    # torch has a class for accelerators; its CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or any(
        said in str(error) for said in ("can't allocate memory", "out of memory")
    )


def _callers() -> int:
    """Return how many frames up the first one outside the package is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("mechinterp", "jaxtyping", "beartype", "torch")


def _halved(part: Part, error: RuntimeError) -> list[Part]:
    """Return a part in two halves after it ran out of memory; raise anything else."""
    if not _no_memory(error) or len(part.rows) < 2:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(part.rows) // 2
    index = np.arange(len(part.rows))
    return [Part(part.rows[half], part.width) for half in (index[:middle], index[middle:])]
