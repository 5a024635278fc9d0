"""A run that was made or is being made: its progress, failures and results, read when asked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from mechinterp.names import unknown
from mechinterp.results import Result
from mechinterp.sweeps.items import Item
from mechinterp.sweeps.joining import joined
from mechinterp.sweeps.ledger import Ledger, Row
from mechinterp.sweeps.opening import read_ledger
from mechinterp.sweeps.places import Place, place_of
from mechinterp.sweeps.values import path_of, read_result, read_written


@dataclass(frozen=True)
class Status:
    """How far a run is.

    ``rate`` is cells per second of work, over all workers' items that are done; ``left`` the
    seconds that the rest takes ``workers`` workers at that rate, None where nothing is known.
    """

    name: str
    done: int
    running: int
    todo: int
    failed: int
    cells: int
    cells_done: int
    rate: float | None
    left: float | None
    workers: int

    @property
    def items(self) -> int:
        """All items."""
        return self.done + self.running + self.todo + self.failed

    @property
    def complete(self) -> bool:
        """Whether every item is done."""
        return self.done == self.items


class SweepRun:
    """A run in its folder: ``mi.open_run`` makes one.

    Shows the items of the spec ``plan``, by default the one that was run last there;
    ``all_plans`` shows those of every spec. Nothing is read before it is asked for, and nothing
    is remembered, so a run that goes on can be watched.
    """

    def __init__(
        self, place: Place, *, all_plans: bool = False, plan: str | None = None
    ) -> None:
        self._place, self._all, self._named = place, all_plans, plan

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self._place.folder

    @property
    def spec(self) -> dict[str, Any]:
        """The spec that was run, as plain data."""
        with read_ledger(self._place) as ledger:
            plans = ledger.plans()
        named = [spec for name, spec in plans if self._named in (None, name)]
        return named[0] if named else {}

    def rows(self, state: str | None = None) -> list[Row]:
        """Return the ledger's rows, perhaps those in one state."""
        with read_ledger(self._place) as ledger:
            return ledger.rows(self._plan(ledger), state)

    def _plan(self, ledger: Ledger) -> str | None:
        if self._all or self._named is not None:
            return self._named
        plans = ledger.plans()
        return plans[0][0] if plans else None

    def status(self) -> Status:
        """Return how far the run is."""
        with read_ledger(self._place) as ledger:
            rows = ledger.rows(self._plan(ledger))
            workers = len(ledger.workers())
        by_state: dict[str, list[Row]] = {name: [] for name in _STATES}
        for row in rows:
            dead = row.state == "running" and not workers
            by_state["todo" if dead else row.state].append(row)
        done = by_state["done"]
        seconds = sum(row.seconds or 0 for row in done)
        left = None
        if seconds and (todo := by_state["todo"] + by_state["running"]):
            per_work = seconds / max(sum(row.work for row in done), 1)
            left = per_work * sum(row.work for row in todo) / max(workers, 1)
        return Status(
            self.spec.get("name", "sweep"),
            *(len(by_state[name]) for name in _STATES),
            cells=sum(row.cells for row in rows),
            cells_done=sum(row.cells for row in done),
            rate=sum(row.cells for row in done) / seconds if seconds else None,
            left=left,
            workers=workers,
        )

    @property
    def failures(self) -> dict[str, str]:
        """The tracebacks of failed items, by what they were to do."""
        found: dict[str, str] = {}
        for row in self.rows("failed"):
            name = str(row.item)
            found[f"{name} ({row.key[:8]})" if name in found else name] = row.error or ""
        return found

    def files(self) -> list[Path]:
        """Return the Parquet files of what is done."""
        return [path_of(self._place.values, row.key) for row in self.rows("done")]

    def results(self, **where: Any) -> "Results":
        """Return the results of the calls whose labels are these, loaded when looked up.

        Args:
            **where: ``method="head_ablation"``, ``model=``, ``data=``, ``site=``, ``kind=``,
                ``direction=``, ``variant=``, ``metric=``, ``seed=``, ``n=``, ...

        Raises:
            ValueError: There is no such label.
        """
        calls: dict[str, list[Row]] = {}
        for row in self.rows():
            calls.setdefault(row.item.call, []).append(row)
        known = {name for rows in calls.values() for name in rows[0].item.labels}
        if wrong := [name for name in where if known and name not in known]:
            raise ValueError(unknown("label", wrong[0], known))
        kept = [
            rows
            for rows in calls.values()
            if all(rows[0].item.labels[name] == value for name, value in where.items())
        ]
        return Results(self._place, kept)

    def to_frame(self, **where: Any) -> pd.DataFrame:
        """Return one row per number, with the labels of its call; ``where`` as in `results`."""
        files = [
            str(path_of(self._place.values, row.key))
            for call in self.results(**where).calls
            for row in call
            if row.state == "done"
        ]
        if not files:
            return pd.DataFrame()
        return self._table(files, "SELECT * FROM numbers")

    def to_xarray(self, **where: Any) -> xr.DataTree:
        """Return all results as one tree, a node per call; ``where`` as in `results`."""
        nodes = {}
        listed = self.results(**where)
        for found, labels in zip(listed, telling([each.item for each in listed]), strict=True):
            told = [f"{k}={v}" for k, v in labels.items() if v is not None and k != "method"]
            name = f"{found.item.method}/{' '.join(told).replace('/', '_')}"
            if name in nodes:  # of other weights or versions, with `all_plans`
                name += f" call={found.item.call[:8]}"
            data = found.result.data
            nodes[name] = data.assign_attrs(
                {**data.attrs, "convention": found.result.convention.to_json()}
            )
        return xr.DataTree.from_dict(nodes)

    def sql(self, query: str) -> pd.DataFrame:
        """Return what DuckDB answers to a query over the table ``numbers``.

        One row per number: the labels of its call (``model``, ``data``, ``method``, ``site``,
        ...), its axes (``prompt``, ``layer``, ``head``, ``position``, ...), ``variable`` (what
        it is of the result: ``ablated``, ``intact``, ...) and ``value``.

        Raises:
            ValueError: Nothing is done yet, or DuckDB does not understand the query.
        """
        return self._table([str(path) for path in self.files()], query)

    def _table(self, files: Sequence[str], query: str) -> pd.DataFrame:
        import duckdb

        if not files:
            raise ValueError(
                f"nothing is done in {self.folder} yet, so there is no table. "
                "Run its spec first."
            )
        with duckdb.connect(config={"enable_external_access": True}) as db:
            listed = ", ".join("'" + path.replace("'", "''") + "'" for path in files)
            try:
                db.execute(
                    "CREATE TEMP TABLE numbers AS SELECT * FROM "
                    f"read_parquet([{listed}], union_by_name = true)"
                )
                db.execute("SET enable_external_access = false")  # a query reads nothing else
                return db.execute(query).df()
            except duckdb.Error as error:
                raise ValueError(f"DuckDB: {' '.join(str(error).split())}") from error

    def __repr__(self) -> str:
        """Say how far it is."""
        now = self.status()
        return (
            f"SweepRun({now.name!r} in {self.folder}: {now.done} of {now.items} items done, "
            f"{now.failed} failed)"
        )


