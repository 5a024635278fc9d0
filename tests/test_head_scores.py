"""Scores of heads: each against a plain loop, its ideal, and models that learned nothing."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, ttest_ind
from zoo import tokens, zoo

import mechinterp as mi
from mechinterp.heads.copying import Unembedding, copying, ov_copying, writing_weights
from mechinterp.heads.kinds import KINDS
from mechinterp.heads.null import SMALLEST, null_p
from mechinterp.heads.patterns import PATTERNS, Seen, distances, share_at_commonest
from mechinterp.heads.words import head_logits
from mechinterp.models import is_causal
from mechinterp.tasks import repeated_tokens
from mechinterp.weights import head_weights

seeds = st.integers(0, 2**31)
FAMILIES = ["gpt2", "neox", "qwen3", "gemma2", "opt", "falcon_grouped", "bert", "native"]


def a_pattern(seen: Seen, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = seen.tokens.shape[1]
    scores = torch.randn(len(seen.tokens), heads, n, n, generator=generator)
    return scores.masked_fill(~seen.visible[:, None], -torch.inf).softmax(-1).nan_to_num()


def some_seen(seed: int, *, causal: bool = True) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 7:] = False
    return Seen(ids, mask, causal, torch.bincount(ids[mask], minlength=5))


def looped(kind: str, pattern: torch.Tensor, seen: Seen, b: int, h: int) -> float:
    """One score by plain loops over queries and keys."""
    ids, length = seen.tokens[b].tolist(), int(seen.mask[b].sum())
    counts = seen.counts
    assert counts is not None
    found = []
    for q in range(1, length):
        row = pattern[b, h, q].tolist()
        keys = range(q + 1 if seen.causal else length)
        if kind == "previous_token":
            found.append(row[q - 1])
        elif kind == "first_token":
            found.append(row[0])
        elif kind == "entropy":
            found.append(-sum(row[k] * math.log(row[k]) for k in keys if row[k] > 0))
        elif kind == "duplicate_token":
            same = [k for k in keys if k != q and ids[k] == ids[q]]
            found += [sum(row[k] for k in same)] if same else []
        elif kind == "induction":
            same = [k for k in keys if k != q and ids[k] == ids[q] and k + 1 in keys]
            after = [k + 1 for k in same if k + 1 != q]
            found += [sum(row[k] for k in after)] if after else []
        elif kind == "local":
            if any(abs(q - k) > 4 for k in keys):
                found.append(sum(row[k] for k in keys if abs(q - k) <= 4))
        elif kind == "rare_token":
            others = [k for k in keys if k > 0]
            if len(others) > 1:
                best = max(others, key=lambda k: row[k])
                rarest = min(int(counts[ids[k]]) for k in others)
                found.append(float(counts[ids[best]] == rarest))
    return float(np.mean(found)) if found else math.nan


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", list(PATTERNS))
@given(seed=seeds)
def test_each_pattern_score_agrees_with_a_plain_loop(kind, causal, seed):
    seen = some_seen(seed, causal=causal)
    pattern = a_pattern(seen, 3, seed)
    found = PATTERNS[kind](pattern, seen)
    for b in range(2):
        for h in range(3):
            expected = looped(kind, pattern, seen, b, h)
            assert float(found[b, h]) == pytest.approx(expected, abs=1e-5, nan_ok=True)


@given(seed=seeds)
def test_positional_agrees_with_a_plain_loop_over_all_prompts(seed):
    seen = some_seen(seed)
    strongest = distances(a_pattern(seen, 3, seed))
    pattern = a_pattern(seen, 3, seed)
    found = share_at_commonest(strongest, seen.queries)
    for h in range(3):
        looks = [
            [max(range(q + 1), key=lambda k, q=q, b=b: float(pattern[b, h, q, k])) - q]
            for b in range(2)
            for q in range(1, int(seen.mask[b].sum()))
        ]
        flat = [look for row in looks for look in row]
        most = max(flat.count(each) for each in flat)
        modes = {each for each in flat if flat.count(each) == most}
        lengths = (seen.mask.sum(1) - 1).tolist()
        by_prompt = [flat[: lengths[0]], flat[lengths[0] :]]
        options = [[row.count(m) / len(row) for row in by_prompt] for m in modes]
        assert any(found[:, h].tolist() == pytest.approx(each) for each in options)


def test_a_head_that_looks_elsewhere_in_every_prompt_is_not_positional():
    queries = torch.ones(4, 6, dtype=torch.bool)
    queries[:, 0] = False
    elsewhere = -torch.arange(4)[:, None, None].expand(4, 1, 6)
    before = torch.full((4, 1, 6), -1)
    found = share_at_commonest(torch.cat([elsewhere, before], 1), queries)
    assert found.mean(0).tolist() == pytest.approx([0.25, 1.0])


@given(seed=seeds)
def test_copying_agrees_with_a_plain_loop(seed):
    seen = some_seen(seed)
    pattern = a_pattern(seen, 2, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    z = torch.randn(2, 9, 2, 4, generator=generator)
    by_token = torch.randn(2, 4, 5, generator=generator)
    writes = by_token[:, :, seen.tokens].permute(2, 0, 1, 3)
    found = copying(pattern, z, writes, seen)
    for b in range(2):
        ids, length = seen.tokens[b].tolist(), int(seen.mask[b].sum())
        different = sorted(set(ids[1:length]))
        for h in range(2):
            over, under = 0.0, 0.0
            for q in range(1, length):
                logit = {t: float(z[b, q, h] @ by_token[h, :, t]) for t in different}
                mean = sum(logit.values()) / len(logit)
                up = {t: max(x - mean, 0.0) for t, x in logit.items()}
                down = {t: max(mean - x, 0.0) for t, x in logit.items()}
                for k in range(1, q + 1):
                    share = up[ids[k]] / max(sum(up.values()), 1e-30)
                    share -= down[ids[k]] / max(sum(down.values()), 1e-30)
                    over += float(pattern[b, h, q, k]) * share
                    under += float(pattern[b, h, q, k])
            expected = over / under if under else 0.0
            assert float(found[b, h]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("copies", [2, 4])
def test_an_ideal_induction_head_scores_one_on_induction_alone(copies):
    n, length = 7, 1 + 7 * copies
    ids = torch.tensor([[0, *list(range(1, n + 1)) * copies]])
    seen = Seen(ids, torch.ones(1, length, dtype=torch.bool), True)
    pattern = torch.zeros(1, 1, length, length)
    for q in range(length):
        earlier = [k + 1 for k in range(1, q) if ids[0, k] == ids[0, q]]
        pattern[0, 0, q, earlier or [0]] = 1 / max(len(earlier), 1)
    assert float(PATTERNS["induction"](pattern, seen)) == pytest.approx(1)
    assert float(PATTERNS["duplicate_token"](pattern, seen)) == 0
    assert float(PATTERNS["previous_token"](pattern, seen)) < 0.1  # that of the first query


def test_a_head_that_writes_what_it_reads_copies_and_its_opposite_does_not():
    seen = some_seen(3)
    pattern = a_pattern(seen, 1, 3)
    pattern = torch.zeros_like(pattern).scatter_(-1, pattern.argmax(-1, keepdim=True), 1.0)
    onehot = torch.nn.functional.one_hot(seen.tokens, 5).float()
    z = (pattern[:, 0] @ onehot)[:, :, None]
    writes = onehot.mT[:, None]
    assert copying(pattern, z, writes, seen) == pytest.approx(1)
    assert copying(pattern, z, -writes, seen) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "native_nonorm"])
def test_eigenvalues_are_those_of_the_whole_vocabulary(name):
    model = zoo(name)
    unembedding = Unembedding(model)
    W_E = model.W_E.detach().double()
    W_V = head_weights(model, 1, fold_norm=True).W_V.double()
    found = ov_copying(unembedding, 1)
    for head, score in enumerate(found.tolist()):
        whole = (
            W_E
            @ W_V[head]
            @ writing_weights(model, 1)[head].double()
            @ unembedding.W_U.double()
        )
        values = torch.linalg.eigvals(whole)
        assert score == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_a_model_are_those_of_its_patterns(name):
    model = zoo(name)
    text = mi.Text.from_tokens(model, [[1, 5, 9, 5, 9, 5, 2], [1, 3, 3, 4, 3]])
    kinds = ["induction", "previous_token", "entropy", "duplicate_token"]
    found = mi.head_scores(model, text, kinds=kinds, nulls=0)
    acts = mi.HookManager(model).capture(text.prompts, "pattern")
    seen = Seen(text.prompts.tokens, text.prompts.mask, is_causal(model))
    for layer in found.data["layer"].values.tolist():
        for kind in kinds:
            for b in range(2):
                for h in range(acts["pattern", layer].shape[1]):
                    expected = looped_on(kind, acts["pattern", layer], seen, b, h)
                    mine = float(found[kind].values[b, layer, h])
                    assert mine == pytest.approx(expected, abs=1e-5, nan_ok=True)


def looped_on(kind: str, pattern: torch.Tensor, seen: Seen, b: int, h: int) -> float:
    counts = torch.ones(200, dtype=torch.long)
    with_counts = Seen(seen.tokens, seen.mask, seen.causal, counts)
    return looped(kind, pattern, with_counts, b, h)


def test_a_padded_prompt_scores_as_it_does_alone():
    model = zoo("llama")
    rows = [[1, 5, 9, 5, 9, 5, 2, 7], [1, 3, 6, 3, 6]]
    kinds = ["induction", "copying", "first_token"]
    both = mi.head_scores(model, mi.Text.from_tokens(model, rows), kinds=kinds, nulls=0)
    alone = mi.head_scores(model, mi.Text.from_tokens(model, rows[1:]), kinds=kinds, nulls=0)
    for kind in kinds:
        np.testing.assert_allclose(both[kind][1], alone[kind][0], atol=1e-5)


def test_prompts_in_which_nothing_comes_again_are_left_out_of_induction():
    model = zoo("gpt2")
    text = mi.Text.from_tokens(model, [[1, 5, 9, 5, 2], [1, 3, 6, 4, 2], [1, 3, 6, 3, 2]])
    found = mi.head_scores(model, text, kinds=["induction", "previous_token"], nulls=0)
    assert found["induction"].sizes["prompt"] == 2
    assert found["previous_token"].sizes["prompt"] == 3
    assert np.isfinite(found.top(3)["induction"]).all()


def test_the_protocol_of_olsson_is_the_default():
    model = zoo("gpt2")
    found = mi.head_scores(model, kinds="induction", n=3, length=6, copies=3, nulls=0, seed=4)
    prompts = repeated_tokens(model, 3, 6, copies=3, distinct=True, seed=4)
    ids = prompts.tokens
    assert all(len(set(row.tolist())) == 6 for row in ids[:, -6:])
    start = ids.shape[1] - 18
    pattern = mi.HookManager(model).capture(prompts, "pattern", layers=1)["pattern", 1]
    for head in range(4):
        looks = [
            pattern[:, head, start + q, [start + k for k in range(q - 5, 0, -6)]].sum(-1)
            for q in range(6, 18)
        ]
        expected = torch.stack(looks).mean(0).numpy()
        np.testing.assert_allclose(found["induction"].values[:, 1, head], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_untrained_models_yield_discoveries_no_oftener_than_promised(name):
    trained, families, wrong = zoo(name), 0, 0
    for seed in range(12):
        untrained = mi.random_init(trained, seed=50 + seed)
        found = mi.head_scores(untrained, n=20, length=10, copies=3, seed=seed)
        families += len(found.kinds)
        wrong += sum(
            float(found.data["p_adjusted"].sel(kind=k).min()) < 0.05 for k in found.kinds
        )
    assert wrong <= binom.ppf(0.99, families, 0.05)  # one untrained model to compare with


def test_p_values_are_those_of_welch_between_the_heads_and_the_prompts():
    generator = np.random.default_rng(0)
    untrained = generator.normal(0.2, 0.05, 12)
    prompts = generator.normal(0.3, 0.02, 5)
    error = prompts.std(ddof=1) / np.sqrt(5)
    one = np.ones((1, 1))
    p = null_p(prompts.mean() * one, error * one, 5 * one.astype(int), untrained, False)
    widened = 0.2 + 0 * untrained  # a sample whose mean has the error of one more head
    among = untrained.var(ddof=1) * (1 + 1 / 12)
    widened = untrained.mean() + (untrained - untrained.mean()) * np.sqrt(12 + 1)
    assert widened.var(ddof=1) / 12 == pytest.approx(among)
    welch: Any = ttest_ind(prompts, widened, equal_var=False, alternative="greater")
    assert float(p[0, 0]) == pytest.approx(float(welch.pvalue))


def test_p_values_stop_where_tails_would_be_extrapolated_too_far():
    one = np.ones((1, 1))
    spread = np.random.default_rng(0).normal(0, 0.01, 40)
    p = null_p(0.9 * one, 0 * one, one.astype(int), spread, False)
    assert float(p[0, 0]) == SMALLEST


def test_one_prompt_has_scores_but_no_p_values_and_says_so():
    text = mi.Text.from_tokens(zoo("gpt2"), [[1, 5, 9, 5, 9, 5, 2, 7]])
    found = mi.head_scores(zoo("gpt2"), text, kinds=["induction", "ov_copying"])
    assert found.data["p"].sel(kind="induction").isnull().all()
    assert found.data["p"].sel(kind="ov_copying").notnull().all()
    assert found.found("induction") == []
    assert "No p-values: one prompt" in found.top(3).attrs["note"]


def test_a_difference_too_small_to_matter_can_be_left_out():
    found = mi.head_scores(mi.load_model("embedded"), n=20, kinds="induction")
    sure, large = found.found("induction"), found.found("induction", least=0.1)
    assert len(sure) > len(large) > 0
    assert set(large) == {h for h in sure if float(found["induction"].mean("prompt")[h]) >= 0.1}


def test_nothing_is_unembedded_for_patterns():
    model = zoo("gpt2")
    expected = mi.head_scores(model, n=4, length=6, nulls=0).mean()

    def refuse(*_: object) -> None:
        raise AssertionError("logits were computed")

    handle = model.unembed.register_forward_pre_hook(refuse)
    try:
        found = mi.head_scores(model, n=4, length=6, nulls=0).mean()
    finally:
        handle.remove()
    assert found.identical(expected)


def test_memory_bounds_how_many_prompts_run_at_once_and_changes_no_score():
    model = zoo("qwen3")
    whole = mi.head_scores(model, n=12, length=8, nulls=0).mean()
    split = mi.head_scores(model, n=12, length=8, nulls=0, memory="1MB").mean()
    xr.testing.assert_allclose(whole, split, atol=1e-6)
    with pytest.raises(ValueError, match=r"too small to watch one prompt of 32 tokens.*Allow"):
        mi.head_scores(model, n=12, length=8, nulls=0, memory="20KB")


def test_the_embedded_model_has_induction_heads_and_says_so():
    model = mi.load_model("embedded")
    found = mi.head_scores(model, n=20)
    heads = found.found("induction")
    assert {(1, 4), (1, 5), (1, 7)} <= set(heads)
    table = found.top(3, metric="induction")
    assert bool((table["p_adjusted"] < 1e-4).all())
    assert "Untrained heads score 0.0" in table.attrs["note"]
    assert found.found("previous_token")[0] == (2, 0)


def test_head_logits_are_those_of_attention_to_the_word_alone():
    model = zoo("llama")
    words = torch.randn(5, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    found = list(head_logits(model, words, 1.0))
    whole: Any = model.original_model
    inner = whole.model
    layer, head = 2, 3
    block = inner.layers[layer]
    d_head = model.cfg.d_head
    normed = block.input_layernorm.original_component(words)
    value = normed @ head_weights(model, layer).W_V[head]
    z = torch.zeros(5, model.cfg.n_heads * d_head)
    z[:, head * d_head : (head + 1) * d_head] = value
    out = block.self_attn.o_proj.original_component(z)
    final = inner.norm.original_component(out)
    expected = whole.lm_head.original_component(final)
    torch.testing.assert_close(found[layer][head], expected.detach(), atol=1e-4, rtol=0)


def test_words_and_needles_are_scored_on_the_embedded_model():
    model = mi.load_model("embedded")
    kinds = ["retrieval", "name_mover", "negative_name_mover", "successor"]
    found = mi.head_scores(model, kinds=kinds, nulls=0)
    for kind in kinds:
        values = found[kind].values
        known = values[np.isfinite(values)]
        assert ((known >= 0) & (known <= 1)).all()
    assert float(found["name_mover"].mean("prompt").max()) > 0.4
    assert np.isnan(found["successor"].values[:, 0]).all()
    both = found["name_mover"].values + found["negative_name_mover"].values
    assert np.nanmax(both) <= 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_scores_as_its_weights_do_in_full(name):
    half, full = zoo(name, torch.bfloat16), zoo(name)
    kinds = [kind for kind, what in KINDS.items() if what.source not in ("words", "needle")]
    rows = [[1, 5, 9, 5, 9, 5, 2, 8, 3, 4], [1, 3, 3, 4, 3]]
    found, expected = (
        mi.head_scores(model, mi.Text.from_tokens(model, rows), kinds=kinds, nulls=0).mean()
        for model in (half, full)
    )
    for kind in set(kinds) - {"positional", "rare_token"}:  # those count strongest keys
        np.testing.assert_allclose(found[kind], expected[kind], atol=0.05, err_msg=kind)
    assert np.isfinite(found["positional"]).all()


def test_half_precision_has_words_and_needles_too():
    model = mi.load_model("embedded", dtype=torch.bfloat16)
    kinds = ["retrieval", "name_mover", "negative_name_mover", "successor"]
    found = mi.head_scores(model, kinds=kinds, nulls=0).mean()
    assert all(np.isfinite(found[kind].values[1:]).all() for kind in kinds)


# ------------------------------------------------------------------------------- bad input


def test_prompts_that_are_too_short_say_what_is_needed():
    model = zoo("gpt2")
    text = mi.Text.from_tokens(model, [[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="at least 3 tokens"):
        mi.head_scores(model, text, kinds="induction")
    with pytest.raises(ValueError, match=r"at least 6 tokens.*longest has 4"):
        mi.head_scores(model, text, kinds="local")


def test_a_vocabulary_without_enough_different_tokens_says_how_many_it_has():
    with pytest.raises(ValueError, match=r"97 ordinary ones.*length=97 or less"):
        mi.head_scores(zoo("gpt2"), length=98, copies=2)


def test_kinds_that_a_model_cannot_have_say_why():
    with pytest.raises(ValueError, match="Did you mean 'induction'"):
        mi.head_scores(zoo("gpt2"), kinds="inductoin")
    with pytest.raises(ValueError, match="no unembedding"):
        mi.head_scores(zoo("bert"), kinds="copying")
    with pytest.raises(ValueError, match="no tokenizer"):
        mi.head_scores(zoo("gpt2"), kinds="successor")
    with pytest.raises(ValueError, match="needs text"):
        mi.head_scores(zoo("gpt2"), kinds="rare_token")
    with pytest.raises(ValueError, match="copies=1"):
        mi.head_scores(zoo("gpt2"), copies=1)
    with pytest.raises(TypeError, match="head_scores takes a Text"):
        mi.head_scores(zoo("gpt2"), tokens(2, 5))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nulls": -1}, "nulls=-1"),
        ({"length": 60}, r"240 tokens.*holds 63 beside.*length=15 or less"),
        ({"kinds": "entropy", "data": [[3]]}, "entropy cannot be scored: it needs at least 2"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_any_run(asked, message, monkeypatch):
    model = zoo("gpt2")
    if "data" in asked:
        asked = asked | {"data": mi.Text.from_tokens(model, asked["data"])}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(model, "forward", refuse)
    with pytest.raises(ValueError, match=message):
        mi.head_scores(model, **asked)


def test_a_model_too_small_for_a_haystack_says_what_it_would_need(monkeypatch):
    model = mi.load_model("embedded")
    monkeypatch.setattr(model.cfg, "n_ctx", 20)
    with pytest.raises(ValueError, match=r"context of 26 tokens.*this model has 20 and \d+"):
        mi.head_scores(model, kinds="retrieval", length=4, copies=2)


def test_a_tokenizer_without_words_in_sequence_says_so_before_any_run(monkeypatch):
    model = mi.load_model("embedded")
    monkeypatch.setattr("mechinterp.heads.words.single_tokens", lambda *_: {})
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=r"single tokens here.*Leave kind 'successor' out"):
        mi.head_scores(model, kinds=["induction", "successor"])
