"""A model without some of its heads: smaller, equal to the masked one, and a model like any."""

import warnings
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from conformance import METHODS, check_method, pair, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from zoo import ANSWERS_ONCE, CAUSAL, HF, NAMES, zoo
from zoo import tokens as random_tokens

import mechinterp as mi
from mechinterp.edits import Mean, Zero
from mechinterp.models import forward
from mechinterp.sites import key_heads, n_heads, site_layers
from mechinterp.tasks.prompts import as_prompts

model_of = cache(zoo)
TOKENS, MEAN_DATA = random_tokens(2, 9), random_tokens(3, 7, seed=5)
EVERY_HEAD = [(layer, head) for layer in range(3) for head in range(4)]
UNEQUAL = [(0, 1), (2, 3)]  # two groups of two heads lose one
HEADLESS = [(0, head) for head in range(4)] + [(2, 2), (2, 3)]  # and a whole group
FOLDS: dict[str, dict[str, Any]] = {
    "zero": {},
    "mean": {"fold": "mean", "mean_data": MEAN_DATA},
}


@cache
def pruned(name: str, heads: tuple[tuple[int, int], ...], fold: str = "zero"):
    return mi.prune_heads(model_of(name), heads, **FOLDS[fold])


def masked(name: str, heads: Any, fold: str) -> Tensor:
    """What the whole model answers with the heads replaced in a plain hooked run."""
    model, by_layer = model_of(name), {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    manager = mi.HookManager(model)
    source = manager.mean(MEAN_DATA, "z")
    edits = [
        Zero("z", layers=layer, heads=gone)
        if fold == "zero"
        else Mean("z", source, layers=layer, heads=gone)
        for layer, gone in by_layer.items()
    ]
    with manager.edit(*edits), torch.no_grad():
        return forward(model, TOKENS)


def assert_same_logits(ours: Tensor, expected: Tensor) -> None:
    ours, expected = ours.detach(), expected.detach()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def splits_groups(name: str, heads: Any) -> bool:
    """Whether falcon_grouped, with two groups of two heads, cannot hold what is left."""
    lost = Counter((layer, head // 2) for layer, head in heads)
    pairs = [{lost[layer, 0], lost[layer, 1]} for layer in range(3)]
    return name == "falcon_grouped" and {0, 1} in pairs


HEADS = st.sets(st.sampled_from(EVERY_HEAD), min_size=1, max_size=11)
FOLD = st.sampled_from(["zero", "mean"])
PATIENT = [HealthCheck.too_slow]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=2, suppress_health_check=PATIENT)
@given(heads=HEADS, fold=FOLD)
def test_a_pruned_model_gives_the_logits_of_the_masked_one(name, heads, fold):
    assert_pruned_is_masked(name, heads, fold)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, suppress_health_check=PATIENT)
@given(heads=HEADS, fold=FOLD)
def test_many_pruned_models_give_the_logits_of_the_masked_ones(name, heads, fold):
    assert_pruned_is_masked(name, heads, fold)


def assert_pruned_is_masked(name, heads, fold):
    model = model_of(name)
    before = mi.fingerprint(model)
    if splits_groups(name, heads):
        with pytest.raises(ValueError, match="unequal size"):
            mi.prune_heads(model, heads, **FOLDS[fold])
        return
    smaller = mi.prune_heads(model, heads, **FOLDS[fold])
    with torch.no_grad():
        ours = forward(smaller, TOKENS)
        assert_same_logits(ours, masked(name, heads, fold))
        if name in HF:
            plain = mi.unwrap(smaller)(TOKENS).logits
            assert_same_logits(ours[:, 0] if name in ANSWERS_ONCE else ours, plain)
    assert mi.fingerprint(model) == before
    assert n_parameters(smaller) < n_parameters(model)


def n_parameters(model: TransformerBridge) -> int:
    return sum(p.numel() for p in mi.unwrap(model).parameters())


@pytest.mark.parametrize("heads", [UNEQUAL, HEADLESS], ids=["unequal groups", "no heads"])
@pytest.mark.parametrize(
    "name", ["gpt2", "neox", "llama", "mistral", "gemma3", "opt", "falcon"]
)
def test_generation_with_the_cache_gives_the_tokens_that_it_gives_without(name, heads):
    model, prompt = pruned(name, tuple(heads)), random_tokens(1, 6)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    own: dict[str, Any] = {"verbose": False, "stop_at_eos": False}
    cached, whole = (
        model.generate(prompt, use_past_kv_cache=kept, **options, **own)
        for kept in (True, False)
    )
    assert isinstance(cached, Tensor) and isinstance(whole, Tensor)
    assert torch.equal(cached, whole)
    plain: Any = mi.unwrap(model)
    plain.generation_config.eos_token_id = None
    for attention in ("eager", "sdpa"):
        plain.set_attn_implementation(attention)
        mask = torch.ones_like(prompt)
        out = plain.generate(prompt, attention_mask=mask, **options)
        assert torch.equal(out, cached)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_first_layer_without_heads_still_says_how_long_the_sequence_is(name):
    plain: Any = mi.unwrap(pruned(name, tuple(HEADLESS)))
    past = plain(TOKENS[:, :-2], use_cache=True).past_key_values
    assert past.get_seq_length() == TOKENS.shape[1] - 2
    continued = plain(TOKENS[:, -2:], past_key_values=past).logits
    assert_same_logits(continued, plain(TOKENS).logits[:, -2:])


def test_the_cache_holds_every_key_value_head_once():
    plain: Any = mi.unwrap(pruned("llama", (*UNEQUAL, (1, 0), (1, 1))))
    cache_ = plain(TOKENS, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache_.layers] == [2, 1, 2]


def test_key_value_heads_go_with_the_last_query_that_reads_them():
    model = pruned("qwen3", ((0, 0), (0, 1), (1, 0), (1, 2), (2, 3)))
    attention = [block.self_attn for block in mi.unwrap(model).model.layers]  # pyright: ignore
    assert [a.q_proj.out_features for a in attention] == [16, 16, 24]
    assert [a.k_proj.out_features for a in attention] == [8, 16, 16]
    assert [a.v_proj.weight.shape[0] for a in attention] == [8, 16, 16]
    assert [a.o_proj.weight.shape[1] for a in attention] == [16, 16, 24]


def test_the_two_models_share_nothing():
    model = zoo("gpt2")
    smaller = mi.prune_heads(model, [(0, 1)])
    theirs = {p.data_ptr() for p in model.original_model.parameters()}
    assert not theirs & {p.data_ptr() for p in smaller.original_model.parameters()}
    with torch.no_grad():
        before = forward(model, TOKENS)
        for parameter in smaller.original_model.parameters():
            parameter.zero_()
        assert torch.equal(forward(model, TOKENS), before)
    assert not mi.pruning_of(model).heads


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "bert"])
def test_pruning_twice_is_pruning_at_once_and_names_are_remembered(name):
    at_once = pruned(name, ((0, 0), (0, 3), (1, 2), (2, 1)))
    first = pruned(name, ((0, 0), (1, 2)))
    twice = mi.prune_heads(first, [(0, 2), (2, 1)])  # (0, 2) was (0, 3) before
    assert_same_logits(forward(twice, TOKENS), forward(at_once, TOKENS))
    record = mi.pruning_of(twice)
    assert record.heads == mi.pruning_of(at_once).heads == {0: (0, 3), 1: (2,), 2: (1,)}
    assert [record.original_head(0, head) for head in (0, 1)] == [(0, 1), (0, 2)]
    assert record.original_head(1, 2) == (1, 3)
    assert [step["heads"] for step in record.steps] == [
        {"0": [0], "1": [2]},
        {"0": [3], "2": [1]},
    ]
    assert record.steps[1]["of"] == mi.fingerprint(first)


