"""Measure the patching engine beside its peers, in one run and on one machine.

    python scripts/fetch_models.py && python scripts/bench_patching.py

Prints tables, stores every number in ``scripts/results/bench_patching.json`` as soon as it is
measured, and with ``--readme`` writes the ratios into README.md. ``--rows`` measures some rows
and keeps what the file has of the others. nnsight and pyvene need environments of their own:
pass their interpreters with ``--nnsight`` and ``--pyvene``. Let nothing else run meanwhile:
work in many small steps, as the peers', suffers from it more than work in few large ones.

Our seconds are those of ``mi.activation_patching`` from end to end (base runs, labelled
result): median of three calls after a first one, which has a column of its own because it also
checks the engine and hashes the weights. A peer's seconds are those of its sweep alone, after
its clean run, in between ours: ours, theirs, ours, ours. (Where our first call took over three
minutes, one more has to do.)
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformer_lens import patching as oracle
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mechinterp as mi
from mechinterp.engine.sizes import as_bytes
from mechinterp.metrics import logit_diff
from mechinterp.results import versions
from mechinterp.tasks.frames import fill, packaged_rows

THREADS = 2
REPEATS = 3
LONG = 180.0  # seconds of a first call from which on one more call has to do
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PEERS = Path(__file__).parent / "bench_peers"
MARKS = "<!-- bench:start -->", "<!-- bench:end -->"
MEMORY = ("400MB", "600MB", "1.2GB")
# transformer-lens: its own sweep, the setter inside it, and the axes in its order.
SWEEPS = {
    ("resid_pre", "each"): (
        oracle.get_act_patch_resid_pre,
        oracle.layer_pos_patch_setter,
        ("layer", "pos"),
    ),
    ("z", "all"): (
        oracle.get_act_patch_attn_head_out_all_pos,
        oracle.layer_head_vector_patch_setter,
        ("layer", "head"),
    ),
    ("z", "each"): (
        oracle.get_act_patch_attn_head_out_by_pos,
        oracle.layer_pos_head_vector_patch_setter,
        ("layer", "pos", "head"),
    ),
}
POSITION = {"pos": "position"}  # what our results call it
SIDES = ("clean", "corrupted")
LENS = "transformer-lens"
LAYERS = [0, 10, 20, 29]
RESID = "`resid_pre`, layer x position, "
console = Console()


# ---------------------------------------------------------------------------------- the work


@dataclass(frozen=True, eq=False)
class Work:
    """One sweep over a model: what both sides compute."""

    model: Any
    task: mi.Task
    site: str
    positions: str = "each"
    screen: str | None = None

    def ours(self) -> tuple[float, mi.PatchingResult]:
        """Return seconds and result of one call."""
        start = time.perf_counter()
        result = mi.activation_patching(
            self.model, self.task, self.site, positions=self.positions, screen=self.screen
        )
        return time.perf_counter() - start, result

    @property
    def axes(self) -> tuple[str, ...]:
        """The swept axes, in the order in which values are compared."""
        return SWEEPS[self.site, self.positions][2]

    def values(self, result: mi.PatchingResult, name: str = "patched") -> np.ndarray:
        """Return the mean over prompts, with the axes in that order."""
        found = result.data[name]
        if "prompt" in found.dims:
            found = found.mean("prompt")
        return found.transpose(*(POSITION.get(axis, axis) for axis in self.axes)).values

    def plan(self) -> mi.Plan:
        """Return what the sweep should cost."""
        cells = mi.patching_cells(self.model, self.task, self.site, positions=self.positions)
        return mi.plan(self.model, self.task, cells, on="corrupted")


@dataclass(frozen=True, eq=False)
class Theirs:
    """A peer's seconds for the whole sweep, and values at some cells (all if None)."""

    seconds: float
    values: np.ndarray
    cells: np.ndarray | None = None
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Peer:
    """Who is compared with, the ratio aimed at, and how to run it (or why it is not run)."""

    name: str
    target: float | None
    run: Callable[[Work], Theirs] | None
    why_not: str = ""
    screen: str | None = None


