"""Real models, with raw Hugging Face numerics, as transformer-lens bridges."""

from mechinterp.models.forward import forward, is_causal, n_layers, tokenizer_of
from mechinterp.models.load import load_model

__all__ = [
    "forward",
    "is_causal",
    "load_model",
    "n_layers",
    "tokenizer_of",
]
