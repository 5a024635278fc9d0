"""Taking heads and neurons out of a plain module, in place."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechinterp.models.pruned.anatomy import Anatomy, axis
from mechinterp.models.pruned.runtime import Empty, become

Gone = Mapping[int, Sequence[int]]  # by layer, numbered as they now are


def cut_heads(anatomy: Anatomy, gone: Gone) -> None:
    """Take query heads out, and the key/value heads that no query is left to read."""
    for layer, heads in gone.items():
        _cut_layer(anatomy, layer, set(heads))


def cut_neurons(anatomy: Anatomy, gone: Gone) -> None:
    """Take MLP neurons out."""
    for layer, neurons in gone.items():
        for part, projection in anatomy.neurons_of(layer).items():
            side = "in" if part == "out" else "out"
            there = cast(Tensor, projection.weight).shape[axis(projection, side)]
            lost = set(neurons)
            take(projection, side, [n for n in range(there) if n not in lost])


@torch.no_grad()
def fold(projection: nn.Module, units: Sequence[int], values: Float[Tensor, "unit d"]) -> None:
    """Add to a projection's bias what it makes of ``values`` as the input of some units.

    ``d`` is 1 for neurons. Where there is no bias, one is made.
    """
    d = values.shape[1]
    weight = cast(Tensor, projection.weight)
    rows = _rows(units, d).to(weight.device)
    read = weight.index_select(axis(projection, "in"), rows).double()
    read = read if isinstance(projection, Conv1D) else read.T
    added = values.reshape(-1).double().to(read) @ read
    give_bias(projection)
    bias = cast(nn.Parameter, projection.bias)
    bias.copy_((bias.double() + added).to(bias))


def give_bias(projection: nn.Module) -> None:
    """Give a projection that has no bias one of zeros."""
    if projection.bias is None:
        weight = cast(nn.Parameter, projection.weight)
        zeros = weight.new_zeros(weight.shape[axis(projection, "out")])
        projection.bias = nn.Parameter(zeros.detach())


@torch.no_grad()
def take(projection: Any, side: str, rows: Sequence[int]) -> None:
    """Keep some inputs (``side="in"``) or outputs (``"out"``) of a projection."""
    weight = projection.weight
    index = torch.tensor(rows, dtype=torch.int64, device=weight.device)
    cut = weight.index_select(axis(projection, side), index)
    projection.weight = nn.Parameter(cut, weight.requires_grad)
    if side == "out" and projection.bias is not None:
        bias = projection.bias
        projection.bias = nn.Parameter(bias.index_select(0, index), bias.requires_grad)
    names = {"in": ("in_features", "nx"), "out": ("out_features", "nf")}[side]
    setattr(projection, names[isinstance(projection, Conv1D)], len(rows))


def _cut_layer(anatomy: Anatomy, layer: int, gone: set[int]) -> None:
    heads, attention = anatomy.heads(layer), anatomy.attention(layer)
    kept = [i for i in range(len(heads.queries)) if i not in gone]
    left = heads.keeping(kept)
    paths = anatomy.attention_paths
    if not kept:
        for part in ("q", "k", "v", "qkv", "o"):
            if part in paths:
                _empty(attention, paths[part], part)
        for part in {"q_norm", "k_norm"} & paths.keys():
            owner, name = _owner(attention, paths[part])
            owner._modules[name] = None
    else:
        keys = [i for i, key in enumerate(heads.keys) if key in left.keys]
        places: dict[str, Iterable[int]] = {"q": kept, "k": keys, "v": keys}
        if heads.fused is not None:
            both = enumerate(heads.fused)
            places = {"qkv": [i for i, pair in both if left.has(*pair)]}
        for part, which in places.items():
            take(anatomy.projection(layer, part), "out", _rows(which, heads.d_head).tolist())
        take(anatomy.projection(layer, "o"), "in", _rows(kept, heads.d_head).tolist())
    holder, _ = _owner(attention, paths["qkv" if heads.fused is not None else "q"])
    become(attention, holder, left, paths["o"] if holder is attention else None)


def _empty(attention: nn.Module, path: str, part: str) -> None:
    owner, name = _owner(attention, path)
    old: Any = owner._modules[name]
    d_model = old.weight.shape[axis(old, "out" if part == "o" else "in")]
    sizes = (0, d_model) if part == "o" else (d_model, 0)
    owner._modules[name] = Empty(*sizes, old.bias if part == "o" else None)


def _owner(module: nn.Module, path: str) -> tuple[Any, str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def _rows(units: Iterable[int], d: int) -> Tensor:
    """Return the rows of units of ``d`` numbers each."""
    index = torch.tensor(list(units), dtype=torch.int64)
    return (index[:, None] * d + torch.arange(d)).flatten()
