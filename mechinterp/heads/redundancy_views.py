"""What the redundancy atlas gathers while prompts stream by: sums over pairs of heads.

Memory depends on the number of heads, never on how much text there is. Every sum is over
tokens, so the order and size of batches move nothing but the last digits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_CACHED = 2**18  # numbers in a block of patterns that is gone through pair by pair
_BLOCK = 64  # heads against those from them on, in one product
_LEAST = 1e-30  # stands for 0 in logarithms: 1e-30 * log(1e-30) is nothing
_CONSTANT = 1e-10  # share of variance in the second moment that is rounding


class Divergence:
    """Jensen-Shannon divergence of all pairs of patterns, summed over queries."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self.sum = torch.zeros(heads, heads, dtype=torch.float64, device=device)
        self.queries = 0

    def add(
        self, patterns: Float[Tensor, "head query key"], reach: Int[Tensor, " query"]
    ) -> None:
        """Add some queries; query ``i`` attends to none but its first ``reach[i]`` keys."""
        order = reach.argsort(stable=True)
        keys, start = reach[order].tolist(), 0
        while start < len(keys):
            stop = start + 1
            while stop < len(keys) and len(patterns) * (stop + 1 - start) * keys[stop] <= (
                _CACHED
            ):
                stop += 1
            self._add(patterns[:, order[start:stop], : keys[stop - 1]])
            start = stop
        self.queries += len(keys)

    def _add(self, patterns: Float[Tensor, "head query key"]) -> None:
        # Half a pattern plus half of the same one is that pattern to the last bit: twins
        # are 0 apart.
        half = patterns.clamp(min=_LEAST).flatten(1) / 2
        own = (2 * half).log().mul_(2 * half).sum(1).double()
        mixed, log = torch.empty_like(half), torch.empty_like(half)
        for head in range(len(half) - 1):
            others = slice(0, len(half) - head - 1)
            m = torch.add(half[head], half[head + 1 :], out=mixed[others])
            both = torch.log(m, out=log[others]).mul_(m).sum(1).double()
            self.sum[head, head + 1 :] += (own[head] + own[head + 1 :]) / 2 - both

    def mean(self) -> Float[np.ndarray, "head head"]:
        """Return the mean over queries in bits: 0 the same, 1 nothing attended to by both."""
        bits = self.sum / (max(self.queries, 1) * np.log(2))
        return (bits + bits.T).clamp(0, 1).cpu().numpy()


class Cosine:
    """Cosine of all pairs of outputs, summed over the tokens where neither is zero."""

    def __init__(
        self, W_O: Float[Tensor, "head d_head d_model"], dtype: torch.dtype, budget: int
    ) -> None:
        self.W_O = W_O.to(dtype)
        heads, _, d_model = W_O.shape
        told = {"dtype": torch.float64, "device": W_O.device}
        self.sum = torch.zeros(heads, heads, **told)
        self.both = torch.zeros(heads, heads, **told)
        self.step = max(1, min(512, budget // (3 * heads * d_model * self.W_O.itemsize)))

    def add(self, z: Float[Tensor, "token head d_head"]) -> None:
        """Add some tokens."""
        for part in z.split(self.step):
            out = torch.bmm(part.permute(1, 0, 2), self.W_O)  # head token d_model
            norm = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
            there = norm > 0
            out = (out / torch.where(there, norm, 1.0)).flatten(1)
            for start in range(0, len(out), _BLOCK):  # not below the diagonal
                rows = slice(start, start + _BLOCK)
                self.sum[rows, start:] += (out[rows] @ out[start:].T).double()
            there = there[..., 0].double()
            self.both += there @ there.T

    def mean(self) -> Float[np.ndarray, "head head"]:
        """Return the mean over tokens, NaN where one of two heads never writes anything."""
        total = self.sum.triu(1) + self.sum.triu(1).T + self.both.diagonal().diag()
        return (total / self.both).clamp(-1, 1).cpu().numpy()  # 0 / 0 is NaN


class Moments:
    """Cross-covariances of outputs, for linear CKA, for some of the heads at a time.

    ``z`` times a root ``R`` with ``R R.T = W_O W_O.T`` has the inner products of the outputs
    in ``d_head`` numbers. Sums are about the first token's values: near the mean, the digits
    of large means do not cancel.
    """

    def __init__(
        self,
        W_O: Float[Tensor, "head d_head d_model"],
        blocks: Sequence[range],
        dtype: torch.dtype,
    ) -> None:
        self.root = root(W_O.double()).to(dtype)
        self.blocks = blocks
        self.heads, _, self.width = self.root.shape
        columns = self.heads * self.width
        self.sums = [
            torch.zeros(
                len(block) * self.width,
                columns - block.start * self.width,
                dtype=dtype,
                device=W_O.device,
            )
            for block in blocks
        ]
        self.shift: Tensor | None = None
        self.first = torch.zeros(columns, dtype=torch.float64, device=W_O.device)
        self.second = torch.zeros(columns, dtype=torch.float64, device=W_O.device)
        self.offset = torch.zeros_like(self.first)
        self.n = 0

    def add(self, z: Float[Tensor, "token head d_head"]) -> None:
        """Add some tokens."""
        x = torch.einsum("thd,hdk->thk", z, self.root).flatten(1)
        if self.shift is None:
            self.shift = x[0].clone()
            self.offset = self.shift.double()
        x = x - self.shift
        self.n += len(x)
        self.first += x.sum(0, dtype=torch.float64)
        self.second += x.square().sum(0, dtype=torch.float64)
        for block, total in zip(self.blocks, self.sums, strict=True):
            start, stop = block.start * self.width, block.stop * self.width
            total.addmm_(x[:, start:stop].T, x[:, start:])

    def squares(self) -> list[Float[Tensor, "row column"]]:
        """Return per block ``‖Y_a.T Y_b‖²`` of centred outputs, b from the block's first on."""
        found = []
        for block, total in zip(self.blocks, self.sums, strict=True):
            start, stop = block.start * self.width, block.stop * self.width
            centred = total.double()
            centred -= torch.outer(self.first[start:stop], self.first[start:]) / self.n
            parts = centred.square_().reshape(len(block), self.width, -1, self.width)
            found.append(parts.sum((1, 3)))
        return found

    def constant(self) -> Tensor:
        """Return which heads write the same at every token, up to rounding."""
        per_head = (self.heads, self.width)
        variance = (self.second - self.first.square() / self.n).reshape(per_head).sum(1)
        mean = self.first / self.n + self.offset
        power = variance + self.n * mean.square().reshape(per_head).sum(1)
        return variance <= _CONSTANT * power


def root(W_O: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head d_head"]:
    """Return ``R`` with ``R @ R.T = W_O @ W_O.T``."""
    values, vectors = torch.linalg.eigh(W_O @ W_O.mT)
    return vectors * values.clamp(min=0).sqrt()[:, None]


def cka(
    squares: Float[np.ndarray, "head head"], constant: np.ndarray
) -> Float[np.ndarray, "head head"]:
    """Return linear CKA from ``‖Y_a.T Y_b‖²`` in the upper triangle; NaN for constant heads.

    Source: Kornblith et al. 2019, arXiv:1905.00414, in its linear form.
    """
    whole = np.triu(squares) + np.triu(squares, 1).T
    size = np.sqrt(np.diag(whole))
    size = np.where(constant | (size == 0), np.nan, size)
    found = np.clip(whole / np.outer(size, size), 0, 1)
    np.fill_diagonal(found, np.where(np.isnan(size), np.nan, 1.0))
    return found
