"""The catalogue of sites is proven on every architecture, and its meaning is checked."""

import pytest
import torch
import zoo

import mechinterp as mi
from mechinterp.hooks import HookManager
from mechinterp.models import forward
from mechinterp.sites import SITES, is_post_norm, locate, resolve_heads, resolve_layers

PARALLEL = ["neox", "phi", "falcon", "falcon_grouped"]
GROUPED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "falcon_grouped"]


def hooks_on(model) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for m in [*model.modules(), *model.hook_dict.values()]
    )


def absent(name: str) -> set[str]:
    if name == "native_attn":
        return {"resid_mid", "mlp_out", "mlp_post"}
    return {"resid_mid"} if name in PARALLEL else set()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_site_works_or_says_why_not(name):
    model = zoo.zoo(name)
    catalogue = mi.sites(model)
    assert {e.name for e in catalogue if not e.works} == absent(name)
    for entry in catalogue:
        if entry.works:
            assert entry.layers == (() if entry.name == "embed" else (0, 1, 2))
            assert entry.missing == {}
        else:
            assert set(entry.missing) == {0, 1, 2}
            assert "does not exist" in entry.missing[0]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_catalogue_leaves_the_model_as_it_was(name):
    model = zoo.zoo(name)
    before, hooks = forward(model, zoo.tokens()), hooks_on(model)
    mi.sites(model)
    assert torch.equal(forward(model, zoo.tokens()), before)
    assert hooks_on(model) == hooks


@pytest.mark.parametrize("name", zoo.NAMES)
def test_what_each_layer_writes_adds_up_to_the_residual_stream(name):
    model = zoo.zoo(name)
    have = [s for s in SITES if s not in absent(name) and not s.startswith(("s", "p"))]
    acts = HookManager(model).capture(zoo.tokens(), have)
    for layer in range(3):
        at = lambda site, layer=layer: acts[site, layer]  # noqa: E731
        if is_post_norm(model.blocks[layer]):
            block = model.blocks[layer]
            mid = block.ln1.original_component(at("resid_pre") + at("attn_out"))
            torch.testing.assert_close(at("resid_mid"), mid)
            post = block.ln2.original_component(at("resid_mid") + at("mlp_out"))
            torch.testing.assert_close(at("resid_post"), post)
            continue
        mid = at("resid_pre") + at("attn_out")
        if ("resid_mid", layer) in acts:
            torch.testing.assert_close(at("resid_mid"), mid)
        if ("mlp_out", layer) in acts:
            mid = mid + at("mlp_out")
        torch.testing.assert_close(at("resid_post"), mid)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_heads_mix_values_by_the_pattern_and_the_pattern_is_the_softmax_of_the_scores(name):
    model = zoo.zoo(name)
    acts = HookManager(model).capture(zoo.tokens(), ["scores", "pattern", "v", "z"])
    for layer in range(3):
        pattern = acts["pattern", layer]
        torch.testing.assert_close(acts["scores", layer].softmax(-1), pattern)
        group = acts["z", layer].shape[2] // acts["v", layer].shape[2]
        v = acts["v", layer].repeat_interleave(group, dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        torch.testing.assert_close(acts["z", layer], z)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_results_of_all_heads_and_the_bias_are_the_output_projection(name):
    model = zoo.zoo(name)
    acts = HookManager(model).capture(zoo.tokens(), ["z", "result"])
    for layer in range(3):
        attn = model.blocks[layer].attn
        heads = [attn.W_O[h] for h in range(4)]
        for head, W_O in enumerate(heads):
            expected = acts["z", layer][:, :, head] @ W_O
            torch.testing.assert_close(acts["result", layer][:, :, head], expected)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_shapes_name_query_and_key_value_heads_apart(name):
    catalogue = mi.sites(zoo.zoo(name))
    kv = 2 if name in GROUPED else 1 if name == "falcon" else 4
    assert catalogue["k"].shape == ("batch", "pos", f"kv_head={kv}", "d_head=8")
    assert catalogue["z"].shape == ("batch", "pos", "head=4", "d_head=8")
    assert catalogue["pattern"].shape == ("batch", "head=4", "query_pos", "key_pos")


def test_a_catalogue_prints_every_site_with_its_shape_hook_and_reason():
    text = repr(mi.sites(zoo.zoo("neox")))
    for site in SITES:
        assert site in text
    assert "run in parallel" in text
    assert "0..2" in text


def test_an_unknown_site_suggests_near_names():
    with pytest.raises(
        ValueError, match=r"unknown site 'resid_prae'. Did you mean 'resid_pre'"
    ):
        mi.Site("resid_prae")


def test_a_layer_out_of_range_says_which_there_are():
    with pytest.raises(
        ValueError, match=r"layer 3 does not exist: the model has layers 0\.\.2"
    ):
        resolve_layers(zoo.zoo("gpt2"), "z", 3)


def test_a_head_out_of_range_says_which_there_are():
    model = zoo.zoo("llama")
    with pytest.raises(
        ValueError, match=r"head \(1, 4\) does not exist: layer 1 has heads 0\.\.3"
    ):
        resolve_heads(model, "z", 1, 4)
    with pytest.raises(ValueError, match=r"layer 1 has key/value heads 0\.\.1"):
        resolve_heads(model, "k", 1, 2)


def test_layers_and_heads_count_from_the_end_and_are_not_named_twice():
    model = zoo.zoo("gpt2")
    assert resolve_layers(model, "z", [-1, 0]) == [2, 0]
    assert resolve_heads(model, "z", 0, -1) == [3]
    with pytest.raises(ValueError, match="twice"):
        resolve_layers(model, "z", [2, -1])
    with pytest.raises(ValueError, match="twice"):
        resolve_heads(model, "z", 0, [0, 0])


def test_a_site_the_architecture_lacks_gives_the_reason():
    with pytest.raises(mi.MissingSiteError, match="run in parallel"):
        locate(zoo.zoo("neox"), "resid_mid", 0)
    with pytest.raises(mi.MissingSiteError, match="has no MLP"):
        locate(zoo.zoo("native_attn"), "mlp_post", 0)
