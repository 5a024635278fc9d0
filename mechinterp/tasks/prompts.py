"""Prompts as the model sees them: right-padded token ids with a mask.

Strings are tokenised in one place, under one rule for the beginning of sequence (BOS): they
get the tokenizer's own special tokens; if it adds none and has a BOS, one is prepended unless
the text starts with it. Token input is never changed. Which of these happened is recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models import tokenizer_of

BOS = Literal["given", "tokenizer", "prepended", "none"]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token ids of several prompts, right-padded, with a mask of the real ones.

    ``text`` holds the strings they came from, if they did. ``bos`` says what stands first:
    ``"given"`` tokens that were not touched, special tokens that the ``"tokenizer"`` added, a
    BOS that was ``"prepended"``, or ``"none"``.

    Raises:
        ValueError: The shapes differ, the padding is not on the right, or a prompt is empty.
    """

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    text: tuple[str, ...] | None
    bos: BOS

    def __post_init__(self) -> None:
        if self.tokens.shape != self.mask.shape:
            raise ValueError(
                f"tokens have shape {tuple(self.tokens.shape)} but the mask "
                f"{tuple(self.mask.shape)}. Pass two tensors [prompt, pos]."
            )
        if len(self) == 0:
            raise ValueError("there are no prompts. Pass at least one.")
        if not bool(self.mask.any(1).all()):
            empty = (~self.mask.any(1)).nonzero()[0].item()
            raise ValueError(f"prompt {empty} is empty. Pass prompts of at least one token.")
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()):
            raise ValueError("the padding is not on the right. Pad after each prompt's end.")

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Number of tokens of each prompt, padding not counted."""
        return self.mask.sum(1)

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of each prompt, without padding."""
        return [
            row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> "Prompts":
        """Return some of the prompts, padded no further than the longest of them."""
        index, rows = choose(chosen, len(self)), self.rows
        text = self.text and [self.text[i] for i in index]
        return pad([rows[i] for i in index], text, self.bos)


def choose(chosen: int | slice | Sequence[int], n: int) -> list[int]:
    """Return the indices that ``chosen`` means among ``n`` prompts.

    Raises:
        IndexError: An index lies outside.
        ValueError: None is chosen.
    """
    listed = [chosen] if isinstance(chosen, int) else chosen
    index = (
        list(range(n)[listed]) if isinstance(listed, slice) else [range(n)[i] for i in listed]
    )
    if not index:
        raise ValueError(f"{chosen!r} chooses none of the {n} prompts. Choose at least one.")
    return index


def pad(
    rows: Sequence[Sequence[int]], text: Sequence[str] | None = None, bos: BOS = "given"
) -> Prompts:
    """Return prompts from lists of token ids, padded on the right.

    The padding id is 0: with the mask it is never read.
    """
    mask = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.bool)
    tokens = torch.zeros_like(mask, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return Prompts(tokens, mask, tuple(text) if text else None, bos)


def as_prompts(
    model: TransformerBridge, prompts: Any, *, prepend_bos: bool | None = None
) -> Prompts:
    """Return ``prompts`` as this model's token ids.

    Args:
        model: The model that will read them.
        prompts: A string or several, a tensor of token ids ``[pos]`` or ``[prompt, pos]``,
            lists of token ids (of any lengths), :class:`Prompts`, or data that has them
            (a ``Task``'s clean prompts, a ``Text``'s documents).
        prepend_bos: For strings: ``True`` puts a BOS first (never a second one), ``False``
            adds no special token at all, ``None`` follows the rule above.

    Raises:
        ValueError: There is no prompt, one is empty or longer than the model's context, an id
            is outside its vocabulary, or strings are given to a model without tokenizer.
        TypeError: ``prompts`` is nothing of the above, or ``prepend_bos=True`` for tokens.
    """
    ready = [prompts, getattr(prompts, "clean", None), getattr(prompts, "prompts", None)]
    if given := [each for each in ready if isinstance(each, Prompts)]:
        made = given[0]
    elif texts := _as_strings(prompts):
        rows, _, bos = encode(model, texts, prepend_bos=prepend_bos)
        made = pad(rows, texts, bos)
    else:
        if prepend_bos:
            raise TypeError(
                "prepend_bos=True is for strings; token input is never changed. "
                "Put the BOS id first yourself."
            )
        made = pad(_as_rows(prompts))
    _check_fits(model, made)
    return made


def encode(
    model: TransformerBridge, texts: Sequence[str], *, prepend_bos: bool | None = None
) -> tuple[list[list[int]], list[list[tuple[int, int]]] | None, BOS]:
    """Return token ids per text, their character spans, and where the first token came from.

    Special tokens span no characters. The spans are ``None`` for a tokenizer that is not a
    fast one, since it does not report them.

    Raises:
        ValueError: The model has no tokenizer, or a BOS is asked for and it has none.
    """
    if not texts:
        raise ValueError("there are no prompts. Pass at least one.")
    tokenizer = require_tokenizer(model)
    bos_id = tokenizer.bos_token_id
    own = _tokenise(tokenizer, texts, special=True)
    bare = _tokenise(tokenizer, texts, special=False)
    adds = any(a != b for a, b in zip(own[0], bare[0], strict=True))
    if prepend_bos and bos_id is None and not adds:
        raise ValueError("prepend_bos=True, but this tokenizer has no BOS token. Leave it out.")
    if prepend_bos is False:
        return *bare, "none"
    if adds:
        return *_without_double(own, bos_id), "tokenizer"
    if bos_id is None:
        return *bare, "none"
    missing = [not row or row[0] != bos_id for row in bare[0]]
    rows = [[bos_id] * lacks + row for lacks, row in zip(missing, bare[0], strict=True)]
    spans = bare[1] and [
        [(0, 0)] * lacks + row for lacks, row in zip(missing, bare[1], strict=True)
    ]
    return rows, spans, "prepended" if any(missing) else "given"


def token_strings(model: TransformerBridge, tokens: Sequence[int]) -> list[str]:
    """Return each token as text, or its id where the model has no tokenizer."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        return [str(token) for token in tokens]
    return [str(tokenizer.decode([token])) for token in tokens]


def token_texts(model: TransformerBridge, ids: np.ndarray) -> np.ndarray:
    """Return each id as text, empty for -1; netCDF cannot hold a null character."""
    known = [int(each) for each in np.unique(ids) if each >= 0]
    words = dict(zip(known, token_strings(model, known), strict=True)) | {-1: ""}
    texts = [words[int(each)].replace("\0", "␀") for each in ids.flat]
    return np.array(texts, dtype=str).reshape(ids.shape)


Encoded = tuple[list[list[int]], list[list[tuple[int, int]]] | None]


def require_tokenizer(model: TransformerBridge) -> Any:
    """Return the model's tokenizer, or say what to do without one."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so it cannot read strings. Pass token ids, or load "
            "the model with mi.load_model(..., tokenizer=...)."
        )
    return tokenizer


