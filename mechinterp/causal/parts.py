"""Parts of a model that can be taken out: heads, MLPs, neurons; alone or in sets."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from operator import index as as_integer
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from mechinterp.names import unknown
from mechinterp.sites import n_neurons, resolve_heads, resolve_layers, site_layers

_UNIT = {"z": "head", "mlp_post": "neuron", "mlp_out": "MLP"}


@dataclass(frozen=True, order=True)
class Part:
    """One head or neuron of a layer, or (without an index) its MLP."""

    layer: int
    index: int | None = None

    @property
    def label(self) -> str:
        """Its name: ``3.1`` for a head or neuron, ``3.mlp`` for an MLP."""
        return f"{self.layer}.{'mlp' if self.index is None else self.index}"

    @property
    def pair(self) -> tuple[int, int]:
        """The pair (layer, index) of a head or neuron."""
        assert self.index is not None
        return self.layer, self.index


@dataclass(frozen=True, eq=False)
class PartSets:
    """Sets of parts to take out together; ``grid`` where each part stands alone, all named."""

    sets: list[list[Part]]
    labels: list[str]
    unit: str
    grid: bool

    @property
    def layers(self) -> list[int]:
        """The layers that have any of the parts."""
        return sorted({part.layer for one in self.sets for part in one})

    @property
    def axes(self) -> dict[str, list[int]]:
        """The labels of a grid's axes: ``layer``, and ``head`` or ``neuron``."""
        axes = {"layer": self.layers}
        if self.unit != "MLP":
            units = {part.index for (part,) in self.sets if part.index is not None}
            axes[self.unit] = sorted(units)
        return axes


def sets_of(model: TransformerBridge, site: str, asked: Any) -> PartSets:
    """Return the sets of parts of ``site`` that were asked for; see ``mi.head_ablation``.

    Raises:
        ValueError: A part does not exist or is named twice in a set; a set is empty; the words
            are unknown.
        TypeError: Something is no part.
    """
    unit = _UNIT[site]
    if asked is None:
        every = every_part(model, site)
        return PartSets([[part] for part in every], [p.label for p in every], unit, True)
    if isinstance(asked, str):
        if site == "mlp_out" and asked == "layers":
            raise ValueError(
                "'layers' takes out what a layer has together, but that is one MLP. Name none "
                "to take out each by itself, or pass 'pairs'."
            )
        words = ("pairs",) if site == "mlp_out" else ("pairs", "layers")
        if asked not in words:
            raise ValueError(unknown(f"choice of {unit}s", asked, words))
        every = every_part(model, site)
        if asked == "pairs":
            if len(every) < 2:
                raise ValueError(f"'pairs' takes two {unit}s, but this model has {len(every)}.")
            sets = [list(pair) for pair in combinations(every, 2)]
            return PartSets(sets, [_label(one) for one in sets], unit, False)
        layers = sorted({part.layer for part in every})
        sets = [[part for part in every if part.layer == layer] for layer in layers]
        return PartSets(sets, [f"layer {layer}" for layer in layers], unit, False)
    listed = list(asked)
    if not listed:
        raise ValueError(f"there are no {unit}s to take out. Name at least one.")
    sets = [
        [part_of(model, site, one)] if _is_part(one, site) else _set(model, site, one)
        for one in listed
    ]
    labels = [_label(one) for one in sets]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"{twice[0]} is asked for twice. Name each {unit} or set once.")
    return PartSets(sets, labels, unit, False)


def every_part(model: TransformerBridge, site: str) -> list[Part]:
    """Return all parts of a site, layer by layer."""
    if site == "mlp_out":
        return [Part(layer) for layer in site_layers(model, site)]
    return [
        Part(layer, index)
        for layer in site_layers(model, site)
        for index in range(_count(model, site, layer))
    ]


def part_of(model: TransformerBridge, site: str, named: Any) -> Part:
    """Return the part that (layer, index), or an MLP's layer, names.

    Raises:
        ValueError: It does not exist.
        TypeError: It is no part.
    """
    layer, index = (named, None) if site == "mlp_out" else pair_of(named, _UNIT[site])
    (at,) = resolve_layers(model, site, int(layer))
    assert at is not None
    if index is None:
        return Part(at)
    if site == "z":
        found = resolve_heads(model, site, at, index)
        assert found is not None
        return Part(at, found[0])
    count = n_neurons(model, at)
    if not -count <= index < count:
        raise ValueError(
            f"neuron ({at}, {index}) does not exist: layer {at} has neurons 0..{count - 1}."
        )
    return Part(at, index % count)


def pair_of(named: Any, unit: str) -> tuple[int, int]:
    """Return a pair of integers (layer, unit).

    Raises:
        TypeError: It is none.
    """
    try:
        layer, number = named
        return as_integer(layer), as_integer(number)
    except (TypeError, ValueError):
        raise TypeError(
            f"{named!r} is no pair (layer, {unit}) of integers. Pass pairs such as (3, 1)."
        ) from None


def _set(model: TransformerBridge, site: str, asked: Any) -> list[Part]:
    unit = _UNIT[site]
    if not isinstance(asked, Iterable) or isinstance(asked, str):
        how = "a layer" if site == "mlp_out" else f"a pair (layer, {unit})"
        raise TypeError(f"{asked!r} is neither {how} nor a list of them.")
    parts = [part_of(model, site, one) for one in asked]
    if not parts:
        raise ValueError("a set is empty. Name at least one part in each.")
    if len(set(parts)) < len(parts):
        twice = next(part for part in parts if parts.count(part) > 1)
        raise ValueError(f"{unit} {twice.label} is named twice in a set. Name each once.")
    return sorted(parts)


def _is_part(asked: Any, site: str) -> bool:
    if site == "mlp_out":
        return isinstance(asked, Integral)
    both = isinstance(asked, tuple | list) and len(asked) == 2
    return both and all(isinstance(number, Integral) for number in asked)


def _count(model: TransformerBridge, site: str, layer: int) -> int:
    if site == "mlp_post":
        return n_neurons(model, layer)
    return len(resolve_heads(model, site, layer, None) or ())


def _label(parts: list[Part]) -> str:
    return " + ".join(part.label for part in parts)
