"""What a report can show, as plain data: each kind of panel has its drawing in ``assets``.

A panel knows nothing of methods; its fields go to the page as JSON, arrays as base64.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar
from unicodedata import bidirectional
from zlib import compress

import numpy as np
import pandas as pd

from mechinterp.plotting import visible


@dataclass(frozen=True)
class Axis:
    """One axis of a panel: its name, the label of every place on it, and whether they count.

    Places that are ``ordered`` (layers, positions) are joined by lines, named ones are not.
    """

    name: str
    labels: Sequence[str]
    ordered: bool = True


@dataclass(frozen=True, eq=False)
class Cells:
    """Numbers on any axes: a grid of two or a line over one, the rest to choose from.

    ``values`` maps ``"mean"``, ``"low"``, ``"high"`` and ``"p"`` (where there are any) to
    arrays on ``axes``; ``prompts`` has one label per prompt, and ``per_prompt`` its values,
    prompts first. ``scales`` are units to show the numbers in: a name and a factor.
    """

    kind: ClassVar[str] = "cells"
    title: str
    axes: Sequence[Axis]
    values: Mapping[str, np.ndarray]
    scales: Sequence[tuple[str, float]]
    signed: bool = True
    note: str = ""
    prompts: Sequence[str] = ()
    per_prompt: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart, with its band where it has one."""

    name: str
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Chart:
    """Some lines that share a vertical axis."""

    name: str
    lines: Sequence[Line]
    logarithmic: bool = False


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines over a common axis, several charts to choose from."""

    kind: ClassVar[str] = "lines"
    title: str
    x: Axis
    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """A table to sort and to filter; ``note`` stands below it."""

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    @classmethod
    def of(cls, title: str, frame: pd.DataFrame, note: str = "") -> "Table":
        """Return the table of a frame."""
        rows = [[_plain(value) for value in row] for row in frame.itertuples(index=False)]
        return cls(title, [str(name) for name in frame.columns], rows, note)


@dataclass(frozen=True, eq=False)
class LensPrompt:
    """What a lens read from one prompt: arrays on layers and positions.

    ``words`` are places in the panel's vocabulary, -1 where nothing was read.
    """

    name: str
    tokens: Sequence[str]
    words: np.ndarray
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class LensTable:
    """The first choice at every layer and position, coloured by a number to choose."""

    kind: ClassVar[str] = "lens"
    title: str
    layers: Sequence[str]
    vocabulary: Sequence[str]
    prompts: Sequence[LensPrompt]
    labels: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True, eq=False)
class AttentionPrompt:
    """One prompt's tokens and the heads' patterns on it, from 0 to 255 of all attention."""

    name: str
    tokens: Sequence[str]
    patterns: Sequence[bytes]

    @staticmethod
    def packed(pattern: np.ndarray) -> bytes:
        """Return a pattern of ``uint8``, queries first, as the page unpacks it (deflate)."""
        return compress(np.ascontiguousarray(pattern, dtype=np.uint8).tobytes(), 9)


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Where heads look: tokens to hover over, and the pattern of the chosen head."""

    kind: ClassVar[str] = "attention"
    title: str
    heads: Sequence[str]
    prompts: Sequence[AttentionPrompt]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Waterfall:
    """What adds up to a total: ``shares`` is prompts by parts, the interval that of means."""

    kind: ClassVar[str] = "waterfall"
    title: str
    unit: str
    parts: Sequence[str]
    prompts: Sequence[str]
    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    note: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure as it would be printed."""

    kind: ClassVar[str] = "picture"
    title: str
    png: bytes
    described: str
    note: str = field(default="")


def token(text: str) -> str:
    """Return a token as the page shows it: visible, and right-to-left words kept together."""
    shown = visible(text)
    if any(bidirectional(letter) in ("R", "AL") for letter in shown):
        return f"\u2068{shown}\u2069"  # isolates, so that what stands beside it keeps its order
    return shown


Panel = Cells | Lines | Table | LensTable | AttentionView | Waterfall | Picture


def as_json(value: Any) -> Any:
    """Return a panel, or what is in it, as JSON values; every panel says its ``kind``.

    Arrays become base64 of little-endian numbers with their shape: NaN survives, and a number
    takes a third of its digits. Floats that are not finite, which JSON lacks, become None.
    """
    if isinstance(value, np.ndarray):
        whole = value.dtype.kind in "iub"
        packed = np.ascontiguousarray(value, dtype="<i4" if whole else "<f4")
        kind = "int32" if whole else "float32"
        return {kind: _base64(packed.tobytes()), "shape": list(value.shape)}
    if isinstance(value, bytes):
        return _base64(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        told = {"kind": value.kind} if hasattr(value, "kind") else {}
        return told | {each.name: as_json(getattr(value, each.name)) for each in fields(value)}
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return one entry as JSON has it: numbers, truth values and None, all else as text."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return None if value is None else str(value)


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")
