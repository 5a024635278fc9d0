"""Where a run lives: a local folder with a ledger, values beside it, and locks.

SQLite's write-ahead log needs memory that all its processes share, which a network file system
does not have, so a run on one is refused before anything is written.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

NETWORK = frozenset(
    [
        "9p",
        "acfs",
        "afpfs",
        "afs",
        "beegfs",
        "ceph",
        "cephfs",
        "cifs",
        "coda",
        "davfs",
        "fuse.ceph",
        "fuse.cephfs",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.goofys",
        "fuse.juicefs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "gfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "mmfs",
        "ncpfs",
        "nfs",
        "nfs3",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "pvfs2",
        "smb",
        "smb2",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "vmhgfs",
        "webdav",
        "wekafs",
    ]
)


@dataclass(frozen=True)
class Place:
    """The files of a run."""

    folder: Path

    @property
    def ledger(self) -> Path:
        """The SQLite database."""
        return self.folder / "ledger.sqlite"

    @property
    def values(self) -> Path:
        """The folder of Parquet files."""
        return self.folder / "values"

    @property
    def workers(self) -> Path:
        """The folder of locks, one per worker, each held while its worker is alive."""
        return self.folder / "workers"

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Let one process at a time look the ledger over, make it, or mend it."""
        try:
            with FileLock(self.folder / "opening.lock", timeout=120):
                yield
        except Timeout as error:
            raise TimeoutError(
                f"another process has been opening {self.folder} for two minutes. If it hangs, "
                "end it and start again."
            ) from error


def place_of(folder: str | os.PathLike[str], *, make: bool) -> Place:
    """Return the place of a run, made where it is not there yet.

    Raises:
        FileNotFoundError: It is not there and is not to be made.
        ValueError: It is a file, lies on a network file system, or its ``values`` lead out of
            it by a link.
    """
    place = Place(Path(folder).expanduser().absolute())
    if place.folder.exists() and not place.folder.is_dir():
        raise ValueError(f"{place.folder} is a file. Give the name of a folder.")
    refuse_network(place.folder)
    if make:
        place.folder.mkdir(parents=True, exist_ok=True)
        place.values.mkdir(exist_ok=True)
        place.workers.mkdir(exist_ok=True)
    elif not (place.ledger.exists() or place.values.is_dir()):
        raise FileNotFoundError(
            f"{place.folder} holds no run. `mechinterp run SPEC.yaml --out {place.folder}` "
            "makes one."
        )
    for path in (place.values, place.workers, place.ledger):
        inside(place, path)
    return place


def inside(place: Place, path: Path) -> Path:
    """Return ``path``, resolved, if it lies in the run's folder once links are followed.

    Raises:
        ValueError: It does not.
    """
    found = path.resolve()
    if not found.is_relative_to(place.folder.resolve()):
        raise ValueError(
            f"{path} leads out of {place.folder}, to {found}, where a run must not write. "
            "Remove the link."
        )
    return found


def refuse_network(folder: Path) -> None:
    """Raise a ``ValueError`` where the folder is on a network file system."""
    kind = file_system(folder)
    if kind in NETWORK:
        raise ValueError(
            f"{folder} is on a network file system ({kind}), on which SQLite cannot keep a "
            "ledger safely. Give a folder on a local disk and copy it when the run is done; "
            "for several machines use --backend ray, whose driver alone writes."
        )


def file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on, or will be; empty if unknown."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    there = there.resolve()
    kinds: dict[Path, str] = {}
    with suppress(OSError):
        for part in psutil.disk_partitions(all=True):
            kinds[Path(part.mountpoint)] = part.fstype.lower()  # the last mount is in force
    mounts = [each for each in (there, *there.parents) if each in kinds]
    return kinds[mounts[0]] if mounts else ""


def is_alive(lock: Path) -> bool:
    """Whether somebody holds a worker's lock; the system lets go of it when a process ends."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
