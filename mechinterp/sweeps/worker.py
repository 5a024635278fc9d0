"""One worker of a run as a process of its own: ``python -m mechinterp.sweeps.worker``.

It shares the ledger with the others and tells its parent what happens in lines of JSON.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.local import ChangedError, DiskFullError, device_name, full_disk, work
from mechinterp.sweeps.places import place_of
from mechinterp.sweeps.workbench import Workbench

STOPPED = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Work on a plan until nothing is left; return 0, or 3 where the run cannot go on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("plan")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--allow-pickle", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    told = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _ended)
    torch.set_num_threads(told.threads)
    place = place_of(told.folder, make=False)
    bench = Workbench(told.allow_pickle, told.trust_remote_code)
    parent = os.getppid()

    def report(event: Mapping[str, Any]) -> None:
        if os.getppid() != parent:  # nobody listens any more
            raise KeyboardInterrupt
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    try:
        with full_disk(place.folder), Ledger(place) as ledger:
            ledger.register(told.threads, device_name())
            work(place, ledger, told.plan, bench, report)
    except (ChangedError, DiskFullError) as error:
        report({"event": "stopped", "error": str(error)})
        return STOPPED
    except KeyboardInterrupt:
        return 130
    return 0


def _ended(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
