"""Native bridges (``TransformerBridge.boot_native``) on disk: a small format of our own.

``config.json`` holds the configuration under ``"model_type": "transformer_lens_native"``,
``model.safetensors`` the weights of the plain module.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.native import (
    NativeModel,
    initialize_native_model,
)
from transformer_lens.model_bridge.supported_architectures import NativeArchitectureAdapter

from mechinterp.models.pruned.anatomy import Anatomy
from mechinterp.models.pruned.bridging import fit
from mechinterp.models.pruned.reading import fill, is_pruned
from mechinterp.models.pruned.record import record, recorded

MODEL_TYPE = "transformer_lens_native"
_ARCHITECTURE = "TransformerLensNative"
# Where and how this run holds the model, which is not what it computes.
_OF_THIS_RUN = {"device", "dtype", "model_name", "n_devices", "init_weights"}


def is_native(model: TransformerBridge) -> bool:
    """Whether transformer-lens built the model itself, with no Hugging Face counterpart."""
    return isinstance(model.original_model, NativeModel)


def native_fields(model: TransformerBridge) -> dict[str, Any]:
    """Return the configuration as plain values."""
    plain = bool | int | float | str | list | dict | None
    return {
        name: value
        for name, value in model.cfg.to_dict().items()
        if name not in _OF_THIS_RUN and isinstance(value, plain)
    }


def save_native(model: TransformerBridge, module: nn.Module, folder: Path) -> None:
    """Write the plain module of a native bridge into an existing folder."""
    fields = {"model_type": MODEL_TYPE, "format": 1, "fields": native_fields(model)}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def initialise_native(module: nn.Module, config: Any, seed: int) -> None:
    """Draw the weights of a native module as transformer-lens does (its ``init_mode``)."""
    assert isinstance(module, NativeModel)
    initialize_native_model(module, config, seed=seed)


def wrap_native(module: nn.Module, config: Any, name: str) -> TransformerBridge:
    """Return a bridge around a plain native module."""
    return build_bridge_from_module(
        module,
        _ARCHITECTURE,
        tl_config=config,
        model_name=name,
        post_adapter_hook=partial(fit, module),
    )


def load_native(
    folder: Path, stored: dict[str, Any], name: str, dtype: torch.dtype, device: torch.device
) -> TransformerBridge:
    """Read back what `save_native` wrote; ``stored`` is the content of its ``config.json``.

    Raises:
        ValueError: The folder was written by a later version.
    """
    if stored.get("format") != 1:
        raise ValueError(
            f"{folder} has native-model format {stored.get('format')!r}; this version of "
            "mechinterp reads format 1. Update mechinterp."
        )
    config = TransformerBridgeConfig.from_dict(stored["fields"])
    module = NativeModel(config)
    if is_pruned(stored["fields"]):
        pruning = recorded(stored["fields"])
        record(config, pruning)
        fill(module, Anatomy(module, NativeArchitectureAdapter(config)), pruning, folder)
    else:
        module.load_state_dict(load_file(folder / "model.safetensors"))
    return wrap_native(module.to(device=device, dtype=dtype), config, name)
