"""Bridges around pruned attention.

transformer-lens 4.3.0 gives all layers one configuration, and reads from it how many heads
each has. A pruned layer gets a view of it with numbers of its own, cuts its fused projection
as its heads are ordered, and picks keys and values where its groups are of unequal size.
"""

from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    JointQKVAttentionBridge,
)

from mechinterp.models.pruned.anatomy import Anatomy, LayerHeads, axis, heads_left


def fit(module: nn.Module, adapter: ArchitectureAdapter) -> None:
    """Make an adapter ready to wrap this module, if some of its heads were pruned."""
    if not any(map(heads_left, module.modules())):
        return
    template = Anatomy(module, adapter).template.submodules["attn"]
    template.__class__ = _pruned(type(template))


class _LayerConfig:
    """The model's configuration, with one layer's numbers of heads."""

    def __init__(self, shared: Any, heads: LayerHeads) -> None:
        self.shared = shared
        self.n_heads, self.n_key_value_heads = len(heads.queries), len(heads.keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["shared"], name)


class _Pruned:
    """What a pruned layer does otherwise than its class of attention."""

    def set_original_component(self: Any, component: nn.Module) -> None:
        heads = heads_left(component)
        if heads is not None:
            self.config = _LayerConfig(self.config, heads)
            if not heads.queries:
                _leave_only_output(self)
                self.set_original_component(component)
                return
            if isinstance(self, JointQKVAttentionBridge):
                name = str(self.submodules["qkv"].name)
                self.split_qkv_matrix = partial(_split, heads, name)
        super().set_original_component(component)  # pyright: ignore

    def _update_kv_cache(self: Any, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        k, v = super()._update_kv_cache(k, v, **kwargs)  # pyright: ignore
        index = getattr(self.original_component, "kv_index", None)
        if index is None:
            return k, v
        return k.index_select(1, index), v.index_select(1, index)


class HeadlessAttentionBridge(AttentionBridge):
    """Attention without heads: an output bias, and the places where it is read and written."""

    @property
    def W_Q(self) -> Tensor:
        """The weights of no heads."""
        return self._none("d_model", "d_head")

    @property
    def W_K(self) -> Tensor:
        """The weights of no heads."""
        return self._none("d_model", "d_head")

    @property
    def W_V(self) -> Tensor:
        """The weights of no heads."""
        return self._none("d_model", "d_head")

    @property
    def W_O(self) -> Tensor:
        """The weights of no heads."""
        return self._none("d_head", "d_model")

    def _none(self, *axes: str) -> Tensor:
        like = next(cast(nn.Module, self.original_component).parameters(), torch.empty(0))
        return like.new_empty(0, *(getattr(self.config, axis) for axis in axes))


@cache
def _pruned(kind: type) -> type:
    return type(f"Pruned{kind.__name__}", (_Pruned, kind), {"pruned_from": kind})


def _leave_only_output(bridge: Any) -> None:
    for part in [name for name in bridge.submodules if name != "o"]:
        bridge.submodules.pop(part)
        bridge._modules.pop(part, None)
        bridge.real_components.pop(part, None)
    bridge.hook_aliases = {"hook_z": "o.hook_in"}
    bridge.__class__ = HeadlessAttentionBridge


def _split(
    heads: LayerHeads, name: str, attention: nn.Module
) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Cut a pruned layer's fused projection into queries, keys and values."""
    fused = attention.get_submodule(name)
    assert heads.fused is not None

    def cut(kind: str) -> nn.Linear:
        places = [i for i, (other, _) in enumerate(heads.fused or ()) if other == kind]
        weight = cast(Tensor, fused.weight).detach()
        rows = torch.tensor(places, device=weight.device)[:, None] * heads.d_head
        index = (rows + torch.arange(heads.d_head, device=weight.device)).flatten()
        weight = weight if axis(fused, "out") == 0 else weight.T
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.index_select(0, index))
        if fused.bias is not None:
            linear.bias = nn.Parameter(cast(Tensor, fused.bias).detach().index_select(0, index))
        linear.out_features, linear.in_features = linear.weight.shape
        return linear

    return cut("q"), cut("k"), cut("v")