def test_groups_may_become_equal_again():
    model = mi.prune_heads(pruned("llama", tuple(UNEQUAL)), [(0, 1), (2, 0)])
    assert_same_logits(
        forward(model, TOKENS), masked("llama", [(0, 1), (0, 2), (2, 3), (2, 0)], "zero")
    )
    attention = mi.unwrap(model).model.layers[0].self_attn  # pyright: ignore
    assert type(attention).__name__ == "LlamaAttention"
    assert attention.num_key_value_groups == 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
def test_a_layer_without_heads_gives_its_bias(name):
    heads = [(1, head) for head in range(4)]
    model = pruned(name, tuple(heads), "mean")
    acts = mi.HookManager(model).capture(TOKENS, "attn_out", layers=1)["attn_out", 1]
    assert float((acts - acts[:1, :1]).abs().max()) == 0
    assert float(acts.abs().max()) > 0
    assert_same_logits(forward(model, TOKENS), masked(name, heads, "mean"))


def test_sites_of_heads_are_missing_where_no_head_is_left():
    model = pruned("llama", tuple(HEADLESS))
    assert site_layers(model, "z") == site_layers(model, "pattern") == [1, 2]
    assert site_layers(model, "attn_out") == site_layers(model, "resid_mid") == [0, 1, 2]
    assert [n_heads(model, "z", layer) for layer in range(3)] == [0, 4, 2]
    with pytest.raises(mi.MissingSiteError, match="layer 0 has no heads left"):
        mi.HookManager(model).capture(TOKENS, "q", layers=0)
    assert model.blocks[0].attn.W_O.shape == (0, 8, 32)


