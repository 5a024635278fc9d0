"""Function vectors: effects as by plain hooked runs, sums as written, words kept apart."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_few_shot import CAPITALS, with_tokenizer
from zoo import hf, tokenizer, zoo

import mechinterp as mi
from mechinterp.heads.examples import drawn_texts
from mechinterp.heads.function_vector import FunctionVector
from mechinterp.heads.function_vectors import _prompts, _split
from mechinterp.heads.written import mean_written
from mechinterp.tasks.pairs import FORMAT

MORE = mi.Pairs("more", (*CAPITALS.words, ("he", "him"), ("they", "them"), ("store", "park")))
ASKED: dict[str, Any] = {"shots": 2, "n_prompts": 5, "n_heads": 3, "held_out": 3, "seed": 4}


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2", "falcon"])
def made(request):
    model = with_tokenizer(request.param)
    return request.param, model, mi.function_vector(model, MORE, **ASKED)


def projections(name: str, module) -> list:
    """The module of each layer whose input is all heads' z."""
    if name == "gpt2":
        return [block.attn.c_proj for block in module.transformer.h]
    if name == "falcon":
        return [block.self_attention.dense for block in module.transformer.h]
    return [block.self_attn.o_proj for block in module.model.layers]


def blocks(name: str, module) -> list:
    return list(module.transformer.h if name in ("gpt2", "falcon") else module.model.layers)


