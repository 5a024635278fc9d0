"""Reading a pruned model back: built whole from its configuration, cut, then filled.

``from_pretrained`` makes every layer as the configuration says, so it cannot hold layers that
have lost heads. Here the module is built without memory for weights, the record in its
configuration says what to cut, and the stored weights must then fit one by one: no more memory
is taken than the pruned model has.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources import build_bridge_config_from_hf
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mechinterp.models.pruned.anatomy import Anatomy
from mechinterp.models.pruned.record import Pruning, recorded
from mechinterp.models.pruned.slicing import cut_heads, cut_neurons, give_bias


def is_pruned(config: Any) -> bool:
    """Whether a configuration, or the fields of one, records that something was pruned."""
    pruning = recorded(config)
    return bool(pruning.heads or pruning.neurons)


def read_pruned(
    folder: Path, config: PreTrainedConfig, architecture: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Return the pruned model that `save_model` wrote, as a plain module on the CPU.

    Raises:
        ValueError: The weights do not fit the record.
    """
    kind: Any = getattr(transformers, architecture)
    with init_empty_weights(include_buffers=False), no_init_weights():
        module = kind._from_config(config, dtype=dtype, attn_implementation="eager")
    module.tie_weights()
    bridged = build_bridge_config_from_hf(config, architecture, str(folder), dtype)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridged)
    fill(module, Anatomy(module, adapter), recorded(config), folder)
    module.tie_weights()  # those that are stored once
    return module.eval()


def fill(module: nn.Module, anatomy: Anatomy, pruning: Pruning, folder: Path) -> None:
    """Cut a whole module as the record says, and fill it with the weights in the folder.

    Raises:
        ValueError: The weights do not fit the record.
    """
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    _give_biases(module, anatomy, pruning, state)
    cut_heads(anatomy, pruning.heads)
    cut_neurons(anatomy, pruning.neurons)
    own = dict(module.named_parameters(remove_duplicate=False))
    filled = {id(own[key]) for key in state.keys() & own.keys()}
    state = {k: each.to(own[k].dtype) if k in own else each for k, each in state.items()}
    try:
        found = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: the weights do not fit the heads that its config.json "
            f"says were pruned. {error}"
        ) from error
    empty = [key for key in found.missing_keys if id(own.get(key)) not in filled]
    if wrong := [*empty, *found.unexpected_keys]:
        raise ValueError(
            f"{folder} does not hold the weights of the pruned model that its config.json "
            f"describes: {wrong[0]} is {'missing' if empty else 'unknown'} ({len(wrong)} such)."
        )


def _give_biases(
    module: nn.Module, anatomy: Anatomy, pruning: Pruning, state: Mapping[str, Tensor]
) -> None:
    """Make the biases that were made when means were folded."""
    names = {id(part): name for name, part in module.named_modules()}
    outputs = [anatomy.projection(layer, "o") for layer in pruning.heads]
    outputs += [anatomy.neurons_of(layer)["out"] for layer in pruning.neurons]
    for projection in outputs:
        if f"{names[id(projection)]}.bias" in state:
            give_bias(projection)
