"""Undo the wrapping: from a bridge back to the plain module it was made from.

transformer-lens 4.3.0 replaces the submodules of the module it wraps, so state-dict keys
change and ``save_pretrained`` raises. The way back is the same walk in the other direction:
copy the module tree, taking for every bridge component the component it wraps. Nothing is
built from the configuration, so layers whose shapes differ (pruned heads) come back as they
are, and parameters are shared, not copied: tied weights stay tied and it costs no memory.
"""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    JointQKVAttentionBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PretrainedConfig

# Hooks in force on the bridge, ours included, are not part of the model.
_HOOKS = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}


def unwrap(model: TransformerBridge) -> nn.Module:
    """Return the model's plain Hugging Face module, with its original keys, in eval mode.

    It shares its parameters with the bridge, which keeps working: training the one changes
    the other. ``copy.deepcopy`` the result to separate them. A native bridge has no Hugging
    Face counterpart; its own plain ``torch`` module is returned.

    Raises:
        ValueError: The weights were processed (folded or centred), so there is no plain
            module with this model's activations; or they are spread over several devices.
    """
    if processed_weights(model):
        raise ValueError(
            "this bridge's weights were processed (enable_compatibility_mode folds and centres "
            "them), which no plain module can hold. Load the model again without processing, "
            "or call enable_compatibility_mode(no_processing=True)."
        )
    devices = set(getattr(model.original_model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"this model is spread over {sorted(map(str, devices))}, and its layers "
            "pass their activations on through the wrapping. Load it again with device='cpu' "
            "to unwrap or save it."
        )
    return plain(model.original_model).eval()


def processed_weights(model: TransformerBridge) -> bool:
    """Whether transformer-lens has folded or centred the weights (compatibility mode)."""
    # Not public in transformer-lens 4.3.0, whose own Jacobian lens reads it this way.
    return bool(model._weights_processed)


def plain(module: nn.Module, done: dict[int, Any] | None = None) -> nn.Module:
    """Return the tree of ``module`` without bridge components, sharing every tensor."""
    done = {} if done is None else done
    wrapper = None
    while isinstance(module, GeneralizedComponent):
        assert module.original_component is not None
        wrapper, module = module, module.original_component
    if id(module) in done:
        return done[id(module)]
    new = done[id(module)] = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        # Adapters replace ``forward`` on instances (Falcon); the class has the original.
        if name == "forward":
            continue
        if name in _HOOKS:
            value = type(value)()
        elif isinstance(value, PretrainedConfig):
            value = done.setdefault(id(value), copy.deepcopy(value))
        elif isinstance(value, dict | set):
            value = copy.copy(value)
        vars(new)[name] = value
    new._modules = {
        name: child if child is None else plain(child, done)
        for name, child in module._modules.items()
    }
    if isinstance(wrapper, UnembeddingBridge):
        _drop_synthetic_bias(new)
    if isinstance(wrapper, JointQKVAttentionBridge):
        with torch.random.fork_rng(devices=[]):  # cutting makes layers, which draw weights
            _fuse(wrapper, new)
    return new


def _drop_synthetic_bias(unembed: nn.Module) -> None:
    """Take away the zeros that transformer-lens registers where there was no bias."""
    bias = unembed._buffers.pop("bias", None)
    if bias is None:
        return
    if bias.any():
        raise ValueError(
            "the unembedding was given a bias, which this architecture does not have; "
            "a plain module cannot hold it. Set it to zero before unwrapping."
        )
    unembed.register_parameter("bias", None)


@torch.no_grad()
def _fuse(bridge: JointQKVAttentionBridge, attention: nn.Module) -> None:
    """Carry q, k and v over to the fused projection, if they no longer are its slices.

    The bridge computes with separate projections, cut from the fused one when it was
    wrapped. They share storage with it at first at most, so an edit may have reached only
    them. Where each number came from is read off by cutting a fused projection of indices.
    """
    cut, name = bridge.split_qkv_matrix, bridge.submodules["qkv"].name
    assert cut is not None and name is not None
    used = [cast(nn.Linear, part.original_component) for part in (bridge.q, bridge.k, bridge.v)]
    fused = attention.get_submodule(name)
    stored = {kind: value for kind, value in fused._parameters.items() if value is not None}
    slices = cut(attention)
    if all(
        torch.equal(getattr(part, kind), getattr(piece, kind))
        for kind in stored
        for part, piece in zip(used, slices, strict=True)
    ):
        return
    for kind, value in stored.items():
        where = torch.arange(value.numel(), dtype=torch.float64).view(value.shape)
        fused._parameters[kind] = nn.Parameter(where)
    origins = cut(attention)
    for kind, value in stored.items():
        order = torch.cat([getattr(piece, kind).flatten() for piece in origins]).long()
        assert torch.equal(order.sort().values, torch.arange(value.numel()))
        numbers = torch.cat([getattr(part, kind).flatten() for part in used])
        new = torch.empty_like(numbers)
        new[order.to(new.device)] = numbers
        fused._parameters[kind] = nn.Parameter(new.view(value.shape), value.requires_grad)
