"""What is wrong with a spec, in words: the key, and the nearest one that exists."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from mechinterp.names import unknown


def explained(
    error: ValidationError,
    where: str,
    root: type[BaseModel],
    methods: Mapping[str, type[BaseModel]],
) -> str:
    """Return one sentence per mistake in a spec."""
    said = []
    for each in error.errors():
        context: dict[str, Any] = each.get("ctx", {})
        place = [part for part in each["loc"] if str(part) not in methods]
        at = ".".join(map(str, place)) or "it"
        if each["type"] == "extra_forbidden":
            known = _keys(each["loc"][:-1], root, methods)
            parent = ".".join(map(str, place[:-1]))
            inside = f" in {parent}" if parent else ""
            said.append(unknown(f"key{inside}", place[-1], known))
        elif each["type"] == "union_tag_invalid":
            said.append(f"{at}: {unknown('method', context['tag'], methods)}")
        elif each["type"] == "literal_error":
            known = str(context["expected"]).replace(" or ", ", ").split(", ")
            names = [name.strip("'") for name in known]
            said.append(f"{at}: {unknown('value', each['input'], names)}")
        elif each["type"] == "missing":
            said.append(f"{at} is missing.")
        else:
            message = each["msg"].removeprefix("Value error, ")
            said.append(f"{at}: {message}.")
    return f"{where}: " + " ".join(said)


def _keys(
    path: tuple[Any, ...], root: type[BaseModel], methods: Mapping[str, type[BaseModel]]
) -> list[str]:
    """Return the keys that exist where ``path`` leads."""
    here: type[BaseModel] = root
    for part in path:
        if str(part) in methods:
            here = methods[str(part)]
        elif part == "split":
            here = _model_of(here, "split")
        elif part == "models":
            here = _model_of(here, "models")
    return [str(name) for name in here.model_fields]


def _model_of(here: type[BaseModel], name: str) -> type[BaseModel]:
    """Return the model that a field's annotation holds somewhere inside."""
    waiting: list[Any] = [here.model_fields[name].annotation]
    while waiting:
        each = waiting.pop()
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
        waiting += list(getattr(each, "__args__", ()))
        waiting += [each.__origin__] if hasattr(each, "__metadata__") else []
    return here
