"""Retrieval heads: a needle in a haystack of random tokens, found again at the end."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.hooks.observing import observe
from mechinterp.sites import site_layers
from mechinterp.tasks import Prompts
from mechinterp.tasks.induction import ordinary_ids, repeated_tokens
from mechinterp.tasks.prompts import pad
from mechinterp.tasks.run import rows_at_once

NEEDLE, HAYSTACK = 8, 96  # tokens


def needles(model: TransformerBridge, n: int, seed: int) -> tuple[Prompts, list[int]]:
    """Return prompts that end with a needle from their middle, and where it began.

    Different random tokens; ``NEEDLE`` of them in a row stand once more at the end.

    Raises:
        ValueError: The context or the vocabulary is too small for a haystack.
    """
    context, words = model.cfg.n_ctx - NEEDLE - 1, len(ordinary_ids(model))
    room = min(HAYSTACK, context, words)
    if room <= 2 * NEEDLE:
        least = 2 * NEEDLE + 1
        raise ValueError(
            f"retrieval hides {NEEDLE} tokens among at least {least} different ones and asks "
            f"for them again: it needs a context of {least + NEEDLE + 1} tokens and a "
            f"vocabulary of {least}, but this model has {model.cfg.n_ctx} and {words}. Leave "
            "kind 'retrieval' out."
        )
    plain = repeated_tokens(model, n, room, copies=1, distinct=True, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    before = plain.tokens.shape[1] - room
    starts = (torch.randint(room - 2 * NEEDLE, (n,), generator=generator) + before).tolist()
    rows = [
        [*row, *row[start : start + NEEDLE]]
        for row, start in zip(plain.tokens.tolist(), starts, strict=True)
    ]
    return pad(rows, bos=plain.bos), starts


@torch.no_grad()
def retrieval(
    model: TransformerBridge, prompts: Prompts, starts: list[int]
) -> Float[np.ndarray, "prompt layer head"]:
    """Return the share of a needle's tokens that each head retrieves.

    The needle's tokens after the first are given one by one. A head retrieves one when the
    model's first guess is right and the head's strongest key is that very token in the needle.

    Source: Wu et al. 2024, arXiv:2404.15574 (retrieval score), here with random tokens, whose
    needle nothing but its beginning can bring back.
    """
    layers = site_layers(model, "pattern")
    widths = {layer: len(model.blocks[layer].attn.W_O) for layer in layers}
    n, end = len(prompts), prompts.tokens.shape[1]
    queries = torch.arange(end - NEEDLE, end - 1)
    next_keys = torch.tensor(starts)[:, None] + torch.arange(1, NEEDLE)
    looks = np.full((n, len(layers), max(widths.values()), NEEDLE - 1), np.nan)
    right = np.zeros((n, NEEDLE - 1))
    each = rows_at_once(model, end, 16)
    for start in range(0, n, each):
        rows = slice(start, min(start + each, n))

        def see(own: Tensor, at: int, layer: int, rows: slice) -> None:
            strongest = own[:, :, queries].argmax(-1).cpu()
            looks[rows, at, : widths[layer]] = strongest == next_keys[rows, None]

        put = [
            (("pattern", layer), lambda own, a=at, b=layer, c=rows: see(own, a, b, c))
            for at, layer in enumerate(layers)
        ]
        _, logits = observe(model, prompts, rows, [], put=put)
        guess = logits[:, queries].argmax(-1).cpu()
        right[rows] = guess == prompts.tokens[rows][:, queries + 1]
    return (looks * right[:, None, None]).mean(-1)
