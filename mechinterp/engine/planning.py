"""Planning: what a sweep will cost, before it runs, and how to split it to fit the memory.

Arithmetic and memory follow from the shapes; seconds from a second of timing the model's own
blocks at the sizes of the sweep's passes.
"""

import contextlib
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.engine.packing import Beginnings, Packing, Rows, pack
from mechinterp.engine.sweep import Sweep
from mechinterp.engine.wiring import Frame, Keys, Wiring
from mechinterp.models import is_causal
from mechinterp.sites import AXES, n_neurons

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LIBRARIES = 50e6  # threads' buffers, compiled kernels and the like, measured
_SHARING_ROWS = 4096
_CPU_TOKENS = 4096  # more at once is no faster on a CPU, and only takes memory


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that cost and memory depend on; of its largest layer."""

    n_layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    flops: float  # per token and layer, without attention itself
    itemsize: int
    unembeds_some: bool  # whether the logits of a few tokens can be computed alone


def shape_of(model: TransformerBridge) -> Shape:
    """Return the sizes of a model, read off its weights."""
    d_model, d_head = model.cfg.d_model, model.cfg.d_head
    heads = kv_heads = d_mlp = 0
    flops = 0.0
    for layer, block in enumerate(model.blocks):
        total = 0
        if "attn" in block.submodules:
            for name in ("q", "k", "v", "o"):
                weight = getattr(getattr(block.attn, name, None), "weight", None)
                if isinstance(weight, torch.Tensor):
                    total += weight.numel()
                    count = weight.numel() // (d_model * d_head)
                    heads = max(heads, count if name in "qo" else 0)
                    kv_heads = max(kv_heads, count if name == "k" else 0)
        if "mlp" in block.submodules:
            inner = block.mlp.original_component
            parts = inner.parameters() if block.mlp.name is not None else block.mlp.parameters()
            total += sum({p.data_ptr(): p.numel() for p in parts if p.ndim >= 2}.values())
            if "out" in block.mlp.submodules:
                d_mlp = max(d_mlp, n_neurons(model, layer))
        flops = max(flops, 2.0 * total)
    parameter = next(model.original_model.parameters())
    unembed = getattr(model, "unembed", None)
    return Shape(
        n_layers=len(model.blocks),
        d_model=d_model,
        heads=heads or 1,
        kv_heads=kv_heads or heads or 1,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=model.cfg.d_vocab_out if model.cfg.d_vocab_out > 0 else model.cfg.d_vocab,
        flops=flops,
        itemsize=parameter.dtype.itemsize,
        unembeds_some=is_causal(model)
        and isinstance(getattr(unembed, "original_component", None), torch.nn.Linear),
    )


# ----------------------------------------------------------------------------------- memory


def as_bytes(memory: int | float | str) -> int:
    """Return a number of bytes, given as such or as ``"2GB"`` or ``"512 MiB"``.

    Raises:
        ValueError: It is neither, or not positive.
    """
    found = float(memory) if isinstance(memory, int | float) else None
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?B?)\s*", memory.upper())
        if match and match[2] in _UNITS:
            found = float(match[1]) * _UNITS[match[2]]
    if found is None or not found > 0:
        raise ValueError(f"memory={memory!r} is no size. Pass bytes, or a size such as '2GB'.")
    return int(found)


def free_bytes(device: torch.device) -> int:
    """Return how many bytes the device has free now; on a CPU, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):  # no such limit here
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 1)


def default_budget(device: torch.device) -> int:
    """Return what a sweep may take unless told otherwise: 60 % of what is free."""
    return int(0.6 * free_bytes(device))


def pass_bytes(shape: Shape, bins: int, width: int, keys: int, rows: int, logits: int) -> int:
    """Return an upper estimate of what one pass holds at once, in bytes.

    Of a block: the residual stream and its norms, queries and the keys and values of every bin
    as the attention expands them, scores and pattern, or the MLP's inner layers; and the
    logits. Half as much again is what the allocator was measured to waste.
    """
    tokens = bins * width
    stream = 8 * tokens * shape.d_model
    attention = tokens * shape.heads * (4 * keys + 6 * shape.d_head)
    expanded = bins * keys * shape.d_head * (3 * shape.heads + 4 * shape.kv_heads)
    mlp = 4 * tokens * max(shape.d_mlp, shape.d_model)
    masks = 2 * tokens * keys * 4 + tokens * keys * 3
    answers = rows * (2 * shape.d_model + 3 * logits)
    numbers = stream + max(attention + expanded, mlp) + answers
    return int(1.5 * (shape.itemsize * numbers + masks))


