"""Architectures that transformer-lens 4.3.0 lacks, through its public registration."""

from transformer_lens.model_bridge import TransformerBridge


def answers_once(model: TransformerBridge) -> bool:
    """Whether the model gives one answer per prompt (a classifier), not one per position."""
    return str(model.cfg.architecture).endswith("ForSequenceClassification")
