"""The one way the package runs a model, and the few questions it asks of one.

Everything that needs logits calls `forward`. The attention mask always goes along, so a
padded prompt gives the numbers of the prompt alone, and no key/value cache is kept.
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
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
    """
    device = input_device(model)
    if mask is None:
        mask = torch.ones(tokens.shape, dtype=torch.bool)
    inputs: dict[str, Any] = {"attention_mask": mask.to(device).long()}
    if is_causal(model):
        inputs["use_cache"] = False
    logits = cast(Tensor, model(tokens.to(device), **inputs))
    return logits[:, None] if answers_once(model) else logits


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
