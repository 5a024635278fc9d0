"""The base runs: every run of the data once, and what the counterfactual runs need of them.

What several prompts share at their beginning is one node, computed once. So activations that
two runs have in common are the same numbers, and patching one into the other is known to
change nothing.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.activations import by_position
from mechinterp.engine.cells import Write
from mechinterp.engine.packing import Packing, Rows, pack
from mechinterp.engine.passes import Keep, Pass
from mechinterp.engine.prompted import Prompted
from mechinterp.engine.store import Base
from mechinterp.engine.sweep import Sweep
from mechinterp.engine.wiring import Wiring
from mechinterp.engine.writing import Schedule, in_block, seeing
from mechinterp.sites import locate


def scheduled(
    sweep: Sweep,
    packing: Packing,
    writes: Mapping[int, Sequence[Write]],
    *,
    from_start: bool = False,
) -> Schedule:
    """Return the writes of a packing's rows, by place.

    Those before a row's start are left out, being in what it enters with, unless
    ``from_start``.
    """
    schedule = Schedule(torch.device("cpu"))
    rows = packing.rows
    offsets = packing.bin * packing.width - packing.shift
    for r in range(len(rows)):
        prompt = int(rows.prompt[r])
        run = sweep.prompts.run_index(prompt)
        number = prompt - sweep.prompts.offset[sweep.runs[run].name]
        held = (int(packing.own_from[r]), int(rows.last[r]))
        listed = writes[int(rows.cell[r])]
        start = 0 if from_start else int(rows.start[r])
        schedule.add(listed, number, start, held, int(offsets[r]))
    return schedule


def base_rows(prompts: Prompted) -> Rows:
    """Return one row per prompt of every run; ``cell`` is minus one minus the run."""
    n = len(prompts)
    runs = np.array([prompts.run_index(p) for p in range(n)])
    zeros = np.zeros(n, dtype=np.int64)
    last = prompts.lengths - 1
    return Rows(-1 - runs, np.arange(n), zeros, last, zeros, zeros, prompts.alike)


def embedded(
    sweep: Sweep, wiring: Wiring, *, record: bool = False
) -> tuple[Float[Tensor, "prompt pos d_model"], Float[Tensor, "prompt pos d_model"]]:
    """Return what enters the first block in every run, and the embedding itself."""
    prompts = sweep.prompts
    width = prompts.tokens.shape[1]
    schedule = Schedule(torch.device("cpu"))
    for p in range(len(prompts)):
        run = prompts.run_index(p)
        number = p - prompts.offset[sweep.runs[run].name]
        held = (0, int(prompts.lengths[p]) - 1)
        schedule.add(prompts.writes[run], number, 0, held, p * width)
    groups = schedule.groups("embed", -1)
    place = locate(sweep.model, "embed")
    with (
        in_block(sweep.model, None, {"embed": groups} if groups else {}),
        seeing(sweep.model, [place]) as seen,
    ):
        enter = wiring.open(*padded_tokens(prompts), record=record)
    return enter, seen[place]


def embedded_rows(
    sweep: Sweep, wiring: Wiring, packing: Packing
) -> Float[Tensor, "row pos d_model"] | None:
    """Return what enters the first block in rows whose embedding is edited, by row."""
    rows = packing.rows
    edited = [
        any(write.edit.site == "embed" for write in sweep.writes[cell])
        for cell in rows.cell.tolist()
    ]
    if not any(edited):
        return None
    prompts, width = sweep.prompts, sweep.prompts.tokens.shape[1]
    offset = prompts.offset[sweep.run.name]
    schedule = Schedule(torch.device("cpu"))
    n = int((rows.start == 0).sum())  # rows are in the order of their start
    for r in range(n):
        number = int(rows.prompt[r]) - offset
        held = (0, int(prompts.lengths[rows.prompt[r]]) - 1)
        schedule.add(sweep.row_writes(int(rows.cell[r])), number, 0, held, r * width)
    groups = schedule.groups("embed", -1)
    tokens, mask = padded_tokens(prompts, rows.prompt[:n])
    with in_block(sweep.model, None, {"embed": groups} if groups else {}):
        return wiring.open(tokens, mask)


def run_base(
    sweep: Sweep, wiring: Wiring, capacity: int
) -> tuple[Base, Float[Tensor, "prompt d_model"]]:
    """Compute every run once; return what was kept, and the last layer's end at answers."""
    prompts, rows = sweep.prompts, base_rows(sweep.prompts)
    enter, embedding = embedded(sweep, wiring)
    width = prompts.tokens.shape[1]
    starts = frozenset(sweep.rows.start.tolist())
    wanted = {(site, layer) for _, site, layer in sweep.promised()}
    base = Base(prompts, np.full(prompts.tokens.shape, -1, dtype=np.int64))
    answers = np.concatenate([np.array(run.answer_positions) for run in sweep.runs])
    final: list[Tensor] = []
    order: list[np.ndarray] = []
    kept: list[Keep] = []
    count = 0
    under = {-1 - i: writes for i, writes in enumerate(prompts.writes)}
    for part in base_parts(rows, prompts, width, capacity):
        packing = pack(rows[part], max(width, min(capacity, 4 * width)), prompts.beginnings)
        token, node = numbered(packing, width)
        base.node[packing.rows.prompt] = np.where(node >= 0, node + count, -1)
        keep = Keep(
            token,
            starts,
            bool((sweep.rows.first > 0).any()),
            tuple(key for key in wanted if key[0] != "embed"),
            width,
        )
        schedule = scheduled(sweep, packing, under)
        at = answer_columns(packing, answers[packing.rows.prompt])
        final.append(Pass(wiring, packing, schedule, enter=enter, keep=keep).run(at))
        order.append(packing.rows.prompt)
        kept.append(keep)
        count += len(token)
    base.resid = {layer: torch.cat([k.resid[layer] for k in kept]) for layer in starts}
    if kept[0].kv:
        for layer in kept[0].kv:
            k, v = (torch.cat([each.kv[layer][i] for each in kept]) for i in (0, 1))
            base.keys[layer] = (k, v)
    for key in kept[0].found:
        base.sites[key] = torch.cat([each.found[key] for each in kept])
    if ("embed", None) in wanted:
        prompt, position = (base.node >= 0).nonzero()
        held = torch.empty(count, embedding.shape[-1]).to(embedding)
        held[torch.from_numpy(base.node[prompt, position])] = embedding[prompt, position]
        base.sites["embed", None] = held
    back = torch.from_numpy(np.argsort(np.concatenate(order)))
    return base, torch.cat(final)[back]


