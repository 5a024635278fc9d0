"""Scores of heads: which of them look back, repeat, rest, move names, and how surely."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.heads.copying import Unembedding, ov_copying, unembedding_of
from mechinterp.heads.kinds import KINDS, check_kinds
from mechinterp.heads.needle import needles, retrieval
from mechinterp.heads.null import null_p
from mechinterp.heads.patterns import TEMPLATES, Seen
from mechinterp.heads.scores_result import HeadScores, cases_of
from mechinterp.heads.watching import watched
from mechinterp.heads.words import name_movers, successors
from mechinterp.models import fingerprint, is_causal, random_init, tokenizer_of
from mechinterp.record import Data, convention_of
from mechinterp.sites import site_layers
from mechinterp.stats import holm
from mechinterp.tasks import Labelled, Prompts, Task, Text, as_data, repeated_tokens

DEFAULT = (
    "induction",
    "previous_token",
    "duplicate_token",
    "copying",
    "ov_copying",
    "first_token",
    "local",
    "entropy",
    "positional",
)
_NAMED = 30  # prompts with names
_NEEDLES = 20


def head_scores(
    model: TransformerBridge,
    data: Any = None,
    *,
    kinds: str | Sequence[str] | None = None,
    n: int = 50,
    length: int = 25,
    copies: int = 4,
    nulls: int = 1,
    seed: int = 0,
) -> HeadScores:
    """Score every head for what it does, on random tokens or on text, in one pass.

    Without ``data``, by the protocol of Olsson et al. 2022: ``length`` different random tokens
    repeated to ``copies`` after a start token, ``n`` draws. ``induction`` is then their prefix
    matching: the attention to the successors of all earlier occurrences, summed, averaged over
    the second copy and later.

    Args:
        model: Left as it was.
        data: A ``Text``, ``Task`` (its clean prompts) or ``Labelled``; random tokens if None.
        kinds: ``induction``, ``previous_token``, ``duplicate_token`` (other occurrences of the
            same token), ``copying`` (raises the logits of what it attends to; from activations)
            and ``ov_copying`` (from weights), ``anti_induction`` (induction times how far the
            head lowers what it attends to), ``first_token``, ``local`` (up to four away),
            ``entropy``, ``positional`` (strongest key at one distance), ``rare_token`` (on
            data only), ``retrieval``, ``name_mover``, ``negative_name_mover``, ``successor``.
            All that need no words by default. Their modules give formulas and sources.
        n: How many draws of random tokens.
        length: Different tokens of a draw.
        copies: How often they stand there.
        nulls: How many untrained models of the same shape (``mi.random_init``) to compare
            with; 0 leaves p-values out.
        seed: Of draws and untrained models.

    Returns:
        Scores on ``prompt``, ``layer`` and ``head`` (query heads), kind by kind.

    Raises:
        TypeError: ``data`` is of another kind.
        ValueError: An unknown kind, or one that this model or data cannot have: prompts too
            short, a vocabulary too small, no unembedding, no tokenizer. Before any forward
            pass.
    """
    asked = _asked(model, kinds, data)
    prompts, about = _prompts(model, data, n, length, copies, seed)
    counts = None
    if "rare_token" in asked:
        counts = torch.bincount(prompts.tokens[prompts.mask], minlength=model.cfg.d_vocab)
    seen = Seen(prompts.tokens, prompts.mask, is_causal(model), counts)
    _refuse_short(asked, seen)
    runs = [model]
    found = _measured(runs[0], asked, prompts, counts, seed)
    untrained: list[dict[str, np.ndarray]] = []
    for i in progress(range(nulls), nulls, "untrained models"):
        other = random_init(model, seed + i)
        measured = _measured(other, asked, prompts, counts, seed)
        untrained.append({kind: _mean(values) for kind, (values, _) in measured.items()})
    data_arrays = _labelled(model, found, untrained)
    settings = {
        "copies": copies if data is None else None,
        "length": length if data is None else None,
        "untrained_models": nulls,
        "correction": "Holm over the heads of a kind",
    }
    units = {kind: KINDS[kind].unit for kind in asked}
    return HeadScores(
        data_arrays,
        convention_of(
            "head_scores", model, about, units, fingerprint(model), settings, seed=seed
        ),
    )


def _asked(model: TransformerBridge, kinds: str | Sequence[str] | None, data: Any) -> list[str]:
    """Return the kinds to score, once it is clear that the model has them."""
    if kinds is None:
        able = _has_unembedding(model)
        return [k for k in DEFAULT if able or KINDS[k].source == "pattern"]
    asked = check_kinds(kinds if isinstance(kinds, str) else list(kinds))
    if "rare_token" in asked and data is None:
        raise ValueError(
            "rare_token needs text: random tokens are equally rare. Pass data=, such as "
            "mi.Text.from_strings(model, documents)."
        )
    if any(KINDS[kind].source != "pattern" for kind in asked):
        unembedding_of(model)  # raises where there is none
    worded = [kind for kind in asked if KINDS[kind].source == "words"]
    if worded and tokenizer_of(model) is None:
        raise ValueError(f"{worded[0]} needs words, but this model has no tokenizer.")
    if "retrieval" in asked and not is_causal(model):
        raise ValueError("retrieval asks what is next, but this model sees both sides.")
    return asked


def _has_unembedding(model: TransformerBridge) -> bool:
    try:
        unembedding_of(model)
    except ValueError:
        return False
    return True


def _prompts(
    model: TransformerBridge, data: Any, n: int, length: int, copies: int, seed: int
) -> tuple[Prompts, Data]:
    if data is not None:
        given = as_data(data, accepts=(Text, Task, Labelled), method="head_scores")
        return (given.clean if isinstance(given, Task) else given.prompts), given
    if copies < 2:
        raise ValueError(f"copies={copies}: nothing comes again. Pass at least 2.")
    drawn = repeated_tokens(model, n, length, copies=copies, distinct=True, seed=seed)
    name = f"{length} random tokens x {copies}"
    return drawn, Text(name, drawn, tuple(range(n)), drawn.tokens.shape[1])


def _refuse_short(asked: Sequence[str], seen: Seen) -> None:
    """Raise a ``ValueError`` for a kind that no prompt has a query for."""
    for kind in asked:
        if kind in TEMPLATES:
            template, needs = TEMPLATES[kind]
            some = any(
                bool((template(each).any(-1) & each.queries).any())
                for each in seen.one_by_one()
            )
            if not some:
                longest = int(seen.mask.sum(1).max())
                raise ValueError(
                    f"{kind} cannot be scored: it needs {needs}, but no prompt has that (the "
                    f"longest has {longest} tokens). Pass longer prompts, or other kinds."
                )


def _measured(
    model: TransformerBridge,
    asked: Sequence[str],
    prompts: Prompts,
    counts: Int[Tensor, " token"] | None,
    seed: int,
) -> dict[str, tuple[np.ndarray, list[str] | None]]:
    """Return every kind's scores, and the labels of its cases if they are its own."""
    watch = [kind for kind in asked if KINDS[kind].source in ("pattern", "copying")]
    found: dict[str, Any] = {}
    if watch:
        seen = watched(model, prompts, watch, counts)
        found |= {kind: (values, None) for kind, values in seen.items()}
    if "ov_copying" in asked:
        unembedding = Unembedding(model)
        layers = [ov_copying(unembedding, layer) for layer in site_layers(model, "z")]
        found["ov_copying"] = (_padded(layers), None)
    if "retrieval" in asked:
        given, starts = needles(model, _NEEDLES, seed)
        found["retrieval"] = (
            retrieval(model, given, starts),
            [str(i) for i in range(len(starts))],
        )
    named = [kind for kind in asked if kind.endswith("name_mover")]
    if named:
        movers = name_movers(model, _NAMED, seed)
        found |= {k: (movers[k], [str(i) for i in range(len(movers[k]))]) for k in named}
    if "successor" in asked:
        words, values = successors(model)
        found["successor"] = (values, words)
    return {kind: found[kind] for kind in asked}


