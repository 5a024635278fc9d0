"""transformers without its progress bars and advice, where we speak for it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers report errors only while the block lasts."""
    log = logging.getLogger("transformers")
    level, bars = log.level, is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            enable_progress_bar()
