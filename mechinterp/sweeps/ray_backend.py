"""A run on a Ray cluster: actors compute, the driver claims items and writes the ledger.

Each actor holds a model whose weights it got from the object store once. One item at a time
goes to each; an actor that dies is replaced and its item done again.
"""

import logging
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mechinterp.sweeps.items import Item
from mechinterp.sweeps.ledger import Ledger
from mechinterp.sweeps.local import StoppedError, fail, full_disk, store, this_machine
from mechinterp.sweeps.places import Place
from mechinterp.sweeps.pool import MOST_DEATHS
from mechinterp.sweeps.progress import Report
from mechinterp.sweeps.shipping import Shipped, packed, unpacked
from mechinterp.sweeps.workbench import ChangedError, Workbench

log = logging.getLogger(__name__)
_PAUSE = 0.5
_PATIENCE = 30.0  # seconds before it is said that workers do not start


class Computer:
    """What runs inside an actor: a workbench whose models come out of the object store.

    A model with a ``device_map`` is too large to be one object on one device: each actor reads
    it from its files, and accelerate spreads it over the devices that the actor was given.
    """

    def __init__(self, allow_pickle: bool, trust_remote_code: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        self._bench = Workbench(allow_pickle, trust_remote_code)
        self._device = "cuda" if torch.cuda.is_available() else None

    def do(self, item: str, weights: list[Any]) -> tuple[str, Any, float, dict[str, Any]]:
        """Return ``"done"`` with the result, or ``"failed"`` or ``"changed"`` with why.

        Then its seconds, and what it was done on.
        """
        told = Item.from_json(item)
        try:
            if weights and not self._bench.holds(told.model):
                self._bench.forget()  # before the next one takes memory
                self._bench.take(told.model, unpacked(_fetched(weights[0]), self._device))
            start = time.perf_counter()
            found = self._bench.do(told)
            return "done", found, time.perf_counter() - start, this_machine()
        except ChangedError as error:
            return "changed", str(error), 0.0, {}
        except Exception:
            return "failed", traceback.format_exc(), 0.0, {}


def _fetched(weights: Any) -> Shipped:
    import ray

    return ray.get(weights)


def work_on_ray(
    place: Place,
    ledger: Ledger,
    plan: str,
    bench: Workbench,
    report: Report,
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Do a plan with actors on a Ray cluster: the one at ``address``, or a new local one.

    Args:
        place: The run's folder, on the driver's disk.
        ledger: Written by this process alone.
        plan: Which items.
        bench: Has the models of the plan, or can load them.
        report: Takes what happens.
        workers: Actors; by default one per GPU of the cluster, or per CPU where it has none.
        address: ``"auto"``, ``"ray://host:10001"`` or the like.

    Raises:
        ImportError: Ray is not installed.
        ValueError: The cluster has fewer CPUs than there are to be workers.
        StoppedError: Weights or packages of the actors are not those of the plan.
    """
    with _cluster(address, workers) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        size = workers or gpus or cpus
        if size > cpus:
            raise ValueError(
                f"{size} workers need a CPU each, but the cluster has {cpus}, so Ray would "
                f"never start them all. Pass workers={cpus} or fewer."
            )
        crew = _Crew(ray, bench, size, gpus, cpus)
        ledger.register(crew.threads, f"ray, {'GPUs' if gpus else 'CPUs'}")
        with full_disk(place.folder):
            try:
                _work(crew, place, ledger, plan, report)
            finally:
                crew.dismiss()


def _work(crew: "_Crew", place: Place, ledger: Ledger, plan: str, report: Report) -> None:
    deaths: Counter[str] = Counter()
    waiting: list[Item] = []
    told = time.monotonic()
    while True:
        for actor in crew.idle():
            item = waiting.pop() if waiting else ledger.claim(plan)
            if item is None:
                break
            report({"event": "started", "key": item.key, "item": str(item)})
            crew.give(actor, item)
        if not crew.busy:
            if not ledger.waiting_for_others(plan):
                return
            time.sleep(_PAUSE)
        if time.monotonic() - told > _PATIENCE and (missing := crew.not_started()):
            told = time.monotonic()
            log.warning(
                "%d of %d workers wait for the cluster to have a place for them: others use "
                "it, or its nodes have too few free CPUs or GPUs.",
                missing,
                crew.size,
            )
        for item, found in crew.ended():
            if found is None:
                deaths[item.key] += 1
                log.warning("a worker died on %s; another takes its place", item)
                if deaths[item.key] < MOST_DEATHS:
                    waiting.append(item)
                else:
                    fail(ledger, item, f"{MOST_DEATHS} workers died on this item.", report)
                continue
            state, value, seconds, machine = found
            if state == "changed":
                raise StoppedError(value)
            if state == "failed":
                fail(ledger, item, value, report)
            else:
                store(place, ledger, item, value, seconds, machine, report)


class _Crew:
    """The actors, and what each is doing."""

    def __init__(self, ray: Any, bench: Workbench, size: int, gpus: int, cpus: int) -> None:
        self._ray, self._bench = ray, bench
        each = gpus / size if gpus else 0
        # A part of a GPU, or whole ones: Ray takes no 1.5.
        self._asks = {"num_cpus": 1, "num_gpus": each if each < 1 else int(each)}
        self.threads = 1 if gpus else max(1, cpus // size)
        self._ready: dict[Any, Any] = {}
        self._actors = [self._hire() for _ in range(size)]
        self.busy: dict[Any, tuple[Any, Item]] = {}
        self._weights: dict[str, Any] = {}

    def _hire(self) -> Any:
        kind = self._ray.remote(Computer).options(max_restarts=0, **self._asks)
        trusted = self._bench.allow_pickle, self._bench.trust_remote_code
        actor = kind.remote(*trusted, self.threads)
        self._ready[actor.__ray_ready__.remote()] = actor
        return actor

    @property
    def size(self) -> int:
        """How many actors there are to be."""
        return len(self._actors)

    def not_started(self) -> int:
        """Return how many actors the cluster has not started yet."""
        if self._ready:
            started, _ = self._ray.wait(
                list(self._ready), num_returns=len(self._ready), timeout=0
            )
            for reference in started:
                del self._ready[reference]
        return len(self._ready)

    def idle(self) -> Iterator[Any]:
        """Yield the actors that have nothing to do."""
        at_work = {id(actor) for actor, _ in self.busy.values()}
        yield from [actor for actor in self._actors if id(actor) not in at_work]

    def give(self, actor: Any, item: Item) -> None:
        """Let an actor do an item."""
        self.busy[actor.do.remote(item.to_json(), self._weights_of(item))] = actor, item

    def _weights_of(self, item: Item) -> list[Any]:
        """Return the reference to an item's model in the object store, put there once."""
        if item.model.get("device_map") is not None:
            return []
        name = item.identity["fingerprint"]
        if name not in self._weights:
            self._weights[name] = self._ray.put(packed(self._bench.model(item.model)))
        return [self._weights[name]]  # in a list, so that it is fetched by who lacks it only

    def ended(self) -> list[tuple[Item, tuple[str, Any, float, dict[str, Any]] | None]]:
        """Return the items that ended meanwhile, and None for what if their actor died."""
        if not self.busy:
            return []
        found = []
        ready, _ = self._ray.wait(list(self.busy), timeout=_PAUSE)
        for reference in ready:
            actor, item = self.busy.pop(reference)
            try:
                found.append((item, self._ray.get(reference)))
            except self._ray.exceptions.RayActorError:
                self._actors[self._actors.index(actor)] = self._hire()
                found.append((item, None))
        return found

    def dismiss(self) -> None:
        """End all actors."""
        for actor in self._actors:
            self._ray.kill(actor)


@contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    """Yield ray, connected; disconnect again unless it was connected before."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "--backend ray needs Ray: pip install 'mechinterp-toolkit[ray]'."
        ) from error
    if ray.is_initialized():
        yield ray
        return
    local: Mapping[str, Any] = {} if address else {"num_cpus": workers}
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        **local,
    )
    try:
        yield ray
    finally:
        ray.shutdown()
