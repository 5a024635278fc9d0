"""What one prompt's logits are worth: pure functions of logits and targets.

Every metric is ``fn(logits, targets) -> value per prompt``, where ``logits`` are those at the
answer position. A user's own metric is any function of that form. Half-precision logits are
read in float32, so that a metric never loses more than the model did.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.names import unknown


@dataclass(frozen=True, eq=False)
class Targets:
    """What the logits are compared with: sets of token ids per prompt, right-padded with -1.

    ``reference`` holds the logits of another run at the answer position, for ``kl``.

    Raises:
        ValueError: A prompt has no answer or (where distractors are given) no distractor, or
            the parts count different numbers of prompts.
    """

    answers: Int[Tensor, "prompt n_answer"]
    distractors: Int[Tensor, "prompt n_distractor"] | None = None
    reference: Float[Tensor, "prompt d_vocab"] | None = None

    def __post_init__(self) -> None:
        for name in ("answers", "distractors"):
            sets = getattr(self, name)
            if sets is not None and not bool((sets >= 0).any(1).all()):
                empty = (sets < 0).all(1).nonzero()[0].item()
                raise ValueError(
                    f"prompt {empty} has no {name}. Each prompt needs at least one."
                )
        for name in ("distractors", "reference"):
            other = getattr(self, name)
            if other is not None and len(other) != len(self.answers):
                raise ValueError(
                    f"there are {len(self.answers)} answers but {len(other)} rows of {name}. "
                    "Pass one row per prompt."
                )


Metric = Callable[[Float[Tensor, "prompt d_vocab"], Targets], Float[Tensor, " prompt"]]


def logit(
    logits: Float[Tensor, "prompt d_vocab"], targets: Targets
) -> Float[Tensor, " prompt"]:
    """Return the answer's logit, averaged over a set of answers. Unit: logits."""
    return _mean_logit(logits, targets.answers)


def logit_diff(
    logits: Float[Tensor, "prompt d_vocab"], targets: Targets
) -> Float[Tensor, " prompt"]:
    """Return the mean logit of the answers minus that of the distractors.

    Unit: nats of log-odds. Positive when the model prefers the answer, 0 when indifferent.
    Source: Wang et al. 2022, arXiv:2211.00593, section 2 (there, sets of one).
    """
    distractors = _distractors("logit_diff", targets)
    return _mean_logit(logits, targets.answers) - _mean_logit(logits, distractors)


def prob(logits: Float[Tensor, "prompt d_vocab"], targets: Targets) -> Float[Tensor, " prompt"]:
    """Return the probability of the answers together, between 0 and 1."""
    return log_prob(logits, targets).exp()


def prob_diff(
    logits: Float[Tensor, "prompt d_vocab"], targets: Targets
) -> Float[Tensor, " prompt"]:
    """Return the probability of the answers minus that of the distractors, between -1 and 1.

    Source: Hanna et al. 2023, arXiv:2305.00586, section 2 (greater-than).
    """
    distractors = _distractors("prob_diff", targets)
    return prob(logits, targets) - _set_log_prob(logits, distractors).exp()


def log_prob(
    logits: Float[Tensor, "prompt d_vocab"], targets: Targets
) -> Float[Tensor, " prompt"]:
    """Return the log of the answers' summed probability. Unit: nats; 0 is certainty."""
    return _set_log_prob(logits, targets.answers)


def loss(logits: Float[Tensor, "prompt d_vocab"], targets: Targets) -> Float[Tensor, " prompt"]:
    """Return the cross-entropy of the answers, ``-log_prob``. Unit: nats; 0 is certainty."""
    return -log_prob(logits, targets)


