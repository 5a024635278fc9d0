"""Where a plain module has its heads and neurons, read off transformer-lens' adapter.

The adapter names each projection, and can cut a fused one into queries, keys and values. How
a fused projection orders its heads is therefore not written down here for each architecture:
a projection of row numbers is cut, and the pieces say where their rows were.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    GatedMLPBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    MLPBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformers.pytorch_utils import Conv1D

HEADS = "_pruned_to"  # where a pruned attention keeps its `LayerHeads`
_ATTENTIONS = {
    AttentionBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
}
_ATTENTION_PARTS = {"q", "k", "v", "o", "qkv", "q_norm", "k_norm"}
_MLPS = {MLPBridge, GatedMLPBridge}
_MLP_PARTS = {"in", "gate", "out"}


@dataclass(frozen=True)
class LayerHeads:
    """Which heads an attention has, in the original numbering.

    ``queries`` and ``keys`` are its query and its key/value heads, ``reads`` the place in
    ``keys`` of the one that each query head reads. ``fused`` is the order of the heads in a
    fused projection, as pairs of ``"q"``, ``"k"`` or ``"v"`` and a head.
    """

    d_head: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    reads: tuple[int, ...]
    fused: tuple[tuple[str, int], ...] | None = None

    @property
    def group(self) -> int | None:
        """How many query heads share a key/value head; None where that differs."""
        sizes = set(Counter(self.reads).values())
        return sizes.pop() if len(sizes) == 1 else None

    def keeping(self, kept: Sequence[int]) -> "LayerHeads":
        """Return what is left with the query heads at these places, and what they read."""
        read = sorted({self.reads[i] for i in kept})
        left = replace(
            self,
            queries=tuple(self.queries[i] for i in kept),
            keys=tuple(self.keys[i] for i in read),
            reads=tuple(read.index(self.reads[i]) for i in kept),
        )
        order = self.fused and tuple(pair for pair in self.fused if left.has(*pair))
        return replace(left, fused=order)

    def has(self, kind: str, head: int) -> bool:
        """Whether it has this query, key or value head, named as in the original."""
        return head in (self.queries if kind == "q" else self.keys)


def heads_left(attention: object) -> LayerHeads | None:
    """Return which heads a plain attention module was pruned to, None if it was not."""
    return getattr(attention, "__dict__", {}).get(HEADS)


class Anatomy:
    """The blocks of a plain module, and the projections in them."""

    def __init__(self, module: nn.Module, adapter: ArchitectureAdapter) -> None:
        mapping: Any = adapter.component_mapping
        self.d_head: int = adapter.cfg.d_head
        self.cfg: Any = adapter.cfg
        self.template = mapping["blocks"]
        self.blocks: list[Any] = list(cast(Any, module.get_submodule(self.template.name)))

    def attention(self, layer: int) -> Any:
        """Return the attention of a layer."""
        return self.blocks[layer].get_submodule(self.template.submodules["attn"].name)

    def projection(self, layer: int, part: str) -> Any:
        """Return ``q``, ``k``, ``v``, ``qkv`` or ``o`` of a layer's attention."""
        return self.attention(layer).get_submodule(self.attention_paths[part])

    def neurons_of(self, layer: int) -> dict[str, Any]:
        """Return the projections of a layer's MLP: ``in``, ``out`` and perhaps ``gate``."""
        template = self.template.submodules["mlp"]
        owner = self.blocks[layer].get_submodule(template.name or "")
        parts = template.submodules.items()
        return {part: owner.get_submodule(component.name) for part, component in parts}

    @property
    def has_mlp(self) -> bool:
        """Whether the blocks have an MLP."""
        return "mlp" in self.template.submodules

    def n_neurons(self, layer: int) -> int:
        """Return how many neurons a layer's MLP has."""
        return width(self.neurons_of(layer)["out"], "in")

    @property
    def attention_paths(self) -> dict[str, str]:
        """The names of an attention's parts within it; fused ones without their pieces."""
        parts = self.template.submodules["attn"].submodules
        pieces = {"q", "k", "v"} if "qkv" in parts else set()
        return {part: c.name for part, c in parts.items() if part not in pieces}

    def heads(self, layer: int) -> LayerHeads:
        """Return which heads a layer has."""
        attention = self.attention(layer)
        if (left := heads_left(attention)) is not None:
            return left
        n_heads = width(self.projection(layer, "o"), "in") // self.d_head
        fused = None
        if "qkv" in self.attention_paths:
            fused = _order(attention, self.template.submodules["attn"], self.d_head)
            n_keys = sum(kind == "k" for kind, _ in fused)
        else:
            n_keys = width(self.projection(layer, "k"), "out") // self.d_head
        reads = tuple(head // (n_heads // n_keys) for head in range(n_heads))
        return LayerHeads(
            self.d_head, tuple(range(n_heads)), tuple(range(n_keys)), reads, fused
        )

    def can_index(self, layer: int) -> bool:
        """Whether queries of this layer may read keys and values in any grouping."""
        attention = self.attention(layer)
        grouped = hasattr(attention, "num_key_value_groups") or hasattr(attention, "kv_repeats")
        return grouped and "qkv" not in self.attention_paths

    def check_heads(self) -> None:
        """Raise a ``ValueError`` where heads of this architecture cannot be taken out."""
        template = self.template.submodules.get("attn")
        kind = getattr(template, "pruned_from", type(template))
        other = [] if template is None else set(template.submodules) - _ATTENTION_PARTS
        alibi = getattr(self.cfg, "positional_embedding_type", "") == "alibi"
        if template is None or kind not in _ATTENTIONS or other or alibi:
            raise ValueError(
                f"heads of {self.cfg.architecture} cannot be pruned: its attention "
                f"({kind.__name__}) has more than projections of queries, keys, values and "
                "output. Ablate them with mi.HookManager instead."
            )
        for layer in range(len(self.blocks)):
            if heads_left(self.attention(layer)) is not None:
                continue
            for part in ("q_norm", "k_norm"):
                if part in template.submodules:
                    norm = self.projection(layer, part)
                    if any(p.numel() > self.d_head for p in norm.parameters()):
                        raise ValueError(
                            f"heads of {self.cfg.architecture} cannot be pruned: its {part} "
                            "normalises all heads of a layer together, so taking one out "
                            "changes the others. Ablate them with mi.HookManager instead."
                        )

    def check_neurons(self) -> None:
        """Raise a ``ValueError`` where neurons of this architecture cannot be taken out."""
        template = self.template.submodules.get("mlp")
        if template is None:
            raise ValueError(
                f"{self.cfg.architecture} has no MLPs here, so no neurons. Prune heads."
            )
        mixes = str(getattr(self.cfg, "act_fn", "")).startswith("solu")
        if type(template) not in _MLPS or set(template.submodules) - _MLP_PARTS or mixes:
            raise ValueError(
                f"neurons of {self.cfg.architecture} cannot be pruned: its MLP "
                f"({type(template).__name__}) mixes them or keeps them in one fused "
                "projection. Ablate them with mi.HookManager instead."
            )


def width(module: nn.Module, side: str) -> int:
    """Return how many numbers a projection takes (``in``) or gives (``out``)."""
    return cast(Tensor, module.weight).shape[axis(module, side)]


def axis(module: nn.Module, side: str) -> int:
    """Return the axis of a projection's weight that stands for its input or output."""
    return int(isinstance(module, Conv1D) == (side == "out"))


def _order(attention: nn.Module, template: Any, d_head: int) -> tuple[tuple[str, int], ...]:
    """Return the order in which a fused projection holds its heads."""
    name = template.submodules["qkv"].name
    stand_in, fused = copy.copy(attention), copy.copy(attention.get_submodule(name))
    rows = torch.arange(width(fused, "out"), dtype=torch.float64)
    shape = cast(Tensor, fused.weight).shape
    weight = rows[None].expand(shape) if axis(fused, "out") else rows[:, None].expand(shape)
    bias = None if fused.bias is None else nn.Parameter(rows.clone())
    fused._parameters = {"weight": nn.Parameter(weight.contiguous()), "bias": bias}
    stand_in._modules = attention._modules | {name: fused}
    with torch.random.fork_rng(devices=[]):  # cutting makes layers, which draw weights
        pieces = template.split_qkv_matrix(stand_in)
    first = [
        (int(row), kind, head)
        for kind, piece in zip("qkv", pieces, strict=True)
        for head, row in enumerate(piece.weight[::d_head, 0].tolist())
    ]
    return tuple((kind, head) for _, kind, head in sorted(first))
