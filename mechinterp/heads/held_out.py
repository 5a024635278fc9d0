"""Held-out data: what judges a model must not be what ranked its heads or trained it."""

from typing import Any

import numpy as np
from jaxtyping import Int

from mechinterp.engine.calls import MEASURED
from mechinterp.engine.runs import run_of
from mechinterp.record import Data
from mechinterp.tasks import Labelled, Text, as_data


def held_out(data: Any, evaluate_on: Any, share: float, method: str) -> tuple[Data, Data]:
    """Return what a method works on and what judges it.

    Without ``evaluate_on`` a ``share`` of the prompts judges: the last pieces of a text, whose
    neighbours are alike; of each label its share of labelled texts; and of a task prompts
    spread evenly over it, so that no template is missing on either side.

    Raises:
        TypeError: The data are none of those that methods measure, or not of one kind.
        ValueError: Both have a prompt in common, or there is a single prompt.
    """
    used: Any = as_data(data, MEASURED, method)
    if evaluate_on is None:
        if len(used) < 2:
            raise ValueError(
                "one prompt cannot be used and held out. Give more, or evaluate_on=."
            )
        aside = _aside(used, share)
        chosen = set(aside.tolist())
        return used[[i for i in range(len(used)) if i not in chosen]], used[aside.tolist()]
    judging: Any = as_data(evaluate_on, (type(used),), f"{method}(evaluate_on=)")
    mine = {tuple(row) for row in run_of(used, "clean").prompts.rows}
    theirs = run_of(judging, "clean").prompts.rows
    twice = [i for i, row in enumerate(theirs) if tuple(row) in mine]
    if twice:
        raise ValueError(
            f"{len(twice)} of the {len(judging)} prompts of evaluate_on are also in data, such "
            f"as number {twice[0]}, so what they say would flatter. Give other prompts, or "
            "leave it out to hold some back."
        )
    return used, judging


def _aside(data: Data, share: float) -> Int[np.ndarray, " prompt"]:
    """Return the numbers of the prompts that judge, at least one and not all."""
    n = len(data)
    count = min(max(1, round(share * n)), n - 1)
    if isinstance(data, Text):
        return np.arange(n - count, n)
    order = np.arange(n)
    if isinstance(data, Labelled):
        order = np.argsort(data.labels.numpy(), kind="stable")
    places = np.floor((np.arange(count) + 0.5) * n / count).astype(int)
    return np.sort(order[places])
