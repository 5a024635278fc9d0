"""The one way the package runs a model, and the few questions it asks of one.

Everything that needs logits calls `forward`. The attention mask always goes along, so a
padded prompt gives the numbers of the prompt alone, and no key/value cache is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from mechinterp.models.adapters import answers_once


def forward(
    model: TransformerBridge,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch answer_pos d_out"]:
    """Return the logits at every position.

    ``tokens`` are padded on the right and ``mask`` is true where a prompt has a token; ids
    under the padding are ignored. A language model answers at each position with one logit
    per word of the vocabulary; a sequence classifier answers once, so its ``answer_pos`` has
    length 1 and ``d_out`` is the number of classes; an encoder without a head answers with
    its last hidden state. Gradients are the caller's business.

    Raises:
        ValueError: The mask is not that of right-padded prompts.
    """
    device = input_device(model)
    if mask is None:
        mask = torch.ones(tokens.shape, dtype=torch.bool)
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "mask must be true on the tokens of each prompt and false only after them: prompts "
            "have at least one token and are padded on the right."
        )
    inputs: dict[str, Any] = {"attention_mask": mask.to(device).long()}
    if is_causal(model):
        inputs["use_cache"] = False
    with _padding_unmasked(model, mask):
        logits = cast(Tensor, model(tokens.to(device), **inputs))
    return logits[:, None] if answers_once(model) else logits


@contextmanager
def _padding_unmasked(
    model: TransformerBridge, mask: Bool[Tensor, "batch pos"]
) -> Iterator[None]:
    """Let padding see padding where transformers would make it NaN.

    A query in the padding whose sliding window holds nothing but padding has every score at
    the lowest float64, which is -inf in the float32 that transformers 5.23 takes the softmax
    in; the NaN it gets reaches the real tokens as ``0 * NaN``. A causal model's tokens never
    see what is to their right, so its padding need not be masked at all.
    """
    parameter = next(model.original_model.parameters())
    if parameter.dtype != torch.float64 or not is_causal(model) or mask.all():
        yield
        return

    def see_all(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}

    # The last hook to be added is the last to run: those before it still get the true mask.
    handle = model.original_model.register_forward_pre_hook(see_all, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def input_device(model: TransformerBridge) -> torch.device:
    """Return where the model wants its tokens: the device of its first parameter."""
    return next(model.original_model.parameters()).device


def is_causal(model: TransformerBridge) -> bool:
    """Whether a position sees only itself and what comes before it."""
    return model.cfg.attention_dir == "causal"


def n_layers(model: TransformerBridge) -> int:
    """Return the number of blocks."""
    return len(model.blocks)


def tokenizer_of(model: TransformerBridge) -> PreTrainedTokenizerBase | None:
    """Return the model's tokenizer as it was given, or None where it has none."""
    return model.tokenizer
