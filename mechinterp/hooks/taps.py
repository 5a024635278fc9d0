"""Taps: a function attached to a place, which sees the site's value and may change it.

Everything that reads or edits activations goes through ``tap``. All taps at one hook point
share a station, which runs them in the order of the data flow, so that an edit of ``attn_out``
comes before one of ``resid_mid`` however the two were nested. A station leaves the hook point
as it found it when its last tap goes; hooks that others set are never touched.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.sites import Place

Tap = Callable[[Tensor], Tensor | None]
"""Sees a site's value; returns the tensor to put in its place, or None to leave it."""

# Upstream first: a head's result enters attn_out, and attn_out enters resid_mid.
_STAGE = {"result": 0, "direct": 1, "softmax_in": 1, "softmax_out": 1, "sum": 2, "read": 3}
_SERIAL = itertools.count()


@dataclass(frozen=True, eq=False)
class _Entry:
    """One tap at a station; ``read`` holds this forward's value at ``place.reads``."""

    place: Place
    function: Tap
    stage: int
    serial: int
    read: dict[str, Tensor]

    @property
    def group(self) -> tuple[int, str]:
        return self.stage, self.place.how


class _Station:
    """The taps at one hook point, in the order of the data flow."""

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.entries: list[_Entry] = []
        self.muted: list[list[_Entry]] = []  # entries set aside, to come back

    def add(self, entry: _Entry) -> None:
        self.entries.append(entry)
        self.entries.sort(key=lambda e: (*e.group, e.serial))

    def run(self, tensor: Tensor, how: str | None = None) -> Tensor:
        """Pass ``tensor`` through the taps (of one kind) and return what goes on."""
        for (_, kind), entries in itertools.groupby(self.entries, key=lambda e: e.group):
            if how is not None and kind != how:
                continue
            group = list(entries)
            own = value = self._site_value(group[0], tensor)
            for entry in group:
                new = entry.function(value)
                value = value if new is None else new
            if value is own:
                continue
            if kind == "sum":
                tensor = _summand(group[0].read["value"], tensor, own, value)
            elif kind == "result":
                tensor = tensor + (value - own).sum(2)
            else:
                tensor = value
        return tensor

    def _site_value(self, entry: _Entry, tensor: Tensor) -> Tensor:
        if entry.place.how == "sum":
            return entry.read["value"] + tensor
        if entry.place.how == "result":
            return head_results(self.model, entry.place.layer, entry.read["value"])
        return tensor


def _summand(rest: Tensor, tensor: Tensor, own: Tensor, value: Tensor) -> Tensor:
    """Return what makes ``rest`` plus it ``value``, where ``rest + tensor`` was ``own``.

    The second step takes off the rounding of the first: a sum set to zero is zero exactly, and
    where nothing changes neither does ``tensor``. Gradients flow as through the first step.
    """
    moved = tensor + (value - own)
    return moved + (value - (rest + moved)).detach()


def head_results(model: TransformerBridge, layer: int | None, z: Tensor) -> Tensor:
    """Return ``z @ W_O`` per head: ``batch pos head d_head -> batch pos head d_model``."""
    W_O = model.blocks[layer].attn.W_O
    return einsum(
        z,
        W_O.to(z),
        "batch pos head d_head, head d_head d_model -> batch pos head d_model",
    )


def head_writes(
    model: TransformerBridge, layer: int, z: Tensor, moved: Tensor
) -> Float[Tensor, "batch pos head d_model"]:
    """Return what each head adds to the residual stream when its ``z`` moves a little.

    ``moved @ W_O``; behind a norm of attention's output, that norm's derivative at ``z`` of it.
    """
    results = head_results(model, layer, moved)
    block = model.blocks[layer]
    if "ln1_post" not in block.submodules:
        return results
    summed = block.attn.o.original_component(z.flatten(2))
    norm = block.ln1_post.original_component
    return _derivative(norm, summed[:, :, None].expand_as(results), results)


