"""From a spec to its work items: every model loaded and all data read, but nothing run."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from mechinterp import results
from mechinterp.engine.sizes import as_bytes
from mechinterp.metrics import resolve_metrics
from mechinterp.models import fingerprint
from mechinterp.record import digest
from mechinterp.sweeps.items import Item
from mechinterp.sweeps.methods import (
    TAKES,
    cells_of,
    checked,
    is_seeded,
    layers_of,
    measures,
)
from mechinterp.sweeps.spec import HeadScoresOf, Model, Spec
from mechinterp.sweeps.workbench import Workbench
from mechinterp.tasks import tasks as tasks_of

ABLE = "able"


@dataclass(frozen=True)
class Planned:
    """The items of a spec in the order in which they are done, each once.

    ``left_out`` says which combinations of the grid make no sense, and why.
    """

    items: tuple[Item, ...]
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name for exactly these items."""
        keys = " ".join(item.key for item in self.items)
        return sha256(keys.encode()).hexdigest()


def planned(spec: Spec, bench: Workbench) -> Planned:
    """Return the items of a spec.

    Raises:
        ValueError: A model, task, site, metric or the like does not exist, or nothing is left
            to do. Before anything runs.
    """
    as_bytes(spec.memory)
    items: dict[str, Item] = {}
    left_out: list[str] = []
    for source, name in zip(spec.models, spec.model_names, strict=True):
        for item in _of_model(spec, source, name, bench, left_out):
            first = items.setdefault(item.key, item)
            if (seed := item.labels["seed"]) != (same := first.labels["seed"]):
                left_out.append(
                    f"{item.method} of {item.data['label']} with seed {seed}: nothing in it is "
                    f"drawn, so its numbers are those of seed {same}."
                )
    _check_told_apart(items.values())
    if not items:
        why = " ".join(dict.fromkeys(left_out)) or "No task is left."
        raise ValueError(f"there is nothing to do in this spec. {why}")
    return Planned(tuple(items.values()), tuple(dict.fromkeys(left_out)))


def _check_told_apart(items: Iterable[Item]) -> None:
    """Raise unless every call has labels of its own: tables and comparisons go by them."""
    calls: dict[str, Item] = {}
    for item in items:
        first = calls.setdefault(json.dumps(item.labels, sort_keys=True), item)
        if first.call != item.call:
            raise ValueError(
                f"the spec has the same call twice, cut into items in two ways: {item}. Name "
                "the method once."
            )


def _of_model(
    spec: Spec, source: Model, name: str, bench: Workbench, left_out: list[str]
) -> Iterator[Item]:
    described = source.model_dump(exclude_none=True)
    model = bench.model(described)
    described["name"] = name
    identity = {"fingerprint": fingerprint(model), "versions": results.versions()}
    for seed in spec.seeds:
        for method in spec.methods:
            if isinstance(method, HeadScoresOf) and method.on == "random_tokens":
                for told in method.grid():
                    checked(model, None, method.method, told)
                    yield _item(
                        described, {}, method.method, {**told, "seed": seed}, {}, {},
                        spec, identity, model, None,
                    )  # fmt: skip
    for data_described, data, lenient in _data(spec, described, model, bench, left_out):
        known = {**identity, "data_sha256": digest(data)}
        known["data_metric"] = list(resolve_metrics(None, data.metric))
        for method in spec.methods:
            if isinstance(method, HeadScoresOf) and method.on == "random_tokens":
                continue
            if not isinstance(data, TAKES[method.method]):
                kind = type(data).__name__
                left_out.append(f"{method.method} takes no {kind} ({data.name}).")
                continue
            metrics = spec.metrics or (None,) if measures(method.method) else (None,)
            senseless: dict[str, list[str]] = {}
            for told, metric in product(method.grid(), metrics):
                arguments = dict(told)
                if metric is not None:
                    resolve_metrics(metric)
                    arguments["metric"] = metric
                if is_seeded(method.method, arguments):
                    arguments["seed"] = data_described["seed"]
                try:
                    checked(model, data, method.method, arguments)
                except ValueError as error:
                    if not lenient:
                        raise
                    senseless.setdefault(str(error), []).append(_said(told))
                    continue
                split = (method.split or spec.split).model_dump(exclude_none=True)
                asked = {n: each for n, each in split.items() if n in method.splits(told)}
                asked, parts = _parts(model, data, method.method, arguments, asked)
                for part in parts:
                    yield _item(
                        described, data_described, method.method, arguments, part, asked,
                        spec, known, model, data,
                    )  # fmt: skip
            left_out += _left_out(f"{method.method} of {data.name}", senseless)


def _left_out(what: str, senseless: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield one sentence per reason for which calls make no sense."""
    for why, calls in senseless.items():
        rest = f" and {len(calls) - 1} other calls" if len(calls) > 1 else ""
        yield f"{what}, {calls[0]}{rest}: {why}"


def _item(
    model_described: Mapping[str, Any],
    data_described: Mapping[str, Any],
    method: str,
    arguments: Mapping[str, Any],
    part: Mapping[str, Any],
    split: Mapping[str, int],
    spec: Spec,
    identity: Mapping[str, Any],
    model: TransformerBridge,
    data: Any,
) -> Item:
    cells = cells_of(model, data, method, arguments, part)
    rows = part.get("prompts")
    prompts = 1 if data is None else len(data) if rows is None else rows[1] - rows[0]
    return Item(
        model=dict(model_described),
        data=dict(data_described),
        method=method,
        arguments=dict(arguments),
        part=dict(part),
        split=dict(split),
        identity=dict(identity),
        memory=spec.memory,
        cells=cells,
        work=cells * prompts,
    )


def _parts(
    model: TransformerBridge,
    data: Any,
    method: str,
    arguments: Mapping[str, Any],
    asked: Mapping[str, int],
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return how a call is really split, and its parts: prompts and layers."""
    rows: list[list[int] | None] = [None]
    if each := asked.get("prompts"):
        rows = [[at, min(at + each, len(data))] for at in range(0, len(data), each)]
    layers: list[list[int] | None] = [None]
    swept = layers_of(model, method, arguments)
    if (each := asked.get("layers")) and swept is not None:
        layers = [swept[at : at + each] for at in range(0, len(swept), each)]
    split = {n: each for n, each in asked.items() if n != "layers" or swept is not None}
    parts = [{"prompts": some, "layers": at} for some, at in product(rows, layers)]
    return split, [{k: v for k, v in part.items() if v is not None} for part in parts]


def _data(
    spec: Spec,
    described: Mapping[str, Any],
    model: TransformerBridge,
    bench: Workbench,
    left_out: list[str],
) -> Iterator[tuple[dict[str, Any], Any, bool]]:
    """Yield the description of every data set of the grid, the data, and whether it is able.

    Calls that make no sense on the able ones are left out, not an error.
    """
    counts: dict[str, int] = {}
    names: list[str] = []
    for name in spec.tasks or ():
        if name == ABLE:
            counts |= _able(spec, model, left_out)
            names += [each for each in counts if each not in names]
        else:
            names.append(name)
    for name, n, seed in product(names, spec.prompts or (None,), spec.seeds):
        most = counts.get(name)
        n = n if n is None or most is None else min(n, most)
        yield (*_one(name, n, seed, spec, described, bench), most is not None)
    for name, n, seed in product(spec.texts or (), spec.prompts or (None,), spec.seeds):
        yield (*_one(name, n, seed, spec, described, bench), False)


def _one(
    name: str,
    n: int | None,
    seed: int,
    spec: Spec,
    model_described: Mapping[str, Any],
    bench: Workbench,
) -> tuple[dict[str, Any], Any]:
    told = {"name": name, "n": n, "seed": seed, "context": spec.context}
    data = bench.data(model_described, told)
    return told | {"label": spec.data_name(name), "count": len(data)}, data


def _said(told: Mapping[str, Any]) -> str:
    shown = ("site", "direction", "kind", "method")
    return ", ".join(f"{name}={told[name]}" for name in shown if told.get(name))


def _able(spec: Spec, model: TransformerBridge, left_out: list[str]) -> dict[str, int]:
    """Return the tasks that ``mi.tasks`` says the model can do, and how many prompts."""
    found = {}
    for entry in tasks_of(model).entries:
        if not entry.runs:
            left_out.append(f"{model.cfg.model_name} cannot run {entry.name}.")
        elif (entry.accuracy or 0) < spec.least_accuracy:
            left_out.append(
                f"{model.cfg.model_name} gets {entry.accuracy:.0%} of {entry.name} right, "
                f"less than {spec.least_accuracy:.0%}."
            )
        else:
            found[entry.name] = entry.prompts
    return found
