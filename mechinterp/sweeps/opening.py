"""Opening a run: the ledger looked over, and rebuilt from the values where it is damaged."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mechinterp.sweeps.ledger import DamagedLedgerError, Ledger
from mechinterp.sweeps.places import Place
from mechinterp.sweeps.values import DamagedValuesError, Written, path_of, read_written

log = logging.getLogger(__name__)
_BESIDE = ("", "-wal", "-shm")


def open_ledger(place: Place) -> Ledger:
    """Return the ledger of a run, in agreement with the values beside it.

    A missing or damaged ledger is put aside and rebuilt from the files of values, which name
    their item: every finished item is recovered, with a warning; failures are not. Values that
    the ledger does not know as done are entered (a process was killed between the two); done
    items whose values are gone or damaged are work to do again.
    """
    with place.opening():
        try:
            ledger = Ledger(place.ledger)
        except DamagedLedgerError as error:
            moved = _put_aside(place)
            log.warning("%s It is now %s; rebuilding it from the values.", error, moved.name)
            ledger = Ledger(place.ledger)
        try:
            _agree(place, ledger)
        except BaseException:
            ledger.close()
            raise
        return ledger


def read_ledger(place: Place) -> Ledger:
    """Return the ledger of a run for reading.

    Raises:
        DamagedLedgerError: It is missing or damaged; the message says what mends it.
    """
    try:
        if not place.ledger.exists():
            raise DamagedLedgerError(f"{place.ledger} is missing.")
        return Ledger(place.ledger)
    except DamagedLedgerError as error:
        raise DamagedLedgerError(
            f"{error} Run the same spec with --out {place.folder} again: what its values tell "
            "is recovered first."
        ) from error


def _put_aside(place: Place) -> Path:
    mark = time.strftime("%Y%m%d-%H%M%S")
    moved = place.folder / f"ledger.damaged-{mark}-{os.getpid()}.sqlite"
    for ending in _BESIDE:
        with suppress(FileNotFoundError):
            Path(f"{place.ledger}{ending}").rename(f"{moved}{ending}")
    return moved


def _agree(place: Place, ledger: Ledger) -> None:
    states = ledger.states()
    files = {path.stem: path for path in place.values.glob("*.parquet")}
    entered = ledger.adopt(_sound(files[key] for key in files.keys() - _keys(states, "done")))
    if entered:
        log.warning("recovered %d finished items from their values", entered)
    lost = _keys(states, "done") - files.keys()
    if lost:
        log.warning("the values of %d finished items are gone: they are done again", len(lost))
        ledger.undo(lost)
    if not ledger.workers():
        for left in place.values.glob(".*.part"):  # of processes that were killed
            left.unlink(missing_ok=True)


def _keys(states: dict[str, str], state: str) -> set[str]:
    return {key for key, found in states.items() if found == state}


def _sound(paths: Iterator[Path]) -> Iterator[Written]:
    for path in paths:
        try:
            yield read_written(path)
        except (DamagedValuesError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is left out: %s", path.name, error)


def values_of(place: Place, key: str) -> Written | None:
    """Return what is stored of an item, or None where nothing sound is."""
    path = path_of(place.values, key)
    if not path.exists():
        return None
    return next(_sound(iter([path])), None)
