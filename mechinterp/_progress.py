"""A progress bar on standard error, where that is a terminal, and silence elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

_T = TypeVar("_T")
_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """Show no bars while the block runs: who runs many calls has a bar of its own."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


@contextmanager
def bar(total: float | int, description: str) -> Iterator[Callable[[float | int], None]]:
    """Yield what moves a bar on by some of ``total``; it shows how long the rest takes."""
    if _SILENT.get() or not sys.stderr.isatty():
        yield lambda _: None
        return
    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(description, total=total)
        yield lambda amount: shown.advance(task, amount)


def progress(items: Iterable[_T], total: int, description: str) -> Iterator[_T]:
    """Yield the items, showing how many of ``total`` are done and how long the rest takes."""
    with bar(total, description) as advance:
        for item in items:
            yield item
            advance(1)
