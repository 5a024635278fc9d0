"""The induction dossier: everything that makes an induction head, in one account."""

from collections.abc import Sequence

from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.paths import path_patching
from mechinterp.heads.composition import composition
from mechinterp.heads.copies import lost_prefix, second_copy
from mechinterp.heads.dossier_account import InductionDossier
from mechinterp.heads.dossier_table import heads_that
from mechinterp.heads.icl import icl_score, pieces
from mechinterp.heads.knockout import knock_out
from mechinterp.heads.scores import head_scores
from mechinterp.heads.scores_result import HeadScores
from mechinterp.models import is_causal
from mechinterp.nulls import Head, random_heads, resolved_heads
from mechinterp.sites import key_heads, n_heads, site_layers
from mechinterp.tasks import Text, as_data, repeated_tokens

_KINDS = ("induction", "previous_token", "copying", "ov_copying", "anti_induction")
_COPIES = 4  # of the random tokens that heads are scored on
_UNTRAINED = 8  # heads, at least, to compare with


def induction_dossier(
    model: TransformerBridge,
    *,
    heads: Sequence[Head] | None = None,
    k: int = 5,
    least: float = 0.1,
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
        heads: The candidates, as pairs (layer, head). Default: up to ``k`` of the heads that
            match prefixes, those that copy first, each by prefix matching; at most a quarter
            of a layer's heads, so that random sets can differ. Where no head matches prefixes,
            the ``k`` nearest to it, and the account says so.
        k: How many candidates.
        least: A head matches prefixes if its attention to what followed is at least so much
            above the mean of untrained heads, and significantly so (Holm over all heads). The
            same for heads that attend to the token before.
        n: Draws of random tokens for the scores.
        length: Different tokens of a draw, at least 3.
        n_sets: Different random sets of heads.
        n_prompts: Prompts of the knock-outs and paths, at least 2.
        nulls: Untrained models to compare with; more where they have fewer than 8 heads.
        text: Running text for ``mi.icl_score``; without it that part is left out.
        late: Which token is late for that score.
        early: Which is early.
        seed: Of all that is drawn.

    Returns:
        The account; every part of it is a result of its own.

    Raises:
        TypeError: ``text`` is no ``Text``.
        ValueError: A number is too small; a head does not exist or is named twice, or too few
            others are in its layer; the vocabulary is too small for ``length`` different
            tokens, or the context for four copies; the text is too short; the model sees both
            sides. All before any forward pass.

    Source: Olsson et al. 2022, arXiv:2209.11895; Elhage et al. 2021.
    """
    _check(model, k, least, n, length, n_sets, n_prompts, nulls)
    given = None if heads is None else resolved_heads(model, heads)
    if given is not None:
        random_heads(model, given, 1)  # raises where nothing matches them
    repeated_tokens(model, 1, length, copies=_COPIES, distinct=True)  # raises if too long
    task = second_copy(model, n_prompts, length, seed + 1)
    pairs = lost_prefix(model, n_prompts, min(16, length), seed + 1)
    copies = repeated_tokens(model, n_prompts, length, distinct=True, seed=seed + 2)
    if text is not None:
        pieces(model, as_data(text, (Text,), "icl_score"), late=late, early=early, start=None)

    icl = None if text is None else icl_score(model, text, late=late, early=early)
    every = sum(n_heads(model, "z", layer) for layer in site_layers(model, "z"))
    untrained = max(nulls, -(-_UNTRAINED // every))
    scores = head_scores(
        model,
        kinds=list(_KINDS),
        n=n,
        length=length,
        copies=_COPIES,
        nulls=untrained,
        seed=seed,
    )
    matching = heads_that(scores, "induction", least)
    candidates = given or _candidates(model, scores, matching, k)
    composed = composition(model)
    lost = knock_out(model, task, candidates, n_sets=n_sets, seed=seed)
    first = site_layers(model, "z")[0]
    receivers = {
        f"{layer}.{head}": _key_of(model, layer, head)
        for layer, head in candidates
        if layer > first
    }
    together = {"all": sorted(set(receivers.values()))} if len(receivers) > 1 else {}
    paths = path_patching(model, pairs, receivers | together) if receivers else None
    loss = Text(task.name, copies, tuple(range(n_prompts)), copies.tokens.shape[1]).loss(model)
    chosen = "given" if given else "matching" if matching else "nearest"
    return InductionDossier(
        scores=scores,
        composition=composed,
        knock_out=lost,
        paths=paths,
        loss=loss[:, -2 * length :],
        icl=icl,
        candidates=tuple(candidates),
        settings={
            "chosen": chosen,
            "least": least,
            "k": k,
            "n": n,
            "length": length,
            "n_sets": n_sets,
            "n_prompts": n_prompts,
            "nulls": untrained,
            "seed": seed,
        },
    )


def _check(
    model: TransformerBridge,
    k: int,
    least: float,
    n: int,
    length: int,
    n_sets: int,
    n_prompts: int,
    nulls: int,
) -> None:
    asked = {
        "k": (k, 1, "no candidate"),
        "n": (n, 1, "no random tokens"),
        "length": (length, 3, "too few tokens to look back among"),
        "n_sets": (n_sets, 1, "nothing to compare with"),
        "n_prompts": (n_prompts, 2, "no intervals"),
        "nulls": (nulls, 1, "no untrained heads to compare with"),
    }
    for name, (value, smallest, why) in asked.items():
        if value < smallest:
            raise ValueError(f"{name}={value} leaves {why}. Pass at least {smallest}.")
    if not 0 <= least < 1:
        raise ValueError(f"least={least} is no share of attention. Pass 0 to 1, such as 0.1.")
    if not is_causal(model):
        raise ValueError(
            "induction is predicting what comes next, but this model sees both sides of a "
            "token. Use a causal language model."
        )
    if all(n_heads(model, "z", layer) < 2 for layer in site_layers(model, "z")):
        raise ValueError(
            "no layer has a second head to match a candidate with. Use a model that has."
        )


def _candidates(
    model: TransformerBridge, scores: HeadScores, matching: Sequence[Head], k: int
) -> list[Head]:
    """Return the matching heads, or else the nearest; at most a quarter of a layer's."""
    copying = set(heads_that(scores, "copying", 0.0))
    first = sorted(matching, key=lambda head: head not in copying)  # keeps their order
    chosen: list[Head] = []
    for layer, head in first or scores.ranked("induction"):
        there, heads = sum(at == layer for at, _ in chosen), n_heads(model, "z", layer)
        if heads > 1 and there < max(1, heads // 4) and len(chosen) < k:
            chosen.append((layer, head))
    return chosen


def _key_of(model: TransformerBridge, layer: int, head: int) -> str:
    """Return the node of the keys that a query head uses."""
    return f"{layer}.{key_heads(model, layer)[head]}.k"