def _derivative(function: Callable[[Tensor], Tensor], at: Tensor, moved: Tensor) -> Tensor:
    """Return the derivative of ``function`` at a point, along a direction.

    By two backward passes: what goes back is linear in what comes in, and its own derivative
    is the forward one. (Forward mode warns about its imports in torch 2.13.)
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = at.detach().clone().requires_grad_()
        back = torch.zeros_like(moved, requires_grad=True)
        (pulled,) = torch.autograd.grad(function(point), point, back, create_graph=True)
        return torch.autograd.grad(pulled, back, moved)[0].detach()


class _SoftmaxMode(TorchFunctionMode):
    """Shows a station what the softmax of an attention module takes and gives."""

    def __init__(self, station: _Station) -> None:
        super().__init__()
        self.station = station

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (nn.functional.softmax, torch.softmax, Tensor.softmax):
            return func(*args, **kwargs)
        scores = self.station.run(args[0], "softmax_in")
        return self.station.run(func(scores, *args[1:], **kwargs), "softmax_out")


# By model, then by hook point: the station there, and what uninstalls it.
_Stations = dict[str, tuple[_Station, Callable[[], None]]]
_STATIONS: WeakKeyDictionary[nn.Module, _Stations] = WeakKeyDictionary()

_STATION_HANDLES: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def tap(model: TransformerBridge, place: Place, function: Tap) -> Callable[[], None]:
    """Attach ``function`` to ``place`` and return what takes it off again.

    The function is called in every forward pass with the site's value, laid out as in
    ``sites.AXES``, after the taps attached before it. Calling the remover twice is harmless.
    """
    read: dict[str, Tensor] = {}
    removers = []
    if place.reads is not None:
        source = Place(place.site, place.layer, place.reads)
        remember = partial(_remember, read)
        removers.append(_attach(model, source, remember, _STAGE["read"], read))
    removers.append(_attach(model, place, function, _STAGE[place.how], read))
    return partial(_remove_all, removers, read)


def _remember(read: dict[str, Tensor], tensor: Tensor) -> None:
    read["value"] = tensor


def _remove_all(removers: list[Callable[[], None]], read: dict[str, Tensor]) -> None:
    for remover in removers:
        remover()
    read.clear()


def attached(model: TransformerBridge) -> list[Tap]:
    """Return the functions attached to the model's places, the oldest first."""
    entries = [
        entry
        for station, _ in _STATIONS.get(model, {}).values()
        for entry in station.entries
        if entry.stage != _STAGE["read"]
    ]
    return [entry.function for entry in sorted(entries, key=lambda e: e.serial)]


@contextmanager
def muted(model: TransformerBridge) -> Iterator[None]:
    """Set aside every tap while the block runs; those attached within it work."""
    stations = [station for station, _ in _STATIONS.get(model, {}).values()]
    for station in stations:
        station.muted.append(station.entries)
        station.entries = []
    try:
        yield
    finally:
        for station in stations:
            station.entries = station.muted.pop()


def foreign_hooks(model: TransformerBridge) -> list[str]:
    """Return where hooks are attached that are not taps: by hand or by another library.

    What transformer-lens, transformers, accelerate and torch attach for themselves is not
    counted.
    """
    found = []
    for name, point in model.hook_dict.items():
        mine = _STATION_HANDLES.get(point, ())
        handles = [h for h in [*point.fwd_hooks, *point.bwd_hooks] if h not in mine]
        # transformer-lens wires some for good; whatever else is here, somebody put here.
        if any(not (h.is_permanent and _is_known(h.user_hook)) for h in handles):
            found.append(name)
    for name, module in model.named_modules():
        hooks = [
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(),
            *module._backward_pre_hooks.values(),
        ]
        if any(not _is_known(hook) for hook in hooks):
            found.append(name.replace("_original_component.", "") or type(module).__name__)
    return found


_KNOWN_LIBRARIES = ("transformer_lens", "transformers", "accelerate", "torch", "mechinterp")


def _is_known(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).split(".")[0] in _KNOWN_LIBRARIES


def _attach(
    model: TransformerBridge, place: Place, function: Tap, stage: int, read: dict[str, Tensor]
) -> Callable[[], None]:
    stations = _STATIONS.setdefault(model, {})
    key = f"softmax of {place.hook}" if place.how.startswith("softmax") else place.hook
    if key not in stations:
        station = _Station(model)
        stations[key] = station, _install(model, place, station)
    station, _ = stations[key]
    entry = _Entry(place, function, stage, next(_SERIAL), read)
    station.add(entry)
    return partial(_detach, stations, key, entry)


def _detach(stations: _Stations, key: str, entry: _Entry) -> None:
    if key not in stations:
        return
    station, uninstall = stations[key]
    if entry not in station.entries:
        return
    station.entries.remove(entry)
    if not station.entries and not station.muted:
        uninstall()
        del stations[key]


def _install(model: TransformerBridge, place: Place, station: _Station) -> Callable[[], None]:
    module = _module_at(model, place.hook)
    if place.how.startswith("softmax"):
        return _install_softmax(module.original_component, station)
    handle = module.add_hook(lambda tensor, hook: station.run(tensor))
    _STATION_HANDLES.setdefault(module, []).append(handle)
    return partial(_uninstall, module, handle)


def _uninstall(module: Any, handle: Any) -> None:
    _STATION_HANDLES[module].remove(handle)
    handle.hook.remove()
    if handle in module.fwd_hooks:  # a reset of all hooks may have been quicker
        module.fwd_hooks.remove(handle)


def _install_softmax(attention: nn.Module, station: _Station) -> Callable[[], None]:
    running: list[_SoftmaxMode] = []

    def enter(*_: object) -> None:
        running.append(_SoftmaxMode(station))
        running[-1].__enter__()

    def leave(*_: object) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    handles = [
        attention.register_forward_pre_hook(enter),
        attention.register_forward_hook(leave, always_call=True),
    ]

    def uninstall() -> None:
        for handle in handles:
            handle.remove()

    return uninstall


def _module_at(model: TransformerBridge, hook: str) -> Any:
    module: Any = model
    for part in hook.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module
