"""Shapley values of heads: what each is worth, averaged over the orders of taking them out.

Going through a random order of the heads, each is taken out after those before it; what the
metric then loses is its share. The shares of one order add up to the whole loss exactly. Orders
come in pairs, one the reverse of the other, which lowers the error (antithetic sampling).

Source: Shapley 1953; Castro et al. 2009 (sampling of permutations); Mitchell et al. 2022,
arXiv:2104.12199 (antithetic permutations); Ghorbani and Zou 2020, arXiv:2002.09815 (neurons).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.ablation import StandIns
from mechinterp.causal.parts import Part
from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.metrics import Metric
from mechinterp.record import Data


@dataclass(frozen=True, eq=False)
class ShapleyValues:
    """What each head adds to the metric.

    ``per_prompt`` are means over all orders; ``per_pair`` means over prompts, of each pair of
    orders; ``intact`` and ``empty`` the metric with all heads and with none.
    """

    per_prompt: Float[np.ndarray, "prompt head"]
    per_pair: Float[np.ndarray, "pair head"]
    intact: Float[np.ndarray, " prompt"]
    empty: Float[np.ndarray, " prompt"]
    path: str
    fingerprint: str

    @property
    def error(self) -> Float[np.ndarray, " head"]:
        """The standard error of a head's mean value that the sampling of orders leaves."""
        n = len(self.per_pair)
        return (
            self.per_pair.std(0, ddof=1) / np.sqrt(n)
            if n > 1
            else np.full_like(self.per_pair[0], np.nan)
        )


def shapley_values(
    model: TransformerBridge,
    data: Data,
    heads: Sequence[Part],
    values: StandIns,
    metrics: Mapping[str, Metric],
    *,
    pairs: int,
    seed: int,
    memory: Memory = None,
) -> ShapleyValues:
    """Sample ``pairs`` pairs of orders and return each head's share of the metric."""
    generator = torch.Generator().manual_seed(seed)
    forth = [torch.randperm(len(heads), generator=generator).tolist() for _ in range(pairs)]
    orders = [order for one in forth for order in (one, one[::-1])]
    wanted = {frozenset(order[: i + 1]) for order in orders for i in range(len(heads))}
    sets = sorted(wanted, key=lambda one: (len(one), sorted(one)))
    cells = [Cell(values.edits([heads[i] for i in sorted(one)])) for one in sets]
    found = metrics_of_cells(model, data, cells, on="clean", metrics=metrics, memory=memory)
    measured = dict(zip(sets, found.values[..., 0].double().cpu().numpy(), strict=True))
    intact = found.runs["clean"][:, 0].double().cpu().numpy()
    measured[frozenset()] = intact
    shares = np.zeros((len(orders), len(intact), len(heads)))
    for number, order in enumerate(orders):
        for i, head in enumerate(order):
            before, after = frozenset(order[:i]), frozenset(order[: i + 1])
            shares[number, :, head] = measured[before] - measured[after]
    return ShapleyValues(
        per_prompt=shares.mean(0),
        per_pair=shares.mean(1).reshape(pairs, 2, -1).mean(1),
        intact=intact,
        empty=measured[frozenset(range(len(heads)))],
        path=found.path,
        fingerprint=found.fingerprint,
    )
