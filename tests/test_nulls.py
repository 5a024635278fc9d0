"""Nulls: untrained models of the same shape, and random heads that match given ones."""

import copy
from functools import cache
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformer_lens.model_bridge.sources import boot_native
from zoo import HF, NAMES, NATIVE, hf, tokenizer, tokens, zoo

import mechinterp as mi
from mechinterp.models import forward
from mechinterp.nulls import different_random_heads
from mechinterp.sites import n_heads

model_of = cache(zoo)


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in mi.unwrap(model).named_parameters()}


# --------------------------------------------------------------------------- untrained models


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_model_is_drawn_by_its_seed_and_leaves_everything_else_alone(name):
    model = model_of(name)
    before, state = mi.fingerprint(model), torch.random.get_rng_state()
    one, same, other = (mi.random_init(model, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert mi.fingerprint(model) == before
    assert mi.fingerprint(one) == mi.fingerprint(same) != mi.fingerprint(other)
    assert mi.fingerprint(one) != before and not one.training
    shapes = {n: (p.shape, p.dtype) for n, p in parameters(model).items()}
    assert {n: (p.shape, p.dtype) for n, p in parameters(one).items()} == shapes
    mine = {p.data_ptr() for p in parameters(one).values()}
    assert not mine & {p.data_ptr() for p in parameters(model).values()}
    assert forward(one, tokens()).isfinite().all()
    assert "random weights, seed 5" in str(one.cfg.model_name)


@pytest.mark.parametrize("name", HF)
def test_its_weights_are_distributed_as_in_a_model_that_transformers_builds(name):
    """Each parameter has the same constant, or the same spread, as in one that was built."""
    found = parameters(mi.random_init(model_of(name), 1))
    config = copy.deepcopy(hf(name).config)
    with torch.random.fork_rng(devices=[]):
        built = type(hf(name))._from_config(config)
    expected = dict(built.named_parameters())
    assert set(found) == set(expected)
    for path, parameter in found.items():
        theirs = expected[path].detach()
        if theirs.numel() < 2 or float(theirs.std()) == 0:
            assert torch.equal(parameter, theirs), path
            continue
        error = 4 * 2**0.5 / (2 * theirs.numel()) ** 0.5  # of a ratio of two such spreads
        assert float(parameter.std() / theirs.std()) == pytest.approx(1, abs=error), path
        assert abs(float(parameter.mean())) < 4 * float(theirs.std()) / theirs.numel() ** 0.5


def test_its_spread_is_the_initializer_range_and_its_norms_and_biases_are_as_at_first():
    fresh = mi.unwrap(mi.random_init(model_of("llama"), 2))
    for path, parameter in fresh.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), path
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15), path
    gpt2 = parameters(mi.random_init(model_of("gpt2"), 2))
    scaled = gpt2["transformer.h.0.mlp.c_proj.weight"]
    assert float(scaled.std()) == pytest.approx(0.02 / 6**0.5, rel=0.15)
    assert not any(p.any() for n, p in gpt2.items() if n.endswith(".bias"))


def test_tied_weights_are_tied_again_and_padding_is_still_zero():
    for name in ("gpt2", "bert", "opt"):
        fresh = cast(Any, mi.unwrap(mi.random_init(model_of(name), 0)))
        assert fresh.get_input_embeddings().weight is fresh.get_output_embeddings().weight
        if (padding := fresh.get_input_embeddings().padding_idx) is not None:
            assert not fresh.get_input_embeddings().weight[padding].any()


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_bridge_is_drawn_as_transformer_lens_draws_it(name):
    model = model_of(name)
    booted = boot_native(copy.deepcopy(model.cfg).to_dict() | {"seed": 7, "architecture": None})
    mine, theirs = parameters(mi.random_init(model, 7)), parameters(booted)
    assert all(torch.equal(mine[path], theirs[path]) for path in theirs)


def test_what_transformer_lens_leaves_out_is_reset_by_torch():
    fields = {
        "n_layers": 1, "d_model": 16, "n_ctx": 8, "d_head": 8, "n_heads": 2, "d_vocab": 9,
        "act_fn": "solu_ln", "d_mlp": 32,
    }  # fmt: skip
    model = boot_native(fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    fresh = parameters(mi.random_init(model, 0))
    norms = [p for path, p in fresh.items() if "mlp" in path and "ln" in path]
    assert len(norms) == 2 and {float(p.mean()) for p in norms} == {0.0, 1.0}


def test_an_untrained_model_keeps_its_dtype_and_constants_and_tokenizer():
    single = mi.load_model(hf("llama"), tokenizer=tokenizer())
    half = zoo("llama", torch.bfloat16)
    fresh, rounded = mi.random_init(single, 3), mi.random_init(half, 3)
    assert fresh.tokenizer is single.tokenizer
    for path, parameter in parameters(fresh).items():
        assert torch.equal(parameters(rounded)[path], parameter.bfloat16()), path
    theirs = dict(mi.unwrap(half).named_buffers())
    for path, buffer in mi.unwrap(rounded).named_buffers():
        assert torch.equal(buffer, theirs[path]) and buffer.dtype == theirs[path].dtype


def test_a_model_whose_layers_differ_keeps_its_shapes():
    module = hf("llama")
    mlp = module.model.layers[1].mlp
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight = nn.Parameter(part.weight[:40].detach().clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :40].detach().clone())
    fresh = mi.random_init(mi.load_model(module))
    assert parameters(fresh)["model.layers.1.mlp.up_proj.weight"].shape == (40, 32)


