"""Wiring: a model taken apart into its opening, its blocks and its closing.

The model's own modules do the computing, so an architecture's quirks stay where they are. The
opening (embedding, masks, rotary tables) and the closing (final norm, unembedding, soft-cap)
are the model's own forward pass with its blocks stood in for. A block is called on a packing:
the arguments it gets in a plain run say what it wants, and each is cut to the packing's
positions; a small cache object puts the base run's keys and values before the block's own.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.engine.products import fast_products
from mechinterp.models import forward

_CACHES = ("past_key_values", "layer_past", "past_key_value")


class UnknownWiringError(RuntimeError):
    """A block wants an argument that cannot be cut to some positions."""


class _OpenedError(Exception):
    """The first block, or the last that was asked for, has been reached."""


class KeysKnown(Exception):
    """A block has computed its keys and values, and no more was wanted."""


class Keys:
    """Keys and values of one layer: the base run's first, then those of the block's input.

    Stands in for a transformers cache. ``own`` are the keys and values of the input, laid out
    ``bin kv_head column d_head``. With ``stop`` the block ends there; with ``ready`` they are
    used instead of the input's own (whose queries are then all that is computed).
    """

    def __init__(
        self,
        before: tuple[Tensor, Tensor] | None = None,
        *,
        stop: bool = False,
        ready: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.before, self.stop, self.ready = before, stop, ready
        self.own: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values that the block's attention is over."""
        self.own = (k, v) if self.ready is None else self.ready
        if self.stop:
            raise KeysKnown
        return self.joined(0), self.joined(1)

    def joined(self, which: int) -> Tensor:
        """Return the keys (0) or the values (1), the base run's first."""
        assert self.own is not None
        own = self.own[which]
        return own if self.before is None else torch.cat([self.before[which], own], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        """Return how many positions stand before the block's input."""
        return 0 if self.before is None else self.before[0].shape[2]


class _NativeKeys(TorchFunctionMode):
    """Gives a native block, which knows no cache, the keys and values of a `Keys`.

    Its attention multiplies matrices of four axes twice: queries with keys, pattern with
    values.
    """

    def __init__(self, keys: Keys) -> None:
        super().__init__()
        self.keys = keys
        self.k: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.matmul and args[0].ndim == args[1].ndim == 4:
            before = self.keys.before
            if self.k is None:
                k = self.k = args[1].mT
                k = k if before is None else torch.cat([before[0], k], dim=2)
                args = (args[0], k.mT)
            else:
                _, v = self.keys.update(self.k, args[1])
                args = (args[0], v)
        return func(*args, **(kwargs or {}))


class Wiring:
    """One model's parts, and how to call them. ``width`` is the longest prompt's length."""

    def __init__(self, model: TransformerBridge, example: Int[Tensor, " pos"]) -> None:
        self.model = model
        self.blocks: list[Any] = list(model.blocks)
        self._shapes: dict[type, Any] = {}  # what a block of each class returns
        # Two tokens at least, so that no axis of length one is taken for positions.
        self.width = max(len(example), 2)
        self.example = example if len(example) > 1 else example.repeat(2)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden = self.open(self.example[None], record=True)
        self.example_hidden, self.device = hidden, hidden.device
        self.native = [_is_native(block) for block in self.blocks]

    @property
    def n_layers(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    def open(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        record: bool = False,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what enters the first block; ``record`` keeps every block's arguments."""
        seen: list[Tensor] = []
        calls: list[Any] = []

        def stand_in(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append((args, kwargs))
            hidden = _hidden(args, kwargs)
            seen.append(hidden)
            if not record or layer == self.n_layers - 1:
                raise _OpenedError
            return self._as_output(layer, hidden, args, kwargs)

        with self._stood_in(stand_in), suppress(_OpenedError):
            forward(self.model, tokens, mask)
        if record:
            self.calls = calls
        return seen[0]

    @fast_products()
    def close(
        self,
        hidden: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"] | None = None,
        vocabulary: Int[Tensor, " token"] | None = None,
    ) -> Float[Tensor, "batch answer_pos d_out"]:
        """Return the logits of what leaves the last block, or those of some tokens."""
        tokens = self.example[:1].expand(hidden.shape[:2])

        def stand_in(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            passed = _hidden(args, kwargs)
            if layer == self.n_layers - 1:
                passed = hidden.to(passed.device)
            return self._as_output(layer, passed, args, kwargs)

        with self._stood_in(stand_in), self._unembedding_only(vocabulary):
            return forward(self.model, tokens, mask)

    @fast_products()
    def block(
        self,
        layer: int,
        hidden: Float[Tensor, "bin column d_model"],
        frame: "Frame",
        keys: Keys,
    ) -> Float[Tensor, "bin column d_model"]:
        """Return what the block makes of ``hidden``, the packing's active bins."""
        args, kwargs = frame.arguments(layer, len(hidden))
        block = self.blocks[layer]
        if self.native[layer]:
            with _causality_left_to_the_mask(block), _NativeKeys(keys):
                out = _hidden_of(_call(block, hidden, args, kwargs))
            if keys.own is None:  # all of its heads were pruned
                nothing = hidden.new_zeros(*hidden.shape[:-1], 1)[:, None]
                keys.update(nothing, nothing)
            return out
        args, kwargs = _with_cache(block, args, kwargs, keys)
        return _hidden_of(_call(block, hidden, args, kwargs))

    @fast_products()
    def whole_block(
        self, layer: int, hidden: Float[Tensor, "row pos d_model"], prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what the block makes of whole prompts, with the recorded arguments' rows."""
        args, kwargs = self.calls[layer]
        n = _hidden(args, kwargs).shape[0]
        args = tuple(_rows(value, n, prompts) for value in args)
        kwargs = {name: _rows(value, n, prompts) for name, value in kwargs.items()}
        return _hidden_of(_call(self.blocks[layer], hidden, args, kwargs))

    def _as_output(
        self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return ``hidden`` in the form in which the block returns its output."""
        kind = type(self.blocks[layer].original_component)
        if kind not in self._shapes:
            real = type(self.blocks[layer]).forward(self.blocks[layer], *args, **kwargs)
            self._shapes[kind] = real[1:] if isinstance(real, tuple) else None
        rest = self._shapes[kind]
        return hidden if rest is None else (hidden, *rest)

    @contextmanager
    def _stood_in(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        """Call ``stand_in(layer, args, kwargs)`` instead of the blocks."""
        try:
            for layer, block in enumerate(self.blocks):
                block.__dict__["forward"] = _StandIn(stand_in, layer)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    @contextmanager
    def _unembedding_only(self, vocabulary: Int[Tensor, " token"] | None) -> Iterator[None]:
        if vocabulary is None:
            yield
            return
        unembed: Any = self.model.unembed
        linear = unembed.original_component
        weight = linear.weight[vocabulary.to(linear.weight.device)]
        bias = None if linear.bias is None else linear.bias[vocabulary.to(weight.device)]
        unembed.__dict__["forward"] = _Linear(weight, bias)
        try:
            yield
        finally:
            unembed.__dict__.pop("forward", None)


class Frame:
    """The arguments of every block, cut to one packing; equal ones are cut once."""

    def __init__(
        self,
        wiring: Wiring,
        positions: Int[np.ndarray, "bin column"],
        sees: Bool[np.ndarray, "bin column key"],
        key_positions: Int[np.ndarray, "bin key"],
    ) -> None:
        self.wiring = wiring
        device = wiring.device
        self.positions = torch.from_numpy(np.maximum(positions, 0)).to(device)
        self.sees = torch.from_numpy(sees).to(device)
        self.key_positions = torch.from_numpy(key_positions).to(device)
        self.padding = torch.from_numpy(positions < 0).to(device)
        self._cut: dict[int, Tensor] = {}

    def arguments(self, layer: int, bins: int) -> tuple[list[Any], dict[str, Any]]:
        """Return the layer's arguments for the first ``bins`` bins."""
        args, kwargs = self.wiring.calls[layer]
        native = self.wiring.native[layer]
        skip = "hidden_states" not in kwargs  # then the hidden states come first
        cut = [
            None if skip and i == 0 else self._value(value, bins, native)
            for i, value in enumerate(args)
        ]
        named = {
            name: self._value(value, bins, native and name == "attention_mask")
            for name, value in kwargs.items()
            if name != "hidden_states"
        }
        return cut, named

    def _value(self, value: Any, bins: int, native_mask: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._value(each, bins, native_mask) for each in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._cut:
            self._cut[id(value)] = self._cut_tensor(value, native_mask)
        return self._cut[id(value)][:bins]

    def _cut_tensor(self, value: Tensor, native_mask: bool) -> Tensor:
        width = self.wiring.width
        if native_mask and value.ndim == 2:
            return ~self.sees[:, None]
        if value.ndim == 4 and value.shape[-2:] == (width, width):
            return self._mask(value[0, 0])
        if value.ndim >= 2 and value.shape[0] == 1 and value.shape[1] == width:
            return value[0].to(self.positions.device)[self.positions]
        raise UnknownWiringError(
            f"a block gets a tensor of shape {list(value.shape)} that is no mask, and has no "
            "position axis to cut"
        )

    def _mask(self, plain: Tensor) -> Tensor:
        """Return the plain run's mask between the packing's queries and keys."""
        visible = (
            plain if plain.dtype == torch.bool else plain > torch.finfo(plain.dtype).min / 2
        )
        visible = visible.to(self.sees.device)
        seen = self.sees & visible[self.positions[:, :, None], self.key_positions[:, None, :]]
        seen |= self.padding[:, :, None]
        if plain.dtype == torch.bool:
            return seen[:, None]
        low = torch.finfo(plain.dtype).min
        return torch.zeros(seen.shape, dtype=plain.dtype, device=seen.device).masked_fill(
            ~seen, low
        )[:, None]


class _StandIn:
    def __init__(self, function: Callable[..., Any], layer: int) -> None:
        self.function, self.layer = function, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.layer, args, kwargs)


class _Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


@contextmanager
def _causality_left_to_the_mask(block: Any) -> Iterator[None]:
    """Keep a native block from masking by column number, which a packing has no use for."""
    buffers = block.attn.original_component._buffers
    mask = buffers["causal_mask"]
    buffers["causal_mask"] = torch.zeros(1, 1, dtype=torch.bool, device=mask.device)
    try:
        yield
    finally:
        buffers["causal_mask"] = mask


def _is_native(block: Any) -> bool:
    attention = getattr(getattr(block, "attn", None), "original_component", None)
    return isinstance(getattr(attention, "causal_mask", None), Tensor)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _call(block: Any, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    if args:
        return block(hidden, *args[1:], **kwargs)
    return block(**(kwargs | {"hidden_states": hidden}))


def _with_cache(
    block: Any, args: list[Any], kwargs: dict[str, Any], keys: Keys
) -> tuple[list[Any], dict[str, Any]]:
    for name in _CACHES:
        if name in kwargs:
            return args, kwargs | {name: keys}
    accepted = list(inspect.signature(block.original_component.forward).parameters)
    for name in _CACHES:
        if name in accepted and accepted.index(name) < len(args):
            args[accepted.index(name)] = keys
            return args, kwargs
        if name in accepted:
            return args, kwargs | {name: keys}
    raise UnknownWiringError(
        f"{type(block.original_component).__name__} takes no cache of keys"
    )


def _rows(value: Any, n: int, prompts: Tensor) -> Any:
    """Return the prompts' rows of an argument that has one row per prompt."""
    if isinstance(value, tuple):
        return tuple(_rows(each, n, prompts) for each in value)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == n and n > 1:
        return value[prompts.to(value.device)]
    return value
