"""Real models, with raw Hugging Face numerics, as transformer-lens bridges."""

from mechinterp.models.identity import fingerprint
from mechinterp.models.load import load_model
from mechinterp.models.plain import processed_weights, unwrap
from mechinterp.models.run import forward, is_causal, n_layers, tokenizer_of

__all__ = [
    "fingerprint",
    "forward",
    "is_causal",
    "load_model",
    "n_layers",
    "processed_weights",
    "tokenizer_of",
    "unwrap",
]
