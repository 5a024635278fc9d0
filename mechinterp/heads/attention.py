"""Attention patterns: where heads look on a few prompts, kept small enough to be looked at."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.parts import every_part
from mechinterp.heads.attention_result import WHOLE, AttentionPatterns
from mechinterp.hooks.observing import observe
from mechinterp.models import fingerprint
from mechinterp.nulls import Head, resolved_heads
from mechinterp.record import convention_of
from mechinterp.sites import site_layers
from mechinterp.tasks import Labelled, Prompts, Task, Text, as_data
from mechinterp.tasks.prompts import token_texts


@torch.no_grad()
def attention_patterns(
    model: TransformerBridge,
    data: Any,
    *,
    heads: Sequence[Head] | None = None,
    n: int | None = 16,
    prompts: int | Sequence[int] = 1,
) -> AttentionPatterns:
    """Return where heads look on a few prompts.

    Every weight is rounded to 1/255, so that 16 heads on 512 tokens are 4 MB.

    Args:
        model: Left as it was.
        data: A ``Text``, ``Task`` (its clean prompts) or ``Labelled``.
        heads: Pairs (layer, head), in the order in which they are kept. By default those with
            the highest ``sharpness``, the sharpest first: the mean over queries of the largest
            weight on any token but the first and the query itself, which most heads rest on.
        n: How many heads are kept by default; None for all.
        prompts: How many of the first prompts, or their places.

    Raises:
        TypeError: ``data`` is of another kind.
        ValueError: A head or prompt does not exist, or ``n`` is below 1. Before any forward
            pass.
    """
    given = as_data(data, accepts=(Text, Task, Labelled), method="attention_patterns")
    whole = given.clean if isinstance(given, Task) else given.prompts
    rows = _rows(prompts, len(whole))
    if n is not None and n < 1:
        raise ValueError(f"n={n} keeps no head. Pass at least 1, or None for all.")
    every = [part.pair for part in every_part(model, "z") if part.layer in _layers(model)]
    asked = every if heads is None else resolved_heads(model, heads)
    if not asked:
        raise ValueError(
            f"{model.cfg.model_name} has no attention patterns. "
            "Use a model whose layers attend."
        )

    sharp = np.full((len(rows), len(asked)), np.nan)

    def judge(i: int, j: int, pattern: Tensor) -> None:
        sharp[i, j] = sharpness(pattern)

    _watch(model, whole, rows, asked, judge)
    kept = list(range(len(asked)))
    if heads is None:
        mean = np.nan_to_num(sharp, nan=-1.0).mean(0)
        kept = np.argsort(-mean, kind="stable")[:n].tolist()
    longest = int(whole.lengths[rows].max())
    pattern = np.zeros((len(rows), len(kept), longest, longest), dtype=np.uint8)

    def keep(i: int, j: int, own: Tensor) -> None:
        rounded = np.rint(own.numpy() * WHOLE).astype(np.uint8)
        pattern[i, j, : len(own), : len(own)] = rounded

    _watch(model, whole, rows, [asked[i] for i in kept], keep)
    ids = torch.where(whole.mask, whole.tokens, -1)[rows, :longest].cpu().numpy()
    places = np.arange(longest)
    labelled = xr.Dataset(
        {
            "pattern": (("prompt", "head", "query_pos", "key_pos"), pattern),
            "sharpness": (("prompt", "head"), sharp[:, kept]),
            "length": ("prompt", whole.lengths[rows].cpu().numpy()),
        },
        {
            "prompt": rows,
            "head": [f"{layer}.{head}" for layer, head in (asked[i] for i in kept)],
            "query_pos": places,
            "key_pos": places,
            "token": (("prompt", "query_pos"), token_texts(model, ids)),
        },
    )
    return AttentionPatterns(
        labelled,
        convention_of(
            "attention_patterns",
            model,
            given,
            {"sharpness": "share of attention"},
            fingerprint(model),
            {"heads": "asked for" if heads is not None else "sharpest", "of": len(every)},
            site="pattern",
        ),
    )


def _layers(model: TransformerBridge) -> list[int]:
    return site_layers(model, "pattern")


def _rows(prompts: int | Sequence[int], there: int) -> list[int]:
    """Return the places of the prompts that were asked for."""
    rows = list(range(min(prompts, there))) if isinstance(prompts, int) else list(prompts)
    if not rows or min(rows) < 0:
        raise ValueError(f"prompts={prompts} names no prompts. Pass how many, or their places.")
    if max(rows) >= there:
        raise ValueError(f"prompt {max(rows)} does not exist: there are 0..{there - 1}.")
    return rows


def _watch(
    model: TransformerBridge,
    prompts: Prompts,
    rows: Sequence[int],
    heads: Sequence[Head],
    see: Callable[[int, int, Tensor], None],
) -> None:
    """Give ``see`` each prompt's number, each head's and its pattern, one layer at a time."""
    for i, row in enumerate(rows):
        length = int(prompts.lengths[row])

        def pass_on(own: Tensor, i: int, layer: int, length: int) -> None:
            for j, (at, head) in enumerate(heads):
                if at == layer:
                    see(i, j, own[0, head, :length, :length].float().cpu())

        put = [
            (("pattern", layer), partial(pass_on, i=i, layer=layer, length=length))
            for layer in sorted({layer for layer, _ in heads})
        ]
        observe(model, prompts, slice(row, row + 1), [], put=put)


def sharpness(pattern: Float[Tensor, "query_pos key_pos"]) -> float:
    """Return the mean over queries of the largest weight on another token but the first.

    0: looks at nothing but itself and the first token, 1: at one token each. NaN where there
    are no others: queries count from the third on.
    """
    length = len(pattern)
    others = ~torch.eye(length, dtype=torch.bool)
    others[:, 0] = False
    if length < 3:
        return float("nan")
    return float((pattern * others)[2:].amax(1).double().mean())
