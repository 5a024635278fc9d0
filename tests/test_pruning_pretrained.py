"""Pruning models that have learned something: the embedded one, and SmolLM2-135M."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import mechinterp as mi
from mechinterp._cache import fetched
from mechinterp.models import forward
from mechinterp.tasks.prompts import as_prompts

TEXTS = ["The old man walked down to the river.", "She said that it was late, and went home."]


def assert_equal_and_generating(
    model: TransformerBridge, heads: list[tuple[int, int]], folder: Path
) -> None:
    smaller = mi.prune_heads(model, heads, fold="mean", mean_data=TEXTS)
    prompts = as_prompts(model, ["The capital of France is Paris, and the capital of Italy is"])
    tokens = prompts.tokens
    manager = mi.HookManager(model)
    means = manager.mean(TEXTS, "z")
    edits = [mi.edits.Mean("z", means, layers=layer, heads=head) for layer, head in heads]
    with manager.edit(*edits), torch.no_grad():
        expected = forward(model, tokens)
    with torch.no_grad():
        ours = forward(smaller, tokens)
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    outs = [
        smaller.generate(
            tokens,
            max_new_tokens=8,
            do_sample=False,
            use_past_kv_cache=kept,
            verbose=False,
            stop_at_eos=False,
        )
        for kept in (True, False)
    ]
    cached, unaided = outs
    assert isinstance(cached, Tensor) and isinstance(unaided, Tensor)
    assert torch.equal(cached, unaided)
    again = mi.load_model(mi.save_model(smaller, folder), device="cpu")
    assert torch.equal(forward(again, tokens), forward(smaller, tokens))
    assert mi.fingerprint(again) == mi.fingerprint(smaller)


def test_the_embedded_model(tmp_path):
    heads = [(0, 0), (1, 3), *((2, head) for head in range(8))]
    assert_equal_and_generating(mi.load_model(device="cpu"), heads, tmp_path / "pruned")


@pytest.mark.slow
@pytest.mark.skipif(
    fetched("smollm2-135m") is None,
    reason="SmolLM2-135M is not here; run python scripts/fetch_models.py",
)
def test_smollm2_in_groups_of_unequal_size(tmp_path):
    heads = [(0, 0), (3, 4), (3, 5), (7, 0), (7, 1), (7, 2), *((9, h) for h in range(9))]
    model = mi.load_model("smollm2-135m", device="cpu")
    assert_equal_and_generating(model, heads, tmp_path / "pruned")
