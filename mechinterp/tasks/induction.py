"""Random tokens that repeat: the task of induction heads, and prompts for finding them."""

from collections.abc import Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models import is_causal, tokenizer_of
from mechinterp.tasks.prompts import BOS, Prompts, as_prompts, pad
from mechinterp.tasks.task import Task


def induction(
    model: TransformerBridge,
    n: int | None,
    seed: int,
    *,
    segment: int = 16,
    repeated: int = 8,
) -> Task:
    """Random tokens, then their beginning again: the next token is the one that came before.

    A prompt is a BOS (where there is one), ``segment`` different random tokens, and the first
    ``repeated`` of them once more. The answer is the token that followed the last one's
    earlier occurrence. In the corrupted prompt another token of the segment, the distractor,
    has taken its place; both occur in the clean prompt, so that only their order tells.

    Roles: ``current`` (the earlier occurrence of the last token), ``successor`` (the token
    after it), ``end``. Needs no tokenizer. ``n`` is 64 unless given.

    Source: Olsson et al. 2022, arXiv:2209.11895 (repeated random tokens).
    """
    n = 64 if n is None else n
    ids = ordinary_ids(model)
    if not 0 < repeated <= segment - 2:
        raise ValueError(
            f"segment={segment} and repeated={repeated} leave no distractor. "
            "Pass 0 < repeated <= segment - 2."
        )
    if n < 1 or segment > len(ids):
        raise ValueError(
            f"n={n} prompts with {segment} different tokens cannot be drawn from {len(ids)} "
            "ordinary ones. Pass n >= 1 and a smaller segment."
        )
    generator = torch.Generator().manual_seed(seed)
    first, bos = _beginning(model)
    mask = [] if is_causal(model) else _mask(model)
    clean, corrupted, answers, distractors = [], [], [], []
    for _ in range(n):
        drawn = torch.randperm(len(ids), generator=generator)[:segment].tolist()
        tokens = [ids[i] for i in drawn]
        other = int(torch.randint(repeated + 1, segment, (), generator=generator))
        again = tokens[:repeated] + mask
        clean.append([*first, *tokens, *again])
        corrupted.append(
            [*first, *tokens[:repeated], tokens[other], *tokens[repeated + 1 :], *again]
        )
        answers.append(tokens[repeated])
        distractors.append(tokens[other])
    current = len(first) + repeated - 1
    return Task.from_tokens(
        model,
        clean=pad(clean, bos=bos),
        corrupted=pad(corrupted, bos=bos),
        answers=answers,
        distractors=distractors,
        roles={"current": (current, current + 1), "successor": (current + 1, current + 2)},
        name="induction",
    )


def repeated_tokens(
    model: TransformerBridge,
    n: int,
    length: int,
    *,
    copies: int = 2,
    distinct: bool = False,
    start: Sequence[int] | None = None,
    seed: int = 0,
) -> Prompts:
    """Return prompts of ``length`` random tokens, ``copies`` times over, after a BOS.

    The tokens are drawn independently among those that are not special; with ``distinct``, no
    token occurs twice in a copy. A model without a BOS gets none. With ``start``, these tokens
    stand there instead, and none of them is drawn.

    Args:
        model: Says which tokens there are.
        n: How many prompts.
        length: Tokens of a copy.
        copies: How often the tokens stand there.
        distinct: No token twice in a copy.
        start: Token ids that stand before the first copy.
        seed: Of the draws.

    Raises:
        ValueError: A number is not positive, the prompts do not fit the context, or the
            vocabulary is too small for so many different tokens.
    """
    if min(n, length, copies) < 1:
        raise ValueError(f"n={n}, length={length} and copies={copies} must all be at least 1.")
    first, bos = _beginning(model)
    if start is not None:
        first, bos = list(start), "prepended" if start else "none"
    ids = torch.tensor([i for i in ordinary_ids(model) if i not in set(start or ())])
    if distinct and length > len(ids):
        raise ValueError(
            f"{length} different tokens cannot be drawn from the {len(ids)} ordinary ones of "
            f"this vocabulary. Pass length={len(ids)} or less."
        )
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        drawn = torch.stack([torch.randperm(len(ids), generator=generator) for _ in range(n)])
        drawn = drawn[:, :length]
    else:
        drawn = torch.randint(len(ids), (n, length), generator=generator)
    rows = ids[drawn].tolist()
    return as_prompts(model, pad([[*first, *row * copies] for row in rows], bos=bos))


def ordinary_ids(model: TransformerBridge) -> list[int]:
    """Return the ids of the vocabulary that are no special tokens."""
    tokenizer = tokenizer_of(model)
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    return [i for i in range(model.cfg.d_vocab) if i not in special]


def _beginning(model: TransformerBridge) -> tuple[list[int], BOS]:
    """Return the tokens that open a text for this model, if any."""
    tokenizer = tokenizer_of(model)
    for name in ("bos_token_id", "cls_token_id"):
        opening = getattr(tokenizer, name, None)
        if opening is not None:
            return [opening], "prepended"
    return [], "none"


def _mask(model: TransformerBridge) -> list[int]:
    mask_id = getattr(tokenizer_of(model), "mask_token_id", None)
    return [] if mask_id is None else [mask_id]