def base_bytes(sweep: Sweep, shape: Shape) -> int:
    """Return what the base runs leave in memory, and what libraries take anyway, in bytes."""
    prompts, rows = sweep.prompts, sweep.rows
    nodes = int(prompts.lengths.sum())
    width = prompts.tokens.shape[1]
    starts = len(set(rows.start.tolist()))
    per_node = (starts + 1) * shape.d_model
    if (rows.first > 0).any():
        per_node += 2 * shape.n_layers * shape.kv_heads * shape.d_head
    sizes = {
        "d_model": shape.d_model,
        "d_head": shape.d_head,
        "head": shape.heads,
        "kv_head": shape.kv_heads,
        "neuron": shape.d_mlp,
        "key_pos": width,
    }
    for _, site, _ in sweep.promised():
        numbers = 1
        for axis in AXES[site]:
            numbers *= sizes.get(axis, 1)
        per_node += 2 * numbers  # once per node, once per padded prompt
    return int(_LIBRARIES + nodes * per_node * shape.itemsize)


# ------------------------------------------------------------------------------------ parts


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that go through the model together, in bins of ``width``."""

    rows: Rows
    width: int

    def packed(self, beginnings: Beginnings | None) -> Packing:
        """Return the rows in their bins."""
        return pack(self.rows, self.width, beginnings)


def parts(sweep: Sweep, rows: Rows, capacity: int, shape: Shape) -> list[Part]:
    """Split rows into parts of at most ``capacity`` columns, like lengths together.

    Within a length class, rows are in the order of their start, so that a part is either the
    whole sweep, joining layer by layer, or rows that enter together.
    """
    if not len(rows):
        return []
    beginnings = sweep.prompts.beginnings if sweep.shares else None
    longest = np.zeros(len(sweep.prompts), dtype=np.int64)
    np.maximum.at(longest, rows.prompt, rows.lengths)
    found = []
    remaining = np.arange(len(rows))
    while len(remaining):
        reach = longest[rows.prompt[remaining]]
        widest = int(reach.max())
        mine = reach > 0.85 * widest - 1
        chosen = rows[remaining[mine]]
        remaining = remaining[~mine]
        rank = sweep.prompts.beginnings.rank[chosen.prompt]
        chosen = chosen[np.lexsort((-chosen.lengths, rank, chosen.family, chosen.start))]
        if beginnings is None:
            chosen = chosen[np.lexsort((-chosen.lengths, chosen.prompt, chosen.start))]
        width = best_width(chosen, widest, capacity, shape, beginnings)
        total = np.cumsum(chosen.lengths)
        n_parts = max(1, -(-int(total[-1]) // max(capacity, width)))
        if beginnings is not None:  # what rows share is a table of rows by rows
            n_parts = max(n_parts, -(-len(chosen) // _SHARING_ROWS))
        which = np.minimum((total - 1) * n_parts // int(total[-1]), n_parts - 1)
        found += [Part(chosen[which == i], width) for i in range(n_parts) if (which == i).any()]
    return found


def best_width(
    rows: Rows, widest: int, capacity: int, shape: Shape, beginnings: Beginnings | None
) -> int:
    """Return the width of bins at which the rows cost least.

    Wider bins waste fewer columns and share base keys (or beginnings) among more rows, but
    attention is over the whole bin.
    """
    sample = rows[rows.start == rows.start[0]]
    if beginnings is not None:
        sample = rows[rows.family == rows.family[0]]
    total = int(sample.lengths.sum())
    options = {widest}
    for factor in (1.5, 2, 3, 4, 8, 16, 32):
        width = int(factor * widest)
        if width <= min(max(total, widest), capacity):
            options.add(width)
    sample = sample[np.arange(min(len(sample), 512))]
    costs = {}
    for width in sorted(options):
        packing = pack(sample, width, beginnings)
        keys = packing.prefix + width
        columns = packing.n_bins * width
        attention = (
            40 * shape.heads * (columns * keys + 0.5 * packing.n_bins * keys * shape.d_head)
        )
        costs[width] = columns * shape.flops + attention
    return min(costs, key=lambda width: costs[width])


def capacity(sweep: Sweep, shape: Shape, budget: int, logits: int) -> int:
    """Return how many columns a pass may have within ``budget`` bytes.

    Raises:
        ValueError: Not even one row fits; the message says what does.
    """
    rows = sweep.rows
    most = _CPU_TOKENS if sweep.device.type == "cpu" else 1 << 20
    if not len(rows):
        return most
    widest = int(rows.lengths.max())
    keys = widest + int(rows.first.max())
    left = budget - base_bytes(sweep, shape)
    one = pass_bytes(shape, 1, widest, keys, 1, logits)
    if left < one:
        needed = base_bytes(sweep, shape) + one
        raise ValueError(
            f"memory={_size(budget)} is too small for a single cell: the smallest that works "
            f"is {_size(needed)}. Allow that much, or run fewer or shorter prompts."
        )
    low, high = 1, max(1, most // widest)
    while low < high:
        middle = (low + high + 1) // 2
        fits = pass_bytes(shape, middle, widest, keys, middle * 2, logits) <= left
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * widest


def _size(n: float | int) -> str:
    """Return a size that is no smaller than ``n`` bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            shown = math.ceil(100 * n / size) / 100
            return f"{shown:.2f} {unit}"
    return f"{math.ceil(n)} B"


