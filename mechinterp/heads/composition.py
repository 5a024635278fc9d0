"""Composition: how much of what one head writes another one reads, from weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import xarray as xr
from einops import einsum
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp import plotting
from mechinterp.heads.copying import writing_weights
from mechinterp.models import fingerprint, processed_weights
from mechinterp.results import Convention, Result
from mechinterp.sites import site_layers
from mechinterp.weights import head_weights

KINDS = ("Q", "K", "V")
_UNIT = "share of norms, less that of random orientations"
_SHOWN = 24


@dataclass(frozen=True, eq=False)
class Composition(Result):
    """Composition scores of all pairs of heads, ``composition`` less the random baseline.

    Axes: ``metric`` (Q, K or V: what the receiver reads with), ``sender_layer``,
    ``sender_head``, ``layer`` and ``head`` (the receiver, a query head). 0 is what random
    orientations give; NaN where the sender is not below the receiver.
    """

    @property
    def effect(self) -> xr.DataArray:
        """The scores less the random baseline."""
        return self.data["composition"]

    def partners(self, layer: int, head: int, kind: str = "K", n: int = 5) -> pd.DataFrame:
        """Return the heads that compose most with a head, the strongest first.

        Args:
            layer: Of the head that reads.
            head: Likewise.
            kind: ``"Q"``, ``"K"`` or ``"V"``.
            n: How many of the heads that it reads.

        Raises:
            ValueError: There is no such kind of composition.
        """
        own = self.effect_of(kind).sel(layer=layer, head=head)
        order = np.argsort(-np.nan_to_num(own.values, nan=-np.inf), axis=None, kind="stable")
        where = np.unravel_index(order[:n], own.shape)
        table = pd.DataFrame(
            {
                "layer": own["sender_layer"].values[where[0]],
                "head": own["sender_head"].values[where[1]],
                kind: own.values[where],
            }
        )
        return table.dropna().reset_index(drop=True)

    def plot(self, ax: Axes | None = None, *, kind: str = "K") -> Axes:
        """Draw the strongest receivers and senders of one kind of composition."""
        own = self.effect_of(kind)
        flat = own.stack(
            sender=["sender_layer", "sender_head"],
            receiver=["layer", "head"],
            create_index=False,
        )
        values = flat.transpose("receiver", "sender").values
        size = np.nan_to_num(values, nan=-np.inf)
        rows = np.sort(np.argsort(-size.max(1), kind="stable")[:_SHOWN])
        columns = np.sort(np.argsort(-size[rows].max(0), kind="stable")[:_SHOWN])
        senders = _names(flat, ("sender_layer", "sender_head"))
        receivers = _names(flat, ("layer", "head"))
        shown = xr.DataArray(
            values[np.ix_(rows, columns)],
            dims=("receiver", "sender"),
            coords={
                "receiver": [receivers[i] for i in rows],
                "sender": [senders[i] for i in columns],
            },
        )
        ax = plotting.heat_grid(shown, ax=ax, label=f"{kind}-composition less random")
        many = f"{len(rows)} of {len(receivers)} receivers, {len(columns)} of {len(senders)}"
        plotting.title(ax, f"{kind}-composition · {self.convention.model}", f"{many} senders")
        return ax


@torch.no_grad()
def composition(model: TransformerBridge) -> Composition:
    """Return the Q-, K- and V-composition of every pair of heads of a model, less chance.

    For sender A and receiver B, ``‖W_OV^A W_K^B W_Q^B.T‖ / (‖W_OV^A‖ ‖W_QK^B‖)`` (K),
    ``‖W_OV^A W_QK^B‖ / ...`` (Q) and ``‖W_OV^A W_OV^B‖ / ...`` (V), in Frobenius norms, with
    the gains of the norms before attention in the reading weights and of those behind it in
    ``W_O``. The baseline is ``1/sqrt(d_model)``: the root mean square over all rotations of
    one head's weights against the other's.

    What weights alone cannot say is left out: rotary turns of queries and keys, norms of
    queries and keys, and biases. Computed in float32 at least.

    Raises:
        ValueError: No layer of the model has attention heads.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    layers = site_layers(model, "z")
    if not layers:
        raise ValueError(
            f"{model.cfg.model_name} has no attention heads, so none compose. "
            "Use a model that has some."
        )
    parts = [_parts(model, layer) for layer in layers]
    heads = max(len(part.write) for part in parts)
    d_model = parts[0].write.shape[-1]
    shape = (len(KINDS), len(layers), heads, len(layers), heads)
    values = np.full(shape, np.nan)
    for a, sender in enumerate(parts):
        for b in range(a + 1, len(parts)):
            for k, read in enumerate(parts[b].reads):
                joined = einsum(sender.write, read, "s i m, r m j -> s r i j")
                found = torch.linalg.matrix_norm(joined).double().cpu().numpy()
                values[k, a, : found.shape[0], b, : found.shape[1]] = found
    data = xr.Dataset(
        {
            "composition": (
                ("metric", "sender_layer", "sender_head", "layer", "head"),
                values - d_model**-0.5,
                {"units": _UNIT},
            )
        },
        {
            "metric": list(KINDS),
            "sender_layer": list(layers),
            "sender_head": np.arange(heads),
            "layer": list(layers),
            "head": np.arange(heads),
        },
    )
    return Composition(
        data,
        Convention(
            method="composition",
            model=str(model.cfg.model_name),
            fingerprint=fingerprint(model),
            processed_weights=processed_weights(model),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            data="weights",
            bos="none",
            metrics=dict.fromkeys(KINDS, _UNIT),
            settings={"baseline": "1/sqrt(d_model)", "norm_gains": "in the weights"},
        ),
    )


@dataclass(frozen=True, eq=False)
class _Parts:
    """A layer's heads for composing, each matrix over its whole product's norm.

    ``write[h]`` has the singular values and the right side of ``W_OV``, ``reads`` the left
    sides of what Q, K and V read with.
    """

    write: Float[Tensor, "head d_head d_model"]
    reads: Sequence[Float[Tensor, "head d_model d_head"]]


def _parts(model: TransformerBridge, layer: int) -> _Parts:
    weights = head_weights(model, layer, fold_norm=True)
    W_Q, W_K, W_V = (_scaled(W) for W in (weights.W_Q, weights.W_K, weights.W_V))
    W_O = _scaled(writing_weights(model, layer))
    write = _root(W_V) @ W_O
    by_query = W_Q @ _root(W_K).mT
    by_key = W_K @ _root(W_Q).mT
    by_value = W_V @ _root(W_O.mT).mT
    return _Parts(_over_norm(write), [_over_norm(m) for m in (by_query, by_key, by_value)])


def _root(matrix: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_head d_head"]:
    """Return ``R`` with ``R.T @ R = matrix.T @ matrix``: it stands for the matrix in norms."""
    return torch.linalg.qr(matrix).R


def _scaled(weight: Tensor) -> Tensor:
    """Return weights over their largest: scores do not change, and no product overflows.

    In float32 at least: below that torch has no QR decomposition.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    tiny = torch.finfo(weight.dtype).tiny
    return weight / weight.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)


def _over_norm(matrix: Tensor) -> Tensor:
    return matrix / torch.linalg.matrix_norm(matrix, keepdim=True)


def _names(flat: xr.DataArray, axes: tuple[str, str]) -> list[str]:
    first, second = (flat[axis].values for axis in axes)
    return [f"{a}.{b}" for a, b in zip(first, second, strict=True)]