def _mean(values: np.ndarray) -> Float[np.ndarray, "layer head"]:
    if values.ndim == 2:
        return values
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def _error(values: np.ndarray) -> Float[np.ndarray, "layer head"]:
    """Return the standard error of the mean over prompts; 0 for what has no prompts."""
    if values.ndim == 2:
        return np.zeros_like(values)
    known = np.ma.masked_invalid(values)
    n = np.maximum(known.count(0), 1)
    return (known.std(0, ddof=1) / np.sqrt(n)).filled(0.0)


def _padded(layers: Sequence[Float[Tensor, " _"]]) -> Float[np.ndarray, "layer head"]:
    found = np.full((len(layers), max(map(len, layers))), np.nan)
    for row, own in zip(found, layers, strict=True):
        row[: len(own)] = own.cpu().numpy()
    return found


def _labelled(
    model: TransformerBridge,
    found: dict[str, tuple[np.ndarray, list[str] | None]],
    untrained: Sequence[dict[str, np.ndarray]],
) -> xr.Dataset:
    layers = site_layers(model, "z")
    arrays: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for kind, (values, labels) in found.items():
        dims = ("layer", "head")
        if values.ndim == 3:
            axis = "prompt" if labels is None else cases_of(kind)
            coords[axis] = np.arange(len(values)) if labels is None else np.array(labels)
            dims = (axis, *dims)
        arrays[kind] = (dims, values, {"units": KINDS[kind].unit})
    heads = next(iter(found.values()))[0].shape[-1]
    coords |= {"layer": list(layers), "head": np.arange(heads)}
    if untrained:
        pools = {
            kind: np.concatenate([each[kind].ravel() for each in untrained]) for kind in found
        }
        p = np.stack(
            [
                null_p(_mean(values), _error(values), pools[kind], KINDS[kind].lower_too)
                for kind, (values, _) in found.items()
            ]
        )
        coords["kind"] = list(found)
        arrays["p"] = (("kind", "layer", "head"), p)
        arrays["p_adjusted"] = (("kind", "layer", "head"), np.stack([holm(each) for each in p]))
        arrays["null_mean"] = ("kind", [float(np.nanmean(pools[kind])) for kind in found])
        arrays["null_sd"] = ("kind", [float(np.nanstd(pools[kind], ddof=1)) for kind in found])
    return xr.Dataset(arrays, coords)
