"""The worker's loop: claim an item, do it, store it, say so; until nothing is left.

Several processes may run it on one folder at a time. A failing item is entered with its
traceback and the rest goes on; a full disk stops the run with everything stored intact.
"""

import errno
import logging
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch

from mechinterp.sweeps.items import Item
from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.places import Place
from mechinterp.sweeps.values import write_values
from mechinterp.sweeps.workbench import ChangedError, Workbench

log = logging.getLogger(__name__)
Report = Callable[[Mapping[str, Any]], None]
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PAUSE = 0.5  # seconds between looks at what other workers still do


class StoppedError(RuntimeError):
    """The run cannot go on as it is; what was stored is intact."""


class DiskFullError(OSError):
    """The disk is full; what was stored is intact, and the same command goes on."""


def work(
    place: Place,
    ledger: Ledger,
    plan: str,
    bench: Workbench,
    report: Report,
    *,
    wait: bool = True,
) -> None:
    """Do items of a plan until all are done, by this worker or, with ``wait``, by others.

    Raises:
        DiskFullError: A value or the ledger could not be written.
        ChangedError: Weights, data or packages are not those of the plan.
    """
    with full_disk(place.folder):
        while True:
            item = ledger.claim(plan)
            if item is None:
                if not (wait and ledger.waiting_for_others(plan)):
                    return
                time.sleep(_PAUSE)
                continue
            report({"event": "started", "key": item.key, "item": str(item)})
            start = time.perf_counter()
            try:
                result = bench.do(item)
            except ChangedError:
                raise
            except Exception:
                error = traceback.format_exc()
                fail(ledger, item, error, report)
                continue
            seconds = time.perf_counter() - start
            store(place, ledger, item, result, seconds, this_machine(), report)


def store(
    place: Place,
    ledger: Ledger,
    item: Item,
    result: Any,
    seconds: float,
    machine: Mapping[str, Any],
    report: Report,
) -> None:
    """Write an item's values, then enter it as done; as failed if they cannot be written."""
    try:
        written = write_values(
            place.values,
            item,
            result,
            seconds=seconds,
            finished=time.time(),
            machine=machine,
        )
    except OSError:
        raise
    except Exception:  # what it returned is no result, or holds what no table does
        fail(ledger, item, traceback.format_exc(), report)
        return
    if not ledger.done(written):
        log.info("%s was done by another worker meanwhile", item.key[:12])
        return
    told = {"key": item.key, "item": str(item), "seconds": seconds}
    report({"event": "done", **told, "cells": item.cells, "work": item.work})


def fail(ledger: Ledger, item: Item, error: str, report: Report) -> None:
    """Enter an item as failed, with its traceback."""
    ledger.failed(item.key, error)
    last = error.strip().splitlines()[-1]
    log.error("%s failed: %s", item, last)
    report(
        {
            "event": "failed",
            "key": item.key,
            "item": str(item),
            "error": last,
            "cells": item.cells,
            "work": item.work,
        }
    )


@contextmanager
def full_disk(folder: str | PathLike[str]) -> Iterator[None]:
    """Raise a `DiskFullError` where the block meets a full disk."""
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, sqlite3.OperationalError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if not (full or "disk is full" in str(error)):
            raise
        raise DiskFullError(
            errno.ENOSPC,
            "the disk is full. What was stored is intact; make room and start the same "
            "command again, which goes on where this one stopped",
            str(folder),
        ) from error


def this_machine() -> dict[str, Any]:
    """Return what the last bits of a number depend on, beside what its key says."""
    return {"device": device_name(), "threads": torch.get_num_threads()}


def device_name() -> str:
    """Return what the models will be on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