def kl(logits: Float[Tensor, "prompt d_vocab"], targets: Targets) -> Float[Tensor, " prompt"]:
    """Return KL(reference ‖ logits): how far the run is from the reference run.

    Unit: nats. 0 when both predict the same, never negative beyond rounding.

    Raises:
        ValueError: The targets carry no reference logits.
    """
    if targets.reference is None:
        raise ValueError(
            "kl compares with a reference run, but these targets have none. "
            "Pass Targets(..., reference=clean_logits) or task.targets(reference=clean_logits)."
        )
    log_p = _precise(targets.reference).to(logits.device).log_softmax(-1)
    log_q = _precise(logits).log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def rank(logits: Float[Tensor, "prompt d_vocab"], targets: Targets) -> Float[Tensor, " prompt"]:
    """Return how many tokens have a larger logit than the best answer: 0 is the top.

    Half of the tokens that are as high count too, as if ties were broken by chance; other
    answers never do.
    """
    best = _best_logit(logits, targets.answers)[:, None]
    whole = _precise(logits)
    ids, present = _ids(logits, targets.answers)
    tied_answers = (whole.gather(1, ids) == best) & present
    level = (whole == best).sum(-1) - tied_answers.sum(-1)
    return (whole > best).sum(-1).to(best.dtype) + 0.5 * level.to(best.dtype)


def accuracy(
    logits: Float[Tensor, "prompt d_vocab"], targets: Targets
) -> Float[Tensor, " prompt"]:
    """Return 1 where the best answer beats every distractor, else 0; a tie is 0.

    Without distractors the answer must beat every other token of the vocabulary.
    """
    best = _best_logit(logits, targets.answers)
    if targets.distractors is not None:
        rival = _best_logit(logits, targets.distractors)
    else:
        others = torch.ones_like(logits, dtype=torch.bool)
        ids, present = _ids(logits, targets.answers)
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        others[rows[present], ids[present]] = False
        rival = _precise(logits).masked_fill(~others, -torch.inf).amax(-1)
    return (best > rival).to(best.dtype)


METRICS: dict[str, Metric] = {
    fn.__name__: fn
    for fn in (logit_diff, logit, prob, prob_diff, log_prob, loss, kl, rank, accuracy)
}

# Metrics that read the logits of the targets' tokens and no others.
OF_TARGETS = (logit_diff, logit)

_WORSE: tuple[Metric, ...] = (loss, kl, rank)


def is_worse(name: str, metric: Metric) -> bool:
    """Whether more of a metric is worse: loss, kl and rank, by whatever name.

    Of a function of one's own more is taken to be better, unless it is given one of these
    names.
    """
    return metric in _WORSE or name in ("loss", "kl", "rank")


UNITS: dict[str, str] = {
    "logit_diff": "nats of log-odds",
    "logit": "logits",
    "prob": "probability",
    "prob_diff": "probability",
    "log_prob": "nats",
    "loss": "nats",
    "kl": "nats",
    "rank": "tokens ranked above",
    "accuracy": "share right",
}


def resolve_metrics(
    metric: str | Callable | Mapping | None, default: str | Callable = "logit_diff"
) -> dict[str, Metric]:
    """Return the metrics that were asked for, by name.

    ``metric`` is a name from ``METRICS``, a function, or a mapping of several (name to name
    or function); ``None`` means ``default``.

    Raises:
        ValueError: A name is not in ``METRICS``, or the mapping is empty.
        TypeError: Something is neither a name nor callable.
    """
    metric = default if metric is None else metric
    if isinstance(metric, Mapping):
        if not metric:
            raise ValueError("metric= is an empty mapping. Pass at least one metric.")
        return {str(name): _one_metric(each) for name, each in metric.items()}
    name = metric if isinstance(metric, str) else _name_of(metric)
    return {name: _one_metric(metric)}


