"""A small sweep that can be killed: what the tests and ``scripts/sweep_killing.py`` share.

Children are forked from a server that has imported everything, so each starts in a moment.
"""

import multiprocessing as mp
import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mechinterp as mi
from mechinterp.sweeps import local, values
from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.values import read_result, read_written

SPEC: dict[str, Any] = {
    "name": "small",
    "models": "tiny",
    "tasks": "induction",
    "prompts": 4,
    "seeds": [0],
    "methods": [
        {"method": "head_ablation", "kinds": ["zero", "mean", "resample"]},
        {"method": "activation_patching", "sites": ["z", "resid_pre"], "positions": ["end"]},
        {"method": "attribution_patching", "sites": "z", "positions": "all"},
    ],
    "split": {"prompts": 2, "layers": 2},
}
SPEC["methods"][0]["split"] = {"layers": 1}
ITEMS = 3 * 3 + 2 * 4 + 2


def tiny() -> Any:
    """The model that the specs call ``tiny``, always with the same weights."""
    from zoo import zoo

    return zoo("native_attn")


@cache
def _own() -> Any:
    return tiny()  # the engine checks itself once per model


def run_small(out: str | Path, spec: dict[str, Any] | None = None, **told: Any) -> mi.SweepRun:
    """Run the small sweep, or another, in this process."""
    return mi.run(spec or SPEC, out, models={"tiny": _own()}, output="quiet", **told)


def stored(out: str | Path) -> dict[str, str]:
    """The digest of every item's numbers, from the files and checked against the ledger."""
    found = {}
    for row in mi.open_run(out).rows("done"):
        path = values.path_of(Path(out) / "values", row.key)
        read_result(path)
        found[row.key] = read_written(path).sha256
        assert row.sha256 == found[row.key]
    return found


# ----------------------------------------------------------------------------------- children


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(before: Callable[..., Any], at: int, after: bool) -> Callable[..., Any]:
    """A function that kills the process at its ``at``-th call, before it or after it."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at and not after:
            _die()
        found = before(*args, **kwargs)
        if len(calls) == at and after:
            _die()
        return found

    return call


# Where a process can be when it is killed: what is patched, and whether before or after it.
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "an item is claimed": (Ledger, "claim", True),
    "an item is computed": (local.Workbench, "do", True),
    "values are written under a temporary name": (values.pq, "write_table", True),
    "values are in their place but not entered": (Ledger, "done", False),
    "an item is entered": (Ledger, "done", True),
}


def _child(out: str, moment: str | None, at: int, started: Any, spec: Any = None) -> None:
    torch.set_num_threads(1)
    if moment is not None:
        owner, name, after = MOMENTS[moment]
        setattr(owner, name, _dying(getattr(owner, name), at, after))
    model = tiny()
    started.set()
    mi.run(spec or SPEC, out, models={"tiny": model}, output="quiet")


def context() -> Any:
    """Processes that are forked from one that has everything imported and no threads."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["sweeping", "zoo", "mechinterp.sweeps.run"])
    return found


def start(out: Path, *, moment: str | None = None, at: int = 1, spec: Any = None) -> Any:
    """Start a child that runs the small sweep; return it once it is about to."""
    made = context()
    started = made.Event()
    process = made.Process(target=_child, args=(str(out), moment, at, started, spec))
    process.start()
    while not started.wait(0.05) and process.is_alive():
        pass
    return process


def killed_at_random(out: Path, generator: random.Random, longest: float) -> bool:
    """Start a child, kill it at a random moment; return whether it was still at work."""
    process = start(out)
    time.sleep(generator.uniform(0, longest))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL
