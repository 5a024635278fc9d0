"""The ledger: one row per work item in an SQLite database, and who works on which.

States go ``todo`` -> ``running`` -> ``done`` or ``failed``. A row says ``done`` only after its
values are on the disk. A claim belongs to a worker, which holds the lock on a file of its own
as long as it lives; when nobody holds it any more, its claim goes to whoever asks next.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from mechinterp.sweeps.items import Item
from mechinterp.sweeps.places import Place, is_alive
from mechinterp.sweeps.values import Written

FORMAT = 2
_APPLICATION = 0x6D656369  # "meci": what the file is, in its header
_TABLES = """
CREATE TABLE IF NOT EXISTS items (
  key TEXT PRIMARY KEY, call TEXT NOT NULL, item TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('todo', 'running', 'done', 'failed')),
  worker TEXT, attempts INTEGER NOT NULL DEFAULT 0, cells INTEGER NOT NULL,
  work INTEGER NOT NULL, seconds REAL, finished REAL, sha256 TEXT, rows INTEGER, error TEXT);
CREATE TABLE IF NOT EXISTS plans (
  plan TEXT PRIMARY KEY, spec TEXT NOT NULL, made REAL NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS plan_items (
  plan TEXT NOT NULL, place INTEGER NOT NULL, key TEXT NOT NULL,
  PRIMARY KEY (plan, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS workers (
  worker TEXT PRIMARY KEY, pid INTEGER NOT NULL, started REAL NOT NULL, threads INTEGER,
  device TEXT);
CREATE INDEX IF NOT EXISTS plan_keys ON plan_items (key);
"""


class DamagedLedgerError(ValueError):
    """The database cannot be relied on."""


@dataclass(frozen=True)
class Row:
    """What the ledger says about one item."""

    key: str
    item: Item
    state: str
    attempts: int
    cells: int
    work: int
    seconds: float | None
    finished: float | None
    sha256: str | None
    error: str | None


class Ledger:
    """A connection to the ledger of a run; made for one thread."""

    def __init__(self, place: Place) -> None:
        """Open the database of a run, or make it.

        Raises:
            DamagedLedgerError: It is truncated or otherwise damaged.
            ValueError: It was made by a newer version, or the place allows no write-ahead log.
        """
        self._place, path = place, place.ledger
        check(path)
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            self._db.close()
            raise ValueError(
                f"{path.parent} allows no write-ahead log (SQLite says {mode!r}), as network "
                "file systems do not. Give a folder on a local disk."
            )
        self._db.execute("PRAGMA synchronous=FULL")
        with self._writing():
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if found > FORMAT:
                raise ValueError(
                    f"{path} has format {found}, this version writes {FORMAT}. Update "
                    "mechinterp-toolkit, or give another folder."
                )
            if found < FORMAT:
                self._db.execute("DROP TABLE IF EXISTS workers")  # had other columns
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id={_APPLICATION}")
                self._db.execute(f"PRAGMA user_version={FORMAT}")
        self.worker = uuid4().hex
        self._lock: FileLock | None = None

    def close(self) -> None:
        """Close the connection; what a worker had claimed is free again."""
        try:
            if self._lock is not None:
                self.release()
                self._db.execute("DELETE FROM workers WHERE worker = ?", [self.worker])
        finally:
            self._db.close()
            if self._lock is not None:
                self._lock.release()
                self._lock_of(self.worker).unlink(missing_ok=True)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(sqlite3.Error):  # the disk is full: the claims are taken over
            self.close()

    def _lock_of(self, worker: str) -> Path:
        return self._place.workers / f"{worker}.lock"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # ------------------------------------------------------------------------------ planning

    def plan(self, name: str, spec: str, items: Sequence[Item]) -> None:
        """Enter a plan and those of its items that are not there yet, to do."""
        now = time.time()
        with self._writing():
            self._db.execute(
                "INSERT INTO plans VALUES (?, ?, ?, ?) "
                "ON CONFLICT (plan) DO UPDATE SET used = excluded.used, spec = excluded.spec",
                [name, spec, now, now],
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO items (key, call, item, state, cells, work) "
                "VALUES (?, ?, ?, 'todo', ?, ?)",
                [(i.key, i.call, i.to_json(), i.cells, i.work) for i in items],
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO plan_items VALUES (?, ?, ?)",
                [(name, place, item.key) for place, item in enumerate(items)],
            )

    def retry(self, plan: str) -> int:
        """Make the failed items of a plan work to do again; return how many."""
        with self._writing():
            done = self._db.execute(
                "UPDATE items SET state = 'todo', error = NULL WHERE state = 'failed' "
                "AND key IN (SELECT key FROM plan_items WHERE plan = ?)",
                [plan],
            )
        return done.rowcount

    # ------------------------------------------------------------------------------- working

    def register(self, threads: int, device: str) -> None:
        """Enter this connection as a worker that may claim items."""
        self._lock = FileLock(self._lock_of(self.worker), blocking=False)
        self._lock.acquire()
        told = [self.worker, os.getpid(), time.time(), threads, device]
        with self._writing():
            self._db.execute("INSERT INTO workers VALUES (?, ?, ?, ?, ?)", told)

    def claim(self, plan: str) -> Item | None:
        """Return the next item of a plan that is free, now this worker's; None if none is.

        Items whose worker is gone are free.
        """
        with self._writing():
            row = self._free(plan)
            if row is None and self._take_over(plan):
                row = self._free(plan)
            if row is None:
                return None
            self._db.execute(
                "UPDATE items SET state = 'running', worker = ?, attempts = attempts + 1 "
                "WHERE key = ?",
                [self.worker, row[0]],
            )
        return Item.from_json(row[1])

    def _free(self, plan: str) -> Any:
        return self._db.execute(
            "SELECT items.key, items.item FROM plan_items JOIN items USING (key) "
            "WHERE plan = ? AND state = 'todo' ORDER BY place LIMIT 1",
            [plan],
        ).fetchone()

    def _take_over(self, plan: str) -> bool:
        """Free the items of workers that are gone."""
        everyone = [worker for (worker,) in self._db.execute("SELECT worker FROM workers")]
        gone = [w for w in everyone if w != self.worker and not is_alive(self._lock_of(w))]
        for worker in gone:
            self._lock_of(worker).unlink(missing_ok=True)
        self._db.executemany("DELETE FROM workers WHERE worker = ?", [(w,) for w in gone])
        freed = self._db.execute(
            "UPDATE items SET state = 'todo', worker = NULL WHERE state = 'running' "
            "AND worker NOT IN (SELECT worker FROM workers)"
        )
        return freed.rowcount > 0

    def waiting_for_others(self, plan: str) -> bool:
        """Whether other workers still have items of the plan."""
        return bool(
            self._db.execute(
                "SELECT 1 FROM plan_items JOIN items USING (key) WHERE plan = ? "
                "AND state IN ('todo', 'running') LIMIT 1",
                [plan],
            ).fetchone()
        )

    def release(self) -> None:
        """Give back what this worker had claimed and not done."""
        with self._writing():
            self._db.execute(
                "UPDATE items SET state = 'todo', worker = NULL, attempts = attempts - 1 "
                "WHERE state = 'running' AND worker = ?",
                [self.worker],
            )

    def done(self, found: Written) -> bool:
        """Enter an item as done; False where it was meanwhile taken from this worker."""
        with self._writing():
            changed = self._db.execute(
                "UPDATE items SET state = 'done', seconds = ?, finished = ?, sha256 = ?, "
                "rows = ?, error = NULL WHERE key = ? AND state = 'running' AND worker = ?",
                [*_result(found), found.item.key, self.worker],
            )
        return changed.rowcount == 1

    def failed(self, key: str, error: str) -> None:
        """Enter an item as failed, with its traceback."""
        with self._writing():
            self._db.execute(
                "UPDATE items SET state = 'failed', error = ?, finished = ? "
                "WHERE key = ? AND state = 'running' AND worker = ?",
                [error, time.time(), key, self.worker],
            )

    def give_up(self, key: str, error: str) -> Item:
        """Enter an item whose workers died as failed, and return it."""
        with self._writing():
            self._db.execute(
                "UPDATE items SET state = 'failed', worker = NULL, error = ?, finished = ? "
                "WHERE key = ? AND state != 'done'",
                [error, time.time(), key],
            )
        (item,) = self._db.execute("SELECT item FROM items WHERE key = ?", [key]).fetchone()
        return Item.from_json(item)

    def adopt(self, found: Iterable[Written]) -> int:
        """Enter items whose values are there as done, whatever the ledger knew of them."""
        count = 0
        with self._writing():
            for each in found:
                item = each.item
                changed = self._db.execute(
                    "INSERT INTO items (key, call, item, state, cells, work, seconds, "
                    "finished, sha256, rows) VALUES (?, ?, ?, 'done', ?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET state = 'done', error = NULL, "
                    "seconds = excluded.seconds, finished = excluded.finished, "
                    "sha256 = excluded.sha256, rows = excluded.rows WHERE state != 'done'",
                    [
                        *(item.key, item.call, item.to_json(), item.cells, item.work),
                        *_result(each),
                    ],
                )
                count += changed.rowcount
        return count

    def undo(self, keys: Iterable[str]) -> None:
        """Make items whose values are lost work to do again."""
        with self._writing():
            self._db.executemany(
                "UPDATE items SET state = 'todo', worker = NULL, sha256 = NULL WHERE key = ?",
                [(key,) for key in keys],
            )

    # ------------------------------------------------------------------------------- reading

    def plans(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the plans and their specs, the last used one first."""
        found = self._db.execute("SELECT plan, spec FROM plans ORDER BY used DESC, rowid DESC")
        return [(name, json.loads(spec)) for name, spec in found]

    def rows(self, plan: str | None = None, state: str | None = None) -> list[Row]:
        """Return the rows of a plan in its order, or of all items, perhaps in one state."""
        columns = (
            "items.key, item, state, attempts, cells, work, seconds, finished, sha256, error"
        )
        if plan is None:
            query, told = f"SELECT {columns} FROM items WHERE 1 ", []
        else:
            query = f"SELECT {columns} FROM plan_items JOIN items USING (key) WHERE plan = ? "
            told = [plan]
        if state is not None:
            query += "AND state = ? "
            told.append(state)
        query += "ORDER BY items.rowid" if plan is None else "ORDER BY place"
        return [
            Row(key, Item.from_json(item), *rest)
            for key, item, *rest in self._db.execute(query, told)
        ]

    def digests(self) -> dict[str, str]:
        """Return the sha256 of the values of every item that is done, by key."""
        return dict(self._db.execute("SELECT key, sha256 FROM items WHERE state = 'done'"))

    def counts(self, plan: str) -> dict[str, tuple[int, int, int]]:
        """Return per state how many items, cells and how much work a plan has."""
        return {
            state: (items, cells, work)
            for state, items, cells, work in self._db.execute(
                "SELECT state, COUNT(*), SUM(cells), SUM(work) FROM plan_items "
                "JOIN items USING (key) WHERE plan = ? GROUP BY state",
                [plan],
            )
        }

    def workers(self) -> list[tuple[int, int, str]]:
        """Return process number, threads and device of those at work."""
        return [
            (pid, threads, device)
            for worker, pid, threads, device in self._db.execute(
                "SELECT worker, pid, threads, device FROM workers"
            )
            if is_alive(self._lock_of(worker))
        ]


def _result(found: Written) -> list[Any]:
    return [found.seconds, found.finished, found.sha256, found.rows]


def check(path: Path) -> None:
    """Raise where a database that is there is not whole.

    Raises:
        DamagedLedgerError: It is empty, no database, not ours, or its pages do not fit.
    """
    if not path.exists():
        return
    if path.stat().st_size == 0:
        raise DamagedLedgerError(f"{path} is empty.")
    db = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=60)
    try:
        said = [row[0] for row in db.execute("PRAGMA integrity_check(1)")]
        (ours,) = db.execute("PRAGMA application_id").fetchone()
        if said == ["ok"] and ours == _APPLICATION:
            db.execute("SELECT COUNT(*) FROM items").fetchone()
            return
        said = said if said != ["ok"] else ["it is not a ledger of mechinterp"]
    except sqlite3.DatabaseError as error:
        # A full disk, a busy ledger or a missing permission are no damage.
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        said = [str(error)]
    finally:
        db.close()
    raise DamagedLedgerError(f"{path} is damaged: {'; '.join(map(str, said))}.")
