"""What an error says about a name that does not exist: the near ones, then all of them."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the sentence that tells a user ``name`` is no ``kind`` and what there is.

    >>> unknown("task", "iou", ["ioi", "induction"])
    "unknown task 'iou'. Did you mean 'ioi'? There are: 'induction', 'ioi'."
    """
    known = sorted(known)
    near = get_close_matches(str(name), known, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    there = ", ".join(map(repr, known)) or "none"
    return f"unknown {kind} {name!r}.{hint} There are: {there}."
