"""What a pattern looks like: one number per prompt and head, from attention and tokens alone.

Most kinds are a template, which says for every query the keys that count: the score is the
attention on them, summed over keys and averaged over the queries that have any. Queries in the
padding and the first position, which sees nothing else, never count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

WINDOW = 4  # how far "local" goes


@dataclass(frozen=True, eq=False)
class Seen:
    """The tokens that a pattern is over.

    ``counts[i]`` is how often token ``i`` occurs in all of the data; None where that means
    nothing. ``causal``: keys after a query are hidden.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    causal: bool
    counts: Int[Tensor, " token"] | None = None

    def one_by_one(self) -> Iterator["Seen"]:
        """Yield the prompts one at a time."""
        for i in range(len(self.tokens)):
            rows = slice(i, i + 1)
            yield Seen(self.tokens[rows], self.mask[rows], self.causal, self.counts)

    @property
    def visible(self) -> Bool[Tensor, "batch pos pos"]:
        """Which keys each query sees."""
        seen = self.mask[:, None, :].expand(-1, self.tokens.shape[1], -1)
        return seen.tril() if self.causal else seen

    @property
    def queries(self) -> Bool[Tensor, "batch pos"]:
        """Which positions count as queries."""
        found = self.mask.clone()
        found[:, 0] = False
        return found


Template = Callable[[Seen], Bool[Tensor, "batch pos pos"]]
Score = Callable[[Float[Tensor, "batch head pos pos"], Seen], Float[Tensor, "batch head"]]


def previous_token(seen: Seen) -> Bool[Tensor, "batch pos pos"]:
    """The key just before each query."""
    n = seen.tokens.shape[1]
    at = torch.ones(n, n, dtype=torch.bool, device=seen.tokens.device)
    return (at.tril(-1) & at.triu(-1)) & seen.visible


def duplicate_token(seen: Seen) -> Bool[Tensor, "batch pos pos"]:
    """Other occurrences of each query's own token (earlier ones in a causal model)."""
    return _same(seen) & ~_diagonal(seen) & seen.visible


def induction(seen: Seen) -> Bool[Tensor, "batch pos pos"]:
    """The successors of all other occurrences of each query's token, itself excluded.

    On ``n`` different tokens repeated, the queries that have any are those of the second copy
    on. Source: Olsson et al. 2022, arXiv:2209.11895 (prefix matching).
    """
    earlier = _same(seen) & ~_diagonal(seen) & seen.visible
    return earlier.roll(1, dims=2).index_fill(
        2, torch.tensor([0]).to(earlier.device), False
    ) & (~_diagonal(seen) & seen.visible)


def first_token(seen: Seen) -> Bool[Tensor, "batch pos pos"]:
    """The first position, where heads rest that have nothing to do."""
    found = torch.zeros_like(seen.visible)
    found[:, :, 0] = True
    return found & seen.visible


def local(seen: Seen) -> Bool[Tensor, "batch pos pos"]:
    """The query itself and up to four positions away, for queries that see farther."""
    n = seen.tokens.shape[1]
    at = torch.arange(n, device=seen.tokens.device)
    near = (at[:, None] - at).abs() <= WINDOW
    farther = (seen.visible & ~near).any(-1, keepdim=True)
    return near & seen.visible & farther


def attention_on(template: Template) -> Score:
    """Return the score of a template; NaN for a prompt in which no query has such a key."""

    def score(
        pattern: Float[Tensor, "batch head pos pos"], seen: Seen
    ) -> Float[Tensor, "batch head"]:
        keys = template(seen)
        queries = seen.queries & keys.any(-1)
        on = (pattern * keys[:, None]).sum(-1)
        return _mean(on, queries)

    return score


def entropy(
    pattern: Float[Tensor, "batch head pos pos"], seen: Seen
) -> Float[Tensor, "batch head"]:
    """Return the mean entropy of a query's attention, in nats: 0 when it is on one key."""
    nats = -torch.special.xlogy(pattern, pattern).sum(-1)
    return _mean(nats, seen.queries)


def distances(
    pattern: Float[Tensor, "batch head pos pos"],
) -> Int[Tensor, "batch head pos"]:
    """Return how far each query's strongest key is away: 0 itself, -1 the one before it."""
    at = torch.arange(pattern.shape[-1], device=pattern.device)
    return pattern.argmax(-1) - at


def share_at_commonest(
    distance: Int[Tensor, "prompt head pos"], queries: Bool[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt head"]:
    """Return the share of queries whose strongest key is at the head's commonest distance.

    The commonest is that over all prompts, so that a head which looks elsewhere in every
    prompt is not positional. On tokens that repeat at one distance, induction and
    duplicate-token heads are positional as well: judge those by text.

    Source: Voita et al. 2019, arXiv:1905.09418, section 5.2 (positional: at least 0.9).
    """
    found = torch.empty(distance.shape[:2])
    for head, own in enumerate(distance.unbind(1)):
        commonest = own[queries].mode().values
        at_it = (own == commonest) & queries
        found[:, head] = at_it.sum(-1) / queries.sum(-1)
    return found


def rare_token(
    pattern: Float[Tensor, "batch head pos pos"], seen: Seen
) -> Float[Tensor, "batch head"]:
    """Return the share of queries whose strongest key is the rarest token that they see.

    By how often tokens occur in all of the data; ties count. The first position is left out
    as a key, and queries that see a single other key are left out.

    Source: Voita et al. 2019, arXiv:1905.09418, section 5.2.
    """
    assert seen.counts is not None
    keys = seen.visible.clone()
    keys[:, :, 0] = False
    often = seen.counts.to(seen.tokens.device)[seen.tokens][:, None, :].expand(keys.shape)
    hidden = torch.iinfo(often.dtype).max
    rarest = often.masked_fill(~keys, hidden).amin(-1)
    strongest = pattern.masked_fill(~keys[:, None], -1).argmax(-1)
    chosen = often[:, 0][:, None].expand(-1, pattern.shape[1], -1).gather(2, strongest)
    return _mean((chosen == rarest[:, None]).to(pattern), seen.queries & (keys.sum(-1) > 1))


# Each template, and what a prompt must have for it.
TEMPLATES: dict[str, tuple[Template, str]] = {
    "previous_token": (previous_token, "at least 2 tokens"),
    "duplicate_token": (duplicate_token, "a token that occurs twice, so at least 2 tokens"),
    "induction": (
        induction,
        "a token that comes again after another one, so at least 3 tokens",
    ),
    "first_token": (first_token, "at least 2 tokens"),
    "local": (local, f"at least {WINDOW + 2} tokens"),
}
PATTERNS: dict[str, Score] = {
    **{kind: attention_on(template) for kind, (template, _) in TEMPLATES.items()},
    "entropy": entropy,
    "rare_token": rare_token,
}


def _same(seen: Seen) -> Bool[Tensor, "batch pos pos"]:
    return seen.tokens[:, :, None] == seen.tokens[:, None, :]


def _diagonal(seen: Seen) -> Bool[Tensor, "pos pos"]:
    return torch.eye(seen.tokens.shape[1], dtype=torch.bool, device=seen.tokens.device)


def _mean(
    values: Float[Tensor, "batch head pos"], queries: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch head"]:
    counted = values.masked_fill(~queries[:, None], 0).sum(-1)
    return counted / queries.sum(-1)[:, None]
