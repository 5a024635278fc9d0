"""Screening: rank cells in bfloat16, then compute the top ones in the model's own dtype.

The one place where the engine gives numbers that are not exact, so it is asked for by name and
says which cells it computed exactly.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.engine.execute import Outcome
from mechinterp.hooks.taps import attached, foreign_hooks
from mechinterp.metrics import Metric
from mechinterp.names import unknown
from mechinterp.record import Data

_SCREENS = ("bfloat16",)
_LEAST, _SHARE = 20, 0.05  # cells computed again: so many, or this share if that is more


@dataclass(frozen=True, eq=False)
class Screened(Outcome):
    """An outcome of which the cells in ``exact`` were computed in the model's own dtype."""

    exact: Bool[Tensor, " cell"]


def check_screen(model: TransformerBridge, screen: str | None, method: str = "engine") -> None:
    """Raise unless ``screen`` is None or a way of screening that works on this model now."""
    if screen is None:
        return
    if screen not in _SCREENS:
        raise ValueError(unknown("screen", screen, _SCREENS))
    if method != "engine":
        raise ValueError("screen= is the engine's. Leave it out, or leave method= out.")
    if attached(model) or foreign_hooks(model):
        raise ValueError(
            "screening runs a bfloat16 copy of the model, which would lack the edits and hooks "
            "in place here. Leave screen= out, or remove them."
        )


def screened_cells(
    model: TransformerBridge,
    data: Data,
    cells_of: Callable[[TransformerBridge], Sequence[Cell]],
    *,
    on: str,
    metrics: Mapping[str, Metric],
    memory: Memory = None,
) -> Screened:
    """Return the metrics of cells: exact for the top ones, from bfloat16 for the others.

    Cells are ranked by the largest size of their mean effect over the metrics, each in units
    of its spread over cells. A screened cell's value is the exact base plus its effect in
    bfloat16. ``cells_of`` makes the cells of a model, in the same order for its copy, whose
    own activations they then read.
    """
    cells = cells_of(model)
    count = max(_LEAST, int(_SHARE * len(cells)))
    if count >= len(cells):
        found = metrics_of_cells(model, data, cells, on=on, metrics=metrics, memory=memory)
        everything = torch.ones(len(cells), dtype=torch.bool)
        return Screened(**vars(found), exact=everything)
    low = copy.deepcopy(model)
    low.original_model.to(torch.bfloat16)
    rough = metrics_of_cells(low, data, cells_of(low), on=on, metrics=metrics, memory=memory)
    del low
    effect = rough.values - rough.runs[on]
    size = effect.mean(1).abs()
    score = (size / size.std(0, correction=0).clamp(min=1e-12)).amax(1)
    top = score.topk(count).indices
    chosen = [cells[i] for i in top.tolist()]
    fine = metrics_of_cells(model, data, chosen, on=on, metrics=metrics, memory=memory)
    values = fine.runs[on] + effect
    values[top] = fine.values
    exact = torch.zeros(len(cells), dtype=torch.bool)
    exact[top] = True
    return Screened(values, fine.runs, fine.path, fine.why, fine.fingerprint, exact)
