"""Weights of attention heads, as they act on the residual stream.

Laid out per query head, ``x @ W``, whatever the architecture stores: fused or apart, keys and
values shared by groups of query heads. What the norm before attention multiplies with can be
taken into the weights that read; what it divides by depends on the input and cannot.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.sites import is_post_norm, key_heads


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """One layer's heads. Keys and values of a group are repeated for each of its queries."""

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]


def head_weights(
    model: TransformerBridge, layer: int, *, fold_norm: bool = False
) -> HeadWeights:
    """Return the weights of a layer's heads.

    With ``fold_norm``, ``W_Q``, ``W_K`` and ``W_V`` act on the residual stream over its own
    scale: the gain of the norm before attention is multiplied in, and where that norm
    subtracts the mean, so do they.
    """
    attention: Any = model.blocks[layer].attn
    W_O = attention.W_O.detach()
    weights = {}
    for name in ("W_Q", "W_K", "W_V"):
        weight = getattr(attention, name).detach()
        weights[name] = weight if name == "W_Q" else weight[key_heads(model, layer)]
    norm: Any = getattr(model.blocks[layer], "ln1", None)
    if fold_norm and norm is not None and not is_post_norm(model.blocks[layer]):
        gain = norm_matrix(norm, W_O.shape[-1]).to(W_O)
        weights = {name: gain @ weight for name, weight in weights.items()}
    return HeadWeights(**weights, W_O=W_O)


@torch.no_grad()
def norm_matrix(norm: Any, d_model: int) -> Float[Tensor, "d_model d_model"]:
    """Return ``M`` such that ``norm(x) = x @ M / scale(x) + bias``, whichever norm it is.

    ``scale`` is the root mean square of ``x`` or its standard deviation; where there is no
    norm, ``M`` is the identity and ``scale`` is 1.
    """
    module = norm.original_component
    if isinstance(module, nn.Identity):
        return torch.eye(d_model)
    like = next(module.parameters(), torch.zeros(()))
    x = torch.full((d_model,), 1e3, dtype=like.dtype, device=like.device)  # beside it eps is 0
    x[1::2] *= -1
    out, moved, bias = (module(each[None, None])[0, 0] for each in (x, x + 1e3, 0 * x))
    centres = torch.allclose(out, moved, rtol=1e-2, atol=1e-3 * float(out.abs().max()))
    y = x - x.mean() if centres else x
    gain = torch.diag((out - bias) * y.square().mean().sqrt() / y)
    return gain - gain.mean(0, keepdim=True) if centres else gain
