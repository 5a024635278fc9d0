"""Answers and distractors as sets of single tokens.

An answer string is tokenised as it is given (" Mary" with its space), with no special tokens.
Where that is several tokens, what counts is what the string adds to its prompt: tokenizers
that mark the beginning of a text would otherwise split every word.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.tasks.prompts import require_tokenizer, token_strings

Answer = str | int | Sequence[str | int]


def answer_tokens(model: TransformerBridge, answer: str, prompt: str | None) -> list[int]:
    """Return the tokens of an answer, after its prompt where that makes a difference."""
    tokenizer = require_tokenizer(model)
    alone = _ids(tokenizer, answer)
    if len(alone) == 1 or prompt is None:
        return alone
    before, after = _ids(tokenizer, prompt), _ids(tokenizer, prompt + answer)
    return after[len(before) :] if after[: len(before)] == before else alone


def one_token(model: TransformerBridge, answer: str, prompt: str | None) -> int:
    """Return the single token of an answer.

    Raises:
        ValueError: It is several tokens, which are shown, none, or not in the vocabulary.
    """
    tokens = answer_tokens(model, answer, prompt)
    if len(tokens) != 1:
        shown = " ".join(map(repr, token_strings(model, tokens)))
        raise ValueError(
            f"{answer!r} is {len(tokens)} tokens: {shown}" if tokens else "'' is no token"
        )
    tokenizer = require_tokenizer(model)
    if tokens[0] == tokenizer.unk_token_id and answer != tokenizer.unk_token:
        raise ValueError(f"{answer!r} is not in this tokenizer's vocabulary")
    return tokens[0]


def single_tokens(model: TransformerBridge, answers: Sequence[str]) -> dict[str, int]:
    """Return those answers that are one known token whatever stands before them."""
    if not answers:
        return {}
    tokenizer = require_tokenizer(model)
    rows = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    return {
        answer: row[0]
        for answer, row in zip(answers, rows, strict=True)
        if len(row) == 1 and row[0] != tokenizer.unk_token_id
    }


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
    if first_token and len(tokens := answer_tokens(model, answer, prompt)) > 1:
        return tokens[0]
    try:
        return one_token(model, answer, prompt)
    except ValueError as wrong:
        raise ValueError(
            f"{kind} of prompt {index}: {wrong}. Choose another (mind its leading space), or "
            "pass first_token=True to compare first tokens."
        ) from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
