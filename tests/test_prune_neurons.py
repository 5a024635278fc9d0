"""A model without some of its neurons gives the logits of the one where they are masked."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformer_lens.model_bridge.sources import boot_native
from zoo import N_CTX, zoo
from zoo import tokens as random_tokens

import mechinterp as mi
from mechinterp.edits import Mean, Zero
from mechinterp.models import forward
from mechinterp.sites import n_neurons

model_of = cache(zoo)
TOKENS, MEAN_DATA = random_tokens(2, 9), random_tokens(3, 7, seed=5)
FOLDS: dict[str, dict[str, Any]] = {
    "zero": {},
    "mean": {"fold": "mean", "mean_data": MEAN_DATA},
}
WITH_MLP = ["gpt2", "neox", "llama", "gemma2", "opt", "falcon", "bert", "native"]


@pytest.mark.parametrize("name", WITH_MLP)
@settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow])
@given(
    neurons=st.dictionaries(
        st.integers(0, 2),
        st.lists(st.integers(0, 63), min_size=1, max_size=63, unique=True),
        min_size=1,
    ),
    fold=st.sampled_from(["zero", "mean"]),
)
def test_a_pruned_model_gives_the_logits_of_the_masked_one(name, neurons, fold):
    model = model_of(name)
    before = mi.fingerprint(model)
    smaller = mi.prune_neurons(model, neurons, **FOLDS[fold])
    manager = mi.HookManager(model)
    source = manager.mean(MEAN_DATA, "mlp_post")
    edits = [
        Zero("mlp_post", layers=layer, neurons=gone)
        if fold == "zero"
        else Mean("mlp_post", source, layers=layer, neurons=gone)
        for layer, gone in neurons.items()
    ]
    with manager.edit(*edits), torch.no_grad():
        expected = forward(model, TOKENS)
    with torch.no_grad():
        ours = forward(smaller, TOKENS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert mi.fingerprint(model) == before
    whole = [n_neurons(model, layer) for layer in range(3)]
    lost = [len(neurons.get(layer, ())) for layer in range(3)]
    left = [n_neurons(smaller, layer) for layer in range(3)]
    assert left == [all_ - gone for all_, gone in zip(whole, lost, strict=True)]


def test_neurons_and_heads_can_both_go_in_any_order():
    model = model_of("llama")
    one = mi.prune_heads(mi.prune_neurons(model, [(0, 5), (0, 9)]), [(0, 1), (2, 3)])
    other = mi.prune_neurons(mi.prune_heads(model, [(0, 1), (2, 3)]), {0: [9, 5]})
    assert torch.equal(forward(one, TOKENS), forward(other, TOKENS))
    assert mi.pruning_of(one).neurons == mi.pruning_of(other).neurons == {0: (5, 9)}
    third = mi.prune_neurons(one, [(0, 5)])  # which was (0, 6)
    assert mi.pruning_of(third).neurons == {0: (5, 6, 9)}
    assert mi.pruning_of(third).original_neuron(0, 5) == (0, 7)
    assert [sorted(step) for step in mi.pruning_of(third).steps] == [
        ["fold", "model", "neurons", "of"],
        ["fold", "heads", "model", "of"],
        ["fold", "model", "neurons", "of"],
    ]


def test_both_parts_of_a_gated_mlp_are_cut():
    mlp = mi.unwrap(mi.prune_neurons(model_of("gemma3"), {1: range(10)})).model.layers[1].mlp  # pyright: ignore
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (54, 32)
    assert mlp.down_proj.weight.shape == (32, 54)
    assert mlp.gate_proj.out_features == mlp.down_proj.in_features == 54


BAD = {
    "a whole layer": ({"neurons": {1: range(128)}}, "all 128 of layer 1"),
    "twice": ({"neurons": [(0, 1), (0, 1)]}, r"neuron \(0, 1\) is named twice"),
    "no such neuron": ({"neurons": [(0, 128)]}, "layer 0 has neurons 0..127"),
    "nothing": ({"neurons": {}}, "neurons is empty"),
    "no data": ({"neurons": [(0, 1)], "fold": "mean"}, "needs data for the means"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case, monkeypatch):
    arguments, says = BAD[case]
    monkeypatch.setattr("mechinterp.heads.pruning.pruned_copy", pytest.fail)
    with pytest.raises(ValueError, match=says):
        mi.prune_neurons(model_of("gpt2"), **arguments)


def test_a_model_without_mlps_has_no_neurons():
    with pytest.raises(ValueError, match="no MLPs"):
        mi.prune_neurons(model_of("native_attn"), [(0, 0)])


def test_neurons_that_share_a_softmax_are_refused():
    fields = {"n_layers": 1, "d_model": 16, "n_ctx": N_CTX, "d_head": 8, "n_heads": 2}
    model = mi.load_model(boot_native(fields | {"d_vocab": 20, "act_fn": "solu", "d_mlp": 32}))
    with pytest.raises(ValueError, match="mixes them"):
        mi.prune_neurons(model, [(0, 0)])
