"""The induction dossier: everything that makes an induction head, in one account."""

from collections.abc import Sequence

from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.paths import path_patching
from mechinterp.heads.composition import composition
from mechinterp.heads.copies import lost_prefix, second_copy
from mechinterp.heads.dossier_account import InductionDossier
from mechinterp.heads.icl import icl_score
from mechinterp.heads.knockout import knock_out
from mechinterp.heads.scores import head_scores
from mechinterp.heads.scores_result import HeadScores
from mechinterp.nulls import Head
from mechinterp.sites import key_heads, n_heads
from mechinterp.tasks import Text, repeated_tokens

_KINDS = ("induction", "previous_token", "copying", "ov_copying", "anti_induction")


def induction_dossier(
    model: TransformerBridge,
    *,
    heads: Sequence[Head] | None = None,
    k: int = 5,
    n: int = 50,
    length: int = 25,
    n_sets: int = 1000,
    n_prompts: int = 16,
    nulls: int = 1,
    text: Text | None = None,
    late: int = 500,
    early: int = 50,
    seed: int = 0,
) -> InductionDossier:
    """Gather the evidence on a model's induction heads.

    For every head: prefix matching, copying, and whether an untrained model has such heads
    (``mi.head_scores``). For each candidate: the heads whose output its keys read, by weights
    (K-composition) and causally (path patching from every earlier head into its keys, and into
    those of all candidates together, where the token to look behind was taken away), and
    what the second copy loses without it; without all of them, against random sets of heads of
    the same layers. For the model: the loss along two copies of random tokens, and on ``text``
    the in-context-learning score.

    Args:
        model: Left as it was.
        heads: The candidates, as pairs (layer, head). Default: the ``k`` with the highest
            prefix matching among those that no untrained model has: at least half of the best
            one's, and at most a quarter of a layer's heads, so that random sets can differ.
        k: How many candidates.
        n: Draws of random tokens for the scores.
        length: Different tokens of a draw.
        n_sets: Random sets of heads.
        n_prompts: Prompts of the knock-outs and paths.
        nulls: Untrained models to compare with.
        text: Running text for ``mi.icl_score``; without it that part is left out.
        late: Which token is late for that score.
        early: Which is early.
        seed: Of all that is drawn.

    Raises:
        ValueError: A head does not exist, or too few others are in its layer; the vocabulary
            is too small for ``length`` different tokens; the text is too short.

    Source: Olsson et al. 2022, arXiv:2209.11895; Elhage et al. 2021.
    """
    icl = None if text is None else icl_score(model, text, late=late, early=early)
    scores = head_scores(
        model, kinds=list(_KINDS), n=n, length=length, nulls=max(nulls, 1), seed=seed
    )
    candidates = list(heads) if heads is not None else _candidates(model, scores, k)
    composed = composition(model)
    task = second_copy(model, n_prompts, length, seed + 1)
    lost = knock_out(model, task, candidates, n_sets=n_sets, seed=seed)
    pairs = lost_prefix(model, n_prompts, min(16, length), seed + 1)
    receivers = {f"{layer}.{head}": _key_of(model, layer, head) for layer, head in candidates}
    later = {name: node for name, node in receivers.items() if not name.startswith("0.")}
    together = {"all": sorted(set(later.values()))} if len(later) > 1 else {}
    paths = path_patching(model, pairs, later | together) if later else None
    copies = repeated_tokens(model, n_prompts, length, distinct=True, seed=seed + 2)
    loss = Text(task.name, copies, tuple(range(n_prompts)), copies.tokens.shape[1]).loss(model)
    return InductionDossier(
        scores=scores,
        composition=composed,
        knock_out=lost,
        paths=paths,
        loss=loss[:, -2 * length :],
        icl=icl,
        candidates=tuple(candidates),
    )


def _candidates(model: TransformerBridge, scores: HeadScores, k: int) -> list[Head]:
    """Return the best heads by prefix matching, at most a quarter of a layer's (but one)."""
    mean = scores.mean()["induction"]
    best = float(mean.max())
    ranked = scores.found("induction") or scores.ranked("induction")
    chosen: list[Head] = []
    for layer, head in ranked:
        score = float(mean.sel(layer=layer, head=head))
        there = sum(at == layer for at, _ in chosen)
        room = max(1, n_heads(model, "z", layer) // 4)
        if there < room and len(chosen) < k and score >= best / 2:
            chosen.append((layer, head))
    return chosen


def _key_of(model: TransformerBridge, layer: int, head: int) -> str:
    """Return the node of the keys that a query head uses."""
    return f"{layer}.{key_heads(model, layer)[head]}.k"
