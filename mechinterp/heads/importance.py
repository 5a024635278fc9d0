"""Importance: which heads the model can do without, by six methods.

Exact ablation, Michel's gradient in its three variants, Voita's gates, Shapley values, the
redundancy atlas and chance: one call, one kind of result, larger is more important.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.ablation import KINDS, MetricSpec, head_ablation, stand_ins
from mechinterp.causal.grid import check_option, prompt_labels
from mechinterp.causal.parts import Part, every_part, part_of
from mechinterp.engine.calls import MEASURED, Memory, check_answers
from mechinterp.engine.runs import run_of
from mechinterp.heads.gates import open_probability, settled, train_gates
from mechinterp.heads.gradient import gate_gradients
from mechinterp.heads.importance_result import HeadImportance
from mechinterp.heads.redundancy import redundancy_atlas
from mechinterp.heads.shapley import shapley_values
from mechinterp.metrics import Metric, accuracy, is_worse, rank, resolve_metrics
from mechinterp.models import fingerprint
from mechinterp.nulls import Head
from mechinterp.record import Data, convention_of, unit_of
from mechinterp.tasks import as_data

METHODS = ("ablation", "gradient", "hard_concrete", "redundancy", "shapley", "random")
UNITS = ("example", "token", "batch")
OPTIONS = ("unit", "normalize_layers", "orders", "penalty", "steps", "batch_size")


def head_importance(
    model: TransformerBridge,
    data: Any,
    *,
    method: str = "ablation",
    unit: str = "example",
    normalize_layers: bool = False,
    heads: Sequence[Head] | None = None,
    kind: str = "zero",
    reference: Any = None,
    metric: MetricSpec = None,
    orders: int = 8,
    penalty: float = 0.02,
    steps: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    memory: Memory = None,
) -> HeadImportance:
    """Score how important each head is; larger is more important.

    - ``"ablation"``: what the metric loses when the head alone is taken out; exact.
    - ``"gradient"``: how fast the metric changes with a gate on the head (Michel et al. 2019,
      arXiv:1905.10650). ``unit`` says of what the size is taken before the mean: each
      ``"example"`` (the paper's formula), each ``"token"`` of all prompts (its code, here
      without dividing the last layer by another number), or each ``"batch"`` (what libraries
      have offered; it depends on ``batch_size``). The three differ.
    - ``"hard_concrete"``: the probability that the head's gate stays open when gates are
      trained (Voita et al. 2019, arXiv:1905.09418) on the loss plus ``penalty`` an open head.
    - ``"shapley"``: the mean loss over random orders of taking heads out, with the Monte-Carlo
      standard error in ``data["error"]``, which the intervals of ``statistics`` include. The
      values add up to what all heads are worth (``settings["efficiency_gap"]`` is 0 but for
      rounding, with however few orders).
    - ``"redundancy"``: place in ``RedundancyAtlas.pruning_order``, first is 0; by likeness
      alone, whatever ``kind`` and ``metric``.
    - ``"random"``: by chance.

    Args:
        model: Left as it was. Edits in force on it apply, so heads can be scored with others
            taken out.
        data: A ``Task``, a ``Text`` or ``Labelled`` texts.
        method: See above.
        unit: Of the gradient.
        normalize_layers: Divide by the root of the sum of squares of the layer's scores, as
            Michel's code can.
        heads: Score these alone. Default: all.
        kind: What takes a head's place in ablation and Shapley values, as in
            ``mi.head_ablation``.
        reference: Where means and resamples come from, as there.
        metric: What is lost, a name or function. Default: the data's own. Where more is worse
            (``loss``, ``kl``, ``rank``) the importance is its rise, else its fall.
        orders: How many orders Shapley values sample; even and at least 4, since they come in
            pairs and several tell the sampling error.
        penalty: Of the gates: nats that an open head must be worth.
        steps: Of the gates' training.
        batch_size: Prompts of a batch, of gradients and gates.
        seed: Of whatever is drawn.
        memory: Bytes, or a size such as ``"2GB"``, to take beside the model.

    Returns:
        ``importance`` per ``layer`` and ``head``, and per ``prompt`` where the method has
        values of prompts.

    Raises:
        TypeError: ``data`` is none of these.
        ValueError: The method, unit or a head is unknown; or as in ``mi.head_ablation``.
    """
    measured: Any = as_data(data, MEASURED, "head_importance")
    check_option("method", method, METHODS)
    check_option("unit", unit, UNITS)
    check_option("kind", kind, KINDS)
    check_answers(model, measured)
    metrics = resolve_metrics(metric, measured.metric)
    if len(metrics) > 1:
        raise ValueError("importance is by one metric. Pass one.")
    if normalize_layers and method in ("redundancy", "random"):
        raise ValueError(
            f"normalize_layers=True divides sizes, but {method!r} gives places in an order. "
            "Leave it out."
        )
    if method == "gradient":
        check_slope(metrics)
    if orders < 4 or orders % 2:
        raise ValueError(
            f"orders={orders} must be even and at least 4: orders come in pairs, and one pair "
            "does not say how far its values are off."
        )
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps} and batch_size={batch_size} must be at least 1.")
    if not penalty >= 0:
        raise ValueError(f"penalty={penalty} would pay for open heads. Pass 0 or more.")
    every = every_part(model, "z")
    asked = every if heads is None else [part_of(model, "z", head) for head in heads]
    if not asked:
        raise ValueError("heads is empty. Name at least one, or leave it out for all.")
    if twice := [part.label for part, count in Counter(asked).items() if count > 1]:
        raise ValueError(f"head {twice[0]} is named twice. Name each one once.")
    how = _How(
        model=model,
        data=measured,
        metrics=metrics,
        asked=asked,
        every=every,
        unit=unit,
        kind=kind,
        reference=reference,
        orders=orders,
        penalty=penalty,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        memory=memory,
    )
    found = _SCORERS[method](how)
    if normalize_layers:
        found = replace(found, scores=_normalised(found.scores, asked))
    settings = {"importance": method, "normalize_layers": normalize_layers, **found.settings}
    return HeadImportance(
        _labelled(measured, asked, found),
        convention_of(
            "head_importance",
            model,
            measured,
            {found.name: found.unit},
            fingerprint(model),
            settings,
            site="z",
            positions="all",
            ablation=kind if method in ("ablation", "shapley") else None,
            seed=seed,
        ),
    )


def check_slope(metrics: Mapping[str, Metric]) -> None:
    """Raise a ``ValueError`` where a metric moves in steps, so that its gradient is zero."""
    for name, metric in metrics.items():
        if metric in (accuracy, rank):
            raise ValueError(
                f"{name} moves in steps, so it has no gradient. Rank by a smooth metric such "
                "as 'loss' or 'logit_diff' (the first of several), or by method='ablation'."
            )


@dataclass(frozen=True, eq=False)
class _How:
    """What a scorer needs to know."""

    model: TransformerBridge
    data: Any
    metrics: dict[str, Metric]
    asked: list[Part]
    every: list[Part]
    unit: str
    kind: str
    reference: Any
    orders: int
    penalty: float
    steps: int
    batch_size: int
    seed: int
    memory: Memory

    @property
    def name(self) -> str:
        """What the metric is called."""
        return next(iter(self.metrics))

    @property
    def metric_unit(self) -> str:
        """The metric's unit, empty where it has none."""
        return unit_of(self.metrics[self.name])

    @property
    def sign(self) -> float:
        """-1 where more of the metric is worse."""
        return -1.0 if is_worse(self.name, self.metrics[self.name]) else 1.0


