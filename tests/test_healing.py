"""Healing: a short fine-tune of a copy, with its curve."""

import numpy as np
import pytest
import torch
import zoo
from zoo import tokens

import mechinterp as mi
from mechinterp.models import forward

GONE = [(0, 1), (1, 2), (2, 0)]


def text(model, n: int = 20) -> mi.Text:
    """Documents that say the same over and over, so that there is something to learn."""
    rows = [[1, *([5 + i % 3, 9, 4, 7] * 3)] for i in range(n)]
    return mi.Text.from_tokens(model, rows)


def labelled(model, n: int = 24) -> mi.Labelled:
    rows = [[1, 5 + 3 * (i % 3), *tokens(1, 6, seed=i)[0].tolist()] for i in range(n)]
    prompts = mi.Text.from_tokens(model, rows).prompts
    return mi.Labelled("moods", prompts, torch.arange(n) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "native", "bert_classifier"])
def test_a_pruned_model_learns_and_the_one_given_stays(family, lora):
    if family == "native" and lora:
        pytest.skip("LoRA is for Hugging Face models")
    smaller = mi.prune_heads(zoo.zoo(family), GONE)
    data = labelled(smaller) if "bert" in family else text(smaller)
    before = mi.fingerprint(smaller)
    rate = 3e-3 if lora is None else 1e-2
    healed = mi.heal(smaller, data, steps=40, learning_rate=rate, lora_rank=lora)
    assert mi.fingerprint(smaller) == before != mi.fingerprint(healed.model)
    assert all(p.grad is None for p in smaller.parameters())
    assert float(healed.curve.effect.isel(step=-1).mean()) < -0.1
    assert mi.pruning_of(healed.model).heads == mi.pruning_of(smaller).heads


def test_the_curve_is_of_the_models_that_it_begins_and_ends_with():
    model = zoo.zoo("llama")
    data, judged = text(model), mi.Text.from_tokens(model, tokens(5, 9, seed=4))
    healed = mi.heal(model, data, evaluate_on=judged, steps=6, evaluations=3)
    value = healed.curve.data["value"]
    assert value["step"].values.tolist() == [0, 2, 4, 6]
    for step, which in ((0, model), (6, healed.model)):
        own = judged.loss(which).mean("position")
        np.testing.assert_allclose(value.sel(step=step), own, atol=1e-5)


def test_one_update_is_one_update_of_adamw():
    """A loop written on its own, on Hugging Face's module and loss."""
    model = zoo.zoo("llama")
    data, judged = text(model, 4), mi.Text.from_tokens(model, tokens(2, 9, seed=4))
    healed = mi.heal(model, data, evaluate_on=judged, steps=1, batch_size=4, learning_rate=1e-3)
    module = zoo.hf("llama")
    ids = data.prompts.tokens
    module(ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01).step()
    with torch.no_grad():
        want = module(judged.prompts.tokens).logits
        got = forward(healed.model, judged.prompts.tokens, judged.prompts.mask)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_a_healed_model_is_saved_and_read_back(tmp_path):
    smaller = mi.prune_heads(zoo.zoo("qwen2"), GONE)
    healed = mi.heal(smaller, text(smaller), steps=2, lora_rank=2)
    folder = mi.save_model(healed.model, tmp_path / "healed", card=["Healed.", healed.curve])
    again = mi.load_model(folder)
    assert mi.fingerprint(again) == mi.fingerprint(healed.model)
    assert torch.equal(forward(again, tokens(2, 7)), forward(healed.model, tokens(2, 7)))
    assert "Healed." in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"lora_rank": 0}, "must be at least 1"),
        ({"metric": {"loss": "loss", "accuracy": "accuracy"}}, "one metric"),
    ],
)
def test_bad_arguments_are_said_at_once(arguments, says):
    model = zoo.zoo("gpt2")
    with pytest.raises(ValueError, match=says):
        mi.heal(model, text(model), **arguments)


def test_data_to_judge_by_is_other_data():
    model = zoo.zoo("gpt2")
    with pytest.raises(ValueError, match="are also in data"):
        mi.heal(model, text(model), evaluate_on=text(model))
    with pytest.raises(ValueError, match="held out"):
        mi.heal(model, text(model, 1))
    native = zoo.zoo("native")
    with pytest.raises(ValueError, match="native"):
        mi.heal(native, text(native), lora_rank=2)
