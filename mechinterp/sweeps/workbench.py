"""Where items are done: models and data that are loaded once and kept, checked to be the same.

A process holds one model at a time. What an item was planned with is compared with what is
there before it runs, so numbers of other weights or tokens are never entered under its key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp import results
from mechinterp._progress import silent
from mechinterp.models import fingerprint, load_model
from mechinterp.record import digest
from mechinterp.results import Result
from mechinterp.sweeps.items import Item
from mechinterp.sweeps.methods import run_part
from mechinterp.tasks.named import load_named


class ChangedError(RuntimeError):
    """The weights, data or packages are not those that the item was planned with."""


@dataclass(eq=False)
class Workbench:
    """Models and data by their description; ``allow_pickle`` and such as in ``mi.load_model``.

    Files of a model named on the bench (``given``) are not read: its bridge is there.
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False
    given: dict[str, TransformerBridge] = field(default_factory=dict)
    _held: tuple[str, TransformerBridge] | None = None
    _data: dict[str, Any] = field(default_factory=dict)

    def model(self, described: Mapping[str, Any]) -> TransformerBridge:
        """Return the model of a description, loaded unless it is the one at hand."""
        if not self.holds(described):
            self.forget()  # before the next one takes memory
            self.take(described, self._load(described))
        assert self._held is not None
        return self._held[1]

    def holds(self, described: Mapping[str, Any]) -> bool:
        """Whether the model of a description is at hand."""
        return self._held is not None and self._held[0] == _source(described)

    def take(self, described: Mapping[str, Any], model: TransformerBridge) -> None:
        """Hold this model as that of a description."""
        self._held, self._data = (_source(described), model), {}

    def _load(self, described: Mapping[str, Any]) -> TransformerBridge:
        if described["source"] in self.given:
            return self.given[described["source"]]
        return load_model(
            described["source"],
            dtype=getattr(torch, described["dtype"]),
            revision=described.get("revision"),
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            device_map=described.get("device_map"),
        )

    def forget(self) -> None:
        """Let go of the model and data at hand."""
        self._held, self._data = None, {}

    def data(self, model: Mapping[str, Any], described: Mapping[str, Any]) -> Any:
        """Return the data of a description for a model; None where there is none."""
        if not described:
            return None
        asked = _name(described)
        bridge = self.model(model)
        if asked not in self._data:
            found = load_named(
                described["name"],
                bridge,
                described["n"],
                described["seed"],
                described.get("context"),
            )
            self._data[asked] = found
        return self._data[asked]

    def do(self, item: Item) -> Result:
        """Return the result of an item.

        Raises:
            ChangedError: The weights, data or packages are not those of the plan.
        """
        model = self.model(item.model)
        if fingerprint(model) != item.identity["fingerprint"]:
            raise ChangedError(
                f"the weights of {item.model['source']} changed since the sweep was planned. "
                "Start it again: numbers of the old weights are kept apart."
            )
        if results.versions() != item.identity["versions"]:
            raise ChangedError("packages changed since the sweep was planned. Start it again.")
        data = self.data(item.model, item.data)
        if data is not None and digest(data) != item.identity["data_sha256"]:
            raise ChangedError(
                f"the prompts of {item.data['name']} changed since the sweep was planned. "
                "Start it again."
            )
        with silent():
            return run_part(model, data, item.method, item.arguments, item.part, item.memory)


def _source(described: Mapping[str, Any]) -> str:
    return _name({k: v for k, v in described.items() if k != "name"})


def _name(described: Mapping[str, Any]) -> str:
    return repr(sorted(described.items()))
