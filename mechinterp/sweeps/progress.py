"""What a run says while it goes: a bar, lines of JSON, or nothing."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Report = Callable[[Mapping[str, Any]], None]
Output = Literal["progress", "json", "quiet"]


@dataclass
class Tally:
    """How far a plan is; the time left is judged by cells x prompts, its measure of work.

    Attributes:
        items: All items of the plan.
        done: Those done or failed.
        cells: Cells that this run did.
        work: Cells x prompts of all items.
        work_done: Of those done or failed.
        failed: Items that failed in this run.
    """

    items: int
    done: int
    work: int
    work_done: int
    failed: int = 0
    cells: int = 0
    _started: float | None = None
    _work_here: int = 0

    def count(self, event: Mapping[str, Any]) -> None:
        """Take an event into account: an item that was started, done or failed."""
        if self._started is None and event["event"] == "started":
            self._started = time.perf_counter()
        if event["event"] not in ("done", "failed"):
            return
        self.done += 1
        self.failed += event["event"] == "failed"
        self.work_done += event["work"]
        self._work_here += event["work"]
        self.cells += event["cells"]

    @property
    def rate(self) -> float:
        """Cells per second since the first item was started."""
        return self.cells / self._seconds

    @property
    def left(self) -> float | None:
        """Seconds left, by the plan's work and its rate so far; None before the first item."""
        if not self._work_here:
            return None
        return (self.work - self.work_done) * self._seconds / self._work_here

    @property
    def _seconds(self) -> float:
        now = time.perf_counter()
        return max(now - (self._started or now), 1e-9)


@contextmanager
def reporting(output: Output, tally: Tally, stream: IO[str] | None = None) -> Iterator[Report]:
    """Yield what takes a run's events, and shows them in the way that was asked for."""
    if output == "json":
        out = stream or sys.stdout

        def tell(event: Mapping[str, Any]) -> None:
            tally.count(event)
            told = {**event, "items_done": tally.done, "items": tally.items}
            if event["event"] in ("done", "failed"):
                told |= {"cells_per_second": tally.rate, "seconds_left": tally.left}
            out.write(json.dumps({"time": time.time(), **told}) + "\n")
            out.flush()

        yield tell
    elif output == "quiet" or not sys.stderr.isatty():
        yield tally.count
    else:
        with _bar() as bar:
            task = bar.add_task(
                "", total=tally.work, completed=tally.work_done, **_shown(tally)
            )

            def show(event: Mapping[str, Any]) -> None:
                tally.count(event)
                if event["event"] == "failed":
                    bar.console.print(f"failed: {event['item']}: {event['error']}")
                now = str(event["item"]) if event["event"] == "started" else None
                told: dict[str, Any] = {} if now is None else {"description": now[:60]}
                bar.update(task, completed=tally.work_done, **told, **_shown(tally))

            yield show


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.fields[items]} items"),
        BarColumn(),
        TextColumn("{task.fields[rate]} cells/s, {task.fields[left]} left"),
        TextColumn("[dim]{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )


def _shown(tally: Tally) -> dict[str, Any]:
    return {
        "items": f"{tally.done}/{tally.items}",
        "rate": f"{tally.rate:,.1f}",
        "left": "?" if tally.left is None else span(tally.left),
    }


def span(seconds: float | int) -> str:
    """Return a time as ``3:05`` or ``2:03:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
