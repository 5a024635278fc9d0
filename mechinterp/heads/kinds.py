"""The kinds of head that are scored: what each number means, and where it is from."""

from dataclasses import dataclass
from typing import Literal

from mechinterp.heads.patterns import PATTERNS
from mechinterp.names import unknown


@dataclass(frozen=True)
class Kind:
    """One kind of score.

    Attributes:
        unit: Of the score.
        source: What it is computed from.
        lower_too: Whether a score below that of untrained heads says something as well.
    """

    unit: str
    source: Literal["pattern", "copying", "weights", "words", "needle"]
    lower_too: bool = False


_SHARE = "share of attention"
KINDS: dict[str, Kind] = {
    "induction": Kind(_SHARE, "pattern"),
    "previous_token": Kind(_SHARE, "pattern"),
    "duplicate_token": Kind(_SHARE, "pattern"),
    "copying": Kind("share, -1 to 1", "copying", lower_too=True),
    "anti_induction": Kind("product of shares", "copying"),
    "ov_copying": Kind("share of eigenvalues, -1 to 1", "weights", lower_too=True),
    "first_token": Kind(_SHARE, "pattern", lower_too=True),
    "local": Kind(_SHARE, "pattern"),
    "entropy": Kind("nats", "pattern", lower_too=True),
    "positional": Kind("share of queries", "pattern"),
    "rare_token": Kind("share of queries", "pattern"),
    "retrieval": Kind("share of needle tokens", "needle"),
    "name_mover": Kind("share of names", "words"),
    "negative_name_mover": Kind("share of names", "words"),
    "successor": Kind("share of words", "words"),
}
assert {*PATTERNS, "positional"} == {k for k, w in KINDS.items() if w.source == "pattern"}


def check_kinds(kinds: str | list[str] | tuple[str, ...]) -> list[str]:
    """Return the kinds asked for, or raise a ``ValueError`` that suggests near names."""
    asked = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in asked:
        if kind not in KINDS:
            raise ValueError(unknown("kind of head", kind, tuple(KINDS)))
    if not asked:
        raise ValueError(f"no kinds were asked for. There are {', '.join(KINDS)}.")
    return list(dict.fromkeys(asked))
