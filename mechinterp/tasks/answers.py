"""Answers and distractors as sets of single tokens.

An answer string is tokenised as it is given (" Mary" with its space), with no special tokens.
Where that is several tokens, what counts is what the string adds to its prompt: tokenizers
that mark the beginning of a text would otherwise split every word.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.tasks.prompts import require_tokenizer, token_strings

Answer = str | int | Sequence[str | int]


def answer_tokens(model: TransformerBridge, answer: str, prompt: str | None) -> list[int]:
    """Return the tokens of an answer, after its prompt where that makes a difference."""
    tokenizer = require_tokenizer(model)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    alone = ids(answer)
    if len(alone) == 1 or prompt is None:
        return alone
    before, after = ids(prompt), ids(prompt + answer)
    return after[len(before) :] if after[: len(before)] == before else alone


def why_not_one_token(model: TransformerBridge, answer: str, prompt: str | None) -> str | None:
    """Return what is wrong with an answer string, or None when it is one known token."""
    tokens = answer_tokens(model, answer, prompt)
    if len(tokens) != 1:
        shown = " ".join(map(repr, token_strings(model, tokens)))
        return f"{answer!r} is {len(tokens)} tokens: {shown}" if tokens else "'' is no token"
    tokenizer = require_tokenizer(model)
    if tokens[0] == tokenizer.unk_token_id and answer != tokenizer.unk_token:
        return f"{answer!r} is not in this tokenizer's vocabulary"
    return None


def token_sets(
    model: TransformerBridge,
    answers: Sequence[Answer],
    prompts: Sequence[str | None],
    *,
    kind: str,
    first_token: bool,
) -> list[list[int]]:
    """Return a set of token ids per prompt, without repeats.

    Args:
        model: Whose tokenizer and vocabulary count.
        answers: One string or token id per prompt, or several.
        prompts: The texts before them, where known.
        kind: ``"answer"`` or ``"distractor"``, for errors.
        first_token: Whether a string of several tokens stands for its first.

    Raises:
        ValueError: The numbers differ, an answer is not one token, or an id is out of range.
    """
    if len(answers) != len(prompts):
        raise ValueError(
            f"there are {len(prompts)} prompts but {len(answers)} {kind}s. Pass one per "
            "prompt, or a list of several where any of them counts."
        )
    return [
        list(
            dict.fromkeys(
                _one(model, each, prompt, i, kind, first_token) for each in _set(given)
            )
        )
        for i, (given, prompt) in enumerate(zip(answers, prompts, strict=True))
    ]


def pad_sets(sets: Sequence[Sequence[int]]) -> Int[Tensor, "prompt n_token"]:
    """Return sets of token ids as one tensor, right-padded with -1."""
    padded = torch.full((len(sets), max(map(len, sets))), -1, dtype=torch.long)
    for i, tokens in enumerate(sets):
        padded[i, : len(tokens)] = torch.tensor(list(tokens), dtype=torch.long)
    return padded


def _set(given: Answer) -> Sequence[str | int]:
    return [given] if isinstance(given, str | int) else given


def _one(
    model: TransformerBridge,
    answer: str | int,
    prompt: str | None,
    index: int,
    kind: str,
    first_token: bool,
) -> int:
    if isinstance(answer, int):
        if 0 <= answer < model.cfg.d_vocab:
            return answer
        raise ValueError(
            f"{kind} {answer} of prompt {index} does not exist: this model's vocabulary has "
            f"ids 0..{model.cfg.d_vocab - 1}."
        )
    tokens = answer_tokens(model, answer, prompt)
    if first_token and len(tokens) > 1:
        return tokens[0]
    if wrong := why_not_one_token(model, answer, prompt):
        raise ValueError(
            f"{kind} of prompt {index}: {wrong}. Choose another (mind its leading space), or "
            "pass first_token=True to compare first tokens."
        )
    return tokens[0]