_STATES = ("done", "running", "todo", "failed")


@dataclass(frozen=True, eq=False)
class Found:
    """One call of the grid: its first item, whether all parts are done, and its result."""

    place: Place
    rows: tuple[Row, ...]

    @property
    def item(self) -> Item:
        """The first of its items; its labels are those of the call."""
        return self.rows[0].item

    @property
    def complete(self) -> bool:
        """Whether every part is done; the result has NaN, or lacks labels, for the rest."""
        return all(row.state == "done" for row in self.rows)

    @property
    def machines(self) -> list[dict[str, Any]]:
        """What its parts were computed on, each once: ``device`` and ``threads``."""
        written = [
            read_written(path_of(self.place.values, row.key)).machine
            for row in self.rows
            if row.state == "done"
        ]
        return [dict(told) for told in dict.fromkeys(tuple(each.items()) for each in written)]

    @property
    def result(self) -> Result:
        """The result, read and joined now."""
        return joined(
            [
                (row.item, read_result(path_of(self.place.values, row.key), row.sha256))
                for row in self.rows
                if row.state == "done"
            ]
        )

    def __repr__(self) -> str:
        """Say what it is."""
        whole = "" if self.complete else ", not complete"
        return f"Found({self.item.method} {json.dumps(_short(self.item.labels))}{whole})"


class Results:
    """The results of some calls: iterate, count, or take one by its number."""

    def __init__(self, place: Place, calls: Sequence[Sequence[Row]]) -> None:
        self.calls = [tuple(rows) for rows in calls]
        started = [rows for rows in self.calls if any(row.state == "done" for row in rows)]
        self._found = [Found(place, rows) for rows in started]

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Found]:
        return iter(self._found)

    def __getitem__(self, number: int) -> Found:
        return self._found[number]

    def one(self) -> Result:
        """Return the only result.

        Raises:
            ValueError: There is none, or there are several; the message lists them.
        """
        if len(self) != 1:
            there = "; ".join(map(repr, self._found[:6])) or "none done yet"
            raise ValueError(
                f"there is not one result but {len(self)}: {there}. Name the labels of one."
            )
        return self._found[0].result

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._found)) or "no results yet"


def _short(labels: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in labels.items() if v is not None and k not in ("method", "options")}


def telling(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return the items' labels without the long ones that are the same within a method."""
    seen: dict[str, dict[str, set[Any]]] = {}
    for item in items:
        for name in ("dtype", "options"):
            seen.setdefault(item.method, {}).setdefault(name, set()).add(item.labels[name])
    constant = {
        method: [name for name, values in found.items() if len(values) == 1]
        for method, found in seen.items()
    }
    return [
        {k: v for k, v in item.labels.items() if k not in constant[item.method]}
        for item in items
    ]


def open_run(folder: str | PathLike[str], *, all_plans: bool = False) -> SweepRun:
    """Return a run from its folder, while it goes or afterwards.

    Args:
        folder: What ``mi.run`` or ``mechinterp run --out`` was given.
        all_plans: Show everything that was ever done there; by default the items of the spec
            that was run last.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: The folder is on a network file system.
    """
    return SweepRun(place_of(folder, make=False), all_plans=all_plans)