def ioi_pair(model: Any, corruption: str) -> mi.Task:
    """Return the first packaged IOI prompt with names at random or the last one swapped."""
    row = packaged_rows("ioi")[0]
    clean = {"io": row["io"], "first_subject": row["subject"], "subject": row["subject"]}
    changes = {
        "swapped": {"subject": row["io"]},
        "random": {
            "io": row["other_io"],
            "first_subject": row["other_subject"],
            "subject": row["third"],
        },
    }[corruption]
    return mi.Task.from_strings(
        model,
        clean=[fill(row["frame"], clean)[0]],
        corrupted=[fill(row["frame"], clean | changes)[0]],
        answers=[f" {row['io']}"],
        distractors=[f" {row['subject']}"],
        name=f"ioi, {corruption}",
    )


def ioi_batch(model: Any, n: int) -> mi.Task:
    """Return ``n`` IOI prompts of the commonest length, all runs equally long."""
    task = mi.load_task("ioi", model)
    assert task.corrupted is not None
    clean, corrupted = task.clean.lengths.tolist(), task.corrupted.lengths.tolist()
    pairs = list(zip(clean, corrupted, strict=True))
    length = Counter(a for a, b in pairs if a == b).most_common(1)[0][0]
    return task[[i for i, pair in enumerate(pairs) if pair == (length, length)][:n]]


