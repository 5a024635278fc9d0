"""Files that are either complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_beside(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` if the block succeeds.

    Whatever goes wrong inside (disk full, an interrupt), the file that was at ``path`` before
    stays as it was and the temporary one is removed. With ``durable`` the file and its name
    are on the disk, not in a cache of it, when the block has ended.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {final}: the folder {final.parent} does not exist. Create it first."
        )
    part = final.with_name(f".{final.name}.{uuid4().hex[:8]}.part")
    try:
        yield part
        if durable:
            _synced(part)
        part.replace(final)
        if durable and os.name != "nt":  # Windows has no handles of folders to sync
            _synced(final.parent)
    finally:
        part.unlink(missing_ok=True)


def _synced(path: Path) -> None:
    # Windows syncs only what is open for writing; folders can be opened for reading alone.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