def apply_metric(
    name: str,
    fn: Callable,
    logits: Float[Tensor, "prompt d_vocab"],
    targets: Targets,
    prompts: Sequence[int] | None = None,
) -> Float[Tensor, " prompt"]:
    """Return ``fn(logits, targets)``, having checked that it is one finite number per prompt.

    ``prompts`` are the numbers by which an error names the rows, their own by default.

    Raises:
        TypeError: The metric did not return a tensor.
        ValueError: It has another shape, or is NaN or infinite for some prompt.
    """
    value = try_metric(name, fn, logits, targets)
    if not bool(value.isfinite().all()):
        bad = (~value.isfinite()).nonzero().flatten().tolist()
        bad = bad if prompts is None else sorted({prompts[row] for row in bad})
        at_fault = (
            "the metric itself" if bool(logits.isfinite().all()) else "the model's logits"
        )
        raise ValueError(
            f"metric {name!r} is NaN or infinite on prompts {_some(bad)}; the cause is "
            f"{at_fault}. Look for an edit that leaves a query nothing to attend to, or an "
            "overflow in half precision (load the model with dtype=torch.float32)."
        )
    return value


def try_metric(
    name: str, fn: Callable, logits: Float[Tensor, "prompt d_vocab"], targets: Targets
) -> Float[Tensor, " prompt"]:
    """Return ``fn(logits, targets)``, having checked that it is one number per prompt.

    Raises:
        TypeError: The metric did not return a tensor.
        ValueError: It has another shape.
    """
    value = fn(logits, targets)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"metric {name!r} returned {type(value).__name__}. "
            "Return a tensor with one value per prompt."
        )
    if value.shape != logits.shape[:1]:
        raise ValueError(
            f"metric {name!r} returned shape {tuple(value.shape)} for {len(logits)} prompts. "
            f"Return one value per prompt, shape ({len(logits)},)."
        )
    return value


def _one_metric(metric: Any) -> Metric:
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(unknown("metric", metric, METRICS))
        return METRICS[metric]
    if callable(metric):
        return cast(Metric, metric)
    raise TypeError(
        f"a metric is a name or a function of (logits, targets), not {metric!r}. "
        f"Names: {', '.join(METRICS)}."
    )


def _name_of(fn: object) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    name = getattr(fn, "__name__", type(fn).__name__)
    return "metric" if name == "<lambda>" else name


def _some(items: list[int]) -> str:
    return ", ".join(map(str, items[:5])) + (f" and {len(items) - 5} more" if items[5:] else "")


def _distractors(name: str, targets: Targets) -> Int[Tensor, "prompt n_distractor"]:
    if targets.distractors is None:
        raise ValueError(
            f"{name} compares answers with distractors, but this data has no distractors. "
            "Pass distractors=, or a metric of the answer alone: 'logit', 'log_prob' or 'rank'."
        )
    return targets.distractors


def _precise(logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, "prompt d_vocab"]:
    return logits if logits.dtype.itemsize >= 4 else logits.float()


def _ids(
    logits: Float[Tensor, "prompt d_vocab"], tokens: Int[Tensor, "prompt n_token"]
) -> tuple[Int[Tensor, "prompt n_token"], Bool[Tensor, "prompt n_token"]]:
    """Return token ids that are safe to gather with, and which of them are real."""
    tokens = tokens.to(logits.device)
    return tokens.clamp(min=0), tokens >= 0


def _mean_logit(
    logits: Float[Tensor, "prompt d_vocab"], tokens: Int[Tensor, "prompt n_token"]
) -> Float[Tensor, " prompt"]:
    ids, present = _ids(logits, tokens)
    picked = _precise(logits).gather(1, ids)
    return torch.where(present, picked, 0.0).sum(1) / present.sum(1)


def _best_logit(
    logits: Float[Tensor, "prompt d_vocab"], tokens: Int[Tensor, "prompt n_token"]
) -> Float[Tensor, " prompt"]:
    ids, present = _ids(logits, tokens)
    return _precise(logits).gather(1, ids).masked_fill(~present, -torch.inf).amax(1)


def _set_log_prob(
    logits: Float[Tensor, "prompt d_vocab"], tokens: Int[Tensor, "prompt n_token"]
) -> Float[Tensor, " prompt"]:
    ids, present = _ids(logits, tokens)
    log_probs = _precise(logits).log_softmax(-1).gather(1, ids)
    return log_probs.masked_fill(~present, -torch.inf).logsumexp(1)
