"""What a spec will cost on this machine, before any of it runs: ``--dry-run``."""

import time
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.engine import plan
from mechinterp.engine.sizes import as_bytes, size
from mechinterp.models import forward
from mechinterp.sweeps.items import Item
from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.methods import engine_cells, passes_of
from mechinterp.sweeps.places import place_of
from mechinterp.sweeps.planning import planned
from mechinterp.sweeps.progress import span
from mechinterp.sweeps.spec import Spec
from mechinterp.sweeps.workbench import Workbench
from mechinterp.tasks import Task

FEWEST, MOST = 2.0, 10.0  # seconds that a good item takes
_ITEM_BYTES, _NUMBER_BYTES = 9_000, 9  # of a Parquet file, measured


@dataclass(frozen=True)
class Estimate:
    """What is left to do of a spec, and what it takes on this machine with one worker.

    ``seconds`` are those of the engine's own plan where it has one (patching, ablation,
    pruning), else of so many forward passes, which is rough. ``longest`` and ``shortest`` are
    those of one item.
    """

    items: int
    done: int
    cells: int
    seconds: float
    longest: float
    shortest: float
    memory: int
    disk: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.items:,} items to do, {self.done:,} done already: {self.cells:,} cells",
            f"about {span(self.seconds)} for one worker, items of {self.shortest:.1f} to "
            f"{self.longest:.1f} s",
            f"at most {size(self.memory)} of memory with the model, {size(self.disk)} on disk",
        ]
        if self.longest > MOST:
            lines.append(
                f"Items of over {MOST:.0f} s lose much when a run is ended: cut them with "
                "split: {prompts: ...} or {layers: ...}."
            )
        elif 0 < self.longest < FEWEST and self.items > 1:
            lines.append(f"Items of under {FEWEST:.0f} s are more than needed: cut them less.")
        return "\n".join([*lines, *(f"left out: {why}" for why in self.left_out)])


def estimated(
    spec: Spec,
    out: str | PathLike[str] | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Estimate:
    """Return what is left to do of a spec in a folder, and what that takes here.

    The models are loaded, and their blocks timed for a second per method and site.

    Raises:
        ValueError: As ``mi.run``.
    """
    bench = Workbench(allow_pickle, trust_remote_code)
    plan_ = planned(spec, bench)
    done = _done(out)
    todo = [item for item in plan_.items if item.key not in done]
    rates: dict[tuple[Any, ...], tuple[float, int]] = {}
    seconds, memory = [], 0
    for item in todo:
        told = item.arguments
        kind = (item.model["source"], item.method, told.get("site"), told.get("method"))
        kind = (*kind, item.data.get("label"))
        if kind not in rates:
            rates[kind] = _rate(item, bench)
        per_work, peak = rates[kind]
        seconds.append(per_work * item.work)
        memory = max(memory, peak)
    return Estimate(
        items=len(todo),
        done=len(plan_.items) - len(todo),
        cells=sum(item.cells for item in todo),
        seconds=sum(seconds),
        longest=max(seconds, default=0.0),
        shortest=min(seconds, default=0.0),
        memory=memory,
        disk=sum(_ITEM_BYTES + _NUMBER_BYTES * item.work for item in todo),
        left_out=plan_.left_out,
    )


def _done(out: str | PathLike[str] | None) -> set[str]:
    if out is None:
        return set()
    try:
        place = place_of(out, make=False)
    except FileNotFoundError:
        return set()
    if not place.ledger.exists():
        return set()
    with Ledger(place) as ledger:
        return set(ledger.digests())


def _rate(item: Item, bench: Workbench) -> tuple[float, int]:
    """Return seconds per cell and prompt of such an item, and the most bytes it takes."""
    model, data = bench.model(item.model), bench.data(item.model, item.data)
    rows = item.part.get("prompts")
    some = data if rows is None or data is None else data[slice(*rows)]
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    cells = engine_cells(model, some, item.method, item.arguments, item.part)
    if cells is not None:
        on, listed, base = cells
        metric = item.arguments.get("metric")
        found = plan(model, on, listed, on=base, metric=metric, memory=item.memory)
        rows_of = len(listed) * len(on)
        return found.seconds / rows_of, found.peak_bytes + weights
    seconds = _forward_seconds(model, some) * passes_of(model, item.method, item.arguments)
    return seconds / max(item.work, 1), as_bytes(item.memory) + weights


@torch.no_grad()
def _forward_seconds(model: TransformerBridge, data: Any) -> float:
    """Return the seconds of one forward pass over the data, judged by a few prompts."""
    if data is None:
        tokens, n = torch.zeros(4, 100, dtype=torch.long), 50
    else:
        prompts = data.clean if isinstance(data, Task) else data.prompts
        tokens, n = prompts.tokens[:8], len(prompts)
    tokens = tokens[:, : model.cfg.n_ctx]
    forward(model, tokens)
    start = time.perf_counter()
    forward(model, tokens)
    return (time.perf_counter() - start) * n / len(tokens)
