"""Architectures that transformer-lens 4.3.0 lacks or gets wrong.

They join through its public registration, so `TransformerBridge` treats them like its own:
BERT and RoBERTa as sequence classifiers and as encoders without a head, and Falcon with
grouped key/value heads (40B, 180B, 11B).
"""

from typing import Any

from torch import nn
from transformer_lens.factories.architecture_adapter_factory import (
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import ArchitectureAdapter, TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    LinearBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.supported_architectures import (
    BertArchitectureAdapter,
    FalconArchitectureAdapter,
    RobertaArchitectureAdapter,
)

_MASKED_LM_HEAD = ("mlm_head", "ln_final", "unembed")


class BertClassifierAdapter(BertArchitectureAdapter):
    """``BertForSequenceClassification``: class logits from the pooled first token."""

    supports_causal_loss = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        for part in _MASKED_LM_HEAD:
            del self.components[part]
        self.components["unembed"] = UnembeddingBridge(name="classifier")

    def prepare_model(self, hf_model: Any) -> None:
        """Add the pooler that this model has, and count its classes."""
        super().prepare_model(hf_model)
        self.cfg.d_vocab_out = hf_model.config.num_labels


class RobertaClassifierAdapter(RobertaArchitectureAdapter):
    """``RobertaForSequenceClassification``: a two-layer head on the first token."""

    supports_causal_loss = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        for part in _MASKED_LM_HEAD:
            del self.components[part]
        self.components["classifier_dense"] = LinearBridge(name="classifier.dense")
        self.components["unembed"] = UnembeddingBridge(name="classifier.out_proj")

    def prepare_model(self, hf_model: Any) -> None:
        """Read the usable context off the position table, and count the classes."""
        super().prepare_model(hf_model)
        self.cfg.d_vocab_out = hf_model.config.num_labels


class BertEncoderAdapter(BertArchitectureAdapter):
    """``BertModel``: no head, so its answer is the last hidden state."""

    supports_causal_loss = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        for part in _MASKED_LM_HEAD:
            del self.components[part]
        for component in self.components.values():
            component.name = str(component.name).removeprefix("bert.")
        self.cfg.d_vocab_out = self.cfg.d_model


class GroupedFalconAdapter(FalconArchitectureAdapter):
    """Falcon, including ``new_decoder_architecture``.

    transformer-lens 4.3.0 makes three mistakes there: it obeys ``multi_query`` (on by
    default), which transformers ignores in the new architecture; it cuts the fused projection
    into all queries, all keys, all values, where transformers keeps each key/value head
    beside its group of queries; and it expects two norms even when the model has one.
    """

    def __init__(self, cfg: Any) -> None:
        self._grouped = bool(getattr(cfg, "new_decoder_architecture", False))
        if self._grouped:
            cfg.multi_query = False
        super().__init__(cfg)
        if self._grouped and getattr(cfg, "num_ln_in_parallel_attn", None) == 1:
            self.components["blocks"].submodules["ln1"].name = "input_layernorm"

    def _split_falcon_qkv(
        self, original_attention_component: Any
    ) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        if not self._grouped:
            return super()._split_falcon_qkv(original_attention_component)
        fused = original_attention_component.query_key_value
        n_kv_heads = self.cfg.n_key_value_heads or self.cfg.n_heads
        d_head = self.cfg.d_model // self.cfg.n_heads

        def cut(part: slice) -> nn.Linear:
            def rows(parameter: nn.Parameter) -> nn.Parameter:
                groups = parameter.detach().unflatten(0, (n_kv_heads, -1, d_head))
                return nn.Parameter(groups[:, part].flatten(0, 2).clone())

            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = rows(fused.weight)
            linear.out_features, linear.in_features = linear.weight.shape
            if fused.bias is not None:
                linear.bias = rows(fused.bias)
            return linear

        return cut(slice(0, -2)), cut(slice(-2, -1)), cut(slice(-1, None))


ADAPTERS: dict[str, type[ArchitectureAdapter]] = {
    "BertForSequenceClassification": BertClassifierAdapter,
    "BertModel": BertEncoderAdapter,
    "FalconForCausalLM": GroupedFalconAdapter,
    "RobertaForSequenceClassification": RobertaClassifierAdapter,
}


def register_adapters() -> None:
    """Make transformer-lens use `ADAPTERS`; doing it again changes nothing."""
    for architecture, adapter in ADAPTERS.items():
        ArchitectureAdapterFactory.register_adapter(architecture, adapter)


def answers_once(model: TransformerBridge) -> bool:
    """Whether the model gives one answer per prompt (a classifier), not one per position."""
    return str(model.cfg.architecture).endswith("ForSequenceClassification")
