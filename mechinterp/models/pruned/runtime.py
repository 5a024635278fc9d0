"""Attention modules that work with fewer heads: what transformers' own classes cannot do.

A pruned attention stays an object of its own class where that computes right with other
numbers of heads. Two cases need a subclass: query heads left in groups of unequal size, which
pick their keys and values one by one, after the key/value cache; and no heads at all.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources.native import NativeAttention

from mechinterp.models.pruned.anatomy import HEADS, LayerHeads

_CACHES = ("past_key_values", "layer_past")


class Empty(nn.Module):
    """A projection to or from no heads: zeros, or the bias that is left.

    It has no weight among its parameters, for there are no numbers to store.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The weight, of no numbers."""
        return torch.empty(self.out_features, self.in_features)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the bias at every position."""
        out = hidden.new_zeros(*hidden.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def reset_parameters(self) -> None:
        """Draw the weights anew: a bias begins at zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _IndexedCache:
    """A cache, or none, that gives every query head a copy of the keys and values it reads."""

    def __init__(self, cache: Any, index: Tensor) -> None:
        self.cache, self.index = cache, index

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            k, v = self.cache.update(k, v, *args, **kwargs)
        return k.index_select(1, self.index), v.index_select(1, self.index)


class _Indexed:
    """Query heads in unequal groups: keys and values are stored once, picked when read."""

    kv_index: Tensor

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        picking = _IndexedCache(past_key_values, self.kv_index)
        return super().forward(*args, past_key_values=picking, **kwargs)  # pyright: ignore


class _Repeats(Tensor):
    """How often each key/value head is repeated; "more than once" for a native attention."""

    # What is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def __gt__(self, other: object) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


class _NativeIndexed:
    """The same in transformer-lens' own attention, which repeats its keys and values."""

    kv_index: Tensor

    @property
    def kv_repeats(self) -> Tensor:
        return torch.bincount(self.kv_index).as_subclass(_Repeats)

    @kv_repeats.setter
    def kv_repeats(self, _: int) -> None:
        """The index says it."""


class _Headless:
    """No heads: attention gives its output bias, and nothing looks at anything.

    Of its keys and values, one number per position goes to the cache, because transformers
    reads off a layer's cache how long the sequence is.
    """

    layer_idx: int
    _output: str | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        caches = [value for value in args if hasattr(value, "get_seq_length")]
        caches += [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]
        for found in caches:
            nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 1)[:, None]
            found.update(nothing, nothing, self.layer_idx)
        z = hidden_states[..., :0]
        if self._output is None:  # the output projection belongs to another module (BERT)
            return z, None
        return self.get_submodule(self._output)(z), None  # pyright: ignore


def become(attention: Any, holder: Any, heads: LayerHeads, output: str | None) -> None:
    """Make an attention, already sliced, compute with the heads it has left.

    ``holder`` is the module that has the queries' projection, and ``output`` the name in it
    of the output projection, None where another module has that.
    """
    vars(attention)[HEADS] = heads
    own = getattr(type(holder), "pruned_from", type(holder))
    n_heads, n_keys = len(heads.queries), len(heads.keys)
    indexed = bool(n_heads) and heads.group is None
    group = 1 if indexed else heads.group or 1
    if not n_heads:
        holder.__class__ = _subclass(_Headless, own)
        holder._output = output
    elif indexed:
        kind = _NativeIndexed if issubclass(own, NativeAttention) else _Indexed
        holder.__class__ = _subclass(kind, own)
    else:
        holder.__class__ = own
    holder._buffers.pop("kv_index", None)
    if indexed:
        device = next(holder.parameters()).device
        if device.type == "meta":  # a stored model's weights come later, and on the CPU
            device = torch.device("cpu")
        index = torch.tensor(heads.reads, device=device)
        holder.register_buffer("kv_index", index, persistent=False)
    sizes = dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), n_heads)
    sizes |= dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), n_keys)
    sizes |= dict.fromkeys(("num_key_value_groups", "kv_repeats"), group)
    sizes |= dict.fromkeys(("split_size", "all_head_size"), n_heads * heads.d_head)
    for name, value in sizes.items():
        if name in vars(holder):
            setattr(holder, name, value)


@cache
def _subclass(kind: type, own: type) -> type:
    name = f"{kind.__name__.removeprefix('_')}{own.__name__}"
    return type(name, (kind, own), {"pruned_from": own, "__module__": own.__module__})
