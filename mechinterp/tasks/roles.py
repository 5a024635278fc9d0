"""Named places in a prompt: from a substring of the text to a span of tokens.

A role's place is a substring that occurs once, ``(substring, n)`` for its n-th occurrence
counted from 0, or ``(start, end)`` in characters. One place serves every prompt; a list gives
one place per prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Place = str | tuple[str | int, int]
Spans = tuple[tuple[int, int], ...]


def find_roles(
    texts: Sequence[str],
    offsets: Sequence[Sequence[tuple[int, int]]],
    roles: Mapping[str, Place | Sequence[Place]],
) -> dict[str, Spans]:
    """Return each role's token span ``(start, end)`` per prompt, end exclusive.

    Args:
        texts: The prompts.
        offsets: The characters that each token of each prompt covers.
        roles: Where each role is.

    Raises:
        ValueError: A place is not in its prompt, is there several times, or covers no token;
            or a list has another length than there are prompts.
    """
    return {
        role: tuple(
            _token_span(role, i, text, spans, place)
            for i, (text, spans, place) in enumerate(
                zip(texts, offsets, places_of(role, places, len(texts)), strict=True)
            )
        )
        for role, places in roles.items()
    }


def places_of(role: str, places: Any, n: int) -> list[Place]:
    """Return one place per prompt, repeating a place that serves them all.

    Raises:
        ValueError: A list of places has another length than there are prompts.
    """
    if _is_place(places):
        return [places] * n
    if len(places) != n:
        raise ValueError(
            f"role {role!r} has {len(places)} places for {n} prompts. "
            "Pass one per prompt, or a single one that serves them all."
        )
    return list(places)


def _is_place(place: Any) -> bool:
    return isinstance(place, str) or (
        isinstance(place, tuple) and len(place) == 2 and isinstance(place[1], int)
    )


def _token_span(
    role: str, prompt: int, text: str, offsets: Sequence[tuple[int, int]], place: Place
) -> tuple[int, int]:
    start, end = _characters(role, prompt, text, place)
    # Tokenizers differ in whether a token covers the space before its word.
    while end - start > 1 and text[start].isspace():
        start += 1
    while end - start > 1 and text[end - 1].isspace():
        end -= 1
    covering = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not covering:
        raise ValueError(f"role {role!r} covers no token of prompt {prompt}: {text!r}.")
    return covering[0], covering[-1] + 1


def _characters(role: str, prompt: int, text: str, place: Place) -> tuple[int, int]:
    what, which = (place, None) if isinstance(place, str) else place
    if isinstance(what, int):
        if not (which is not None and 0 <= what < which <= len(text)):
            raise ValueError(
                f"role {role!r} is at characters {what}..{which}, but prompt {prompt} has "
                f"{len(text)}: {text!r}."
            )
        return what, which
    starts = [i for i in range(len(text)) if what and text.startswith(what, i)]
    if which is None and len(starts) > 1:
        raise ValueError(
            f"role {role!r} is ambiguous: {what!r} occurs {len(starts)} times in prompt "
            f"{prompt}, {text!r}. Pass ({what!r}, n) for its n-th occurrence, counted from 0."
        )
    if (which or 0) >= len(starts):
        raise ValueError(
            f"role {role!r} not found: {what!r} occurs {len(starts)} times in prompt {prompt}, "
            f"{text!r}."
        )
    start = starts[which or 0]
    return start, start + len(what)
