"""Composition of heads: whole matrices, transformer-lens, and random orientations."""

import numpy as np
import pytest
import torch
from zoo import zoo

import mechinterp as mi
from mechinterp.heads.composition import KINDS, _over_norm, _parts
from mechinterp.heads.copying import writing_weights
from mechinterp.weights import head_weights


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "falcon", "native_attn", "bert"])
def test_scores_are_those_of_the_whole_matrices(name):
    model = zoo(name)
    found = mi.composition(model).data["composition"]
    below, above = (
        head_weights(model, 0, fold_norm=True),
        head_weights(model, 2, fold_norm=True),
    )
    W_OV_sent = below.W_V @ writing_weights(model, 0)
    W_QK = above.W_Q @ above.W_K.mT
    W_OV = above.W_V @ writing_weights(model, 2)
    for kind, read in zip(KINDS, (W_QK, W_QK.mT, W_OV), strict=True):
        for a in range(4):
            for b in range(4):
                norms = torch.linalg.matrix_norm(W_OV_sent[a]) * torch.linalg.matrix_norm(
                    read[b]
                )
                score = torch.linalg.matrix_norm(W_OV_sent[a] @ read[b]) / norms
                baseline = model.cfg.d_model**-0.5
                mine = found.sel(
                    metric=kind, sender_layer=0, sender_head=a, layer=2, head=b
                ).item()
                assert mine == pytest.approx(float(score) - baseline, abs=1e-5)


def test_scores_equal_those_of_transformer_lens_without_its_missing_baseline():
    model = zoo("native_nonorm")
    found = mi.composition(model).data["composition"]
    for kind in KINDS:
        theirs = model.all_composition_scores(kind)  # sender layer and head, receiver's
        mine = found.sel(metric=kind) + model.cfg.d_model**-0.5
        upper = np.isfinite(mine.values)
        np.testing.assert_allclose(
            mine.values[upper], theirs.detach().numpy()[upper], atol=1e-5, rtol=0
        )


def test_random_orientations_have_the_baseline_on_average():
    part = _parts(zoo("gpt2"), 0)
    read = _parts(zoo("gpt2"), 1).reads[1]
    generator = torch.Generator().manual_seed(0)
    d_model, squares = 32, []
    for _ in range(400):
        turned = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator)).Q
        squares.append(torch.linalg.matrix_norm(part.write[0] @ turned @ read[0]) ** 2)
    assert float(torch.stack(squares).mean()) == pytest.approx(1 / d_model, rel=0.05)
    assert float(torch.linalg.matrix_norm(_over_norm(read)[0])) == pytest.approx(1)


def test_nothing_composes_with_what_is_not_below_it():
    found = mi.composition(zoo("llama")).data["composition"]
    for sender in range(3):
        for receiver in range(3):
            values = found.sel(sender_layer=sender, layer=receiver)
            assert bool(values.isnull().all()) == (sender >= receiver)


def test_partners_are_the_strongest_senders_of_a_head():
    result = mi.composition(zoo("gpt2"))
    table = result.partners(2, 1, "K", n=3)
    own = result.effect_of("K").sel(layer=2, head=1)
    assert list(table["K"]) == sorted(table["K"], reverse=True)
    assert table["K"].to_numpy()[0] == float(own.max())
    assert len(result.partners(0, 0)) == 0


def test_a_pair_that_is_made_to_compose_comes_first():
    model = zoo("native_nonorm")
    with torch.no_grad():
        sender, receiver = model.blocks[0].attn, model.blocks[1].attn
        written = sender.W_O[1]  # d_head, d_model
        receiver.W_K[2] = written.T
    table = mi.composition(model).top(1, metric="K")
    row = table.iloc[0]
    assert (row["sender_layer"], row["sender_head"], row["layer"], row["head"]) == (0, 1, 1, 2)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_composes_as_its_weights_do_in_full(name):
    half = zoo(name, torch.bfloat16)
    found = mi.composition(half)
    full = mi.composition(zoo(name))
    assert found.convention.dtype == "bfloat16"
    np.testing.assert_allclose(found.effect, full.effect, atol=2e-3)
