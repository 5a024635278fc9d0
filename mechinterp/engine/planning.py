"""Planning: what a sweep will cost, before it runs.

Arithmetic and memory follow from the shapes; seconds from a second of timing the model's own
blocks at the sizes of the sweep's passes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mechinterp.engine.checking import unchecked
from mechinterp.engine.execute import Engine
from mechinterp.engine.parts import Part, parts
from mechinterp.engine.reading import Reader
from mechinterp.engine.sizes import base_bytes, pass_bytes, size
from mechinterp.engine.wiring import Frame, Keys, Wiring
from mechinterp.hooks.taps import muted

_LAST_LAYER = 0.35  # share of a block that the last layer takes
_ROW_SECONDS = 1e-4  # laying out one row and writing its edits, measured


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
        path: ``"fast"``, ``"layers"`` (only unchanged layers are skipped: encoders and text) or
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
            f"about {self.seconds:,.1f} s and at most {size(self.peak_bytes)}",
            f"path: {self.path}" + (f" ({self.why})" if self.why else ""),
        ]
        return "\n".join(lines)

    def __add__(self, other: "Plan") -> "Plan":
        """Return the plan of two sweeps, one after the other."""
        slowest = max(self, other, key=lambda plan: ("fast", "layers", "full").index(plan.path))
        sums = ("cells", "rows", "token_layers", "full_token_layers", "flop", "seconds")
        return replace(
            slowest,
            **{name: getattr(self, name) + getattr(other, name) for name in (*sums, "passes")},
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            self_check=self.self_check or other.self_check,
        )

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
    wiring: Wiring, sizes: Sequence[tuple[int, int, int]], logits: Any, *, whole: bool
) -> Calibration:
    """Time the model's own block and its ends, for about a second.

    ``sizes`` are (bins, width, prefix) to time, ``logits`` the vocabulary to unembed; with
    ``whole``, bins are whole prompts.
    """
    end = time.perf_counter() + 1.0
    tokens, seconds = [], []
    for bins, width, prefix in sorted(set(sizes), key=lambda each: each[0] * each[1]):
        call = _whole_block(wiring, bins) if whole else _block(wiring, bins, width, prefix)
        tokens.append(bins * (wiring.width if whole else width))
        seconds.append(_timed(call, wiring.device, end))
    d_model = wiring.example_hidden.shape[-1]
    hidden = torch.zeros(64, 1, d_model).to(wiring.example_hidden)
    if whole:
        hidden = hidden.expand(-1, wiring.width, -1)
    one, many = (
        _timed(partial(wiring.close, hidden[:n], vocabulary=logits), wiring.device, end)
        for n in (1, 64)
    )
    opened = _timed(partial(wiring.open, wiring.example[None]), wiring.device, end)
    per_row = max(0.0, (many - one) / 63)
    return Calibration(tuple(tokens), tuple(seconds), opened, one, per_row)


def _block(wiring: Wiring, bins: int, width: int, prefix: int) -> Callable[[], Any]:
    """Return a call of a middle block on so many bins, all of whose keys are visible."""
    layer, d_model = wiring.n_layers // 2, wiring.example_hidden.shape[-1]
    hidden = torch.randn(bins, width, d_model).to(wiring.example_hidden)
    position = np.tile(np.arange(width) % wiring.width, (bins, 1))
    keys = np.tile(np.arange(prefix + width) % wiring.width, (bins, 1))
    frame = Frame(wiring, position, np.ones((bins, width, prefix + width), dtype=bool), keys)
    before = None
    if prefix:
        probe = Keys()
        alone = Frame(
            wiring, position[:1], np.ones((1, width, width), dtype=bool), position[:1]
        )
        wiring.block(layer, hidden[:1], alone, probe)
        assert probe.own is not None
        k, v = (own[:, :, :1].expand(bins, -1, prefix, -1) for own in probe.own)
        before = (k, v)
    return lambda: wiring.block(layer, hidden, frame, Keys(before))


def _whole_block(wiring: Wiring, bins: int) -> Callable[[], Any]:
    hidden = torch.randn(bins, *wiring.example_hidden.shape[1:]).to(wiring.example_hidden)
    rows = torch.zeros(bins, dtype=torch.long)
    return lambda: wiring.whole_block(wiring.n_layers // 2, hidden, rows)


def _timed(call: Callable[[], Any], device: torch.device, end: float) -> float:
    """Return the median seconds of a call: twice after warming up, more while there is time."""
    call()
    found = []
    while len(found) < 2 or (len(found) < 5 and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        _synchronise(device)
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def plan_of(engine: Engine, reader: Reader) -> Plan:
    """Return what the sweep will cost, after a second of calibration."""
    start = time.perf_counter()
    sweep, shape, rows = engine.sweep, engine.shape, engine.sweep.rows
    assert sweep.fingerprint  # a sweep takes it too
    prepared = time.perf_counter() - start
    n_logits = engine.n_logits(reader)
    n, width = len(sweep.run), sweep.run.prompts.tokens.shape[1]
    full = len(sweep.cells) * n * width * shape.n_layers
    base_tokens = int(sweep.prompts.lengths.sum())
    if engine.path == "full":
        work: list[Part] = []
    else:
        work = parts(sweep, rows, engine.capacity(reader), shape)
    per_part = []
    for part in work:
        packing = part.packed(sweep.prompts.beginnings if sweep.shares else None)
        per_part.append((packing, [packing.active(at) for at in range(shape.n_layers)]))
    token_layers = base_tokens * shape.n_layers
    token_layers += int(sum(engine.token_layers(part) for part in work))
    token_layers = full if engine.path == "full" else token_layers
    peak = base_bytes(sweep, shape)
    if per_part:
        peak += max(
            pass_bytes(shape, p.n_bins, p.width, p.width + p.prefix, len(p.rows), n_logits)
            for p, _ in per_part
        )
    checks = unchecked(engine.sweep, engine.path) if engine.path != "full" else 0
    seconds = prepared + _seconds(engine, reader, per_part, base_tokens, checks, full)
    return Plan(
        cells=len(sweep.cells),
        rows=len(rows),
        token_layers=token_layers,
        full_token_layers=full,
        flop=token_layers * shape.flops,
        seconds=seconds,
        peak_bytes=peak,
        passes=len(work),
        self_check=checks > 0,
        path=engine.path,
        why=engine.why,
    )


def _seconds(
    engine: Engine, reader: Reader, per_part: list, base_tokens: int, checks: int, full: int
) -> float:
    sweep, n_layers = engine.sweep, engine.shape.n_layers
    with torch.no_grad(), muted(sweep.model):
        wiring = engine.wiring
        biggest = max((p for p, _ in per_part), key=lambda p: p.n_bins, default=None)
        width = wiring.width if biggest is None else biggest.width
        prefix = 0 if biggest is None else biggest.prefix
        most = 1 if biggest is None else biggest.n_bins
        sizes = [(b, width, prefix) for b in {1, -(-most // 8), -(-most // 3), most}]
        whole = engine.path == "layers"
        timed = calibrated(wiring, sizes, reader.vocabulary, whole=whole)
    seconds = 3 * timed.open + n_layers * timed.block(base_tokens) + 2 * timed.close
    for packing, active in per_part:
        for layer, bins in enumerate(active):
            # The last layer computes keys and values everywhere, the rest at answers alone.
            short = layer == n_layers - 1 and not (wiring.native[layer] or whole)
            seconds += timed.block(bins * packing.width) * (_LAST_LAYER if short else 1.0)
        rows = len(packing.rows)
        seconds += timed.close + rows * (timed.close_row + _ROW_SECONDS)
    seconds += checks * (timed.open + timed.close + n_layers * timed.block(wiring.width))
    if engine.path == "full":
        seconds += (
            full
            / wiring.width
            / n_layers
            * (timed.open + timed.close + n_layers * timed.block(wiring.width))
        )
    return seconds
