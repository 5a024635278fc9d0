"""What each head writes to the residual stream at the last token, norms taken into account.

In most architectures that is ``z @ W_O``. Where a norm stands between attention and the
residual stream (Gemma's sandwich), it is that through the norm with its scale as it was.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.hooks import HookManager
from mechinterp.sites import is_post_norm, site_layers
from mechinterp.tasks.prompts import Prompts
from mechinterp.weights import head_weights, norm_matrix

Written = dict[int, Float[Tensor, "head d_model"]]


def check_writes_are_sums(model: TransformerBridge) -> None:
    """Raise a ``ValueError`` where attention is normed together with the residual stream."""
    for layer in site_layers(model, "z"):
        if is_post_norm(model.blocks[layer]):
            raise ValueError(
                f"layer {layer} norms the residual stream after attention is added to it, so "
                "what a head writes is no vector of its own. Use a pre-norm model."
            )


@torch.no_grad()
def mean_written(manager: HookManager, prompts: Prompts) -> Written:
    """Return per layer what each head writes at the last token, averaged over the prompts.

    Raises:
        ValueError: The heads of a layer do not sum to what its attention adds, so that the
            architecture does something to them that is not known here.
    """
    acts = manager.capture(prompts, ["z", "attn_out"], positions=-1)
    model = manager.model
    found = {}
    for layer in site_layers(model, "z"):
        W_O = head_weights(model, layer).W_O
        each = torch.einsum("phd,hdm->phm", acts["z", layer][:, 0], W_O)
        added = acts["attn_out", layer][:, 0]
        norm: Any = getattr(model.blocks[layer], "ln1_post", None)
        if norm is not None:
            each = _through(norm, each, added, getattr(model.blocks[layer].attn, "b_O", None))
        rest = added - each.sum(1)  # the biases, the same in every prompt
        if not torch.allclose(rest, rest.mean(0), atol=1e-3 * float(added.abs().max())):
            raise ValueError(
                f"the heads of layer {layer} do not sum to what its attention adds to the "
                "residual stream, so their sum would be no function vector. "
                "Use another architecture."
            )
        found[layer] = each.double().mean(0).to(each.dtype)
    return found


def _through(
    norm: Any,
    each: Float[Tensor, "prompt head d_model"],
    added: Float[Tensor, "prompt d_model"],
    bias: Tensor | None,
) -> Float[Tensor, "prompt head d_model"]:
    """Return the heads' outputs behind the norm of their sum, whose scale is left as it was."""
    M = norm_matrix(norm, each.shape[-1]).to(each)
    whole = each.sum(1) if bias is None else each.sum(1) + bias
    constant = norm.original_component(torch.zeros_like(whole[:1]))
    scale = (whole @ M).norm(dim=-1) / (added - constant).norm(dim=-1)
    return each @ M / scale[:, None, None]