@dataclass(frozen=True, eq=False)
class _Scored:
    """Scores of the heads asked for, per prompt where the method has any; more beside them."""

    scores: Float[np.ndarray, "*prompt head"]
    name: str
    unit: str
    settings: dict[str, Any]
    beside: dict[str, np.ndarray]
    steps: list[int] | None = None


def _by_ablation(how: _How) -> _Scored:
    heads = [part.pair for part in how.asked]
    result = head_ablation(
        how.model,
        how.data,
        kind=how.kind,
        reference=how.reference,
        heads=heads,
        metric=how.metrics,
        seed=how.seed,
        memory=how.memory,
    )
    lost = -how.sign * result.effect.isel(metric=0).transpose("prompt", "set").values
    said = {name: result.convention.settings[name] for name in ("path", "why")}
    return _Scored(lost, f"{how.name} lost", how.metric_unit, said, {})


def _by_gradient(how: _How) -> _Scored:
    rows, tokens, batches = [], [], []
    for found in gate_gradients(how.model, how.data, how.metrics, how.batch_size):
        each = np.stack([found[p.layer][..., p.index].numpy() for p in how.asked], axis=-1)
        rows.append(np.abs(each.sum(1)))
        tokens.append(np.abs(each).sum(1))
        batches.append(np.abs(each.sum((0, 1))) / len(each))
    said = {"unit": how.unit, "batch_size": how.batch_size}
    what = f"|d {how.name} / d gate| per {how.unit}"
    if how.unit == "example":
        scores = np.concatenate(rows)
    elif how.unit == "token":  # so that the mean over prompts is the one over all tokens
        lengths = run_of(how.data, "clean").prompts.lengths
        scores = np.concatenate(tokens) / lengths.double().mean().item()
    else:
        scores = np.stack(batches).mean(0)
    return _Scored(scores, what, how.metric_unit, said, {})