def random_task(model: Any, n: int, length: int) -> mi.Task:
    """Return prompts of random tokens; the corrupted ones differ in every token."""
    generator = torch.Generator().manual_seed(0)
    d_vocab = int(model.cfg.d_vocab)
    low = min(1000, d_vocab // 2)  # special tokens come first
    size = d_vocab - low

    def draw(*shape: int, least: int = 0) -> torch.Tensor:
        return torch.randint(least, size, shape, generator=generator)

    clean, answers = draw(n, length), draw(n)
    corrupted = (clean + draw(n, length, least=1)) % size
    distractors = (answers + draw(n, least=1)) % size
    return mi.Task.from_tokens(
        model,
        clean=(low + clean).tolist(),
        corrupted=(low + corrupted).tolist(),
        answers=(low + answers).tolist(),
        distractors=(low + distractors).tolist(),
        name=f"{n} prompts of {length} random tokens",
    )


def random_gpt2() -> Any:
    """Return a model shaped like GPT-2 small, with random weights."""
    torch.manual_seed(0)
    return mi.load_model(GPT2LMHeadModel(GPT2Config()).eval())


# ------------------------------------------------------------------------------------- peers


def transformer_lens(work: Work, sample: int | None = None) -> Theirs:
    """Run transformer-lens' sweep, or time a random sample of its cells and scale."""
    assert work.task.corrupted is not None
    sweep, setter, axes = SWEEPS[work.site, work.positions]
    tokens, targets = work.task.corrupted.tokens, work.task.targets()
    _, clean = work.model.run_with_cache(
        work.task.clean.tokens, names_filter=lambda hook: hook.endswith(work.site)
    )

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logit_diff(logits[:, -1], targets).mean()

    if sample is None:
        start = time.perf_counter()
        values = sweep(work.model, tokens, clean, metric)
        return Theirs(time.perf_counter() - start, values.numpy())
    sizes = {
        "layer": work.model.cfg.n_layers,
        "pos": tokens.shape[1],
        "head": work.model.cfg.n_heads,
    }
    every = np.array(list(product(*(range(sizes[axis]) for axis in axes))))
    chosen = every[np.random.default_rng(0).permutation(len(every))[:sample]]
    table = pd.DataFrame(chosen, columns=list(axes))
    start = time.perf_counter()
    values = oracle.generic_activation_patch(
        work.model, tokens, clean, metric, setter, work.site, index_df=table
    )
    seconds = (time.perf_counter() - start) * len(every) / len(chosen)
    note = f"{len(chosen)} of {len(every):,} cells, scaled"
    return Theirs(seconds, values.numpy(), chosen, note)


def plain_hugging_face(work: Work, folder: Path) -> Theirs:
    """Batch by hand: one layer's positions at once, logits at the last position only."""
    assert work.task.corrupted is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.model.layers
    stored: dict[int, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, i=i: stored.__setitem__(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    model(work.task.clean.tokens, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    tokens = work.task.corrupted.tokens
    n = tokens.shape[1]
    each = torch.arange(n)
    targets = work.task[[0] * n].targets()

    def patch(_: Any, args: tuple, layer: int) -> tuple:
        hidden = args[0].clone()
        hidden[each, each] = stored[layer][0]
        return (hidden, *args[1:])

    found = []
    start = time.perf_counter()
    for i, layer in enumerate(layers):
        handle = layer.register_forward_pre_hook(partial(patch, layer=i))
        logits = model(tokens.expand(n, -1), use_cache=False, logits_to_keep=1).logits
        handle.remove()
        found.append(logit_diff(logits[:, -1], targets))
    return Theirs(time.perf_counter() - start, torch.stack(found).numpy())


def elsewhere(work: Work, python: str, script: str, folder: Path) -> Theirs:
    """Run a peer in its own environment, on the same weights and token ids."""
    assert work.task.corrupted is not None and work.task.distractors is not None
    question = {
        "clean": work.task.clean.tokens[0].tolist(),
        "corrupted": work.task.corrupted.tokens[0].tolist(),
        "answer": int(work.task.answers[0, 0]),
        "distractor": int(work.task.distractors[0, 0]),
        "layers": list(range(work.model.cfg.n_layers)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "question.json"
        path.write_text(json.dumps(question), encoding="utf-8")
        done = subprocess.run(
            [python, str(PEERS / script), str(folder), str(path)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    return Theirs(
        answer["seconds"], np.array(answer["values"]), versions=dict(answer["versions"])
    )


# --------------------------------------------------------------------------------- measuring


def compare(work: Work, peer: Peer) -> dict[str, Any]:
    """Time both sides in turn and say how far apart their values are."""
    assert peer.run is not None
    first, result = work.ours()
    ours = [work.ours()[0]]
    theirs = peer.run(work)
    ours += [] if first > LONG else [work.ours()[0] for _ in range(REPEATS - 1)]
    seconds = statistics.median(ours)
    mine = work.values(result)
    comparable = np.ones(mine.shape, dtype=bool)
    if "exact" in result.data:  # screened values are not meant to be equal
        comparable = work.values(result, "exact")
    if theirs.cells is not None:
        index = tuple(theirs.cells.T)
        mine, comparable = mine[index], comparable[index]
    gaps = np.abs(mine - theirs.values)[comparable]
    logit = max(float(work.task.logits(work.model, s).abs().max()) for s in SIDES)
    return {
        "first_call_seconds": first,
        "seconds": seconds,
        "calls_seconds": ours,
        "peer_seconds": theirs.seconds,
        "ratio": theirs.seconds / seconds,
        "target": peer.target,
        "note": theirs.note,
        "cells_compared": int(gaps.size),
        "largest_difference": float(gaps.max()) if gaps.size else None,
        "tolerance": 1e-5 * logit,
        "path": result.convention.settings["path"],
        "measured": stamp(theirs.versions),
    }


def stamp(others: dict[str, str]) -> dict[str, Any]:
    """Return when, on what and with which versions something was measured."""
    peers = {name: v for name, v in others.items() if name not in versions()}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": cpu(),
        "threads": torch.get_num_threads(),
        "versions": versions() | peers,
    }


def cpu_info(key: str) -> str:
    """Return an entry of /proc/cpuinfo, or an empty string where there is none."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1].strip()
    return ""


def cpu() -> str:
    """Return the name of the processor."""
    return cpu_info("model name") or platform.processor() or platform.machine()


def matmul_rate(n: int = 2048) -> float:
    """Return floating-point operations per second of a large product on this machine."""
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[1:])


def timed(call: Callable[[], Any]) -> float:
    """Return the median seconds of three calls after a warm-up."""
    call()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def planned(plan: mi.Plan, seconds: float) -> dict[str, Any]:
    """Return what the plan said, beside the seconds that were measured."""
    return {
        "cells": plan.cells,
        "token_layers": plan.token_layers,
        "full_token_layers": plan.full_token_layers,
        "gflop": plan.flop / 1e9,
        "predicted_seconds": plan.seconds,
        "seconds": seconds,
        "ratio": plan.seconds / seconds,
        "within": 0.3,
    }


def rate(plan: mi.Plan, seconds: float, before: float, after: float) -> dict[str, float]:
    """Return the arithmetic rate reached, beside that of a large product on this machine."""
    return {
        "gflop_per_second": plan.flop / seconds / 1e9,
        "matmul_before": before / 1e9,
        "matmul_after": after / 1e9,
        "share": 2 * plan.flop / seconds / (before + after),
        "target": 0.5,
    }


# -------------------------------------------------------------------------------------- rows


@dataclass
class Bench:
    """What was measured so far, in a file that is whole at any moment."""

    out: Path
    found: dict[str, Any]
    folder: Path
    interpreters: dict[str, str | None]

    def row(self, name: str) -> dict[str, Any]:
        """Return the record of a row, with what an earlier run stored."""
        return self.found["rows"].setdefault(name, {})

    def save(self) -> None:
        """Write everything, or leave the file as it was."""
        part = self.out.with_name(f".{self.out.name}.part")
        part.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        part.replace(self.out)

    def model(self) -> Any:
        """Return a newly loaded model, on which nothing was checked or hashed yet."""
        gc.collect()
        return mi.load_model(self.folder)

    def measure(self, name: str, title: str, work: Work, peers: Sequence[Peer]) -> None:
        """Compare one sweep with each peer, and with its plan; store after each."""
        record = self.row(name)
        record["work"] = title
        known = record.setdefault("peers", {})
        for number, peer in enumerate(peers):
            if peer.run is None:
                known.setdefault(peer.name, {"why_not": peer.why_not, "target": peer.target})
                self.save()
                continue
            console.print(f"{name}: {peer.name}", highlight=False)
            before = matmul_rate()
            ours = compare(replace(work, screen=peer.screen), peer)
            after = matmul_rate()
            if number and peer.screen is None:
                ours["first_call_seconds"] = None  # only one call on a model is its first
            known[peer.name] = ours
            self.save()
            if not number:
                plan = work.plan()
                record["plan"] = planned(plan, ours["seconds"])
                record["rate"] = rate(plan, ours["seconds"], before, after)
                self.save()

    def apart(self, name: str, target: float | None, script: str) -> Peer:
        """Return a peer that runs under its own interpreter, if one was given."""
        python = self.interpreters[name]
        if python is None:
            return Peer(name, target, None, f"not measured: needs --{name} PYTHON")
        run = partial(elsewhere, python=python, script=script, folder=self.folder)
        return Peer(name, target, run)


def resid_random(bench: Bench) -> None:
    """Measure ``resid_pre``, names at random, beside all peers."""
    model = bench.model()
    work = Work(model, ioi_pair(model, "random"), "resid_pre")
    peers = [
        Peer(LENS, 25, transformer_lens),
        bench.apart("nnsight", 15, "nnsight_resid_pre.py"),
        Peer("Hugging Face, batched", 4, partial(plain_hugging_face, folder=bench.folder)),
        bench.apart("pyvene", None, "pyvene_resid_pre.py"),
    ]
    bench.measure("resid_random", RESID + "names at random", work, peers)


def resid_swapped(bench: Bench) -> None:
    """Measure ``resid_pre``, the last name swapped, so that runs share their beginning."""
    model = bench.model()
    work = Work(model, ioi_pair(model, "swapped"), "resid_pre")
    peers = [Peer(LENS, 100, transformer_lens)]
    bench.measure("resid_swapped", RESID + "last name swapped", work, peers)


def heads(bench: Bench) -> None:
    """Measure ``z``, layer by head."""
    model = bench.model()
    work = Work(model, ioi_pair(model, "swapped"), "z", "all")
    peers = [Peer(LENS, 25, transformer_lens)]
    bench.measure("heads", "`z`, layer x head, last name swapped", work, peers)


def heads_positions(bench: Bench) -> None:
    """Measure ``z``, layer by head by position."""
    model = bench.model()
    work = Work(model, ioi_pair(model, "swapped"), "z", "each")
    peers = [Peer(LENS, 150, partial(transformer_lens, sample=60))]
    title = "`z`, layer x head x position, last name swapped"
    bench.measure("heads_positions", title, work, peers)


def batch(bench: Bench) -> None:
    """Measure ``z``, layer by head, on 64 prompts at once, and with screening."""
    model = bench.model()
    work = Work(model, ioi_batch(model, 64), "z", "all")
    sampled = partial(transformer_lens, sample=12)
    name = f"{LENS}, screen=bfloat16"
    screened = Peer(name, 20, sampled, screen="bfloat16")
    if "amx_bf16" not in cpu_info("flags").split():
        screened = Peer(name, 20, None, "skipped: this processor has no AMX")
    peers = [Peer(LENS, 6, sampled), screened]
    bench.measure("batch", "`z`, layer x head, 64 prompts", work, peers)


def gpt2_shape(bench: Bench) -> None:
    """Measure ``resid_pre`` on a random model of GPT-2 small's shape."""
    model = random_gpt2()
    work = Work(model, random_task(model, 1, 15), "resid_pre")
    peers = [Peer(LENS, 18, transformer_lens)]
    title = "`resid_pre`, layer x position, GPT-2 small's shape, 15 random tokens"
    bench.measure("gpt2_shape", title, work, peers)


def spread(n: int, length: int) -> list[int]:
    """Return ``n`` evenly spaced positions of ``length``."""
    return [int((i + 0.5) * length / n) for i in range(n)]


def scaling(bench: Bench) -> None:
    """Measure how our seconds grow with length, cells and prompts."""
    model = bench.model()
    series = {
        "tokens": [(n, 1, n, LAYERS, 16) for n in (16, 32, 64, 128, 256, 512)],
        "cells": [(30 * n, 1, 16, None, n) for n in (1, 2, 4, 8, 16)],
        "prompts": [(n, n, 16, LAYERS, 16) for n in (1, 2, 4, 8, 16, 32)],
    }
    record = bench.row("scaling")
    for name, settings in series.items():
        console.print(f"our seconds against {name}")
        sizes, seconds = [], []
        for size, prompts, length, layers, n in settings:
            call = partial(
                mi.activation_patching,
                model,
                random_task(model, prompts, length),
                "resid_pre",
                layers=layers,
                positions=spread(n, length),
            )
            sizes.append(size)
            seconds.append(timed(call))
        exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        record[name] = {"sizes": sizes, "seconds": seconds, "exponent": exponent}
        record["measured"] = stamp({})
        bench.save()


def memory(bench: Bench) -> None:
    """Measure how far the peak grows under ``memory=``, each setting in a new process."""
    record = bench.row("memory")
    for setting in MEMORY:
        console.print(f"peak memory with memory={setting!r}", highlight=False)
        command = [sys.executable, __file__, "--grow", setting, "--folder", str(bench.folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record[setting] = json.loads(done.stdout.splitlines()[-1])
        record[setting]["measured"] = stamp({})
        bench.save()


def grow(folder: Path, setting: str) -> dict[str, Any]:
    """Return how far a sweep raises this process' peak above what the model takes."""
    model = mi.load_model(folder)
    task = ioi_batch(model, 32)
    sweep = mi.activation_patching  # imported before, not during
    for weight in model.parameters():  # a file that is mapped is resident once it was read
        weight.sum()
    gc.collect()
    with suppress(OSError, AttributeError):  # give back what reading the model left over
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = psutil.Process().memory_info().rss
    resets = forget_peak()
    start = time.perf_counter()
    sweep(model, task, "z", positions="all", memory=setting)
    seconds = time.perf_counter() - start
    growth = peak(resets) - before
    allowed = as_bytes(setting)
    return {
        "before_bytes": before,
        "growth_bytes": growth,
        "allowed_bytes": allowed,
        "ratio": growth / allowed,
        "target": 1.1,
        "peak_is_of": "the sweep" if resets else "the process",
        "seconds": seconds,
    }


def forget_peak() -> bool:
    """Let the kernel count this process' peak anew, so that loading does not hide the sweep."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def peak(resets: bool) -> int:
    """Return the largest resident size in bytes, since the last reset where there is one.

    ``ru_maxrss`` does not do after a reset: it remembers what the parent had before exec.
    """
    if resets:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if match := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


ROWS: dict[str, Callable[[Bench], None]] = {
    fn.__name__: fn
    for fn in (
        resid_random,
        resid_swapped,
        heads,
        heads_positions,
        batch,
        gpt2_shape,
        scaling,
        memory,
    )
}


# ------------------------------------------------------------------------------------ telling


def show(found: dict[str, Any]) -> None:
    """Print every number that is known."""
    rows = found["rows"]
    table = Table(
        "work",
        "peer",
        "first call s",
        "ours s",
        "peer s",
        "ratio",
        "target",
        "difference",
        "tolerance",
        title="mechinterp and its peers",
    )
    for record in rows.values():
        for name, each in record.get("peers", {}).items():
            table.add_row(record["work"], *line(name, each))
    console.print(table)

    table = Table(
        "work",
        "predicted s",
        "measured s",
        "ratio",
        "GFLOP/s",
        "matmul",
        "share",
        title="plan (target: within 30 %) and arithmetic rate (target: 0.5 in the first row)",
    )
    for record in rows.values():
        if "plan" in record:
            plan, reached = record["plan"], record["rate"]
            matmul = (reached["matmul_before"] + reached["matmul_after"]) / 2
            numbers = (plan["predicted_seconds"], plan["seconds"], plan["ratio"])
            more = (reached["gflop_per_second"], matmul, reached["share"])
            table.add_row(record["work"], *(f"{n:.3g}" for n in (*numbers, *more)))
    console.print(table)

    table = Table("against", "sizes", "our seconds", "exponent", title="scaling")
    for name, each in rows.get("scaling", {}).items():
        if name != "measured":
            seconds = " ".join(f"{s:.3g}" for s in each["seconds"])
            sizes = " ".join(map(str, each["sizes"]))
            table.add_row(name, sizes, seconds, f"{each['exponent']:.2f}")
    console.print(table)

    table = Table("memory=", "growth", "ratio", "target", "s", title="peak memory")
    for name, each in rows.get("memory", {}).items():
        growth = f"{each['growth_bytes'] / 1e6:.0f} MB"
        numbers = (
            f"{each['ratio']:.2f}",
            f"at most {each['target']}",
            f"{each['seconds']:.1f}",
        )
        table.add_row(name, growth, *numbers)
    console.print(table)


def line(peer: str, each: dict[str, Any]) -> list[str]:
    """Return the cells of one comparison."""
    target = "-" if each["target"] is None else f"{each['target']:g}x"
    if "ratio" not in each:
        return [f"{peer} ({each['why_not']})", "", "", "", "", target, "", ""]
    first, gap = each["first_call_seconds"], each["largest_difference"]
    return [
        f"{peer} ({each['note']})" if each["note"] else peer,
        "" if first is None else f"{first:.2f}",
        f"{each['seconds']:.2f}",
        f"{each['peer_seconds']:.1f}",
        f"{each['ratio']:.1f}x",
        target,
        "" if gap is None else f"{gap:.1g}",
        f"{each['tolerance']:.1g}",
    ]


def markdown(found: dict[str, Any]) -> str:
    """Return the comparisons as a table, and what they were measured on."""
    lines = [
        "| work | mechinterp s | peer s | ratio | target |",
        "| --- | --: | --: | --: | --: |",
    ]
    stamps = []
    for record in found["rows"].values():
        for name, each in record.get("peers", {}).items():
            peer, _, ours, theirs, ratio, target, *_ = line(name, each)
            work = f"{record['work']}; {peer}"
            lines.append(f"| {work} | {ours} | {theirs} | {ratio} | {target} |")
            stamps += [each["measured"]] if "measured" in each else []
    where = dict.fromkeys(
        f"{each['date']}, {each['machine']}, {each['threads']} threads" for each in stamps
    )
    used = {name: v for each in stamps for name, v in each["versions"].items()}
    told = ", ".join(f"{name} {v}" for name, v in used.items())
    return "\n".join([*lines, "", f"Measured {'; '.join(where)}; {told}."])


def write_readme(found: dict[str, Any], path: Path = README) -> None:
    """Put the table between the two marks."""
    text = path.read_text(encoding="utf-8")
    start, end = MARKS
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        sys.exit(f"{path.name} needs the lines {start} and {end}, in this order, once each")
    before, rest = text.split(start)
    after = rest.split(end)[1]
    path.write_text(f"{before}{start}\n{markdown(found)}\n{end}{after}", encoding="utf-8")


def beyond(found: dict[str, Any]) -> list[str]:
    """Return the comparisons whose values differ by more than the tolerance."""
    return [
        f"{row}, {name}"
        for row, record in found["rows"].items()
        for name, each in record.get("peers", {}).items()
        if (each.get("largest_difference") or 0) > each.get("tolerance", 0)
    ]


def main() -> None:
    """Measure the rows, store and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--nnsight", metavar="PYTHON", help="an interpreter that has nnsight")
    parser.add_argument("--pyvene", metavar="PYTHON", help="an interpreter that has pyvene")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{Path(__file__).stem}.json")
    parser.add_argument("--grow", help=argparse.SUPPRESS)  # what the memory row runs
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        if arguments.grow:
            print(json.dumps(grow(arguments.folder, arguments.grow)))
            return
        found: dict[str, Any] = {"model": "SmolLM2-135M-Instruct, float32", "rows": {}}
        if arguments.out.exists():
            found = json.loads(arguments.out.read_text(encoding="utf-8"))
        arguments.out.parent.mkdir(exist_ok=True, parents=True)
        busy = psutil.cpu_percent(interval=2)
        console.print(
            f"{cpu()}; torch.get_num_threads() is {torch.get_num_threads()}; before the start "
            f"the processor is {busy:.0f} % busy" + (" (too much)" if busy > 10 else ""),
            highlight=False,
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "smollm2-135m"
            if set(arguments.rows) != {"gpt2_shape"}:
                mi.save_model(mi.load_model("smollm2-135m"), folder)
            peers = {"nnsight": arguments.nnsight, "pyvene": arguments.pyvene}
            bench = Bench(arguments.out, found, folder, peers)
            for name in arguments.rows:
                ROWS[name](bench)
    found["rows"] = {name: found["rows"][name] for name in ROWS if name in found["rows"]}
    bench.save()
    show(found)
    if arguments.readme:
        write_readme(found)
    if apart := beyond(found):
        sys.exit(f"values differ by more than the tolerance: {'; '.join(apart)}")


if __name__ == "__main__":
    main()
