"""Which kind of data a method takes."""

from typing import Any, TypeVar

from mechinterp.tasks.task import Task
from mechinterp.tasks.text import Labelled, Text

_Data = TypeVar("_Data")

_MAKE = {
    Task: "mi.load_task('ioi', model) or mi.Task.from_strings(model, ...)",
    Text: "mi.Text.from_strings(model, documents)",
    Labelled: "mi.Labelled.from_strings(model, texts, labels)",
}


def as_data(data: Any, accepts: tuple[type[_Data], ...], method: str) -> _Data:
    """Return ``data`` if ``method`` takes its kind.

    Raises:
        TypeError: It does not; the kinds that it takes are named, and how to make one.
    """
    if isinstance(data, accepts):
        return data
    kinds = " or ".join(f"a {kind.__name__}" for kind in accepts)
    how = "; ".join(_MAKE[kind] for kind in accepts if kind in _MAKE)
    raise TypeError(
        f"{method} takes {kinds} as data, not a {type(data).__name__}. Make one with {how}."
    )
