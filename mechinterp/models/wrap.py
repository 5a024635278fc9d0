"""From a Hugging Face module to a bridge with the same numbers."""

from difflib import get_close_matches
from functools import partial

from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import (
    build_bridge_from_module,
    detect_tokenizer_bos_eos,
)
from transformer_lens.utilities.architectures import classify_architecture
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechinterp.models.adapters import register_adapters
from mechinterp.models.pruned.bridging import fit


def wrap(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> TransformerBridge:
    """Return a bridge that takes ``module`` over: eager attention, eval mode, raw numerics.

    ``name`` is what results will call it. The tokenizer is attached as it is.
    (transformer-lens' own loading replaces it by one that always adds a beginning-of-sequence
    token, and may need the network for that.)

    Raises:
        ValueError: The architecture is not supported, or the module is wrapped already.
    """
    architecture = type(module).__name__
    check_supported(module.config, architecture)
    if any(isinstance(part, GeneralizedComponent) for part in module.modules()):
        raise ValueError(
            f"this {architecture} is already wrapped by transformer-lens, which has replaced "
            "its layers. Pass the bridge itself, or the module that mi.unwrap(bridge) returns."
        )
    module.set_attn_implementation("eager")
    bridge = build_bridge_from_module(
        module,
        architecture,
        hf_config=module.config,
        model_name=name or module.config._name_or_path or architecture,
        post_adapter_hook=partial(fit, module),
    )
    if tokenizer is not None:
        attach_tokenizer(bridge, tokenizer)
    if placement := set(getattr(module, "hf_device_map", {}).values()):
        bridge.cfg.n_devices = len(placement)
    return bridge.eval()


def attach_tokenizer(bridge: TransformerBridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the bridge this tokenizer, unchanged, and record what it adds to a text."""
    prepends_bos, appends_eos = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.tokenizer_prepends_bos = prepends_bos
    bridge.cfg.tokenizer_appends_eos = appends_eos
    # The property setter rebuilds a tokenizer that replaces another one.
    bridge._tokenizer = tokenizer


def check_supported(config: object, architecture: str) -> None:
    """Raise unless transformer-lens can wrap this architecture as a text model."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{architecture} is an encoder-decoder model; mechinterp works on decoder-only "
            "language models and on encoders."
        )
    register_adapters()
    # The public table lacks what users registered themselves.
    known = ArchitectureAdapterFactory._adapters
    if architecture not in known:
        near = get_close_matches(architecture, known, n=3)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise ValueError(f"transformer-lens has no adapter for {architecture}.{hint}")
    if (kind := classify_architecture(architecture)) in ("audio", "vision"):
        raise ValueError(
            f"{architecture} is made for {kind}; mechinterp works on text models. "
            "Load one of these."
        )
