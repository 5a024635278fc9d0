"""Watching: one pass over the prompts, every layer's patterns reduced as they go by."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Key
from mechinterp.engine.calls import Memory
from mechinterp.engine.sizes import pass_bytes, shape_of, size
from mechinterp.heads.copying import Unembedding, copying
from mechinterp.heads.patterns import PATTERNS, Seen, distances, share_at_commonest
from mechinterp.hooks.observing import pass_by
from mechinterp.lens.states import budget_of
from mechinterp.models import is_causal
from mechinterp.sites import site_layers
from mechinterp.tasks import Prompts

_PATTERNS = 2**27  # bytes of one layer's patterns at a time: more is no faster
_COPIES = 12  # tensors of a pattern's size that scoring it may hold


@torch.no_grad()
def watched(
    model: TransformerBridge,
    prompts: Prompts,
    kinds: Sequence[str],
    counts: Int[Tensor, " token"] | None = None,
    memory: Memory = None,
) -> dict[str, Float[np.ndarray, "prompt layer head"]]:
    """Return the scores of kinds that come from patterns, for every prompt and head.

    NaN where a prompt has no query to judge by, and past the heads of a layer with fewer.
    Nothing but one layer's patterns of a few prompts is held at a time, within ``memory``
    (for ``positional`` also the strongest key of every query), and no logits are computed.

    Raises:
        ValueError: ``memory`` is too small for one prompt.
    """
    layers = site_layers(model, "pattern")
    widths = {layer: len(model.blocks[layer].attn.W_O) for layer in layers}
    shape = (len(prompts), len(layers), max(widths.values()))
    found = {kind: np.full(shape, np.nan) for kind in kinds}
    strongest = None
    if "positional" in found:
        strongest = np.zeros((*shape, prompts.tokens.shape[1]), dtype=np.int16)
    from_z = any(kind not in PATTERNS and kind != "positional" for kind in kinds)
    reduced = _Reduced(found, strongest, Unembedding(model) if from_z else None, widths)
    each = _at_once(model, prompts, memory, 0 if strongest is None else strongest.nbytes)
    for start in range(0, len(prompts), each):
        rows = slice(start, min(start + each, len(prompts)))
        seen = Seen(prompts.tokens[rows], prompts.mask[rows], is_causal(model), counts)
        put = []
        for at, layer in enumerate(layers):
            told = {"at": at, "layer": layer, "seen": seen, "rows": rows}
            put.append((("pattern", layer), partial(reduced.see_pattern, **told)))
            if from_z:
                put.append((("z", layer), partial(reduced.see_z, **told)))
        last: Key = ("z" if from_z else "pattern", layers[-1])
        pass_by(model, prompts, rows, put, until=last)
    if strongest is not None:
        seen = Seen(prompts.tokens, prompts.mask, is_causal(model))
        for at, layer in enumerate(layers):
            own = torch.from_numpy(strongest[:, at, : widths[layer]])
            found["positional"][:, at, : widths[layer]] = share_at_commonest(own, seen.queries)
    return found


@dataclass(frozen=True, eq=False)
class _Reduced:
    """Takes patterns and ``z`` as they go by, and keeps one number per prompt and head."""

    found: dict[str, Float[np.ndarray, "prompt layer head"]]
    strongest: Int[np.ndarray, "prompt layer head pos"] | None
    unembedding: Unembedding | None
    widths: dict[int, int]
    held: dict[int, Tensor] = field(default_factory=dict)

    def see_pattern(self, own: Tensor, at: int, layer: int, seen: Seen, rows: slice) -> None:
        pattern, here = own.float().cpu(), (rows, at, slice(self.widths[layer]))
        for kind in self.found.keys() & PATTERNS.keys():
            self.found[kind][here] = PATTERNS[kind](pattern, seen)
        if self.strongest is not None:
            self.strongest[here] = distances(pattern)
        if self.unembedding is not None:
            self.held[layer] = pattern

    def see_z(self, own: Tensor, at: int, layer: int, seen: Seen, rows: slice) -> None:
        assert self.unembedding is not None
        pattern, z = self.held.pop(layer), own.float().cpu()
        writes = self.unembedding.writes(layer, seen).float().cpu()
        score, here = copying(pattern, z, writes, seen), (rows, at, slice(self.widths[layer]))
        if "copying" in self.found:
            self.found["copying"][here] = score
        if "anti_induction" in self.found:
            looks = PATTERNS["induction"](pattern, seen)
            self.found["anti_induction"][here] = looks * (-score).clamp(min=0)


def _at_once(model: TransformerBridge, prompts: Prompts, memory: Memory, kept: int) -> int:
    """Return how many prompts to run at once within the budget, ``kept`` bytes of it taken."""
    shape, width = shape_of(model), prompts.tokens.shape[1]
    pattern = 4 * shape.heads * width**2
    written = 8 * width * (shape.d_model + shape.heads * shape.d_head)  # z to logits

    def needed(n: int) -> int:
        return (
            kept + n * (_COPIES * pattern + written) + pass_bytes(shape, n, width, width, 0, 0)
        )

    budget = budget_of(model, memory)
    if needed(1) > budget:
        held = f", {size(kept)} of it for the strongest keys of kind positional" if kept else ""
        raise ValueError(
            f"memory={size(budget)} is too small to watch one prompt of {width} tokens: that "
            f"takes {size(needed(1))}{held}. Allow that much, or pass fewer or shorter prompts."
        )
    n = max(1, min(len(prompts), _PATTERNS // pattern))
    while needed(n) > budget:
        n -= 1
    return n
