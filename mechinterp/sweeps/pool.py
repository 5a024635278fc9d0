"""Several workers on this machine: processes that share the ledger, replaced when they die."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from queue import Queue
from typing import Any

import torch

import mechinterp
from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.local import StoppedError
from mechinterp.sweeps.places import Place
from mechinterp.sweeps.progress import Report
from mechinterp.sweeps.workbench import Workbench
from mechinterp.sweeps.worker import STOPPED

log = logging.getLogger(__name__)
MOST_DEATHS = 3  # of workers on one item, before it counts as failed


def work_in_processes(
    place: Place, ledger: Ledger, plan: str, bench: Workbench, report: Report, workers: int
) -> None:
    """Do a plan with several processes, which share this one's threads.

    A worker that dies is replaced and its item done again; an item on which three die is
    entered as failed.

    Raises:
        StoppedError: A worker could not go on: the disk is full, or weights changed.
    """
    pool = _Pool(place, plan, bench, max(1, torch.get_num_threads() // workers))
    for _ in range(workers):
        pool.start()
    deaths: Counter[str] = Counter()
    stopped = ""
    try:
        while pool.at_work:
            worker, event = pool.events.get()
            if event["event"] == "stopped":
                stopped = event["error"]
                continue
            if event["event"] != "ended":
                pool.doing[worker] = event["key"] if event["event"] == "started" else None
                report(event)
                continue
            del pool.at_work[worker]
            if (code := event["code"]) not in (0, STOPPED):
                key = pool.doing.get(worker)
                log.warning("a worker died (exit code %s); another takes its place", code)
                deaths[key or ""] += 1
                if deaths[key or ""] >= MOST_DEATHS:
                    if key is None:
                        raise StoppedError(
                            f"workers die before they do anything (exit code {code}). "
                            "Run with one worker to see why."
                        )
                    _give_up(ledger, key, code, report)
                pool.start()
    finally:
        pool.stop()
    if stopped:
        raise StoppedError(stopped)


def _give_up(ledger: Ledger, key: str, code: int, report: Report) -> None:
    error = f"{MOST_DEATHS} workers died on this item, the last with exit code {code}."
    item = ledger.give_up(key, error)
    told = {"event": "failed", "key": key, "item": str(item), "error": error}
    report({**told, "cells": item.cells, "work": item.work})


class _Pool:
    """Processes and what they say."""

    def __init__(self, place: Place, plan: str, bench: Workbench, threads: int) -> None:
        self.events: Queue[tuple[int, dict[str, Any]]] = Queue()
        self.doing: dict[int, str | None] = {}
        self.at_work: dict[int, subprocess.Popen[str]] = {}
        flags = {
            "--allow-pickle": bench.allow_pickle,
            "--trust-remote-code": bench.trust_remote_code,
        }
        self._command = [sys.executable, "-m", "mechinterp.sweeps.worker", str(place.folder)]
        self._command += [plan, "--threads", str(threads)]
        self._command += [flag for flag, asked in flags.items() if asked]
        here = str(Path(mechinterp.__file__).parents[1])
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._told = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        self._number = 0

    def start(self) -> None:
        """Start another worker."""
        self._number += 1
        process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, text=True, env=self._told
        )
        self.at_work[self._number] = process
        threading.Thread(target=self._listen, args=(self._number, process), daemon=True).start()

    def _listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as said:
            for line in said:
                if line.startswith("{"):
                    self.events.put((number, json.loads(line)))
        self.events.put((number, {"event": "ended", "code": process.wait()}))

    def stop(self) -> None:
        """End all that are still at work, and wait for them."""
        for process in list(self.at_work.values()):
            process.terminate()
        for process in list(self.at_work.values()):
            process.wait()