def test_the_key_head_of_every_query_is_known():
    model = pruned("llama", (*UNEQUAL, (1, 0), (1, 1)))
    assert [key_heads(model, layer) for layer in range(3)] == [[0, 1, 1], [0, 0], [0, 0, 1]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_promises_on_a_pruned_model(method, tmp_path):
    model = pruned("llama", (*UNEQUAL, *((1, head) for head in range(4))), "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error", mi.SlowPathWarning)
        check_method(getattr(mi, method), METHODS[method], model, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_where_projections_were_fused(method):
    model, entry = pruned("gpt2", ((0, 0), (0, 2), (1, 1), (2, 3)), "mean"), METHODS[method]
    data = [] if entry.data is None else [entry.data(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", mi.SlowPathWarning)
        result = getattr(mi, method)(model, *data, **entry.given(model, *(data or [None])))
    assert result.convention.fingerprint == mi.fingerprint(model)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        *(("llama", site) for site in ("z", "pattern", "q", "k", "v")),
        ("gpt2", "z"),
        ("neox", "pattern"),
        ("gemma3", "q"),
        ("falcon", "k"),
    ],
)
def test_patching_a_pruned_model_takes_the_fast_path_and_is_exact(name, site):
    heads = HEADLESS if name == "llama" else (*UNEQUAL, (1, 0))
    model = pruned(name, tuple(heads))
    task = pair(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mi.SlowPathWarning)
        fast = mi.activation_patching(model, task, site, positions="end")
    with pytest.warns(mi.SlowPathWarning):
        model.hook_dict["blocks.1.hook_out"].add_hook(lambda tensor, hook: tensor + 0)
        slow = mi.activation_patching(model, task, site, positions="end")
    model.reset_hooks()
    here, there = (float(abs(r.data["patched"]).max()) for r in (fast, slow))
    assert float(abs(fast.data["patched"] - slow.data["patched"]).max()) <= 1e-5 * max(
        here, there
    )


@pytest.mark.parametrize("name", ["gpt2", "native"])
def test_a_pruned_model_can_be_drawn_anew_and_verified(name):
    model = pruned(name, tuple(HEADLESS), "mean")
    fresh = mi.random_init(model, seed=3)
    assert n_parameters(fresh) == n_parameters(model)
    assert mi.pruning_of(fresh).heads == mi.pruning_of(model).heads
    assert mi.verify(fresh).ok


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon"])
def test_a_pruned_model_can_be_trained(name):
    model = zoo(name, torch.float64)
    model = mi.prune_heads(model, HEADLESS, fold="mean", mean_data=MEAN_DATA)
    plain = mi.unwrap(model)
    plain(TOKENS, labels=TOKENS).loss.backward()
    unread = [path for path, p in plain.named_parameters() if p.grad is None]
    assert all(".0.ln_1" in path or ".0.input_layernorm" in path for path in unread)
    assert all(p.grad.isfinite().all() for p in plain.parameters() if p.grad is not None)


@pytest.mark.parametrize("attention", ["multi_head", "grouped_query"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_known_model_keeps_its_behaviour_without_the_heads_it_does_not_use(
    attention, positions
):
    known = mi.known_model("induction", attention=attention, positions=positions)
    used = set(known.heads.values()) if isinstance(known.heads, dict) else set(known.heads)
    n_layers, n_heads = len(known.model.blocks), known.model.cfg.n_heads
    idle = [(i, j) for i in range(n_layers) for j in range(n_heads) if (i, j) not in used]
    smaller = mi.prune_heads(known.model, idle)
    tokens = random_tokens(2, 12) % 30 + 1
    assert_same_logits(forward(smaller, tokens), forward(known.model, tokens))


BAD = {
    "every head": ({"heads": EVERY_HEAD}, "all 12 heads of the model"),
    "twice": ({"heads": [(0, 1), (0, 1)]}, r"\(0, 1\) is named twice"),
    "no such head": ({"heads": [(0, 4)]}, r"\(0, 4\) does not exist: layer 0 has heads 0..3"),
    "no such layer": ({"heads": [(3, 0)]}, r"\(3, 0\) does not exist: the model has layers"),
    "nothing": ({"heads": []}, "heads is empty"),
    "no data": ({"heads": [(0, 1)], "fold": "mean"}, "needs data for the means"),
    "data for zero": ({"heads": [(0, 1)], "mean_data": TOKENS}, "takes no means"),
    "no such fold": ({"heads": [(0, 1)], "fold": "median"}, "no way to fold"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case, monkeypatch):
    arguments, says = BAD[case]
    model = zoo("gpt2")
    monkeypatch.setattr("mechinterp.heads.pruning.pruned_copy", pytest.fail)
    with pytest.raises(ValueError, match=says):
        mi.prune_heads(model, **arguments)


def test_a_head_that_is_gone_does_not_exist():
    with pytest.raises(ValueError, match="layer 0 has no heads left"):
        mi.prune_heads(pruned("llama", tuple(HEADLESS)), [(0, 0)])


def test_processed_weights_are_refused():
    model = zoo("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="weights were processed"):
        mi.prune_heads(model, [(0, 1)])


def test_a_fused_projection_says_which_choices_remain():
    with pytest.raises(ValueError, match=r"groups are \[\(0, 0\), \(0, 1\)\]; \[\(0, 2\)"):
        mi.prune_heads(model_of("falcon_grouped"), [(0, 1)])


def test_a_pruned_model_that_differs_is_not_returned(monkeypatch):
    monkeypatch.setattr("mechinterp.models.pruned.copying.fold", lambda *_: None)
    with pytest.raises(RuntimeError, match="differs from the masked one"):
        mi.prune_heads(model_of("gpt2"), [(0, 1)], **FOLDS["mean"])


@pytest.mark.parametrize("data", ["task", "text", "labelled", "list"])
def test_means_are_over_any_data_and_the_record_says_which(data):
    model = zoo("bert_classifier" if data == "labelled" else "llama")
    made = {
        "task": lambda: pair(model),
        "text": lambda: text(model),
        "list": lambda: random_tokens(3, 7).tolist(),
        "labelled": lambda: mi.Labelled(
            "three", as_prompts(model, MEAN_DATA), torch.arange(3), ("a", "b", "c")
        ),
    }[data]()
    smaller = mi.prune_heads(model, [(1, 1)], fold="mean", mean_data=made)
    over = mi.pruning_of(smaller).steps[0]["mean_over"]
    assert over["kind"].lower() == data
    assert len(over["sha256"]) == 64


def test_all_causal_families_are_covered():
    assert set(CAUSAL) < set(NAMES)


def test_a_model_with_edits_in_force_is_not_cut():
    model = zoo("gpt2")
    with mi.HookManager(model).ablate("z", layers=0, heads=0):
        forward(model, random_tokens(1, 4))
        with pytest.raises(ValueError, match="edits or hooks are in place"):
            mi.prune_heads(model, [(1, 1)])
