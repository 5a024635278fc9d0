"""What a head does to words: name movers, and successors, by its OV circuit alone.

A word's effective embedding, the residual stream behind the first layer, goes through the norm
before a head, its values and its output, then the final norm and the unembedding, as if the
head attended to that word and nothing else reached the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.heads.copying import unembedding_of
from mechinterp.hooks import HookManager
from mechinterp.sites import is_post_norm, key_heads
from mechinterp.tasks import Task
from mechinterp.tasks.answers import single_tokens
from mechinterp.tasks.prompts import as_prompts
from mechinterp.weights import head_weights

TOP = 5  # Wang et al.: a name is copied when it is among the first five
_PAIRS = 2
_NAMES = ("io", "first_subject", "subject")
_SEQUENCES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "1 2 3 4 5 6 7 8 9",
    " ".join(ascii_uppercase),
)


@torch.no_grad()
def name_movers(
    model: TransformerBridge, task: Task
) -> dict[str, Float[np.ndarray, "prompt layer head"]]:
    """Return the share of a prompt's names that each head copies, and that it un-copies.

    ``task`` is of indirect object identification, with its roles. A name is copied when it is
    among the five highest logits that the head's OV circuit makes of it;
    ``negative_name_mover`` asks the same of minus the head's output. NaN for heads of the
    first layer, which precede the embedding.

    Source: Wang et al. 2022, arXiv:2211.00593, section 3.1 and appendix (copy score).
    """
    n = len(task)
    acts = HookManager(model).capture(
        task, "resid_post", layers=0, positions=list(_NAMES), device="cpu"
    )
    places = torch.tensor([[task.roles[role][p][0] for role in _NAMES] for p in range(n)])
    names = task.clean.tokens.gather(1, places)
    words = acts.rows(
        "resid_post", 0, torch.arange(n).repeat_interleave(len(_NAMES)), places.flatten()
    )
    found = {}
    for kind, sign in (("name_mover", 1.0), ("negative_name_mover", -1.0)):
        logits = head_logits(model, words, sign)
        copied = np.stack([_copied(each, names.flatten()) for each in logits])
        found[kind] = copied.reshape(len(copied), -1, n, len(_NAMES)).mean(-1)
        found[kind] = _first_layer_blank(found[kind].transpose(2, 0, 1))
    return found


@dataclass(frozen=True, eq=False)
class Known:
    """A sequence of words as token ids; ``pairs`` are where a word and its next are single."""

    words: tuple[str, ...]
    ids: list[int | None]
    pairs: list[int]


def sequences(model: TransformerBridge) -> list[Known]:
    """Return the sequences (days, months, numbers, ...) that this model's tokens can say.

    Raises:
        ValueError: None has three words in a row that are single tokens.
    """
    usable = []
    for words in map(tuple, map(str.split, _SEQUENCES)):
        known = single_tokens(model, [f" {word}" for word in words])
        ids = [known.get(f" {word}") for word in words]
        pairs = [i for i in range(len(ids) - 1) if None not in (ids[i], ids[i + 1])]
        if len(pairs) >= _PAIRS:
            usable.append(Known(words, ids, pairs))
    if not usable:
        raise ValueError(
            "no sequence of days, months, numbers or letters has three words in a row that are "
            "single tokens here, so successors cannot be scored. Leave kind 'successor' out."
        )
    return usable


@torch.no_grad()
def successors(
    model: TransformerBridge, usable: list[Known]
) -> tuple[list[str], Float[np.ndarray, "word layer head"]]:
    """Return the words that have a successor, and whether each head makes it of them.

    1 where the successor has the highest logit among the words of its sequence (those that are
    single tokens here), else 0.

    Source: Gould et al. 2023, arXiv:2312.09230 (succession by effective embeddings).
    """
    labels, scores = [], []
    for each in usable:
        prompts = as_prompts(model, [f" {each.words[i]}" for i in each.pairs])
        acts = HookManager(model).capture(prompts, "resid_post", layers=0, positions=[-1])
        among = torch.tensor([token for token in each.ids if token is not None])
        right = torch.tensor([each.ids[i + 1] for i in each.pairs])
        assert [row[-1] for row in prompts.rows] == [each.ids[i] for i in each.pairs]
        logits = head_logits(model, acts["resid_post", 0][:, 0], 1.0, among)
        best = np.stack([(among[own.argmax(-1)] == right).float() for own in logits])
        scores.append(best.transpose(2, 0, 1))
        labels += [each.words[i] for i in each.pairs]
    return labels, _first_layer_blank(np.concatenate(scores))


def head_logits(
    model: TransformerBridge,
    words: Float[Tensor, "word d_model"],
    sign: float,
    vocabulary: Int[Tensor, " token"] | None = None,
) -> Iterator[Float[Tensor, "head word token"]]:
    """Yield, layer by layer, the logits that each head's OV circuit makes of the words."""
    W_U = unembedding_of(model)
    b_U = getattr(model, "b_U", None)
    if vocabulary is not None:
        W_U, b_U = W_U[:, vocabulary], None if b_U is None else b_U[vocabulary]
    for layer, each in enumerate(model.blocks):
        block: Any = each
        weights = head_weights(model, layer)
        read = words if is_post_norm(block) else _normed(block, "ln1", words)
        value = einsum(read, weights.W_V, "word m, head m d -> head word d")
        if (b_V := getattr(block.attn, "b_V", None)) is not None:
            value = value + b_V[key_heads(model, layer)][:, None]
        written = _normed(block, "ln1_post", value @ weights.W_O)
        ends = _normed(model, "ln_final", sign * written)
        yield ends @ W_U if b_U is None else ends @ W_U + b_U


def _normed(owner: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(owner, name, None)
    return x if norm is None else norm.original_component(x)


def _copied(
    logits: Float[Tensor, "head word token"], names: Int[Tensor, " word"]
) -> np.ndarray:
    own = logits.gather(2, names[None, :, None].expand(len(logits), -1, 1))
    return ((logits > own).sum(-1) < TOP).float().numpy()


def _first_layer_blank(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    scores[:, 0] = np.nan
    return scores
