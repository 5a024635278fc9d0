"""One door for every kind of model."""

import copy as copying
from pathlib import Path

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mechinterp.models.wrap import check_supported, wrap

EMBEDDED = Path(__file__).parents[1] / "data" / "embedded"


def load_model(
    source: str | Path | nn.Module | TransformerBridge = "embedded",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    copy: bool = False,
) -> TransformerBridge:
    """Return ``source`` as a bridge."""
    if isinstance(source, TransformerBridge):
        return source.eval()
    if isinstance(source, PreTrainedModel):
        return wrap(copying.deepcopy(source) if copy else source, tokenizer)
    folder = EMBEDDED if source == "embedded" else Path(str(source))
    import transformers

    config = AutoConfig.from_pretrained(folder)
    architecture = config.architectures[0]
    check_supported(config, architecture)
    module = getattr(transformers, architecture).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", use_safetensors=True
    )
    return wrap(module, tokenizer or AutoTokenizer.from_pretrained(folder))
