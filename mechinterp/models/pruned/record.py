"""What was pruned from a model: kept in its configuration, in the original numbering.

The configuration is part of a model's identity and goes to ``config.json`` with it, so a
pruned model, its copy on disk and its fingerprint all know what it once was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge

Units = Mapping[int, tuple[int, ...]]  # by layer


@dataclass(frozen=True)
class Pruning:
    """What a model has lost, by layer, in the numbering of the model that it all began with.

    Attributes:
        heads: The query heads that are gone.
        neurons: The MLP neurons that are gone.
        steps: One account per call of ``prune_heads`` or ``prune_neurons``, the first first:
            the fingerprint of the model it was given (``of``), what it removed, how it folded
            and over what.
    """

    heads: Units = field(default_factory=dict)
    neurons: Units = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()

    def original_head(self, layer: int, head: int) -> tuple[int, int]:
        """Return the name that this ``head`` of this ``layer`` had in the original."""
        return layer, _kept(self.heads.get(layer, ()), head)

    def original_neuron(self, layer: int, neuron: int) -> tuple[int, int]:
        """Return the name that this ``neuron`` of this ``layer`` had in the original."""
        return layer, _kept(self.neurons.get(layer, ()), neuron)

    def after(self, kind: str, units: Units, step: Mapping[str, Any]) -> "Pruning":
        """Return the record once more ``units`` are gone, named as they now are.

        Args:
            kind: ``"heads"`` or ``"neurons"``.
            units: Which of each layer, as they are now named.
            step: What is to be remembered about it.
        """
        lost: dict[str, dict[int, tuple[int, ...]]] = {
            "heads": dict(self.heads),
            "neurons": dict(self.neurons),
        }
        named = {}
        for layer, gone in units.items():
            before = lost[kind].get(layer, ())
            named[layer] = tuple(_kept(before, unit) for unit in gone)
            lost[kind][layer] = tuple(sorted((*before, *named[layer])))
        ordered = {name: dict(sorted(by_layer.items())) for name, by_layer in lost.items()}
        return Pruning(**ordered, steps=(*self.steps, {**step, kind: _to_json(named)}))


def pruning_of(model: TransformerBridge) -> Pruning:
    """Return what was pruned from a model; nothing for one that is whole."""
    return recorded(config_of(model.original_model, model.cfg))


def config_of(module: nn.Module, cfg: Any) -> Any:
    """Return the configuration that holds the record: a native model's is its bridge's."""
    return getattr(module, "config", None) or cfg


def recorded(config: Any) -> Pruning:
    """Return the record in a configuration, or in the fields of one."""
    fields = config if isinstance(config, Mapping) else vars(config)
    return Pruning(
        _from_json(fields.get("pruned_heads", {})),
        _from_json(fields.get("pruned_neurons", {})),
        tuple(fields.get("pruning_steps", ())),
    )


def record(config: Any, pruning: Pruning) -> None:
    """Write the record into a configuration."""
    config.pruned_heads = _to_json(pruning.heads)
    config.pruned_neurons = _to_json(pruning.neurons)
    config.pruning_steps = [dict(step) for step in pruning.steps]


def _kept(gone: Iterable[int], index: int) -> int:
    """Return the number that the ``index``-th of those that are not gone has."""
    lost = set(gone)
    return next(islice((n for n in count() if n not in lost), index, None))


def _to_json(units: Units) -> dict[str, list[int]]:
    return {str(layer): list(gone) for layer, gone in units.items()}


def _from_json(units: Mapping[str, Iterable[int]]) -> dict[int, tuple[int, ...]]:
    return {int(layer): tuple(gone) for layer, gone in units.items()}
