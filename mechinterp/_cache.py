"""Where fetched models lie: ``scripts/fetch_models.py`` writes there, ``load_model`` reads."""

import os
import sys
from pathlib import Path

# Name of a model: its file or folder inside the cache, and its name on the Hugging Face hub.
FETCHED = {
    "smollm2-135m": (
        "smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": ("minilm", "sentence-transformers/all-MiniLM-L6-v2"),
}


def cache_folder() -> Path:
    """Return ``MECHINTERP_CACHE``, or ``mechinterp`` in the user's cache folder."""
    if chosen := os.environ.get("MECHINTERP_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mechinterp"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local or Path.home() / "AppData" / "Local") / "mechinterp" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechinterp"


def fetched(name: str) -> Path | None:
    """Return where the model ``name`` of `FETCHED` lies, or None if it was not fetched."""
    place = cache_folder() / FETCHED[name][0]
    return place if place.exists() else None
