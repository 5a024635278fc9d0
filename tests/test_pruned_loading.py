"""A pruned model on disk: it comes back equal, anywhere, and its card says what it is."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from conformance import pair
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import tokenizer, zoo
from zoo import tokens as random_tokens

import mechinterp as mi
from mechinterp.models import forward

TOKENS = random_tokens(2, 9)
MEAN: dict[str, Any] = {"fold": "mean", "mean_data": random_tokens(3, 7, seed=5)}
# Equal groups, a whole group, and a layer without heads: what every family can hold.
HEADS = [(0, 0), (0, 1), *((1, head) for head in range(4)), (2, 1), (2, 3)]


@cache
def pruned(name: str):
    model = zoo(name)
    if name == "llama":
        mi.load_model(model, tokenizer=tokenizer())
    model = mi.prune_heads(model, [*HEADS, *([(2, 0)] if name == "llama" else [])], **MEAN)
    return model if name == "native_attn" else mi.prune_neurons(model, {0: [3, 5]}, **MEAN)


@pytest.fixture
def folder(tmp_path):
    return mi.save_model(pruned("llama"), tmp_path / "pruned")


FAMILIES = ["gpt2", "neox", "llama", "gemma3", "opt", "falcon", "falcon_grouped"]


@pytest.mark.parametrize("name", [*FAMILIES, "roberta_classifier", "native", "native_attn"])
def test_a_reloaded_model_is_the_model(name, tmp_path):
    model = pruned(name)
    again = mi.load_model(mi.save_model(model, tmp_path / "pruned"), device="cpu")
    assert torch.equal(forward(again, TOKENS), forward(model, TOKENS))
    assert mi.fingerprint(again) == mi.fingerprint(model)
    assert mi.pruning_of(again) == mi.pruning_of(model)


def test_a_fresh_process_gives_the_same_logits(folder, tmp_path):
    code = (
        "import sys, torch, mechinterp as mi; from mechinterp.models import forward; "
        "model = mi.load_model(sys.argv[1], device='cpu'); "
        "tokens = torch.load(sys.argv[2]); "
        "torch.save([forward(model, tokens).detach(), mi.fingerprint(model)], sys.argv[3])"
    )
    there, back = tmp_path / "tokens.pt", tmp_path / "logits.pt"
    torch.save(TOKENS, there)
    subprocess.run([sys.executable, "-c", code, folder, there, back], check=True)
    logits, fingerprint = torch.load(back)
    assert torch.equal(logits, forward(pruned("llama"), TOKENS))
    assert fingerprint == mi.fingerprint(pruned("llama"))


def test_a_reloaded_model_can_be_pruned_saved_and_loaded_again(folder, tmp_path):
    again = mi.prune_heads(mi.load_model(folder, device="cpu"), [(0, 0)])
    assert again.tokenizer is not None
    last = mi.load_model(mi.save_model(again, tmp_path / "twice"), device="cpu")
    assert torch.equal(forward(last, TOKENS), forward(again, TOKENS))
    assert mi.pruning_of(last).heads[0] == (0, 1, 2)
    assert len(mi.pruning_of(last).steps) == 3


def test_it_may_be_read_in_another_dtype(folder):
    model = mi.load_model(folder, device="cpu", dtype=torch.float64)
    assert {p.dtype for p in model.original_model.parameters()} == {torch.float64}
    gap = (forward(model, TOKENS) - forward(pruned("llama"), TOKENS)).abs().max()
    assert float(gap.detach()) < 1e-4


def test_the_configuration_has_the_map(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["pruned_heads"] == {"0": [0, 1], "1": [0, 1, 2, 3], "2": [0, 1, 3]}
    assert config["pruned_neurons"] == {"0": [3, 5]}


def test_transformers_refuses_it_rather_than_reading_it_wrong(folder):
    with pytest.raises(Exception, match=r"size mismatch|mismatched|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_card_says_what_was_pruned_from_what(tmp_path):
    whole, model = zoo("llama"), pruned("llama")
    curve = mi.activation_patching(model, pair(model), "z", positions="end")
    card = ["How it was chosen.", curve, Figure()]
    folder = mi.save_model(model, tmp_path / "pruned", card=card)
    text = (folder / "README.md").read_text()
    assert mi.fingerprint(whole) in text and mi.fingerprint(model) in text
    assert "| 0 | 2 of 4 | 0, 1 | 62 of 64 |" in text
    assert "| 1 | 0 of 4 | 0, 1, 2, 3 | 64 of 64 |" in text
    assert "9 heads, their mean over 3 prompts" in text
    assert "How it was chosen." in text
    assert (folder / "card_1.png").stat().st_size > 1000 and "(card_2.png)" in text
    mi.save_model(model, folder)  # its own card is part of the model that it replaces
    assert not (folder / "card_1.png").exists()


def test_a_card_of_something_else_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="texts and pictures, but int is neither"):
        mi.save_model(pruned("llama"), tmp_path / "pruned", card=[3])
    assert not list(tmp_path.iterdir())


def test_somebody_elses_readme_is_not_replaced(folder):
    (folder / "README.md").write_text("# My notes\n")
    with pytest.raises(ValueError, match=r"not part of a model \(README.md\)"):
        mi.save_model(pruned("llama"), folder)


def test_a_whole_model_gets_no_card_unless_asked(tmp_path):
    model = zoo("gpt2")
    assert not (mi.save_model(model, tmp_path / "a") / "README.md").exists()
    folder = mi.save_model(model, tmp_path / "b", card="Notes.")
    assert "Notes." in (folder / "README.md").read_text()


@pytest.mark.parametrize("damage", ["a weight is gone", "a weight too many", "other shapes"])
def test_weights_that_do_not_fit_the_record_are_refused(folder, damage):
    file = folder / "model.safetensors"
    state, key = load_file(file), "model.layers.2.self_attn.q_proj.weight"
    if damage == "other shapes":
        state[key] = torch.zeros(32, 32)
    elif damage == "a weight is gone":
        del state[key]
    else:
        state["model.layers.2.self_attn.more.weight"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"do not fit|does not hold"):
        mi.load_model(folder, device="cpu")


def test_a_pruned_model_is_not_spread_over_devices(folder):
    with pytest.raises(ValueError, match="does not apply to a pruned model"):
        mi.load_model(folder, device_map="auto")