def last_z(name: str, module, rows: list[list[int]]) -> torch.Tensor:
    """``[layer, prompt, head * d_head]`` at each prompt's last token, prompt by prompt."""
    seen: list[list[torch.Tensor]] = [[] for _ in projections(name, module)]
    handles = [
        each.register_forward_pre_hook(lambda m, args, at=at: seen[at].append(args[0][0, -1]))
        for at, each in enumerate(projections(name, module))
    ]
    with torch.no_grad():
        for row in rows:
            module(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return torch.stack([torch.stack(each) for each in seen])


def test_indirect_effects_are_those_of_plain_hooked_runs(made):
    name, model, vector = made
    train, _ = _split(MORE, 3, 4)
    clean, _ = _prompts(model, train, 5, 2, "true", FORMAT, 4)
    shuffled, answers = _prompts(model, train, 5, 2, "shuffled_labels", FORMAT, 4)
    module = hf(name)
    means = last_z(name, module, clean.rows).mean(1)
    d_head = means.shape[-1] // 4
    for layer in range(3):
        for head in range(4):
            own = slice(head * d_head, (head + 1) * d_head)

            def put(m, args, own=own, mean=means[layer]):
                z = args[0].clone()
                z[0, -1, own] = mean[own]
                return (z, *args[1:])

            for prompt, row in enumerate(shuffled.rows):
                answer = int(answers[prompt, 0])
                with torch.no_grad():
                    base = module(torch.tensor([row])).logits[0, -1].softmax(-1)[answer]
                    handle = projections(name, module)[layer].register_forward_pre_hook(put)
                    after = module(torch.tensor([row])).logits[0, -1].softmax(-1)[answer]
                    handle.remove()
                found = vector.effects.effect.sel(layer=layer, head=head, prompt=prompt)
                assert float(found) == pytest.approx(float(after - base), abs=2e-6)


def test_all_heads_together_write_what_attention_adds(made):
    _, model, vector = made
    train, _ = _split(MORE, 3, 4)
    clean, _ = _prompts(model, train, 5, 2, "true", FORMAT, 4)
    manager = mi.HookManager(model)
    added = manager.capture(clean, "attn_out", positions=-1)
    for layer, each in mean_written(manager, clean).items():
        bias = getattr(model.blocks[layer].attn, "b_O", None)
        bias = torch.zeros(32) if bias is None else bias.detach()
        expected = added["attn_out", layer][:, 0].mean(0) - bias
        torch.testing.assert_close(each.sum(0), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vector.written[layer], each)


def test_the_vector_sums_the_heads_with_the_largest_mean_effect(made):
    _, _, vector = made
    mean = vector.effects.effect.mean("prompt").values
    best = sorted(
        ((at, head) for at in range(3) for head in range(4)), key=lambda cell: -mean[cell]
    )[:3]
    assert list(vector.heads) == best
    torch.testing.assert_close(
        vector.vector, sum(vector.written[at][head] for at, head in best)
    )
    assert vector.of_heads([(0, 1)]).heads == ((0, 1),)
    assert vector.of_heads(1).heads == vector.heads[:1]


def test_adding_it_gives_what_a_plain_hooked_run_gives(made):
    name, model, vector = made
    effect = vector.evaluate(model, layer=[0, 2], n_random=3, scale=2.0)
    held_out = vector.effects.convention.settings["held_out"]
    module = hf(name)

    def add(m, args, output):
        whole = output if isinstance(output, torch.Tensor) else output[0]
        whole = whole.clone()
        whole[0, -1] += 2.0 * vector.vector
        return whole if isinstance(output, torch.Tensor) else (whole, *output[1:])

    for prompt, (question, answer) in enumerate(held_out):
        row = [1, *tokenizer()(f"Q: {question}\nA:")["input_ids"]]
        token = tokenizer()(f" {answer}")["input_ids"][0]
        for layer in (0, 2):
            with torch.no_grad():
                base = module(torch.tensor([row])).logits[0, -1].log_softmax(-1)
                handle = blocks(name, module)[layer].register_forward_hook(add)
                after = module(torch.tensor([row])).logits[0, -1].log_softmax(-1)
                handle.remove()
            found = effect.data.sel(metric="log_prob", prompt=prompt)
            assert float(found["zero_shot"]) == pytest.approx(float(base[token]), abs=1e-4)
            there = float(found["with_vector"].sel(layer=layer))
            assert there == pytest.approx(float(after[token]), abs=1e-4)


def test_the_control_is_what_the_same_heads_write_under_shuffled_labels(made):
    _, model, vector = made
    train, _ = _split(MORE, 3, 4)
    shuffled, _ = _prompts(model, train, 5, 2, "shuffled_labels", FORMAT, 4)
    written = mean_written(mi.HookManager(model), shuffled)
    summed = torch.stack([written[at][head] for at, head in vector.heads]).sum(0)
    control = vector.control
    assert float(control.norm()) == pytest.approx(float(vector.vector.norm()), rel=1e-5)
    assert float(torch.cosine_similarity(control, summed, dim=0)) == pytest.approx(1, abs=1e-5)
    effect = vector.evaluate(model, layer=1, n_random=2)
    swapped = replace(
        vector, written=vector.written_shuffled, written_shuffled=vector.written
    ).evaluate(model, layer=1, scale=float(vector.vector.norm() / summed.norm()), n_random=2)
    np.testing.assert_allclose(
        effect.data["with_control"], swapped.data["with_vector"], atol=1e-5
    )
    table = effect.summary()
    shown = float(effect.control_effect.sel(metric="log_prob").mean()) + table["zero_shot"][0]
    assert table["with_control"][0] == pytest.approx(shown)


def test_p_values_of_several_layers_are_corrected_for_them(made):
    _, model, vector = made
    effect = vector.evaluate(model, layer=[0, 1, 2], n_random=9)
    table = effect.summary().query("metric == 'log_prob'")
    assert table["p_adjusted"].min() == pytest.approx(min(3 * table["p_random"].min(), 1.0))
    assert "Holm over 3 layers" in effect.plot().get_title("left") + str(
        [text.get_text() for text in effect.plot().texts]
    )


def test_what_it_is_measured_on_was_not_used_to_make_it(made):
    _, model, vector = made
    told = vector.effects.convention.settings
    train, kept = ({row[0] for row in told[name]} for name in ("train", "held_out"))
    assert not train & kept and len(kept) == 3 and len(train) == 6
    with pytest.raises(ValueError, match="was made from 1 of these words"):
        vector.evaluate(model, [("he", "him"), *[r for r in MORE if r[0] in train][:1]][1:])


def test_a_p_value_counts_the_random_vectors_that_do_as_much(made):
    _, model, vector = made
    effect = vector.evaluate(model, layer=1, n_random=9)
    for metric in ("log_prob", "accuracy"):
        mine = effect.effect.sel(metric=metric, layer=1).mean("prompt")
        theirs = effect.random_effect.sel(metric=metric, layer=1).mean("prompt")
        expected = (1 + int((theirs >= mine).sum())) / 10
        assert float(effect.p_random(metric=metric)[0]) == expected
    assert list(effect.summary()["metric"]) == ["log_prob", "accuracy"]


def test_saving_brings_back_the_same_vector(made, tmp_path):
    _, model, vector = made
    back = FunctionVector.load(vector.save(tmp_path / "vector"))
    assert back.heads == vector.heads and back.effects.equals(vector.effects)
    assert torch.equal(back.vector, vector.vector)
    assert torch.equal(back.control, vector.control)
    effect = back.evaluate(model, n_random=2)
    assert mi.load_result(effect.save(tmp_path / "effect.nc")).equals(effect)


def test_random_vectors_are_as_long_and_the_pictures_have_titles(made):
    from mechinterp.heads.function_vector import _random

    _, model, vector = made
    drawn = _random(vector.vector, 4, 0)
    np.testing.assert_allclose(
        [float(d.norm()) for d in drawn], float(vector.vector.norm()), rtol=1e-5
    )
    assert "function vector" in vector.evaluate(model, n_random=2).plot().get_title("left")
    assert "None" not in vector.effects.plot().get_title("left")


def test_both_kinds_of_prompt_ask_the_same_words():
    true = drawn_texts([0, 1, 2], MORE, 3, "true", seed=1)
    shuffled = drawn_texts([0, 1, 2], MORE, 3, "shuffled_labels", seed=1)
    assert [answer for _, answer in true] == [answer for _, answer in shuffled]
    last = [[text.split("Q: ")[-1] for text, _ in kind] for kind in (true, shuffled)]
    assert last[0] == last[1]


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"shots": 1}, "at least 2 examples"),
        ({"n_heads": 13}, "1 to 12 heads"),
        ({"held_out": 9}, "sets 9 of 9 words aside"),
        ({"shots": 6}, "6 examples beside a query need 7"),
    ],
)
def test_bad_arguments_are_named(given_, says):
    with pytest.raises(ValueError, match=says):
        mi.function_vector(with_tokenizer("gpt2"), MORE, **(ASKED | given_))


def test_models_that_cannot_have_one_are_refused():
    with pytest.raises(ValueError, match="sees both sides"):
        mi.function_vector(with_tokenizer("bert"), MORE, **ASKED)
    with pytest.raises(ValueError, match="was made on another model"):
        vector = mi.function_vector(with_tokenizer("gpt2"), MORE, **ASKED)
        vector.evaluate(with_tokenizer("llama"))
    with pytest.raises(ValueError, match="no tokenizer"):
        mi.function_vector(zoo("llama"), MORE, **ASKED)


@pytest.mark.slow
def test_capitals_are_told_by_a_vector_on_smollm2_and_not_by_random_ones():
    model = mi.load_model("smollm2-135m")
    vector = mi.function_vector(
        model,
        "country-capital",
        shots=6,
        n_prompts=10,
        n_heads=5,
        layers=[14, 18, 20, 24],
        held_out=20,
    )
    result = vector.evaluate(model, layer=15)
    row = result.summary().set_index("metric").loc["log_prob"]
    assert row["effect"] > 0
    assert row["p_random"] < 0.01 and row["p_zero_shot"] < 0.01
