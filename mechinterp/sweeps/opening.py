"""Opening a run: the ledger looked over, and rebuilt from the values where it is damaged."""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from mechinterp.sweeps.ledger import DamagedLedgerError, Ledger
from mechinterp.sweeps.places import Place
from mechinterp.sweeps.values import DamagedValuesError, Written, read_written

log = logging.getLogger(__name__)
_BESIDE = ("", "-wal", "-shm")


def open_ledger(place: Place) -> Ledger:
    """Return the ledger of a run, in agreement with the values beside it.

    A missing or damaged ledger is put aside and rebuilt from the files of values, which name
    their item: every finished item is recovered, with a warning; failures are not. Values that
    the ledger does not know as done are entered (a process was killed between the two); done
    items whose values are gone, cut short or others' are work to do again.
    """
    with place.opening():
        try:
            ledger = Ledger(place)
        except DamagedLedgerError as error:
            moved = _put_aside(place)
            log.warning("%s It is now %s; rebuilding it from the values.", error, moved.name)
            ledger = Ledger(place)
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
        return Ledger(place)
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
    known = ledger.digests()
    sound = {found.item.key: found for found in _sound(place.values.glob("*.parquet"))}
    entered = ledger.adopt(found for key, found in sound.items() if key not in known)
    if entered:
        log.warning("recovered %d finished items from their values", entered)
    lost = {key for key in known if key not in sound or sound[key].sha256 != known[key]}
    if lost:
        log.warning(
            "the values of %d finished items are gone or damaged: they are done again",
            len(lost),
        )
        ledger.undo(lost)
    if not ledger.workers():
        for left in place.values.glob(".*.part"):  # of processes that were killed
            left.unlink(missing_ok=True)


def _sound(paths: Iterable[Path]) -> Iterator[Written]:
    for path in paths:
        try:
            yield read_written(path)
        except (DamagedValuesError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is left out: %s", path.name, error)