def _by_gates(how: _How) -> _Scored:
    gates = train_gates(
        how.model,
        how.data,
        penalty=how.penalty,
        steps=how.steps,
        batch_size=how.batch_size,
        seed=how.seed,
    )
    scores = [float(open_probability(gates.log_odds[p.layer])[p.index]) for p in how.asked]
    gate = [float(settled(gates.log_odds[p.layer])[p.index]) for p in how.asked]
    history = [
        [float(at[p.layer][p.index]) for p in how.asked] for at in gates.history.values()
    ]
    said = {
        "penalty": how.penalty,
        "steps": how.steps,
        "batch_size": how.batch_size,
        "last_loss": gates.loss,
    }
    beside = {"open": np.array(history), "gate": np.array(gate)}
    steps = list(gates.history)
    return _Scored(np.array(scores), "gate is open", "probability", said, beside, steps)


def _by_shapley(how: _How) -> _Scored:
    layers = sorted({part.layer for part in how.asked})
    values = stand_ins(how.model, how.data, how.kind, how.reference, "z", layers, how.seed)
    found = shapley_values(
        how.model,
        how.data,
        how.asked,
        values,
        how.metrics,
        pairs=how.orders // 2,
        seed=how.seed,
        memory=how.memory,
    )
    whole = float((found.intact - found.empty).mean()) * how.sign
    said = {
        "orders": how.orders,
        "all_heads_together": whole,
        "efficiency_gap": float(how.sign * found.per_prompt.sum(1).mean() - whole),
        "path": found.path,
    }
    scores = how.sign * found.per_prompt
    beside = {"error": found.error}
    return _Scored(scores, f"{how.name} lost", how.metric_unit, said, beside)


def _by_redundancy(how: _How) -> _Scored:
    # Neither tree nor order asks for interactions, which cost more than all the rest.
    atlas = redundancy_atlas(
        how.model, how.data, pairs="none", seed=how.seed, memory=how.memory
    )
    place = {head: i for i, head in enumerate(atlas.pruning_order())}
    scores = [place[part.pair] for part in how.asked]
    return _Scored(np.array(scores, float), "place in the pruning order", "", {}, {})


def _by_chance(how: _How) -> _Scored:
    generator = torch.Generator().manual_seed(how.seed)
    drawn = torch.rand(len(how.every), generator=generator, dtype=torch.float64).tolist()
    scores = [drawn[how.every.index(part)] for part in how.asked]
    return _Scored(np.array(scores), "chance", "", {}, {})


_SCORERS: dict[str, Callable[[_How], _Scored]] = {
    "ablation": _by_ablation,
    "gradient": _by_gradient,
    "hard_concrete": _by_gates,
    "redundancy": _by_redundancy,
    "shapley": _by_shapley,
    "random": _by_chance,
}


def _normalised(
    scores: Float[np.ndarray, "*prompt head"], heads: Sequence[Part]
) -> Float[np.ndarray, "*prompt head"]:
    """Divide by the length of each layer's vector of mean scores (Michel's code)."""
    mean = scores.mean(0) if scores.ndim > 1 else scores
    layers = np.array([part.layer for part in heads])
    lengths = [np.sqrt((mean[layers == layer] ** 2).sum()) + 1e-20 for layer in layers]
    return scores / np.array(lengths)


def _labelled(data: Data, heads: Sequence[Part], found: _Scored) -> xr.Dataset:
    layers = sorted({part.layer for part in heads})
    units = sorted({part.index for part in heads if part.index is not None})
    at = (
        [layers.index(part.layer) for part in heads],
        [units.index(part.index) for part in heads if part.index is not None],
    )

    def grid(values: np.ndarray) -> np.ndarray:
        whole = np.full((*values.shape[:-1], len(layers), len(units)), np.nan)
        whole[..., at[0], at[1]] = values
        return whole

    prompts = ("prompt",) if found.scores.ndim > 1 else ()
    arrays = {"importance": ((*prompts, "layer", "head"), grid(found.scores))}
    for name, values in found.beside.items():
        first = ("step",) if values.ndim > 1 else ()
        arrays[name] = ((*first, "layer", "head"), grid(values))
    coords: dict[str, Any] = {"layer": layers, "head": units}
    if prompts:
        coords |= prompt_labels(data)
    if found.steps is not None:
        coords["step"] = found.steps
    return xr.Dataset(arrays, coords)
