"""Observing: one run of some prompts, what passes at some places, and its graph if wanted.

Each block can be rehearsed: run once more just before its turn, on the same input, with other
functions attached. What a rehearsal writes leads nowhere, so one run of the model shows for
every layer what that layer alone would do with other values in place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Key
from mechinterp.hooks.editing import HookNotFiredError
from mechinterp.hooks.running import first_row
from mechinterp.hooks.taps import Tap, tap
from mechinterp.models import forward
from mechinterp.sites import locate
from mechinterp.tasks.prompts import Prompts

Attached = Sequence[tuple[Key, Tap]]


def observe(
    model: TransformerBridge,
    prompts: Prompts,
    rows: slice,
    keys: Sequence[Key],
    *,
    track: bool = False,
    put: Attached = (),
    rehearse: Mapping[int, Attached] | None = None,
) -> tuple[dict[Key, Tensor], Tensor]:
    """Return each key's whole tensor on some of the prompts, and the logits.

    Args:
        model: Left as it was.
        prompts: What to run on.
        rows: Which of the prompts.
        keys: Places to see.
        track: Let the model go on with copies of the tensors, so that a gradient of the logits
            with respect to them exists, whether or not its weights require one. Whether
            gradients are on is the caller's business.
        put: Functions to attach, before those that see.
        rehearse: By layer, the functions to attach while the block is rehearsed.

    Raises:
        HookNotFiredError: A place was not passed.
    """
    seen: dict[Key, Tensor] = {}
    with ExitStack() as stack:
        if track:
            stack.callback(tap(model, locate(model, "embed"), _require_gradient))
        for key, function in put:
            stack.callback(tap(model, locate(model, *key), function))
        for key in keys:
            stack.callback(tap(model, locate(model, *key), partial(_see, seen, key, track)))
        stack.enter_context(_rehearsing(model, rehearse or {}))
        stack.enter_context(first_row(model, rows.start))
        logits = forward(model, prompts.tokens[rows], prompts.mask[rows])
    _check_passed(keys, seen)
    return seen, logits


def look(
    model: TransformerBridge, prompts: Prompts, rows: slice, keys: Sequence[Key]
) -> dict[Key, Tensor]:
    """Return each key's whole tensor on some of the prompts; no logits are computed.

    Raises:
        HookNotFiredError: A place was not passed.
    """
    seen: dict[Key, Tensor] = {}
    put = [(key, partial(_see, seen, key, False)) for key in keys]
    pass_by(model, prompts, rows, put, until=("resid_post", len(model.blocks) - 1))
    _check_passed(keys, seen)
    return seen


def pass_by(
    model: TransformerBridge, prompts: Prompts, rows: slice, put: Attached, *, until: Key
) -> None:
    """Run some of the prompts past the functions in ``put``, and no farther than ``until``.

    What comes after that place, the unembedding above all, costs nothing.

    Args:
        model: Left as it was.
        prompts: What to run on.
        rows: Which of the prompts.
        put: Functions to attach; those at ``until`` still see it.
        until: The last place to be passed.

    Raises:
        HookNotFiredError: ``until`` was not passed.
    """
    with suppress(_PassedAll):
        observe(model, prompts, rows, [], put=[*put, (until, _stop)])
        raise HookNotFiredError(
            f"{until[0]} at layer {until[1]} never fired, so there is nothing to see. "
            "mi.sites(model) lists the sites that work on this model."
        )


def _check_passed(keys: Sequence[Key], seen: Mapping[Key, Tensor]) -> None:
    if missed := [key for key in keys if key not in seen]:
        site, layer = missed[0]
        raise HookNotFiredError(
            f"{site} at layer {layer} never fired, so there is nothing to capture. "
            "mi.sites(model) lists the sites that work on this model."
        )


class _PassedAll(Exception):
    """Ends a run: all that is wanted has passed."""


def _stop(_: Tensor) -> None:
    raise _PassedAll


def _see(seen: dict[Key, Tensor], key: Key, track: bool, own: Tensor) -> Tensor | None:
    seen[key] = own.clone() if track else own
    return seen[key] if track else None


def _require_gradient(own: Tensor) -> Tensor | None:
    return None if own.requires_grad else own.detach().requires_grad_()


@contextmanager
def _rehearsing(model: TransformerBridge, attached: Mapping[int, Attached]) -> Iterator[None]:
    blocks: list[Any] = [model.blocks[layer] for layer in attached]
    try:
        for block, functions in zip(blocks, attached.values(), strict=True):
            placed = [(locate(model, *key), function) for key, function in functions]
            attach = [partial(tap, model, place, function) for place, function in placed]
            block.__dict__["forward"] = _Rehearsed(block, attach)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class _Rehearsed:
    """A block's ``forward`` that runs the block once beforehand, with more attached to it."""

    def __init__(self, block: Any, attach: Sequence[Callable[[], Callable[[], None]]]) -> None:
        self.forward = partial(type(block).forward, block)
        self.attach = attach

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), ExitStack() as stack:
            for attach in self.attach:
                stack.callback(attach())
            self.forward(*args, **kwargs)
        return self.forward(*args, **kwargs)