def base_parts(
    rows: Rows, prompts: Prompted, width: int, capacity: int
) -> Iterator[np.ndarray]:
    """Split the base rows, in the order of their beginnings, into passes."""
    order = np.argsort(prompts.beginnings.rank[rows.prompt], kind="stable")
    each = max(1, capacity // width)
    for start in range(0, len(order), each):
        yield order[start : start + each]


def numbered(packing: Packing, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat columns in use, and the number of each row's positions among them."""
    flat = packing.row.reshape(-1)
    token = (flat >= 0).nonzero()[0]
    number = np.full(len(flat), -1, dtype=np.int64)
    number[token] = np.arange(len(token))
    node = np.full((len(packing.rows), width), -1, dtype=np.int64)
    for r in range(len(packing.rows)):
        last, own_from = int(packing.rows.last[r]), int(packing.own_from[r])
        mine = np.arange(own_from, last + 1)
        node[r, mine] = number[packing.flat(r, mine)]
        early = min(own_from, last + 1)  # the parent, which comes first, knows these
        node[r, :early] = node[packing.parent[r], :early]
    return token, node


def answer_columns(packing: Packing, answers: np.ndarray) -> np.ndarray:
    """Return the flat column of each row's answer."""
    columns = np.empty(len(packing.rows), dtype=np.int64)
    for r, position in enumerate(answers.tolist()):
        s = packing.holder(r, position)
        columns[r] = packing.flat(s, np.array([position]))[0]
    return columns


def fulfil(sweep: Sweep, base: Base) -> None:
    """Fill in the activations that cells read, from what the base runs kept."""
    runs = {run.name: run for run in sweep.runs}
    for (name, site, layer), promises in sweep.promised().items():
        for stored in promises:
            values = base.padded(runs[name], (site, layer))
            stored.values_found[site, layer] = by_position(site, values)


def padded_tokens(
    prompts: Prompted, chosen: Int[np.ndarray, " row"] | None = None
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Return the tokens of some of the prompts (all by default) and their mask."""
    rows = np.arange(len(prompts)) if chosen is None else chosen
    tokens = torch.from_numpy(prompts.tokens[rows])
    lengths = torch.from_numpy(prompts.lengths[rows])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]
