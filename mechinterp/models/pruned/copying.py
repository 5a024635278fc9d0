"""A pruned copy of a bridge."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mechinterp.models.native import wrap_native
from mechinterp.models.plain import unwrap
from mechinterp.models.pruned.anatomy import Anatomy
from mechinterp.models.pruned.record import config_of, pruning_of, record
from mechinterp.models.pruned.slicing import Gone, cut_heads, cut_neurons, fold
from mechinterp.models.run import tokenizer_of
from mechinterp.models.wrap import attach_tokenizer, wrap


@dataclass(frozen=True, eq=False)
class Removal:
    """What to take out: ``kind`` (``"heads"`` or ``"neurons"``) by layer, as they now are.

    ``means`` are what each had on average, by layer, in the same order, to be folded into the
    output's bias; ``step`` is the account of it for the model's record.
    """

    kind: str
    gone: Gone
    step: Mapping[str, Any]
    means: Mapping[int, Float[Tensor, "unit d"]] = field(default_factory=dict)


def anatomy_of(model: TransformerBridge) -> Anatomy:
    """Return where the plain module of a bridge has its heads and neurons."""
    return Anatomy(unwrap(model), model.adapter)


def copied(model: TransformerBridge) -> tuple[nn.Module, Any]:
    """Return a copy of the plain module of a bridge, and of its configuration."""
    return copy.deepcopy(unwrap(model)), copy.deepcopy(model.cfg)


def wrapped_like(
    model: TransformerBridge, module: nn.Module, cfg: Any, name: str | None = None
) -> TransformerBridge:
    """Return a bridge around a plain module that was copied from the model's own."""
    tokenizer = copy.deepcopy(tokenizer_of(model))
    name = str(model.cfg.model_name) if name is None else name
    if isinstance(module, PreTrainedModel):
        return wrap(module, tokenizer, name)
    bridge = wrap_native(module, cfg, name).eval()
    if tokenizer is not None:
        attach_tokenizer(bridge, tokenizer)
    return bridge


def pruned_copy(model: TransformerBridge, removal: Removal) -> TransformerBridge:
    """Return a copy of the model without some of its heads or neurons; it shares nothing."""
    module, cfg = copied(model)
    anatomy = Anatomy(module, model.adapter)
    for layer, values in removal.means.items():
        out = _output(anatomy, removal.kind, layer)
        fold(out, removal.gone[layer], values)
    cut = {"heads": cut_heads, "neurons": cut_neurons}[removal.kind]
    cut(anatomy, removal.gone)
    gone = {layer: tuple(units) for layer, units in removal.gone.items()}
    pruning = pruning_of(model).after(removal.kind, gone, removal.step)
    record(config_of(module, cfg), pruning)
    name = str(model.cfg.model_name).removesuffix(", pruned")
    return wrapped_like(model, module, cfg, f"{name}, pruned")


def _output(anatomy: Anatomy, kind: str, layer: int) -> nn.Module:
    if kind == "heads":
        return anatomy.projection(layer, "o")
    return anatomy.neurons_of(layer)["out"]
