"""Streaming prompts through the model for the redundancy atlas, within a memory budget."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.engine.sizes import size
from mechinterp.heads.copying import writing_weights
from mechinterp.heads.redundancy_views import Cosine, Divergence, Moments, cka
from mechinterp.hooks import HookNotFiredError
from mechinterp.hooks.observing import pass_by
from mechinterp.lens.states import prompts_at_once
from mechinterp.models import input_device, is_causal
from mechinterp.tasks import Prompts

_ROWS = 512  # columns of z in one product: fewer are slow, more waste the lower triangle
_BUFFER = 2**27  # bytes


@dataclass(frozen=True, eq=False)
class Watched:
    """The views that need the model to run, and over how much they were taken."""

    js: Float[np.ndarray, "head head"]
    cka: Float[np.ndarray, "head head"]
    cosine: Float[np.ndarray, "head head"]
    tokens: int
    passes: int


def considered(model: TransformerBridge, prompts: Prompts) -> Bool[Tensor, "prompt pos"]:
    """Return which positions are looked at: real ones, in a causal model but the first.

    At the first position a causal head has one key, and its output is the same in all prompts
    that begin alike.
    """
    there = prompts.mask.clone()
    if is_causal(model):
        there[:, 0] = False
    return there


def sampled(there: Bool[Tensor, "prompt pos"], n: int, seed: int) -> Int[Tensor, "query 2"]:
    """Return ``n`` different queries as pairs (prompt, position), in order."""
    queries = there.nonzero()
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))
    return queries[order[:n].sort().values]


@torch.no_grad()
def watch(
    model: TransformerBridge,
    prompts: Prompts,
    layers: Sequence[int],
    queries: Int[Tensor, "query 2"],
    budget: int,
) -> Watched:
    """Return divergence, CKA and cosine of all pairs of heads of these layers.

    Where the cross-covariances of all pairs do not fit in half of ``budget`` bytes, the
    prompts are read several times, each time for some of the pairs.

    Raises:
        ValueError: The budget is too small.
        HookNotFiredError: A layer's pattern or ``z`` was not passed.
    """
    device, parameter = input_device(model), next(model.original_model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    W_O = torch.cat([writing_weights(model, layer) for layer in layers]).to(device)
    heads = len(W_O)
    groups, sums = _passes(heads, W_O.shape[1], dtype.itemsize, budget // 2)
    left = budget - sums
    buffer = min(_BUFFER, left // 8)
    run = _Run(model, prompts, layers, considered(model, prompts), dtype, buffer)
    at_once = prompts_at_once(model, prompts, [("z", i) for i in layers], left // 2)
    per_query = 2 * heads * prompts.tokens.shape[1] * dtype.itemsize
    divergence, cosine = Divergence(heads, device), Cosine(W_O, dtype, buffer)
    squares = torch.zeros(heads, heads, dtype=torch.float64, device=device)
    moments = None
    for i, blocks in enumerate(groups):
        moments = Moments(W_O, blocks, dtype)
        starts = range(0, len(prompts), at_once)
        for start in progress(starts, len(starts), "heads side by side"):
            rows = slice(start, min(start + at_once, len(prompts)))
            inside = (queries[:, 0] >= rows.start) & (queries[:, 0] < rows.stop)
            own = queries[inside] if i == 0 else queries[:0]
            parts = own.split(max(1, left // 4 // per_query))
            for j, part in enumerate(parts):
                patterns, z = run(rows, part, j == 0)
                if len(part):
                    divergence.add(patterns, run.reach(part).to(device))
                for chunk in z:
                    moments.add(chunk)
                    if i == 0:
                        cosine.add(chunk)
        for block, found in zip(blocks, moments.squares(), strict=True):
            squares[block.start : block.stop, block.start :] = found
    assert moments is not None
    constant = moments.constant().cpu().numpy()
    found = cka(squares.cpu().numpy(), constant)
    return Watched(divergence.mean(), found, cosine.mean(), moments.n, len(groups))


class _Run:
    """Runs some prompts and gives the patterns of some queries, and ``z`` in chunks."""

    def __init__(
        self,
        model: TransformerBridge,
        prompts: Prompts,
        layers: Sequence[int],
        there: Bool[Tensor, "prompt pos"],
        dtype: torch.dtype,
        buffer: int,
    ) -> None:
        self.model, self.prompts, self.layers = model, prompts, layers
        self.there, self.dtype, self.buffer = there, dtype, buffer
        self.device, self.causal = input_device(model), is_causal(model)

    def reach(self, queries: Int[Tensor, "query 2"]) -> Int[Tensor, " query"]:
        """Return how many keys, from the first on, each query may attend to."""
        if self.causal:
            return queries[:, 1] + 1
        return self.prompts.lengths[queries[:, 0]]

    def __call__(
        self, rows: slice, queries: Int[Tensor, "query 2"], with_z: bool
    ) -> tuple[Tensor, Iterable[Tensor]]:
        patterns: dict[int, Tensor] = {}
        z: dict[int, Tensor] = {}
        put = []
        for layer in self.layers:
            if len(queries):
                told = {"seen": patterns, "layer": layer, "queries": queries, "rows": rows}
                put.append((("pattern", layer), partial(self._see_pattern, **told)))
            if with_z:
                see = partial(self._see_z, seen=z, layer=layer, rows=rows)
                put.append((("z", layer), see))
        last = ("z", self.layers[-1])  # MLP and unembedding behind it are not needed
        pass_by(self.model, self.prompts, rows, put, until=last)
        for site, seen, asked in (("pattern", patterns, len(queries)), ("z", z, with_z)):
            if asked and (missed := sorted(set(self.layers) - set(seen))):
                raise HookNotFiredError(
                    f"{site} at layer {missed[0]} never fired, so there is nothing to compare. "
                    "mi.sites(model) lists the sites that work on this model."
                )
        gathered = [patterns.pop(layer) for layer in self.layers] if patterns else []
        joined = torch.cat(gathered) if gathered else torch.zeros(0, 0, 0, dtype=self.dtype)
        return joined, _chunks([z[layer] for layer in self.layers], self.buffer) if z else []

    def _see_pattern(
        self, own: Tensor, seen: dict[int, Tensor], layer: int, queries: Tensor, rows: slice
    ) -> None:
        prompt, position = (queries - torch.tensor([rows.start, 0])).to(own.device).unbind(1)
        chosen = own[prompt, :, position]  # query head key
        seen[layer] = chosen.permute(1, 0, 2).to(self.device, self.dtype)

    def _see_z(self, own: Tensor, seen: dict[int, Tensor], layer: int, rows: slice) -> None:
        seen[layer] = own[self.there[rows].to(own.device)].to(self.device, self.dtype)


def _chunks(
    z: Sequence[Float[Tensor, "token _ d_head"]], buffer: int
) -> Iterator[Float[Tensor, "token head d_head"]]:
    """Yield all layers' ``z`` side by side, for as many tokens at a time as fit."""
    width = sum(each.shape[1] * each.shape[2] for each in z)
    step = max(1, buffer // (3 * width * z[0].itemsize))
    for start in range(0, len(z[0]), step):
        yield torch.cat([each[start : start + step] for each in z], 1)


def _passes(
    heads: int, width: int, itemsize: int, budget: int
) -> tuple[list[list[range]], int]:
    """Return blocks of heads whose sums are kept at once, pass by pass, and their bytes."""
    each = max(1, _ROWS // width)
    groups: list[list[range]] = [[]]
    taken = most = 0
    for start in range(0, heads, each):
        block = range(start, min(start + each, heads))
        needed = len(block) * (heads - start) * width**2 * itemsize
        if needed > budget:
            raise ValueError(
                f"memory= is too small: the outputs of {len(block)} heads against those of all "
                f"others take {size(needed)}. Allow at least {size(4 * needed)}."
            )
        if taken + needed > budget:
            groups.append([])
            taken = 0
        groups[-1].append(block)
        taken += needed
        most = max(most, taken)
    return groups, most
