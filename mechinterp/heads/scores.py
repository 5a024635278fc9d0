"""Scores of heads: which of them look back, repeat, rest, move names, and how surely."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.engine.calls import Memory
from mechinterp.heads.copying import Unembedding, ov_copying, unembedding_of
from mechinterp.heads.kinds import KINDS, check_kinds
from mechinterp.heads.needle import needles, retrieval
from mechinterp.heads.null import SMALLEST, null_p
from mechinterp.heads.patterns import TEMPLATES, Seen
from mechinterp.heads.scores_result import HeadScores, cases_of
from mechinterp.heads.watching import watched
from mechinterp.heads.words import Known, name_movers, sequences, successors
from mechinterp.models import fingerprint, is_causal, random_init, tokenizer_of
from mechinterp.record import Data, convention_of
from mechinterp.sites import site_layers
from mechinterp.stats import holm
from mechinterp.tasks import Labelled, Prompts, Task, Text, as_data, load_task, repeated_tokens
from mechinterp.tasks.induction import ordinary_ids

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
    memory: Memory = None,
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
            ``entropy``, ``positional`` (strongest key at one distance, as it also is for
            induction heads where tokens repeat at one distance), ``rare_token`` (on data
            only), ``retrieval``, ``name_mover``, ``negative_name_mover``, ``successor``.
            All that need no words by default. Their modules give formulas and sources.
        n: How many draws of random tokens.
        length: Different tokens of a draw.
        copies: How often they stand there.
        nulls: How many untrained models of the same shape (``mi.random_init``) to compare
            with; 0 leaves p-values out.
        seed: Of draws and untrained models.
        memory: Bytes, or a size such as ``"2GB"``, to take beside the model and the untrained
            one; at most 4 GB by default.

    Returns:
        Scores on ``prompt``, ``layer`` and ``head`` (query heads), kind by kind.

    Raises:
        TypeError: ``data`` is of another kind.
        ValueError: An unknown kind, or one that this model or data cannot have: prompts too
            short, a context or vocabulary too small, no unembedding, no tokenizer; a negative
            number of untrained models; ``memory`` too small for one prompt. Before any
            forward pass.

    Source: Olsson et al. 2022, arXiv:2209.11895; the others' stand on the page of methods and
    in the modules of the kinds.
    """
    if nulls < 0:
        raise ValueError(f"nulls={nulls} is no number of untrained models. Pass 0 or more.")
    asked = _asked(model, kinds, data)
    prompts, about = _prompts(model, data, n, length, copies, seed)
    given = _Given.of(model, asked, prompts, seed)
    found = _measured(model, given, memory)
    untrained: list[dict[str, np.ndarray]] = []
    for i in progress(range(nulls), nulls, "untrained models"):
        measured = _measured(random_init(model, seed + i), given, memory)
        untrained.append({kind: _mean(values) for kind, (values, _) in measured.items()})
    data_arrays = _labelled(model, found, untrained)
    settings = {
        "copies": copies if data is None else None,
        "length": length if data is None else None,
        "untrained_models": nulls,
        "correction": "Holm over the heads of a kind",
        "smallest_p": SMALLEST,
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
        raise ValueError(
            f"{worded[0]} needs words, but this model has no tokenizer. "
            "Load it with mi.load_model(..., tokenizer=...)."
        )
    if "retrieval" in asked and not is_causal(model):
        raise ValueError(
            "retrieval asks what is next, but this model sees both sides. Leave that kind out."
        )
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
    room = model.cfg.n_ctx - 1  # of the start token
    if copies * length > room and length <= len(ordinary_ids(model)):
        raise ValueError(
            f"{length} random tokens {copies} times over are {copies * length} tokens, but "
            f"this model's context holds {room} beside the start token. Pass "
            f"length={room // copies} or less, or fewer copies= (at least 2)."
        )
    drawn = repeated_tokens(model, n, length, copies=copies, distinct=True, seed=seed)
    name = f"{length} random tokens x {copies}"
    return drawn, Text(name, drawn, tuple(range(n)), drawn.tokens.shape[1])


@dataclass(frozen=True, eq=False)
class _Given:
    """What the kinds that were asked for are scored on; building it runs no model."""

    kinds: list[str]
    prompts: Prompts
    counts: Int[Tensor, " token"] | None
    needles: tuple[Prompts, list[int]] | None
    names: Task | None
    sequences: list[Known] | None

    @classmethod
    def of(
        cls, model: TransformerBridge, kinds: list[str], prompts: Prompts, seed: int
    ) -> "_Given":
        """Return it, or raise a ``ValueError`` for a kind that cannot be scored."""
        counts = None
        if "rare_token" in kinds:
            counts = torch.bincount(prompts.tokens[prompts.mask], minlength=model.cfg.d_vocab)
        _refuse_short(kinds, Seen(prompts.tokens, prompts.mask, is_causal(model), counts))
        named = any(kind.endswith("name_mover") for kind in kinds)
        return cls(
            kinds,
            prompts,
            counts,
            needles(model, _NEEDLES, seed) if "retrieval" in kinds else None,
            load_task("ioi", model, seed=seed)[:_NAMED] if named else None,
            sequences(model) if "successor" in kinds else None,
        )


def _refuse_short(asked: Sequence[str], seen: Seen) -> None:
    """Raise a ``ValueError`` for a kind that no prompt has a query for."""
    longest = int(seen.mask.sum(1).max())
    for kind in asked:
        template, needs = TEMPLATES.get(kind, (None, "at least 2 tokens"))
        some = longest > 1 or KINDS[kind].source in ("weights", "words", "needle")
        if template is not None:
            some = any(
                bool((template(each).any(-1) & each.queries).any())
                for each in seen.one_by_one()
            )
        if not some:
            raise ValueError(
                f"{kind} cannot be scored: it needs {needs}, but no prompt has that (the "
                f"longest has {longest} tokens). Pass longer prompts, or other kinds."
            )


def _measured(
    model: TransformerBridge, given: _Given, memory: Memory
) -> dict[str, tuple[np.ndarray, list[str] | None]]:
    """Return every kind's scores, and the labels of its cases if they are its own."""
    watch = [kind for kind in given.kinds if KINDS[kind].source in ("pattern", "copying")]
    found: dict[str, Any] = {}
    if watch:
        seen = watched(model, given.prompts, watch, given.counts, memory)
        found |= {kind: (values, None) for kind, values in seen.items()}
    if "ov_copying" in given.kinds:
        unembedding = Unembedding(model)
        layers = [ov_copying(unembedding, layer) for layer in site_layers(model, "z")]
        found["ov_copying"] = (_padded(layers), None)
    if given.needles is not None:
        values = retrieval(model, *given.needles)
        found["retrieval"] = (values, [str(i) for i in range(len(values))])
    if given.names is not None:
        for kind, values in name_movers(model, given.names).items():
            found[kind] = (values, [str(i) for i in range(len(values))])
    if given.sequences is not None:
        words, values = successors(model, given.sequences)
        found["successor"] = (values, words)
    return {kind: found[kind] for kind in given.kinds}


def _mean(values: np.ndarray) -> Float[np.ndarray, "layer head"]:
    if values.ndim == 2:
        return values
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def _cases(values: np.ndarray) -> Int[np.ndarray, "layer head"]:
    """Return how many prompts (or words) each head's mean is over; 1 for weights."""
    if values.ndim == 2:
        return np.ones(values.shape, dtype=int)
    return np.isfinite(values).sum(0)


def _error(values: np.ndarray) -> Float[np.ndarray, "layer head"]:
    """Return the standard error of each head's mean: 0 from weights, NaN from one prompt."""
    if values.ndim == 2:
        return np.zeros(values.shape)
    known, n = np.ma.masked_invalid(values), _cases(values)
    spread = known.std(0, ddof=1 if len(values) > 1 else 0).filled(np.nan)
    return np.where(n > 1, spread / np.sqrt(np.maximum(n, 1)), np.nan)


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
                null_p(
                    _mean(values),
                    _error(values),
                    _cases(values),
                    pools[kind],
                    KINDS[kind].lower_too,
                )
                for kind, (values, _) in found.items()
            ]
        )
        coords["kind"] = list(found)
        arrays["p"] = (("kind", "layer", "head"), p)
        arrays["p_adjusted"] = (("kind", "layer", "head"), np.stack([holm(each) for each in p]))
        arrays["null_mean"] = ("kind", [float(np.nanmean(pools[kind])) for kind in found])
        arrays["null_sd"] = ("kind", [float(np.nanstd(pools[kind], ddof=1)) for kind in found])
    return xr.Dataset(arrays, coords)
