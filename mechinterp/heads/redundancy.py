"""The redundancy atlas: for every pair of heads, four views of how far one is the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.engine.calls import MEASURED, Memory
from mechinterp.heads.interaction import (
    Interactions,
    MetricSpec,
    Pair,
    check_measurable,
    interactions,
)
from mechinterp.heads.redundancy_distance import FLAGGING, UNITS, distances
from mechinterp.heads.redundancy_result import RedundancyAtlas
from mechinterp.heads.redundancy_stream import considered, sampled, watch
from mechinterp.heads.subspaces import overlaps
from mechinterp.lens.states import budget_of
from mechinterp.models import fingerprint, is_causal
from mechinterp.names import unknown
from mechinterp.nulls import Head
from mechinterp.record import Data, convention_of
from mechinterp.sites import key_heads, n_heads, resolve_heads, site_layers
from mechinterp.tasks import Labelled, Prompts, Task, Text, as_data

QUERIES = 512
SMALL = 40  # heads: up to so many, the interaction of all pairs is measured
Pairs = str | Sequence[Pair]


def redundancy_atlas(
    model: TransformerBridge,
    data: Any,
    *,
    queries: int | None = None,
    task: Any = None,
    pairs: Pairs | None = None,
    flag: int = 50,
    kind: str = "zero",
    metric: MetricSpec = None,
    seed: int = 0,
    memory: Memory = None,
) -> RedundancyAtlas:
    """Compare every pair of heads in what they attend to, write, read and are worth together.

    - ``js``: Jensen-Shannon divergence of their attention, in bits, mean over sampled queries.
      0: the same patterns; 1: no key is attended to by both. (Clark et al. 2019,
      arXiv:1906.04341, cluster heads by it.)
    - ``cka``: linear CKA of their outputs ``z @ W_O`` over tokens, centred. 1: the same up to
      rotation and scale; 0: uncorrelated. With hardly more tokens than ``d_head`` it is high
      for any two heads. (Kornblith et al. 2019, arXiv:1905.00414.)
    - ``cosine``: of the outputs, mean over tokens. 1: the same direction, -1: they cancel.
    - ``read_q``, ``read_k``, ``read_v``, ``write``: ``‖U_a.T U_b‖² / d_head`` of the subspaces
      that ``W_Q``, ``W_K``, ``W_V`` and ``W_O`` span in the residual stream. 1: the same, 0:
      orthogonal; ``d_head / d_model`` is expected of random ones, and reported beside it.
      Heads that share keys and values have 1 for ``read_k`` and ``read_v`` by construction.
    - ``interaction``: ``Δ(a, b) - Δ(a) - Δ(b)``, where Δ is the metric with heads ablated less
      the metric without. 0: they are worth the same apart and together. For a metric of which
      more is better, negative: each stands in for the other; positive: they work in series,
      so that without one the other is worth less. For a loss it is the other way round.

    In a causal model the first position is left out: there every head has one key. Behind a
    norm of attention's output (Gemma), outputs are taken with its gain but not its scale;
    behind a norm of the sum (BERT), before that norm. Text is read as a stream: memory does
    not grow with its length.

    Args:
        model: Left as it was. Layers may have different numbers of heads.
        data: A ``Text``, ``Task`` (its clean prompts), ``Labelled`` or ``Prompts``.
        queries: How many query positions divergence is averaged over, drawn under ``seed``.
            Default: 512, or all if there are fewer.
        task: Where interaction is measured: a ``Task``, or a ``Text`` or ``Labelled`` texts by
            their loss. Default: ``data`` itself, if it is a task or pairs are asked for.
        pairs: Whose interaction is measured: ``"all"``, the ``"flagged"``, ``"none"``, or
            pairs of heads ``((layer, head), (layer, head))``. Default: all pairs of up to 40
            heads, else the flagged, and none without a task.
        flag: A pair is flagged if it is among so many that are most alike by ``js``, ``cka``,
            size of ``cosine``, ``read_q`` or ``write``.
        kind: What takes the place of an ablated ``z``, as in ``mi.head_ablation``; means and
            resamples are over the data that interaction is measured on.
        metric: Of the interaction, as in ``mi.activation_patching``; the task's by default.
        seed: Of the sampled queries.
        memory: Bytes, or a size such as ``"2GB"``, to take beside the model; at most 4 GB by
            default. With little of it, prompts are read several times.

    Returns:
        The views above with the axes ``head_a`` and ``head_b``, and ``redundancy``, which
        combines them: 1 for heads identical in all, 0 for an average pair.

    Raises:
        TypeError: ``data`` or ``task`` is of another kind.
        ValueError: There is a single head; fewer queries or tokens than it takes; an unknown
            kind, metric, head or choice of pairs; interaction without a task; too little
            memory. Before any forward pass.
    """
    about, prompts = _about(data)
    layers = [i for i in site_layers(model, "z") if n_heads(model, "z", i) > 0]
    heads = [(i, head) for i in layers for head in range(n_heads(model, "z", i))]
    if len(heads) < 2:
        raise ValueError(
            f"redundancy is between heads, but this model has {len(heads)}. Use a model with "
            "at least two."
        )
    there = considered(model, prompts)
    n = _n_queries(queries, int(there.sum()))
    judge = _judge(data, task, pairs)
    if judge is not None:
        check_measurable(model, kind, metric, judge)
    chosen = _chosen(model, pairs, judge, heads)
    if flag < 1:
        raise ValueError(f"flag={flag} flags nothing. Pass at least 1.")
    budget = budget_of(model, memory)
    seen = watch(model, prompts, layers, sampled(there, n, seed), budget)
    views: dict[str, Any] = {"js": seen.js, "cka": seen.cka, "cosine": seen.cosine}
    extra: dict[str, Any] = {}
    with torch.no_grad():
        for side, found in overlaps(model, layers).items():
            views[side] = found.overlap.cpu().numpy()
            extra[f"{side}_expected"] = found.expected.cpu().numpy()
            extra[f"{side}_spread"] = found.spread.cpu().numpy()
    shared = _shared(model, heads)
    atlas = _dataset(heads, views | extra, shared)
    measured = None
    if judge is not None and chosen != []:
        if chosen is None:
            chosen = _flagged(atlas, heads, flag)
        measured = interactions(model, judge, heads, chosen, kind, metric, memory)
        atlas = _with_interactions(atlas, measured, chosen)
    first = "all but the first" if is_causal(model) else "all"
    settings: dict[str, Any] = {
        "queries": n,
        "queries_of": int(there.sum()),
        "tokens": seen.tokens,
        "d_head": int(model.cfg.d_head),
        "positions": first,
        "outputs": "z @ W_O, with the gain of a norm of attention's output, without its scale",
        "subspaces": "gain of the norm before attention in W_Q, W_K and W_V",
        "passes": seen.passes,
    }
    if measured is not None:
        assert judge is not None
        asked = pairs if isinstance(pairs, str) or pairs is None else "given"
        settings |= {
            "interaction_metric": measured.metric,
            "interaction_unit": measured.unit,
            "interaction_on": judge.name,
            "pairs": asked or ("all" if len(heads) <= SMALL else "flagged"),
            "flag": flag,
        }
    units = dict(UNITS) | ({} if measured is None else {"interaction": measured.unit})
    return RedundancyAtlas(
        atlas,
        convention_of(
            "redundancy_atlas",
            model,
            about,
            units,
            fingerprint(model),
            settings,
            seed=seed,
            ablation=None if measured is None else kind,
        ),
    )


def _about(data: Any) -> tuple[Data, Prompts]:
    if isinstance(data, Prompts):
        n, width = data.tokens.shape
        data = Text("prompts", data, tuple(range(n)), width)
    given = as_data(data, accepts=(Text, Task, Labelled), method="redundancy_atlas")
    return given, given.clean if isinstance(given, Task) else given.prompts


def _n_queries(asked: int | None, there: int) -> int:
    """Return how many queries to sample, out of so many."""
    if there < 2:
        raise ValueError(
            "the prompts are too short: heads are compared at positions after the first, and "
            f"there {'is 1' if there else 'are none'}. Pass prompts of several tokens."
        )
    if asked is None:
        return min(QUERIES, there)
    if asked < 1:
        raise ValueError(f"queries={asked} samples nothing. Pass at least 1.")
    if asked > there:
        raise ValueError(
            f"queries={asked}, but the prompts have {there} positions after their first. Pass "
            "fewer, or more text."
        )
    return asked


def _judge(data: Any, task: Any, pairs: Pairs | None) -> Data | None:
    """Return the data that interaction is measured on, None if it is not measured."""
    if task is not None:
        as_data(task, accepts=MEASURED, method="redundancy_atlas(task=...)")
    own = isinstance(data, Task) or (isinstance(data, MEASURED) and pairs is not None)
    judge = task if task is not None else data if own else None
    named = pairs if isinstance(pairs, str) else None
    if named is not None and named not in ("all", "flagged", "none"):
        raise ValueError(unknown("choice of pairs", named, ("all", "flagged", "none")))
    if named == "none":
        return None
    if judge is None and pairs is not None:
        raise ValueError(
            f"interaction is measured on a task, but data is {type(data).__name__}. Pass "
            "task=, such as mi.load_task('ioi', model), or leave pairs out."
        )
    return judge


def _chosen(
    model: TransformerBridge, pairs: Pairs | None, judge: Data | None, heads: list[Head]
) -> list[Pair] | None:
    """Return the pairs to measure; None for those that will be flagged."""
    if judge is None:
        return []
    if pairs is not None and not isinstance(pairs, str):
        asked = [_checked(model, pair) for pair in pairs]
        if twice := [pair for i, pair in enumerate(asked) if pair in asked[:i]]:
            raise ValueError(
                f"the pair {twice[0][0]}, {twice[0][1]} is named twice. Name each once."
            )
        return asked
    if pairs == "all" or (pairs is None and len(heads) <= SMALL):
        return [(a, b) for i, a in enumerate(heads) for b in heads[i + 1 :]]
    return None


def _checked(model: TransformerBridge, pair: Pair) -> Pair:
    """Return a pair in order, or raise a ``ValueError`` that says what is wrong with it."""
    (a, b) = pair
    layers = site_layers(model, "z")
    for layer, head in (a, b):
        if layer not in layers:
            raise ValueError(f"layer {layer} has no heads: those with heads are {layers}.")
        resolve_heads(model, "z", layer, [head])
        if head < 0:
            raise ValueError(f"head ({layer}, {head}): count heads from 0.")
    if tuple(a) == tuple(b):
        raise ValueError(f"the pair {a}, {b} is one head. Pass two different heads.")
    first, second = sorted(((int(a[0]), int(a[1])), (int(b[0]), int(b[1]))))
    return first, second


def _shared(model: TransformerBridge, heads: Sequence[Head]) -> Bool[np.ndarray, "head head"]:
    """Return which heads have their keys and values in common."""
    kv = [(layer, key_heads(model, layer)[head]) for layer, head in heads]
    return np.array([[a == b for b in kv] for a in kv])


def _dataset(
    heads: Sequence[Head], views: dict[str, np.ndarray], shared: np.ndarray
) -> xr.Dataset:
    names = [f"{layer}.{head}" for layer, head in heads]
    arrays: dict[str, Any] = {
        name: (("head_a", "head_b"), values, {"units": UNITS[name]} if name in UNITS else {})
        for name, values in views.items()
    }
    arrays["shared_kv"] = (("head_a", "head_b"), shared)
    coords: dict[str, Any] = {}
    for side in "ab":
        axis = f"head_{side}"
        coords[axis] = (axis, names, {"long_name": "layer.head"})
        coords[f"layer_{side}"] = (axis, [layer for layer, _ in heads])
        coords[f"index_{side}"] = (axis, [head for _, head in heads])
    found = xr.Dataset(arrays, coords)
    alike = 1 - distances(found, "mean")
    return found.assign(
        redundancy=(("head_a", "head_b"), alike, {"units": UNITS["redundancy"]})
    )


def _flagged(atlas: xr.Dataset, heads: Sequence[Head], flag: int) -> list[Pair]:
    """Return the pairs most alike by any view, each once, in order."""
    upper = np.triu_indices(len(heads), 1)
    found: set[tuple[int, int]] = set()
    for view in FLAGGING:
        apart = distances(atlas, view)[upper]
        order = np.argsort(apart, kind="stable")[:flag]
        found |= {(int(upper[0][k]), int(upper[1][k])) for k in order}
    return [(heads[a], heads[b]) for a, b in sorted(found)]


def _with_interactions(
    atlas: xr.Dataset, measured: Interactions, pairs: Sequence[Pair]
) -> xr.Dataset:
    names = [tuple(f"{layer}.{head}" for layer, head in pair) for pair in pairs]
    coords = {
        "prompt": np.arange(len(measured.alone)),
        "head": atlas["head_a"].values,
        "pair": [" + ".join(each) for each in names],
        "of_a": ("pair", [a for a, _ in names]),
        "of_b": ("pair", [b for _, b in names]),
    }
    unit = {"units": measured.unit}
    return atlas.assign(
        alone=(("prompt", "head"), measured.alone, unit),
        together=(("prompt", "pair"), measured.together, unit),
    ).assign_coords(coords)
