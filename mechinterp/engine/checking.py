"""The self-check: before it is trusted, the engine meets plain hooked runs.

On the longest prompt and a shorter (so padded) one: the base runs and the activations read
from them, then cells of every kind of site in use, at the first layer, the last, and one of
each type of layer. What was found is remembered while the weights, the edits in force and the
kind of cell stay the same and prompts are no longer; code that is swapped under the same
weights is not noticed.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.engine.cells import Write
from mechinterp.engine.packing import Rows
from mechinterp.engine.runs import Promised
from mechinterp.engine.sweep import Sweep
from mechinterp.engine.writing import seeing
from mechinterp.hooks import HookManager
from mechinterp.hooks.taps import tap
from mechinterp.models import input_device
from mechinterp.sites import AXES, locate, site_layers

# Largest difference of a logit, as a share of the largest logit. transformers takes softmaxes
# and some norms in float32 whatever the dtype, so float64 runs agree no better than that.
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
# Per model and kind of cell: the longest prompt checked, and what was wrong.
_UNKNOWN = "numbers that are not finite cannot be compared"
_FOUND: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[int, str]]] = WeakKeyDictionary()
Ends = Callable[[Rows], tuple[Rows, Tensor]]


def unchecked(sweep: Sweep, path: str) -> int:
    """Return how many plain runs of one prompt the check will take."""
    rows, prompts = _cases(sweep, path)
    return 0 if not len(rows) else len(rows) + len(prompts) * len(sweep.runs)


@torch.no_grad()
def check(sweep: Sweep, path: str, of_run: Callable[[int], Tensor], logits_of: Ends) -> str:
    """Return why this path is not to be trusted on the sweep, or an empty string.

    ``of_run`` gives the engine's logits of a numbered prompt, ``logits_of`` those of rows.
    """
    known = _FOUND.setdefault(sweep.model, {})
    keys = _keys(sweep, path)
    for key in keys.values():
        if key in known and known[key][1]:
            return known[key][1]
    rows, prompts = _cases(sweep, path)
    if not len(rows):
        return ""
    reason = _runs_differ(sweep, prompts, of_run)
    reason = reason or _rows_differ(sweep, rows, logits_of)
    longest = int(sweep.prompts.lengths.max())
    checked = {_kind(sweep, int(cell)) for cell in rows.cell}
    for kind, key in keys.items():
        if reason not in ("", _UNKNOWN) or (not reason and kind in checked):
            known[key] = longest, reason
    return "" if reason == _UNKNOWN else reason


def _runs_differ(sweep: Sweep, prompts: list[int], of_run: Callable[[int], Tensor]) -> str:
    manager = HookManager(sweep.model)
    for run in sweep.runs:
        wanted = [
            (site, layer, promises[0])
            for (name, site, layer), promises in sweep.promised().items()
            if name == run.name
        ]
        places = [locate(sweep.model, site, layer) for site, layer, _ in wanted]
        for prompt in prompts:
            with run.in_force(manager), seeing(sweep.model, places) as seen:
                plain = run.answer(sweep.model, prompt)
            mine = of_run(sweep.prompts.offset[run.name] + prompt)
            if reason := _differ(plain, mine, f"the {run.name} run"):
                return reason
            length = int(run.prompts.lengths[prompt])
            for (site, layer, stored), place in zip(wanted, places, strict=True):
                theirs, mine = seen[place][0], stored.values_found[site, layer][prompt]
                axis = AXES[site].index("query_pos" if "query_pos" in AXES[site] else "pos") - 1
                theirs, mine = (t.narrow(axis, 0, length) for t in (theirs, mine))
                if "key_pos" in AXES[site]:
                    low = torch.finfo(theirs.dtype).min / 2
                    theirs, mine = (t[..., :length].clamp(min=low) for t in (theirs, mine))
                where = f"{site} at layer {layer} of the {run.name} run"
                if reason := _differ(theirs, mine, where, slack=10.0):
                    return reason
    return ""


def _rows_differ(sweep: Sweep, rows: Rows, logits_of: Ends) -> str:
    manager = HookManager(sweep.model)
    done, mine = logits_of(rows)
    offset = sweep.prompts.offset[sweep.run.name]
    for i, (cell, prompt) in enumerate(
        zip(done.cell.tolist(), done.prompt.tolist(), strict=True)
    ):
        edits = sweep.cells[cell].edits
        with sweep.run.in_force(manager, *edits):
            plain = sweep.run.answer(sweep.model, prompt - offset)
            sites = " and ".join(sorted({edit.site for edit in edits}))
            what = f"an edit of {sites} that starts at layer {done.start[i]}"
            reason = _differ(plain, mine[i], what)
            if reason and reason != _UNKNOWN:
                with _shaken(sweep.model):
                    moved = sweep.run.answer(sweep.model, prompt - offset) - plain
                reason = _differ(plain, mine[i], what, least=3 * _largest(moved.cpu()))
        if reason:
            return reason
    return ""


@contextmanager
def _shaken(model: TransformerBridge) -> Iterator[None]:
    """Move each number of the residual stream by the tolerance, up or down at random.

    Where that moves the logits of a plain run as much, the engine is not at fault: edits left
    nothing of the stream, or a constant, and norms enlarge the rounding of any computation.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(value: Tensor) -> Tensor:
        signs = torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1
        return value * (1 + TOLERANCE.get(value.dtype, 1e-5) * signs)

    with ExitStack() as stack:
        for site in ("resid_pre", "resid_mid", "resid_post"):
            for layer in site_layers(model, site):
                stack.callback(tap(model, locate(model, site, layer), shake))
        yield