# ------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Plan:
    """What a sweep will cost on this machine. Nothing has run but a second of calibration.

    Attributes:
        cells: Counterfactual runs asked for.
        rows: Cells times prompts that can differ from the base run; the others are free.
        token_layers: Tokens times layers to compute, the base runs included.
        full_token_layers: What running the whole model once per cell would take.
        flop: Multiplications and additions of the blocks, in floating-point operations.
        seconds: Predicted time.
        peak_bytes: Upper estimate of the memory taken at once, without the model itself.
        passes: Trips through the layers that the memory splits the rows into.
        self_check: Whether the engine will first check itself on this kind of cell.
        path: ``"fast"``, ``"layers"`` (only unchanged layers are skipped: encoders) or
            ``"full"`` (whole runs), and why if it is not the fast one.
    """

    cells: int
    rows: int
    token_layers: int
    full_token_layers: int
    flop: float
    seconds: float
    peak_bytes: int
    passes: int
    self_check: bool
    path: str
    why: str = ""

    def __str__(self) -> str:
        share = self.token_layers / max(self.full_token_layers, 1)
        lines = [
            f"{self.cells:,} cells: {self.rows:,} runs of one prompt that can change something",
            f"{self.token_layers:,} token-layers, {share:.1%} of running every cell in full",
            f"{self.flop / 1e9:,.1f} GFLOP in {self.passes:,} pass" + "es" * (self.passes != 1),
            f"about {self.seconds:,.1f} s and at most {_size(self.peak_bytes)}",
            f"path: {self.path}" + (f" ({self.why})" if self.why else ""),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "<pre>" + str(self) + "</pre>"


@dataclass(frozen=True)
class Calibration:
    """Seconds of one block at several numbers of columns, and of the two ends."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    open: float
    close: float
    close_row: float

    def block(self, tokens: float | int) -> float:
        """Return the seconds of a block on so many columns."""
        if tokens >= self.tokens[-1]:
            return self.seconds[-1] * tokens / self.tokens[-1]
        return float(np.interp(tokens, self.tokens, self.seconds))


def calibrated(
    wiring: Wiring, sizes: Sequence[tuple[int, int, int]], logits: Any
) -> Calibration:
    """Time the model's own block and its ends, for about a second.

    ``sizes`` are (bins, width, prefix) to time; ``logits`` the vocabulary to unembed.
    """
    layer = wiring.n_layers // 2
    tokens, seconds = [], []
    end = time.perf_counter() + 1.0
    for bins, width, prefix in sorted(set(sizes), key=lambda s: s[0] * s[1]):
        seconds.append(_timed_block(wiring, layer, bins, width, prefix, end))
        tokens.append(bins * width)
    hidden = torch.zeros(64, 1, wiring.example_hidden.shape[-1]).to(wiring.example_hidden)
    one, many = (
        _best(lambda n=n: wiring.close(hidden[:n], vocabulary=logits), 2) for n in (1, 64)
    )
    opened = _best(lambda: wiring.open(wiring.example[None]), 2)
    return Calibration(tuple(tokens), tuple(seconds), opened, one, max(0.0, (many - one) / 63))


def _timed_block(
    wiring: Wiring, layer: int, bins: int, width: int, prefix: int, end: float
) -> float:
    d_model = wiring.example_hidden.shape[-1]
    hidden = torch.randn(bins, width, d_model).to(wiring.example_hidden)
    position = np.tile(np.arange(width) % wiring.width, (bins, 1))
    keys = np.tile(np.arange(prefix + width) % wiring.width, (bins, 1))
    frame = Frame(wiring, position, np.ones((bins, width, prefix + width), dtype=bool), keys)
    before = None
    if prefix:
        probe = Keys()
        wiring.block(layer, hidden[:1], frame, probe)
        assert probe.own is not None
        k, v = (own[:, :, :1].expand(bins, -1, prefix, -1) for own in probe.own)
        before = (k, v)
    wiring.block(layer, hidden, frame, Keys(before))
    found = []
    while len(found) < 2 or (len(found) < 5 and time.perf_counter() < end):
        start = time.perf_counter()
        wiring.block(layer, hidden, frame, Keys(before))
        _synchronise(wiring.device)
        found.append(time.perf_counter() - start)
        if time.perf_counter() > end and found:
            break
    return float(np.median(found))


def _best(call: Any, times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
