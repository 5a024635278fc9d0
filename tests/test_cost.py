"""The formula of a model's cost against what torch counts."""

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode
from zoo import tokens as random_tokens
from zoo import zoo

import mechinterp as mi

CONTEXT = 11


def pruned(name: str):
    heads = [(0, 1), (2, 3), *((1, head) for head in range(4))]
    return mi.prune_neurons(mi.prune_heads(zoo(name), heads), {0: range(7)})


@pytest.mark.parametrize("make", [zoo, pruned])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "falcon"])
def test_arithmetic_and_cache_are_what_torch_counts(name, make):
    model = make(name)
    found = mi.cost(model, context=CONTEXT)
    plain: Any = mi.unwrap(model)
    tokens = random_tokens(1, CONTEXT)
    past = plain(tokens[:, :-1], use_cache=True).past_key_values
    with FlopCounterMode(display=False) as counter:
        past = plain(tokens[:, -1:], past_key_values=past).past_key_values
    assert found.flops_per_token == counter.get_total_flops()
    layers = past.layers
    sizes = [kept[:, :, -1:].nbytes for layer in layers for kept in (layer.keys, layer.values)]
    assert found.cache_bytes_per_token == sum(sizes)
    assert found.parameters == sum(p.numel() for p in plain.parameters())


def test_parameters_by_part():
    whole, less = mi.cost(zoo("llama"), context=9), mi.cost(pruned("llama"), context=9)
    assert whole.attention_parameters == 3 * (32 * 32 * 2 + 2 * 32 * 16)
    assert whole.mlp_parameters == 3 * 3 * 32 * 64
    assert less.mlp_parameters == whole.mlp_parameters - 3 * 32 * 7
    assert less.query_heads == (3, 0, 3)
    assert less.key_value_heads == (2, 0, 2)
    assert whole.parameters - less.parameters == (
        whole.attention_parameters
        - less.attention_parameters
        + whole.mlp_parameters
        - less.mlp_parameters
    )


def test_an_encoder_has_no_cache():
    assert mi.cost(zoo("bert"), context=9).cache_bytes_per_token == 0


def test_a_context_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Pass 1\.\.64"):
        mi.cost(zoo("gpt2"), context=65)
