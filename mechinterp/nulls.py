"""Nulls: random heads to compare chosen ones with.

A set of heads that matters should matter more than other heads of the same layers. For a whole
model that has learned nothing see ``mi.random_init``.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import comb, prod

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.sites import resolve_heads, resolve_layers

Head = tuple[int, int]


def random_heads(
    model: TransformerBridge, heads: Sequence[Head], n: int, seed: int = 0
) -> list[tuple[Head, ...]]:
    """Return ``n`` random sets of heads that match ``heads`` layer by layer.

    Each set has as many heads of each layer as ``heads``, none of them among ``heads``, drawn
    without replacement; the sets are drawn independently, so two may be equal. Heads are
    query heads, as pairs (layer, head).

    Args:
        model: Says which heads there are.
        heads: The heads to match, as pairs (layer, head).
        n: How many sets.
        seed: Of the draws.

    Raises:
        ValueError: ``n`` is below 1, there are no heads, one does not exist or is named twice,
            or a layer has too few others.
    """
    if n < 1:
        raise ValueError(f"n={n} draws no set of heads. Pass at least 1.")
    counts, others = _matching(model, heads)
    generator = torch.Generator().manual_seed(seed)
    return [_one_set(counts, others, generator) for _ in range(n)]


def different_random_heads(
    model: TransformerBridge, heads: Sequence[Head], n: int, seed: int = 0
) -> tuple[list[tuple[Head, ...]], int]:
    """Return ``n`` different such sets, or all that exist, and how many exist.

    Without replacement: a set comes once, each with the same probability.

    Raises:
        ValueError: As ``random_heads``.
    """
    if n < 1:
        raise ValueError(f"n={n} draws no set of heads. Pass at least 1.")
    counts, others = _matching(model, heads)
    possible = prod(comb(len(others[layer]), counts[layer]) for layer in others)
    generator = torch.Generator().manual_seed(seed)
    if possible <= 2 * n:
        every = list(_every_set(counts, others))
        order = torch.randperm(possible, generator=generator)[:n].tolist()
        return sorted(every[i] for i in order), possible
    found: set[tuple[Head, ...]] = set()
    while len(found) < n:
        found.add(_one_set(counts, others, generator))
    return sorted(found), possible


def resolved_heads(model: TransformerBridge, heads: Sequence[Head]) -> list[Head]:
    """Return the heads with layers and heads counted from 0.

    Raises:
        ValueError: There are none, one does not exist or is named twice.
    """
    given = [_resolved(model, *head) for head in heads]
    if not given:
        raise ValueError("there are no heads. Pass (layer, head) pairs.")
    if twice := [head for head, count in Counter(given).items() if count > 1]:
        raise ValueError(f"head {twice[0]} is named twice. Pass each once.")
    return given


def _matching(
    model: TransformerBridge, heads: Sequence[Head]
) -> tuple[Counter[int], dict[int, list[int]]]:
    """Return how many heads of each layer to draw, and from which."""
    given = resolved_heads(model, heads)
    counts = Counter(layer for layer, _ in given)
    others = {layer: _others(model, layer, given) for layer in sorted(counts)}
    for layer, count in counts.items():
        if len(others[layer]) < count:
            raise ValueError(
                f"{count} heads of layer {layer} are given, but it has only "
                f"{len(others[layer])} others to match them with. Give at most half of a "
                "layer's heads, or compare with an untrained model: mi.random_init(model)."
            )
    return counts, others


def _one_set(
    counts: Counter[int], others: dict[int, list[int]], generator: torch.Generator
) -> tuple[Head, ...]:
    return tuple(
        (layer, head)
        for layer, heads_there in others.items()
        for head in _drawn(heads_there, counts[layer], generator)
    )


def _every_set(
    counts: Counter[int], others: dict[int, list[int]]
) -> Iterator[tuple[Head, ...]]:
    each = [
        [[(layer, head) for head in chosen] for chosen in combinations(there, counts[layer])]
        for layer, there in others.items()
    ]
    for parts in product(*each):
        yield tuple(head for part in parts for head in part)


def _resolved(model: TransformerBridge, layer: int, head: int) -> Head:
    (at,) = resolve_layers(model, "z", layer)
    found = resolve_heads(model, "z", at, head)
    assert at is not None and found is not None
    return at, found[0]


def _others(model: TransformerBridge, layer: int, given: Sequence[Head]) -> list[int]:
    every = resolve_heads(model, "z", layer, None)
    assert every is not None
    return [head for head in every if (layer, head) not in given]


def _drawn(heads: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(heads), generator=generator)[:count].tolist()
    return sorted(heads[i] for i in order)
