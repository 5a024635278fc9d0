"""A progress bar on standard error, where that is a terminal, and silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_T = TypeVar("_T")


def progress(items: Iterable[_T], total: int, description: str) -> Iterator[_T]:
    """Yield the items, showing how many of ``total`` are done and how long the rest takes."""
    if not sys.stderr.isatty():
        yield from items
        return
    yield from track(
        items, description, total=total, console=Console(stderr=True), transient=True
    )