def _tokenise(tokenizer: Any, texts: Sequence[str], *, special: bool) -> Encoded:
    fast = bool(tokenizer.is_fast)
    out = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_offsets_mapping=fast,
        verbose=False,
    )
    spans = [[tuple(span) for span in row] for row in out["offset_mapping"]] if fast else None
    return [list(row) for row in out["input_ids"]], spans


def _without_double(encoded: Encoded, bos_id: int | None) -> Encoded:
    """Drop the added BOS of texts that start with one already."""
    rows, spans = encoded
    extra = [int(bos_id is not None and row[:2] == [bos_id, bos_id]) for row in rows]
    cut = [row[n:] for row, n in zip(rows, extra, strict=True)]
    return cut, spans and [row[n:] for row, n in zip(spans, extra, strict=True)]


def _as_strings(prompts: Any) -> list[str]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        return []
    texts = [each for each in prompts if isinstance(each, str)]
    if texts and len(texts) < len(prompts):
        raise TypeError("prompts mix strings and tokens. Pass one or the other.")
    return texts


def _as_rows(prompts: Any) -> list[list[int]]:
    """Return lists of token ids from tensors, arrays or (nested) sequences of integers."""
    listed = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(listed, Sequence) and not isinstance(listed, bytes):
        rows = [each.tolist() if hasattr(each, "tolist") else each for each in listed]
        if rows and not any(isinstance(row, Sequence) for row in rows):
            rows = [rows]
        if all(isinstance(row, Sequence) and all(map(_is_id, row)) for row in rows):
            return [list(row) for row in rows]
    raise TypeError(
        f"prompts cannot be of type {type(prompts).__name__}. Pass strings, token ids (a list "
        "or an integer tensor, [pos] or [prompt, pos]), Prompts, a Task or a Text."
    )


def _is_id(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool)


def _check_fits(model: TransformerBridge, prompts: Prompts) -> None:
    d_vocab, n_ctx = model.cfg.d_vocab, model.cfg.n_ctx
    outside = prompts.mask & ((prompts.tokens < 0) | (prompts.tokens >= d_vocab))
    if bool(outside.any()):
        prompt, pos = outside.nonzero()[0].tolist()
        raise ValueError(
            f"token id {int(prompts.tokens[prompt, pos])} at position {pos} of prompt {prompt} "
            f"does not exist: this model's vocabulary has ids 0..{d_vocab - 1}."
        )
    longest = int(prompts.lengths.argmax())
    if (length := int(prompts.lengths[longest])) > n_ctx:
        raise ValueError(
            f"prompt {longest} has {length} tokens, but this model's context holds {n_ctx}. "
            "Shorten it."
        )