def test_weights_that_no_initialiser_knows_are_an_error():
    module = hf("llama")
    module.model.layers[0].extra = nn.ParameterDict({"scale": torch.ones(3)})
    with pytest.raises(ValueError, match=r"leaves model\.layers\.0\.extra\.scale as it was"):
        mi.random_init(mi.load_model(module))


def test_an_untrained_model_knows_nothing_of_induction():
    trained = mi.load_model("embedded")
    fresh = mi.random_init(trained, 0)
    task = mi.load_task("induction", trained, 32)
    values = [
        float(mi.metrics.logit_diff(task.logits(model), task.targets()).mean())
        for model in (trained, fresh)
    ]
    assert values[0] > 1.0 and abs(values[1]) < 0.1


# -------------------------------------------------------------------------------- random heads

heads = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, unique=True)


@settings(deadline=None, max_examples=40)
@given(heads, st.integers(1, 5), st.integers(0, 99))
def test_random_heads_match_the_given_ones_layer_by_layer_and_are_others(given, n, seed):
    model = model_of("llama")
    per_layer = {layer: sum(at == layer for at, _ in given) for layer in range(3)}
    if max(per_layer.values()) > 2:
        with pytest.raises(ValueError, match=r"only [01] others to match them"):
            mi.random_heads(model, given, n, seed)
        return
    drawn = mi.random_heads(model, given, n, seed)
    assert drawn == mi.random_heads(model, given, n, seed) and len(drawn) == n
    for found in drawn:
        assert len(set(found)) == len(found) == len(given)
        assert not set(found) & set(given)
        assert {at: sum(a == at for a, _ in found) for at in range(3)} == per_layer
        assert all(0 <= head < n_heads(model, "z", layer) for layer, head in found)


def test_every_other_head_is_drawn_equally_often():
    drawn = mi.random_heads(model_of("gpt2"), [(1, 2)], 3000)
    counts = [sum(found == ((1, head),) for found in drawn) for head in range(4)]
    assert counts[2] == 0 and all(abs(count - 1000) < 4 * 26 for count in counts[:2])


def test_different_sets_are_drawn_without_replacement_and_all_equally_often():
    given, model = [(1, 2), (2, 0)], model_of("gpt2")
    for n in (4, 6):  # drawn until different; chosen among all nine
        counts: dict[object, int] = {}
        for seed in range(400):
            found, possible = different_random_heads(model, given, n, seed)
            assert possible == 9 and len(set(found)) == len(found) == n
            for each in found:
                counts[each] = counts.get(each, 0) + 1
        assert len(counts) == 9
        spread = (400 * n / 9 * (1 - n / 9)) ** 0.5
        assert all(abs(count - 400 * n / 9) < 4 * spread for count in counts.values())
    assert different_random_heads(model, given, 50)[1] == 9


def test_negative_layers_and_heads_count_from_the_end():
    model = model_of("gpt2")
    assert mi.random_heads(model, [(-1, -1)], 5) == mi.random_heads(model, [(2, 3)], 5)


def test_layers_may_have_different_numbers_of_heads():
    module = hf("llama")
    attention = module.model.layers[1].self_attn
    for part, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        linear = getattr(attention, part)
        linear.weight = nn.Parameter(linear.weight[:rows].detach().clone())
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :16].detach().clone())
    model = mi.load_model(module)
    assert [n_heads(model, "z", layer) for layer in range(3)] == [4, 2, 4]
    assert set(mi.random_heads(model, [(1, 0)], 9)) == {((1, 1),)}
    with pytest.raises(ValueError, match="2 heads of layer 1 are given, but it has only 0"):
        mi.random_heads(model, [(1, 0), (1, 1)], 1)
    with pytest.raises(ValueError, match=r"head \(1, 2\) does not exist"):
        mi.random_heads(model, [(1, 2)], 1)
    assert forward(mi.random_init(model), tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("given", "n", "says"),
    [
        ([], 1, "there are no heads"),
        ([(0, 1)], 0, "n=0 draws no set"),
        ([(0, 9)], 1, r"head \(0, 9\) does not exist: layer 0 has heads 0..3"),
        ([(3, 0)], 1, "layer 3 does not exist"),
        ([(0, 1), (0, -3)], 1, r"head \(0, 1\) is named twice"),
        ([(0, 0), (0, 1), (0, 2)], 1, "at most half of a layer's heads"),
    ],
)
def test_heads_that_cannot_be_matched_are_refused(given, n, says):
    with pytest.raises(ValueError, match=says):
        mi.random_heads(model_of("gpt2"), given, n)
