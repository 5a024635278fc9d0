"""Subspaces that heads read from and write into, and how far two of them are the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.heads.copying import writing_weights
from mechinterp.weights import head_weights

SIDES = ("read_q", "read_k", "read_v", "write")
_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class Overlap:
    """How far the subspaces of every two heads are the same, and by chance would be."""

    overlap: Float[Tensor, "head head"]
    expected: Float[Tensor, "head head"]
    spread: Float[Tensor, "head head"]


def overlaps(model: TransformerBridge, layers: Sequence[int]) -> dict[str, Overlap]:
    """Return for each of ``SIDES`` the overlap of all heads' subspaces, in float64.

    With the gain of the norms before attention in the weights that read, and of those behind
    it in ``W_O``.
    """
    weights = [head_weights(model, layer, fold_norm=True) for layer in layers]
    sides = {
        "read_q": [each.W_Q for each in weights],
        "read_k": [each.W_K for each in weights],
        "read_v": [each.W_V for each in weights],
        "write": [writing_weights(model, layer).mT for layer in layers],
    }
    return {side: overlap(torch.cat([W.double() for W in W_s])) for side, W_s in sides.items()}


def overlap(weights: Float[Tensor, "head d_model d_head"]) -> Overlap:
    """Return ``‖U_a.T U_b‖² / sqrt(rank_a rank_b)`` of the spans of all heads' columns.

    ``U`` has orthonormal columns; the rank is ``d_head`` unless weights are degenerate. 1: the
    same subspace, 0: orthogonal ones. It is the cosine of the two projections. ``expected`` is
    its mean over random subspaces of these ranks, ``sqrt(rank_a rank_b) / d_model``, and
    ``spread`` its standard deviation, from the variance ``2 r s (d - r) (d - s) / (d² (d - 1)
    (d + 2))`` of ``‖U_a.T U_b‖²``. Where a norm subtracts the mean, nothing is read along the
    ones, and ``d`` is one less.
    """
    bases, ranks = _bases(weights)
    n, d_model, _ = bases.shape
    shared = torch.zeros(n, n, dtype=torch.float64, device=bases.device)
    step = max(1, _BYTES // (8 * n * d_model))
    for rows in bases.split(step, 1):  # some rows of all heads' projections at a time
        projections = (rows @ bases.mT).flatten(1)
        shared.addmm_(projections, projections.T)
    along_ones = bases.mean(1).square().sum(-1) * d_model
    d = d_model - int(bool((along_ones < 1e-9).all()))
    r, s = ranks[:, None].double(), ranks[None, :].double()
    size = (r * s).sqrt()
    variance = 2 * r * s * (d - r) * (d - s) / (d**2 * max(d - 1, 1) * (d + 2))
    none = torch.where(size > 0, 1.0, torch.nan)
    found = (shared / size.clamp(min=1) * none).clamp(max=1.0)
    found.diagonal().copy_(none.diagonal())
    return Overlap(found, size / d * none, variance.sqrt() / size.clamp(min=1) * none)


def _bases(
    weights: Float[Tensor, "head d_model d_head"],
) -> tuple[Float[Tensor, "head d_model d_head"], Int[Tensor, " head"]]:
    """Return orthonormal columns that span each head's, 0 past its rank, and the ranks."""
    values, vectors = torch.linalg.eigh(weights.mT @ weights)
    # Weights are known to float32 at best: what is this small beside the largest is rounding.
    kept = (values > 1e-12 * values[:, -1:]) & (values > 0)
    scale = torch.where(kept, values, 1.0).rsqrt() * kept
    return weights @ (vectors * scale[:, None]), kept.sum(1)
