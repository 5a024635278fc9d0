"""Two runs compared number by number."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechinterp.sweeps.opened import SweepRun

_NOT_AXES = ("call", "value", "text")


@dataclass(frozen=True, eq=False)
class Difference:
    """How two runs differ.

    Attributes:
        calls: One row per call: how many numbers both have, how many are equal bit for bit,
            how many only one has, and the largest difference.
        cells: The numbers that differ, the largest difference first.
        tolerance: Up to which a difference is none.
    """

    calls: pd.DataFrame
    cells: pd.DataFrame
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether both runs have the same numbers, up to the tolerance."""
        alone = self.calls[["only A", "only B"]].to_numpy().sum()
        return not len(self.cells) and not alone

    @property
    def summary(self) -> str:
        """What there is to say on one line."""
        counted = self.calls[["both", "equal", "only A", "only B"]].to_numpy(dtype=int)
        both, equal, *alone = counted.sum(0).tolist()
        said = f"{both:,} numbers in both, {equal:,} of them equal bit for bit"
        if len(self.cells):
            worst = self.cells["difference"].iloc[0]
            beyond = f" by more than {self.tolerance:g}" if self.tolerance else ""
            said += f"; {len(self.cells):,} differ{beyond}, at most by {worst:.3g}"
        if any(alone):
            said += f"; {alone[0]:,} in A alone, {alone[1]:,} in B alone"
        return said


def compared(a: SweepRun, b: SweepRun, *, tolerance: float = 0.0) -> Difference:
    """Return how two runs differ, cell by cell, whatever weights or versions made them.

    Numbers are the same cell when the labels of their calls and all their axes are.

    Raises:
        ValueError: Nothing is done in one of them.
    """
    first, second = (run.to_frame() for run in (a, b))
    for run, frame in ((a, first), (b, second)):
        if not len(frame):
            raise ValueError(
                f"nothing is done in {run.folder} yet, so there is no comparing. "
                "Run its spec first."
            )
    axes = sorted((set(first.columns) | set(second.columns)) - set(_NOT_AXES))
    tables = []
    for frame in (first, second):
        whole = frame.reindex(columns=[*axes, "value", "text"])
        keys = whole[axes].astype("string").fillna("")
        tables.append(pd.concat([keys, whole[["value", "text"]]], axis=1))
    both = tables[0].merge(
        tables[1], on=axes, how="outer", suffixes=(" A", " B"), indicator=True
    )
    kept = both["_merge"].to_numpy()
    numbers = [both[f"value {side}"].to_numpy(dtype=float) for side in "AB"]
    texts = [both[f"text {side}"].astype("string").fillna("").to_numpy() for side in "AB"]
    nan = np.isnan(numbers[0]) & np.isnan(numbers[1])
    equal = (kept == "both") & ((numbers[0] == numbers[1]) | nan) & (texts[0] == texts[1])
    with np.errstate(invalid="ignore"):
        size = np.where(equal, 0.0, np.abs(numbers[0] - numbers[1]))
    size = np.where((kept == "both") & np.isnan(size), np.inf, size)  # NaN, or text, differs
    labels = [name for name in a.results()[0].item.labels if name in axes]
    told = both[labels].assign(
        both=kept == "both",
        equal=equal,
        **{"only A": kept == "left_only", "only B": kept == "right_only", "largest": size},
    )
    by_call = told.groupby(labels, sort=False, as_index=False).agg(
        {**dict.fromkeys(("both", "equal", "only A", "only B"), "sum"), "largest": "max"}
    )
    by_call = by_call[[c for c in by_call if not (by_call[c].astype(str) == "").all()]]
    apart = (kept == "both") & (size > tolerance)
    cells = both[apart].assign(difference=size[apart]).drop(columns="_merge")
    cells = cells.sort_values("difference", ascending=False, kind="stable")
    shown = [c for c in cells if not (cells[c].astype(str) == "").all()]
    return Difference(by_call, cells[shown].reset_index(drop=True), tolerance)
