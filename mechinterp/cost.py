"""What a model costs to run, by formula: parameters, arithmetic, key/value cache."""

from dataclasses import dataclass

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models import is_causal, unwrap
from mechinterp.models.pruned.anatomy import Anatomy


@dataclass(frozen=True)
class Cost:
    """What one token costs, for a context of a stated length.

    ``flops_per_token`` counts a multiplication and an addition as two: twice the weights that
    the token passes (embeddings are looked up, not multiplied; the unembedding is), and
    ``4 * n_heads * d_head`` for every key that a layer's queries look at, up to its sliding
    window. Norms, activations and the softmax are left out, and what runs once per prompt, such
    as a classifier's pooler.

    Attributes:
        context: How many tokens attention looks at, the token itself included.
        parameters: All numbers in the model, tied ones once.
        attention_parameters: Those of the attention layers.
        mlp_parameters: Those of the MLPs.
        flops_per_token: Floating-point operations for one token at the end of the context.
        cache_bytes_per_token: What each token adds to the key/value cache; 0 without one. A
            layer whose heads were all pruned keeps one number per token in each of keys and
            values, from which transformers reads the sequence's length.
        query_heads: How many each layer has.
        key_value_heads: How many each layer has.
    """

    context: int
    parameters: int
    attention_parameters: int
    mlp_parameters: int
    flops_per_token: int
    cache_bytes_per_token: int
    query_heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]


def cost(model: TransformerBridge, *, context: int | None = None) -> Cost:
    """Return what a model costs by formula, read off its own weights.

    Args:
        model: The model, pruned or not.
        context: How many tokens attention looks at. Default: 1,024, or as many as fit.

    Raises:
        ValueError: ``context`` is not positive, or longer than the model's.
    """
    context = min(1024, model.cfg.n_ctx) if context is None else context
    if not 1 <= context <= model.cfg.n_ctx:
        raise ValueError(
            f"context={context} is no length for this model. Pass 1..{model.cfg.n_ctx}."
        )
    module = unwrap(model)
    anatomy = Anatomy(module, model.adapter)
    attention = mlp = looked = 0
    matrices, queries, keys, cached = 0, [], [], 0
    itemsize = next(module.parameters()).dtype.itemsize
    for layer in range(len(anatomy.blocks)):
        heads = anatomy.heads(layer)
        queries.append(len(heads.queries))
        keys.append(len(heads.keys))
        parts = [anatomy.projection(layer, part) for part in anatomy.attention_paths]
        attention += sum(_numbers(p) for part in parts for p in part.parameters())
        neurons = anatomy.neurons_of(layer).values() if anatomy.has_mlp else ()
        mlp += sum(_numbers(p) for part in neurons for p in part.parameters())
        matrices += sum(_numbers(p) for p in _matrices([*parts, *neurons]))
        looked += 4 * len(heads.queries) * heads.d_head * _seen(anatomy, layer, context)
        cached += 2 * itemsize * (len(heads.keys) * heads.d_head or 1)
    unembed = getattr(getattr(model, "unembed", None), "weight", None)
    last = unembed.numel() if isinstance(unembed, Tensor) else 0
    return Cost(
        context=context,
        parameters=sum(map(_numbers, module.parameters())),
        attention_parameters=attention,
        mlp_parameters=mlp,
        flops_per_token=2 * (matrices + last) + looked,
        cache_bytes_per_token=cached if is_causal(model) else 0,
        query_heads=tuple(queries),
        key_value_heads=tuple(keys),
    )


def _numbers(parameter: Tensor) -> int:
    return parameter.numel()


def _matrices(parts: list) -> list[Tensor]:
    return [p for part in parts for p in part.parameters() if p.ndim > 1]


def _seen(anatomy: Anatomy, layer: int, context: int) -> int:
    """Return how many keys a query of this layer looks at."""
    attention = anatomy.attention(layer)
    window = getattr(attention, "sliding_window", None)
    if window is None and getattr(attention, "layer_type", None) is None:
        window = getattr(getattr(attention, "config", None), "sliding_window", None)
    return min(context, window) if window else context
