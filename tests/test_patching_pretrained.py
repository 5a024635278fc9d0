"""Patching on a real language model: equal to transformer-lens, and the known story of IOI."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens import patching as oracle
from transformer_lens.model_bridge import TransformerBridge

import mechinterp as mi
from mechinterp._cache import fetched
from mechinterp.metrics import logit_diff

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        fetched("smollm2-135m") is None,
        reason="SmolLM2-135M is not here; run python scripts/fetch_models.py",
    ),
]

# The site, the hook and setter that transformer-lens uses for it, and the axes it indexes.
SWEEPS = {
    "resid_pre": ("resid_pre", oracle.layer_pos_patch_setter, ("layer", "position")),
    "attn_out": ("attn_out", oracle.layer_pos_patch_setter, ("layer", "position")),
    "mlp_out": ("mlp_out", oracle.layer_pos_patch_setter, ("layer", "position")),
    "z": ("z", oracle.layer_head_vector_patch_setter, ("layer", "head")),
    "pattern": ("pattern", oracle.layer_head_pattern_patch_setter, ("layer", "head")),
}


@cache
def model() -> TransformerBridge:
    return mi.load_model("smollm2-135m")


@pytest.mark.parametrize("site", SWEEPS)
def test_sampled_cells_equal_transformer_lens(site):
    name, setter, axes = SWEEPS[site]
    task = mi.load_task("ioi", model(), 2, seed=3)
    task = task[[0]] if len(set(task.clean.lengths.tolist())) > 1 else task
    assert task.corrupted is not None
    by_head = axes[1] == "head"
    rng = np.random.default_rng(0)
    size = 9 if by_head else int(task.clean.lengths[0])
    layers = rng.choice(30, 6, replace=False)
    others = rng.choice(size, 5, replace=False)
    cells = pd.DataFrame([(a, b) for a in layers for b in others], columns=["layer", "index"])
    with torch.no_grad():
        _, cached = model().run_with_cache(
            task.clean.tokens, names_filter=lambda hook: hook.endswith(name)
        )
        theirs = oracle.generic_activation_patch(
            model(),
            task.corrupted.tokens,
            cached,
            lambda logits: logit_diff(logits[:, -1], task.targets()).mean(),
            setter,
            name,
            index_df=cells,
        )
    where = {"heads": others.tolist()} if by_head else {}
    result = mi.activation_patching(
        model(),
        task,
        site,
        positions="all" if by_head else others.tolist(),
        layers=layers.tolist(),
        **where,
    )
    ours = result.data["patched"].mean("prompt").transpose(*axes).values.ravel()
    assert len(ours) == 30
    tolerance = 1e-5 * float(task.logits(model()).abs().max())
    np.testing.assert_allclose(ours, theirs.numpy(), atol=tolerance, rtol=0)
    assert np.abs(result.effect.values).max() > 10 * tolerance


def test_the_indirect_object_is_preferred_and_handed_from_the_subject_to_the_end():
    task = mi.load_task("ioi", model(), 12)
    layers = [2, 4, 20, 26, 29]
    result = mi.activation_patching(
        model(), task, "resid_pre", positions=["subject", "end"], layers=layers
    )
    clean = result.data["clean"].values
    assert clean.mean() > 1.0 and (clean > 0).mean() > 0.8
    recovered = result.recovered.transpose("layer", "position").values
    early, late = recovered[:2], recovered[-2:]
    assert (early[:, 0] > 0.8).all() and (np.abs(early[:, 1]) < 0.1).all()
    assert (late[:, 1] > 0.8).all() and (np.abs(late[:, 0]) < 0.2).all()