def _largest(values: Tensor) -> float:
    """Return the largest size of what is finite and not masked; 0 where nothing is."""
    known = values[values.isfinite() & (values > torch.finfo(values.dtype).min / 2)]
    return float(known.abs().max()) if len(known) else 0.0


def _differ(
    plain: Tensor, mine: Tensor, what: str, slack: float = 1.0, least: float = 0.0
) -> str:
    """Return how far two tensors are apart, or an empty string within the tolerance.

    Which is ``slack`` times the dtype's share of the largest value, and at least ``least``.
    """
    plain, mine = plain.detach().cpu(), mine.detach().cpu()
    if not bool(plain.isfinite().all()):
        same = torch.equal(plain.isfinite(), mine.isfinite())
        if not same or not bool(plain.isfinite().any()):
            return _UNKNOWN  # whoever reads the numbers will say what is wrong with them
        plain, mine = plain[plain.isfinite()], mine[mine.isfinite()]
    allowed = max(TOLERANCE.get(plain.dtype, 1e-5) * slack * _largest(plain), least) + 1e-30
    gap = float((plain.double() - mine.double()).abs().max())
    if gap <= allowed:
        return ""
    return (
        f"on {what} the engine and a plain run differ by {gap:.2g}, more than "
        f"{allowed:.2g}, so this model does not compute position by position as expected"
    )


def _cases(sweep: Sweep, path: str) -> tuple[Rows, list[int]]:
    """Return the rows to check and the prompts of the run that they are on."""
    rows, offset = sweep.rows, sweep.prompts.offset[sweep.run.name]
    lengths = sweep.run.prompts.lengths.numpy()
    known, keys = _FOUND.get(sweep.model, {}), _keys(sweep, path)
    longest = int(sweep.prompts.lengths.max())
    trusted = {
        kind
        for kind, key in keys.items()
        if key in known and known[key][0] >= longest and "apply" not in str(kind)
    }
    if not len(rows) or len(trusted) == len(keys):
        return rows[np.zeros(0, dtype=np.int64)], []
    there = np.unique(rows.prompt - offset)
    ranked = there[np.argsort(lengths[there], kind="stable")].tolist()
    prompts = list(dict.fromkeys([ranked[-1], ranked[0]]))
    if lengths[prompts[0]] == lengths[prompts[-1]]:
        prompts = prompts[:1]
    types = layer_types(sweep.model)
    kinds: dict[Hashable, dict[int, list[int]]] = {}
    here = np.isin(rows.prompt - offset, prompts).nonzero()[0]
    for r in here.tolist():
        kind = _kind(sweep, int(rows.cell[r]))
        if kind not in trusted:
            kinds.setdefault(kind, {}).setdefault(int(rows.start[r]), []).append(r)
    chosen: list[int] = []
    for by_start in kinds.values():
        starts = sorted(by_start)
        of_type = {types[min(start, len(types) - 1)]: start for start in reversed(starts)}
        for start in sorted({starts[0], starts[-1], *of_type.values()}):
            for prompt in prompts:
                mine = [r for r in by_start[start] if rows.prompt[r] - offset == prompt]
                by_first = sorted(mine, key=lambda r: rows.first[r])
                chosen += by_first[:1] + (by_first[-1:] if start == starts[0] else [])
    return rows[np.array(list(dict.fromkeys(chosen)), dtype=np.int64)], prompts


def _kind(sweep: Sweep, cell: int) -> Hashable:
    """Return what cells share that are checked together: sites, edits, kinds of source."""
    return tuple(
        sorted(
            {
                (w.edit.site, w.edit.kind, isinstance(_stored(w), Promised), w.keys is None)
                for w in sweep.writes[cell]
            }
        )
    )


def _stored(write: Write) -> object:
    return getattr(write.edit.reads, "stored", None)


def _keys(sweep: Sweep, path: str) -> dict[Hashable, Hashable]:
    """Return, per kind of cell, the name under which its check is remembered."""
    lengths = sweep.prompts.lengths
    in_force = tuple((action.edit.key, action.layer) for action in sweep.in_force)
    own = tuple(type(edit).__name__ + edit.site for run in sweep.runs for edit in run.edits)
    parameter = next(sweep.model.original_model.parameters())
    rest = (
        sweep.fingerprint,
        path,
        str(parameter.dtype),
        str(input_device(sweep.model)),
        bool((lengths != lengths[0]).any()),
        in_force,
        own,
    )
    kinds = {_kind(sweep, cell) for cell in range(len(sweep.cells))}
    return {kind: (kind, *rest) for kind in kinds}


def layer_types(model: TransformerBridge) -> list[Hashable]:
    """Return what distinguishes the layers: their classes and the configuration's type."""
    config: Any = getattr(model.original_model, "config", None)
    named = getattr(config, "layer_types", None) or [None] * len(model.blocks)
    return [
        (
            type(block.original_component).__name__,
            type(getattr(block, "attn", None)).__name__,
            name,
        )
        for block, name in zip(model.blocks, named, strict=False)
    ]
