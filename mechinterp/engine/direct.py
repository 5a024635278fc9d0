"""What components write into the residual stream, and what a norm makes of each share.

A norm divides by a number that depends on its whole input. Held at the number it had, it is
linear, so the shares of heads, neurons and layers add up behind it: before the unembedding,
and behind the norms that some architectures put on a layer's output (Gemma's sandwich).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.weights import head_weights, norm_matrix


class HeldNorm:
    """A norm at the scales that it had on ``inputs``: linear in each row's share.

    It gives ``x @ matrix / scale + bias`` on its inputs; centring and gain are in the matrix.
    ``bias`` has a row per input: the norm's own, and what it rounds (some norms compute in
    float32 whatever they are given).

    Raises:
        RuntimeError: It gives something else, so it is no norm that is known here.
    """

    @torch.no_grad()
    def __init__(self, norm: Any, inputs: Float[Tensor, "row d_model"]) -> None:
        module = norm.original_component
        out = module(inputs[:, None])[:, 0].double()
        bias = module(torch.zeros_like(inputs[:1, None]))[0, 0].double()
        self.matrix = norm_matrix(norm, inputs.shape[-1]).to(inputs.device).double()
        linear, held = inputs.double() @ self.matrix, out - bias
        self.scale = linear.square().sum(-1) / (linear * held).sum(-1)
        self.bias = out - linear / self.scale[:, None]
        off, size = float((self.bias - bias).abs().max()), float(out.abs().max())
        if not off <= (1e-5 if inputs.dtype.itemsize >= 4 else 2e-2) * size:
            raise RuntimeError(
                f"{type(module).__name__} differs by {off:.3g} from a norm with a scale, a "
                "gain and a bias, so its inputs have no shares in what it gives. "
                "Use mi.path_patching to 'logits'."
            )

    def share(
        self, part: Float[Tensor, "row *unit d_model"]
    ) -> Float[Tensor, "row *unit d_model"]:
        """Return what the norm makes of a part of its input, without its bias."""
        scale = self.scale.reshape(-1, *[1] * (part.ndim - 1))
        return part.double() @ self.matrix / scale

    def pulled(self, direction: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return the direction before the norm whose product is that of ``direction`` after."""
        return direction.double() @ self.matrix.T / self.scale[:, None]


def held_post_norm(
    model: TransformerBridge, site: str, layer: int, inputs: Float[Tensor, "row d_model"]
) -> HeldNorm | None:
    """Return the norm between a layer's output and the residual stream, None without one.

    ``site`` is ``attn_out`` or ``mlp_out``; ``inputs`` is what the layer gave.
    """
    norm = getattr(model.blocks[layer], "ln1_post" if site == "attn_out" else "ln2_post", None)
    return None if norm is None else HeldNorm(norm, inputs)


@torch.no_grad()
def attention_output(
    model: TransformerBridge, layer: int, z: Float[Tensor, "row head d_head"]
) -> Float[Tensor, "row d_model"]:
    """Return what a layer's attention gives, bias included, before any post-norm."""
    attention: Any = model.blocks[layer].attn
    return attention.o.original_component(z.flatten(1)[:, None])[:, 0]


@torch.no_grad()
def head_results(
    model: TransformerBridge,
    layer: int,
    z: Float[Tensor, "row head d_head"],
    heads: list[int] | None = None,
) -> Float[Tensor, "row head d_model"]:
    """Return each head's ``z @ W_O``, as it enters the residual stream.

    Behind a post-norm, a head's share is taken at the scale that the norm had.
    """
    W_O = head_weights(model, layer).W_O
    kept = list(range(len(W_O))) if heads is None else heads
    found = torch.einsum("rhd,hdm->rhm", z[:, kept], W_O[kept])
    norm = held_post_norm(model, "attn_out", layer, attention_output(model, layer, z))
    return found if norm is None else norm.share(found).to(found)


@torch.no_grad()
def attention_shares(
    model: TransformerBridge,
    layer: int,
    z: Float[Tensor, "row head d_head"],
    aim: Float[Tensor, "row d_model"],
) -> tuple[Float[Tensor, "row head"], Float[Tensor, " row"]]:
    """Return the product with ``aim`` of what each head adds, and of what the bias adds.

    Behind a post-norm, shares are taken at the scale that the norm had, and its bias is the
    attention's.
    """
    W_O = head_weights(model, layer).W_O.double()
    whole = attention_output(model, layer, z)
    bias = attention_output(model, layer, torch.zeros_like(z[:1]))[0].double()
    norm = held_post_norm(model, "attn_out", layer, whole)
    before = aim if norm is None else norm.pulled(aim)
    heads = torch.einsum("rhd,hdm,rm->rh", z.double(), W_O, before)
    rest = before @ bias
    return heads, rest if norm is None else rest + (aim * norm.bias).sum(-1)


@torch.no_grad()
def neuron_results(
    model: TransformerBridge,
    layer: int,
    activations: Float[Tensor, "row neuron"],
    neurons: list[int],
) -> Float[Tensor, "row chosen d_model"]:
    """Return what some neurons add to the residual stream: activation times output row.

    Behind a post-norm, a neuron's share is taken at the scale that the norm had.
    """
    rows = neuron_rows(model, layer, torch.tensor(neurons))
    found = activations[:, neurons][..., None] * rows
    block: Any = model.blocks[layer]
    whole = block.mlp.out.original_component(activations[:, None])[:, 0]
    norm = held_post_norm(model, "mlp_out", layer, whole)
    return found if norm is None else norm.share(found).to(found)


@torch.no_grad()
def neuron_rows(
    model: TransformerBridge, layer: int, neurons: Int[Tensor, " chosen"]
) -> Float[Tensor, "chosen d_model"]:
    """Return what each of some neurons writes per unit of activation."""
    out: Any = model.blocks[layer].mlp.out.original_component
    weight = out.weight  # a Linear keeps one column per neuron, GPT-2's Conv1D one row
    per_row = type(out).__name__ == "Conv1D"
    chosen = neurons.to(weight.device)
    return weight[chosen] if per_row else weight[:, chosen].T
