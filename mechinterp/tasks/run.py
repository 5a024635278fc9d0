"""Run the model on prompts and read its logits where the answer is."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models import forward
from mechinterp.tasks.prompts import Prompts

_LOGITS = 100_000_000  # held at once


def rows_at_once(model: TransformerBridge, width: int, most: int) -> int:
    """Return how many prompts of ``width`` tokens to run at once: ``most``, or fewer.

    Fewer where the logits of all their positions would be more than 100 million numbers.
    """
    return max(1, min(most, _LOGITS // (width * model.cfg.d_vocab)))


def answer_logits(
    logits: Float[Tensor, "prompt pos d_vocab"], positions: Sequence[int]
) -> Float[Tensor, "prompt d_vocab"]:
    """Return the logits at one position per prompt, counted from its start.

    A model that answers once per prompt (a sequence classifier) has a single position, which
    is then the answer's whatever ``positions`` says.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, torch.tensor(list(positions), device=logits.device)]


@torch.no_grad()
def logits_at(
    model: TransformerBridge,
    prompts: Prompts,
    positions: Sequence[int],
    *,
    batch_size: int = 64,
) -> Float[Tensor, "prompt d_vocab"]:
    """Return the logits at one position per prompt, at most ``batch_size`` at once."""
    parts = []
    step = rows_at_once(model, prompts.tokens.shape[1], batch_size)
    for start in range(0, len(prompts), step):
        batch = prompts[start : start + step]
        logits = forward(model, batch.tokens, batch.mask)
        parts.append(answer_logits(logits, positions[start : start + step]))
    return torch.cat(parts)
