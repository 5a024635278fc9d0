"""Work items: what one engine call computes, and the key that its numbers are stored under.

The key is the sha256 of everything that the numbers depend on: weights, tokens, the call with
its edits, the metric, the dtype, the split and the package versions. So the same item is never
done twice, and a number is never reused for other weights or versions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

FORMAT = 1
_AXES = ("site", "direction", "kind", "window", "metric", "positions")
_LONG = ("dtype", "options")  # what a line has no room for


@dataclass(frozen=True)
class Item:
    """One call of a method on a part of its data: plain JSON, done anywhere.

    Attributes:
        model: Where the model comes from (``source``, ``dtype``, ...) and its ``name``.
        data: ``name``, ``n``, ``seed``, ``context``; empty for a method without data.
        method: The public function.
        arguments: Its keyword arguments.
        part: ``prompts`` ``[start, stop]`` and ``layers`` ``[...]`` of this item; None is all.
        split: How the spec cuts the call into items.
        identity: ``fingerprint`` of the weights, ``data_sha256`` of the tokens, ``versions``.
        cells: Counterfactual runs of the item.
        work: Cells times prompts: what time is judged by.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    method: str
    arguments: Mapping[str, Any]
    part: Mapping[str, Any]
    split: Mapping[str, Any]
    identity: Mapping[str, Any]
    memory: str
    cells: int = field(compare=False)
    work: int = field(compare=False)

    @cached_property
    def call(self) -> str:
        """The key of the whole call, which all its items share."""
        return _digest(self._whole)

    @cached_property
    def key(self) -> str:
        """The item's own key: 64 hexadecimal digits."""
        return _digest({**self._whole, "part": dict(self.part)})

    @property
    def _whole(self) -> dict[str, Any]:
        # Where the weights and tokens lay does not matter, what they were does.
        return {
            "format": FORMAT,
            "identity": dict(self.identity),
            "dtype": self.model["dtype"],
            "data": self.data.get("label"),
            "method": self.method,
            "arguments": dict(self.arguments),
            "split": dict(self.split),
            "memory": self.memory,
        }

    @property
    def labels(self) -> dict[str, Any]:
        """What tells the call from others in tables: the axes of the spec's grid."""
        told = {"model": self.model["name"], "revision": self.model.get("revision")}
        told |= {"dtype": self.model["dtype"]}
        told |= {"data": self.data.get("label", ""), "n": self.data.get("count")}
        told |= {"seed": self.data.get("seed", self.arguments.get("seed"))}
        told |= {"method": self.method, "variant": self.arguments.get("method")}
        told |= {name: self.arguments.get(name) for name in _AXES}
        told |= {"options": self._options}
        return {
            name: json.dumps(value) if isinstance(value, list | dict) else value
            for name, value in told.items()
        }

    @property
    def _options(self) -> str:
        """The arguments that have no column of their own, as JSON."""
        rest = {k: v for k, v in self.arguments.items() if k not in (*_AXES, "seed", "method")}
        return _canonical({k: v for k, v in rest.items() if v not in (None, {})})

    def __str__(self) -> str:
        """Say what it is on one line."""
        told = {k: v for k, v in self.labels.items() if v is not None and k not in _LONG}
        words = [str(told.pop("method")), str(told.pop("model")), str(told.pop("data"))]
        words += [f"{name}={value}" for name, value in told.items()]
        words += [f"{name}={_span(given)}" for name, given in self.part.items() if given]
        return " ".join(word for word in words if word)

    def to_json(self) -> str:
        """Return the item as one line of JSON; ``from_json`` gives back an equal one."""
        return _canonical({name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def from_json(cls, text: str) -> "Item":
        """Return the item that ``to_json`` wrote."""
        return cls(**json.loads(text))


def _span(given: list[int]) -> str:
    return f"{given[0]}..{given[-1]}" if len(given) > 1 else str(given[0])


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(value: Any) -> str:
    return sha256(_canonical(value).encode()).hexdigest()
