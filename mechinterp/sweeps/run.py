"""Running a spec: plan it, enter the plan, do what is not done yet."""

import json
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._files import written_beside
from mechinterp.hooks.taps import attached
from mechinterp.names import unknown
from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.local import device_name, full_disk, work
from mechinterp.sweeps.opened import SweepRun
from mechinterp.sweeps.opening import open_ledger
from mechinterp.sweeps.places import Place, inside, place_of
from mechinterp.sweeps.planning import Planned, planned
from mechinterp.sweeps.progress import Output, Tally, reporting
from mechinterp.sweeps.spec import Spec, read_spec
from mechinterp.sweeps.workbench import Workbench

log = logging.getLogger(__name__)
BACKENDS = ("local", "ray")
OUTPUTS = ("progress", "json", "quiet")


def run(
    spec: Spec | Mapping[str, Any] | str | PathLike[str],
    out: str | PathLike[str],
    *,
    models: Mapping[str, TransformerBridge] | None = None,
    workers: int | None = None,
    backend: str = "local",
    address: str | None = None,
    retry_failed: bool = False,
    output: Output = "progress",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> SweepRun:
    """Run a sweep in a folder, from where it stopped the last time.

    What is in the folder already is not done again, as long as weights, tokens, arguments and
    package versions are the same; a larger grid runs only what is new. Several processes may
    run on one folder at a time: they share the work.

    Args:
        spec: A YAML or TOML file, or the same as a mapping; ``mechinterp init`` writes one with
            comments.
        out: The run's folder, on a local disk; made where it is not there.
        models: Bridges that are loaded already, by the ``source`` that the spec calls them.
        workers: Processes on this machine, which share its threads; by default this process
            does the work itself. Of a Ray cluster, actors: by default one per GPU, or per CPU.
        backend: ``"local"``, or ``"ray"`` for a cluster (needs ``mechinterp-toolkit[ray]``).
        address: Of the Ray cluster; a new local one by default.
        retry_failed: Do items again that failed before.
        output: ``"progress"`` bar, ``"json"`` lines on standard output, or ``"quiet"``.
        allow_pickle: Let models be read whose weights are pickled, which can run any code.
        trust_remote_code: Let models run their own code.

    Returns:
        The run, as ``mi.open_run`` gives it. Failed items are in its ``failures``.

    Raises:
        FileNotFoundError: There is no such spec file, data file or model.
        ValueError: The spec is wrong, or nothing of it can be done; the folder is on a network
            file system. Before anything runs.
        DiskFullError: The disk is full; everything stored is intact.
    """
    chosen = read_spec(spec)
    if backend not in BACKENDS:
        raise ValueError(unknown("backend", backend, BACKENDS))
    if output not in OUTPUTS:
        raise ValueError(unknown("output", output, OUTPUTS))
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} does nothing. Pass at least 1.")
    if models and (workers not in (None, 1) or backend != "local"):
        raise ValueError("models= are of this process. Leave workers and backend as they are.")
    for name, model in dict(models or {}).items():
        if attached(model):
            raise ValueError(
                f"edits or functions are in force on models[{name!r}], and an item's key says "
                "nothing of them. Run outside that block."
            )
    bench = Workbench(allow_pickle, trust_remote_code, given=dict(models or {}))
    with full_disk(out):
        place = place_of(out, make=True)
        if chosen.export is not None:
            inside(place, place.folder / chosen.export)
        plan = planned(chosen, bench)
        for why in plan.left_out:
            log.warning("left out: %s", why)
        with open_ledger(place) as ledger:
            ledger.plan(plan.name, json.dumps(chosen.model_dump(mode="json")), plan.items)
            if retry_failed:
                ledger.retry(plan.name)
            tally = tally_of(ledger, plan)
            with reporting(output, tally) as report:
                report({"event": "planned", "cells": sum(i.cells for i in plan.items)})
                if workers in (None, 1) and backend == "local":
                    ledger.register(torch.get_num_threads(), device_name())
                    work(place, ledger, plan.name, bench, report)
                elif workers is not None and backend == "local":
                    from mechinterp.sweeps.pool import work_in_processes

                    bench.forget()
                    work_in_processes(place, ledger, plan.name, bench, report, workers)
                else:
                    from mechinterp.sweeps.ray_backend import work_on_ray

                    work_on_ray(place, ledger, plan.name, bench, report, workers, address)
                report({"event": "finished", "failed": tally.failed})
        done = SweepRun(place, plan=plan.name)
        if chosen.export is not None:
            export(done, place, chosen.export)
        return done


def tally_of(ledger: Ledger, plan: Planned) -> Tally:
    """Return how far a plan is before this run does anything."""
    counts = ledger.counts(plan.name)
    ended = [counts[state] for state in ("done", "failed") if state in counts]
    return Tally(
        items=len(plan.items),
        done=sum(items for items, _, _ in ended),
        work=sum(work for _, _, work in counts.values()),
        work_done=sum(work for _, _, work in ended),
    )


def export(done: SweepRun, place: Place, name: str) -> Path:
    """Write the table of all numbers into the run's folder."""
    path = place.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    inside(place, path)
    frame = done.to_frame()
    with written_beside(path, durable=True) as part:
        if path.suffix == ".csv":
            frame.to_csv(part, index=False)
        else:
            frame.to_parquet(part, index=False)
    return path
