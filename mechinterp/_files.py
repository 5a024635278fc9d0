"""Files that are either complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` if the block succeeds.

    Whatever goes wrong inside (disk full, an interrupt), the file that was at ``path`` before
    stays as it was and the temporary one is removed.

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
        part.replace(final)
    finally:
        part.unlink(missing_ok=True)
