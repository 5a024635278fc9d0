"""Reading states out: what each would predict if the model stopped there.

Every number is about the whole vocabulary, but logits are made for some rows and some tokens
at a time, and only sums over tokens are kept, so memory does not grow with the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.engine.closing import Closing

_PER_LOGIT = 40  # bytes that a logit takes while it is read, its copies included
_FEWEST_ROWS = 32  # fewer at once waste the weights' passage through the cache


@dataclass(frozen=True, eq=False)
class Final:
    """The model's own prediction at some rows, and what comparisons with it need.

    ``mass`` is the sum of the probabilities as they were rounded.
    """

    probs: Float[Tensor, "row d_vocab"]
    mass: Float[Tensor, " row"]
    negative_entropy: Float[Tensor, " row"]

    @classmethod
    def of(cls, logits: Float[Tensor, "row d_vocab"]) -> "Final":
        """Return the prediction that logits make."""
        own = precise(logits)
        log_probs = own.log_softmax(-1)
        probs = log_probs.exp()
        log_probs.mul_(probs)
        return cls(
            probs,
            probs.sum(-1, dtype=torch.float64),
            log_probs.nan_to_num_(0.0).sum(-1, dtype=torch.float64),
        )

    def __getitem__(self, rows: slice) -> "Final":
        """Return some of the rows."""
        return Final(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True, eq=False)
class Reading:
    """What states predict: one number per row, or per row and target, in float64.

    ``kl`` is KL(final ‖ lens) in nats: what predicting with the state instead of the model's
    end costs. A target is a set of tokens: ``logit`` is their mean, ``log_prob`` that of their
    summed probability. ``rank`` counts the tokens above the best of them, and half of those
    that are as high: 0 is the top, alone.
    """

    entropy: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]
    top_id: Int[Tensor, " row"]
    top_prob: Float[Tensor, " row"]
    logit: Float[Tensor, "row target"]
    log_prob: Float[Tensor, "row target"]
    rank: Float[Tensor, "row target"]


@torch.no_grad()
def read(
    closing: Closing,
    states: Float[Tensor, "row d_model"],
    final: Final,
    targets: Int[Tensor, "row target member"],
    budget: float | int,
) -> Reading:
    """Return what the states predict, holding about ``budget`` bytes of logits at once.

    ``targets`` are sets of token ids, right-padded with -1; a set that is empty gives NaN and
    a rank of -1.
    """
    rows, tokens = chunk_sizes(len(states), closing.d_vocab, budget)
    parts = []
    for start in range(0, len(states), rows):
        some = slice(start, start + rows)
        parts.append(_read(closing, states[some], final[some], targets[some], tokens))
    return Reading(
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Reading))
    )


def chunk_sizes(rows: int, d_vocab: int, budget: float | int) -> tuple[int, int]:
    """Return how many rows and how many tokens of the vocabulary to read at once.

    The whole vocabulary for as many rows as fit; where these are few, part of it.
    """
    numbers = max(1, int(budget // _PER_LOGIT))
    if numbers >= min(rows, _FEWEST_ROWS) * d_vocab:
        return min(rows, max(1, numbers // d_vocab)), d_vocab
    few = max(1, min(rows, _FEWEST_ROWS, numbers))
    return few, max(1, numbers // few)


def _read(
    closing: Closing,
    states: Float[Tensor, "row d_model"],
    final: Final,
    targets: Int[Tensor, "row target member"],
    tokens: int,
) -> Reading:
    ids, given = targets.clamp(min=0).to(states.device), (targets >= 0).to(states.device)
    own = torch.where(given, _target_logits(closing, states, ids), -torch.inf)
    best = own.amax(-1)
    largest = torch.full((len(states),), -torch.inf, device=states.device)
    largest = largest.to(own.dtype)
    total = torch.zeros(len(states), dtype=torch.float64, device=states.device)
    weighted, cross = total.clone(), total.clone()
    top_id = torch.zeros(len(states), dtype=torch.long, device=states.device)
    above = torch.zeros(best.shape, dtype=torch.float64, device=states.device)
    for start, logits in _chunks(closing, states, tokens):
        peak, where = logits.max(-1)
        top_id = torch.where(peak > largest, where + start, top_id)
        new = torch.maximum(peak, largest)
        shrunk = (largest - new).double().exp()
        largest = new
        weights = (logits - largest[:, None]).exp()
        total = total * shrunk + weights.sum(-1, dtype=torch.float64)
        weighted = weighted * shrunk + weights.mul_(logits).sum(-1, dtype=torch.float64)
        span = slice(start, start + logits.shape[1])
        cross += torch.mul(final.probs[:, span], logits, out=weights).sum(
            -1, dtype=torch.float64
        )
        # A target's logit was computed in other company, so it may not be equal to itself.
        here = given & (ids >= start) & (ids < span.stop)
        mine = logits.gather(1, torch.where(here, ids - start, 0).flatten(1)).view(ids.shape)
        for t in range(ids.shape[1]):
            rival, own_best = mine[:, t].masked_fill(~here[:, t], -torch.inf), best[:, t, None]
            ahead = (logits > own_best).sum(-1) - (rival > own_best).sum(-1)
            level = (logits == own_best).sum(-1) - (rival == own_best).sum(-1)
            above[:, t] += ahead + 0.5 * level  # half of what is as high comes first
    log_total = largest.double() + total.log()
    return Reading(
        entropy=log_total - weighted / total,
        kl=final.negative_entropy - cross + final.mass * log_total,
        top_id=top_id,
        top_prob=(largest.double() - log_total).exp(),
        logit=torch.where(given, own, 0.0).double().sum(-1) / given.sum(-1),
        log_prob=torch.where(
            given.any(-1), own.double().logsumexp(-1) - log_total[:, None], torch.nan
        ),
        rank=torch.where(given.any(-1), above, -1),
    )


def _target_logits(
    closing: Closing,
    states: Float[Tensor, "row d_model"],
    ids: Int[Tensor, "row target member"],
) -> Float[Tensor, "row target member"]:
    if not ids.numel():
        return torch.zeros(ids.shape, device=states.device)
    vocabulary, column = ids.unique(return_inverse=True)
    logits = precise(closing.logits(states, vocabulary))
    return logits.gather(1, column.flatten(1)).view(ids.shape)


def _chunks(
    closing: Closing, states: Float[Tensor, "row d_model"], tokens: int
) -> Iterator[tuple[int, Float[Tensor, "row token"]]]:
    """Yield the first token id of each chunk of the vocabulary, and the chunk's logits."""
    if tokens >= closing.d_vocab:
        yield 0, precise(closing.logits(states))
        return
    for start in range(0, closing.d_vocab, tokens):
        some = torch.arange(start, min(start + tokens, closing.d_vocab))
        yield start, precise(closing.logits(states, some))


def precise(logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return logits in float32 at least."""
    return logits if logits.dtype.itemsize >= 4 else logits.float()
