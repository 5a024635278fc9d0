"""How far two heads are apart by each view of the redundancy atlas."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechinterp.names import unknown

_OVERLAP = "overlap, 0 to 1"
UNITS = {
    "redundancy": "1 identical, 0 an average pair",
    "js": "bits",
    "cka": "share, 0 to 1",
    "cosine": "-1 to 1",
    "read_q": _OVERLAP,
    "read_k": _OVERLAP,
    "read_v": _OVERLAP,
    "write": _OVERLAP,
}
READS = ("read_q", "read_k", "read_v")
PARTS = ("js", "cka", "cosine", "read", "write")  # of the mean
FLAGGING = ("js", "cka", "cosine", "read_q", "write")
VIEWS = ("mean", *PARTS, *READS)
TITLES = {
    "redundancy": "redundancy (1 identical, 0 an average pair)",
    "js": "divergence of attention (bits)",
    "cka": "linear CKA of outputs",
    "cosine": "cosine of outputs",
    "read": "overlap of what is read",
    "read_q": "overlap of what W_Q reads",
    "read_k": "overlap of what W_K reads",
    "read_v": "overlap of what W_V reads",
    "write": "overlap of what is written",
}


def distances(data: xr.Dataset, view: str) -> Float[np.ndarray, "head head"]:
    """Return the distance of all pairs by a view; ``RedundancyAtlas.clusters`` says which."""
    check_view(view)
    if view == "mean":
        parts = [distances(data, part) for part in PARTS]
        return sum((_over_mean(part) for part in parts), np.zeros(parts[0].shape)) / len(PARTS)
    values = reads(data) if view == "read" else data[view].values
    alike = np.abs(values) if view == "cosine" else values
    apart = np.nan_to_num(alike if view == "js" else 1 - alike, nan=1.0)
    np.fill_diagonal(apart, 0.0)
    return apart


def check_view(view: str) -> None:
    """Raise a ``ValueError`` that suggests near names unless a view is a distance."""
    if view == "interaction":
        raise ValueError(
            "interaction is no distance, and not measured for all pairs. Cluster by another "
            f"view: {', '.join(VIEWS)}."
        )
    if view not in VIEWS:
        raise ValueError(unknown("view", view, VIEWS))


def reads(data: xr.Dataset) -> Float[np.ndarray, "head head"]:
    """Return the mean overlap of what is read, ``read_q`` alone for shared keys and values."""
    sides = [data[side].values for side in READS]
    return np.where(data["shared_kv"].values, sides[0], np.mean(sides, axis=0))


def _over_mean(apart: Float[np.ndarray, "head head"]) -> Float[np.ndarray, "head head"]:
    """Return distances over their mean; over 1 where all are 0."""
    mean = float(apart[np.triu_indices(len(apart), 1)].mean())
    return apart / (mean or 1.0)


def clustered_by(view: str) -> str:
    """Return the distance that orders the heads in a picture of a view."""
    return "mean" if view in ("redundancy", "interaction") else view


def is_signed(view: str) -> bool:
    """Return whether a view has values below 0."""
    return view in ("cosine", "interaction", "redundancy")


def said_of(data: xr.Dataset, told: Mapping[str, Any]) -> str:
    """Return the lines below a table of pairs: over how much, by chance, by construction."""
    expected = float(data["write_expected"].median())
    lines = [
        f"js: {told['queries']} queries. cka, cosine: {told['tokens']} tokens. Random "
        f"subspaces overlap by {expected:.3g}."
    ]
    if told["tokens"] < 4 * told["d_head"]:
        lines.append(
            f"{told['tokens']} tokens are few for d_head {told['d_head']}: CKA is high for "
            "any two heads."
        )
    if int(data["shared_kv"].sum()) > data.sizes["head_a"]:
        lines.append("Heads that share keys and values have read_k = read_v = 1.")
    return "\n".join(lines)
