"""What a head does to words: name movers, and successors, by its OV circuit alone.

A word's effective embedding, the residual stream behind the first layer, goes through the norm
before a head, its values and its output, then the final norm and the unembedding, as if the
head attended to that word and nothing else reached the end.
"""

from collections.abc import Iterator
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
from mechinterp.tasks import Prompts, load_task
from mechinterp.tasks.answers import single_tokens
from mechinterp.tasks.prompts import as_prompts
from mechinterp.weights import head_weights

TOP = 5  # Wang et al.: a name is copied when it is among the first five
_PAIRS = 2
_NAMES = ("io", "first_subject", "subject")
_WORDS = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November "
    "December",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "digits": "1 2 3 4 5 6 7 8 9",
    "letters": " ".join(ascii_uppercase),
}
SEQUENCES = {name: tuple(words.split()) for name, words in _WORDS.items()}


@torch.no_grad()
def name_movers(
    model: TransformerBridge, n: int, seed: int
) -> dict[str, Float[np.ndarray, "prompt layer head"]]:
    """Return the share of a prompt's names that each head copies, and that it un-copies.

    On prompts of indirect object identification: a name is copied when it is among the five
    highest logits that the head's OV circuit makes of it; ``negative_name_mover`` asks the same
    of minus the head's output. NaN for heads of the first layer, which precede the embedding.

    Source: Wang et al. 2022, arXiv:2211.00593, section 3.1 and appendix (copy score).
    """
    every = load_task("ioi", model, seed=seed)
    task = every[: min(n, len(every))]
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


@torch.no_grad()
def successors(
    model: TransformerBridge,
) -> tuple[list[str], Float[np.ndarray, "word layer head"]]:
    """Return the words that have a successor, and whether each head makes it of them.

    1 where the successor has the highest logit among the words of its sequence (days, months,
    numbers, ordinals, digits, letters; those that are single tokens here), else 0.

    Source: Gould et al. 2023, arXiv:2312.09230 (succession by effective embeddings).

    Raises:
        ValueError: No sequence has three words in a row that are single tokens.
    """
    usable = []
    for name, sequence in SEQUENCES.items():
        known = single_tokens(model, [f" {word}" for word in sequence])
        ids = [known.get(f" {word}") for word in sequence]
        pairs = [i for i in range(len(ids) - 1) if None not in (ids[i], ids[i + 1])]
        if len(pairs) >= _PAIRS:
            usable.append((name, sequence, ids, pairs))
    if not usable:
        raise ValueError(
            "no sequence of days, months, numbers or letters has three words in a row that are "
            "single tokens here, so successors cannot be scored. Leave kind 'successor' out."
        )
    labels, scores = [], []
    for _, sequence, ids, pairs in usable:
        words = [ids[i] for i in pairs]
        prompts = as_prompts(model, [f" {sequence[i]}" for i in pairs])
        acts = HookManager(model).capture(prompts, "resid_post", layers=0, positions=[-1])
        among = torch.tensor([each for each in ids if each is not None])
        right = torch.tensor([ids[i + 1] for i in pairs])
        assert all(row[-1] == word for row, word in zip(_ends(prompts), words, strict=True))
        logits = head_logits(model, acts["resid_post", 0][:, 0], 1.0, among)
        best = np.stack([(among[each.argmax(-1)] == right).float() for each in logits])
        scores.append(best.transpose(2, 0, 1))
        labels += [sequence[i] for i in pairs]
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


def _ends(prompts: Prompts) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(prompts.tokens, prompts.mask, strict=True)]
