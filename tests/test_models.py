"""Wrapping, running, unwrapping and saving, on every architecture of the zoo."""

import errno
import json
from functools import cache
from typing import Any, cast

import pytest
import torch
import zoo
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedModel

import mechinterp as mi
from mechinterp.models import forward, is_causal, n_layers, processed_weights, tokenizer_of

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-9}
every_architecture = pytest.mark.parametrize("name", zoo.NAMES)
every_hugging_face_architecture = pytest.mark.parametrize("name", zoo.HF)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def shared(name: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """A model for tests that leave it as it is; making one costs more than running it."""
    return zoo.zoo(name, dtype)


def answers(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The plain module's logits, with a position axis also for classifiers."""
    with torch.no_grad():
        logits = module(tokens).logits
    return logits if logits.ndim == 3 else logits[:, None]


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@every_hugging_face_architecture
@both_dtypes
@torch.no_grad()
def test_logits_are_those_of_plain_hugging_face(name, dtype):
    tokens = zoo.tokens()
    ours = forward(shared(name, dtype), tokens)
    assert ours.dtype == dtype
    # GPT-NeoX: Hugging Face takes the softmax in float32 whatever the model's dtype.
    tolerance = 1e-7 if (name, dtype) == ("neox", torch.float64) else DTYPES[dtype]
    assert gap(ours, answers(zoo.hf(name, dtype), tokens)) <= tolerance


@every_architecture
@both_dtypes
@torch.no_grad()
def test_a_padded_prompt_gives_the_numbers_of_the_prompt_alone(name, dtype):
    model, tokens = shared(name, dtype), zoo.tokens(3, 11)
    lengths = [11, 6, 9]
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    padded = forward(model, torch.where(mask, tokens, 0), mask)
    for row, length in enumerate(lengths):
        alone = forward(model, tokens[row : row + 1, :length])[0]
        n = len(alone)
        assert gap(padded[row, :n], alone) <= DTYPES[dtype], (row, length)


@pytest.mark.parametrize("mask", [[False, True], [True, False, True], [False, False]])
def test_a_mask_of_left_padded_or_empty_prompts_is_refused(mask):
    with pytest.raises(ValueError, match="padded on the right"):
        forward(shared("gpt2"), zoo.tokens(1, len(mask)), torch.tensor([mask]))


@every_architecture
@torch.no_grad()
def test_what_lies_under_the_padding_does_not_matter(name):
    model, tokens = shared(name), zoo.tokens(2, 9)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    other = torch.where(mask, tokens, 96)
    seen = mask if zoo.ANSWERS_ONCE.isdisjoint([name]) else mask[:, :1]
    assert gap(forward(model, tokens, mask)[seen], forward(model, other, mask)[seen]) <= 1e-5


@every_architecture
@torch.no_grad()
def test_a_model_is_causal_when_later_tokens_cannot_matter(name):
    model, tokens = shared(name), zoo.tokens(1, 8)
    assert is_causal(model) == (name in zoo.CAUSAL)
    assert n_layers(model) == 3
    if name in zoo.ANSWERS_ONCE:
        return
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 7) % 90 + 3
    moved = (forward(model, tokens) - forward(model, changed)).abs().amax(2)[0]
    assert bool((moved[:-1] == 0).all()) == is_causal(model)


@every_architecture
def test_models_are_in_eval_mode_and_have_no_gradient_mode_of_their_own(name):
    model = shared(name)
    assert not model.training
    assert not any(part.training for part in model.original_model.modules())
    assert forward(model, zoo.tokens()).requires_grad


@pytest.mark.parametrize("name", sorted(zoo.ANSWERS_ONCE))
@torch.no_grad()
def test_a_classifier_answers_once_with_one_logit_per_class(name):
    model = shared(name)
    assert forward(model, zoo.tokens(4)).shape == (4, 1, 3)
    assert model.cfg.d_vocab_out == 3


@torch.no_grad()
def test_a_headless_encoder_answers_with_its_last_hidden_state():
    encoder = cast(Any, zoo.hf("bert")).bert
    tokens = zoo.tokens()
    expected = encoder(tokens).last_hidden_state.clone()
    model = mi.load_model(encoder)
    assert gap(forward(model, tokens), expected) <= 1e-5


@every_hugging_face_architecture
def test_unwrapping_gives_back_the_module_with_its_keys_and_weights(name):
    plain: Any = mi.unwrap(shared(name))
    original: Any = zoo.hf(name)
    assert type(plain) is type(original)
    assert str(plain) == str(original)
    ours, theirs = plain.state_dict(), original.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    tied = plain.get_output_embeddings() is not None and plain.config.tie_word_embeddings
    if tied:
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


@every_hugging_face_architecture
def test_an_unwrapped_module_answers_exactly_as_the_original(name):
    tokens = zoo.tokens()
    assert torch.equal(answers(mi.unwrap(shared(name)), tokens), answers(zoo.hf(name), tokens))


@every_hugging_face_architecture
def test_unwrapped_saved_by_transformers_and_reloaded_is_equal(name, tmp_path):
    plain: Any = mi.unwrap(shared(name))
    plain.save_pretrained(tmp_path)
    reloaded = type(plain).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(answers(reloaded, zoo.tokens()), answers(zoo.hf(name), zoo.tokens()))


@torch.no_grad()
def test_unwrapping_leaves_the_bridge_working_and_carries_no_hooks_along():
    model, tokens = zoo.zoo("gpt2"), zoo.tokens()
    before = forward(model, tokens)
    model.original_model.register_forward_pre_hook(lambda *_: None)
    plain = mi.unwrap(model)
    assert not plain._forward_pre_hooks
    assert torch.equal(forward(model, tokens), before)


@pytest.mark.parametrize("name", ["gpt2", "neox", "falcon", "falcon_grouped"])
@torch.no_grad()
def test_edits_of_split_queries_keys_and_values_reach_the_fused_weights(name):
    model, tokens = zoo.zoo(name), zoo.tokens()
    for part in ("q", "k", "v"):
        linear = getattr(model.blocks[1].attn, part).original_component
        linear.weight = torch.nn.Parameter(linear.weight * 1.5)
    edited = forward(model, tokens)
    assert gap(answers(zoo.hf(name), tokens), edited) > 1e-3
    assert gap(answers(mi.unwrap(model), tokens), edited) <= 1e-5


def test_processed_weights_are_told_and_cannot_be_unwrapped():
    model = zoo.zoo("gpt2")
    assert not processed_weights(model)
    model.enable_compatibility_mode(disable_warnings=True)
    assert processed_weights(model)
    with pytest.raises(ValueError, match="weights were processed"):
        mi.unwrap(model)


@every_architecture
@torch.no_grad()
def test_a_saved_model_loads_equal_with_the_same_fingerprint(name, tmp_path):
    model, tokens = shared(name), zoo.tokens()
    mi.save_model(model, tmp_path / "model")
    again = mi.load_model(tmp_path / "model")
    assert torch.equal(forward(again, tokens), forward(model, tokens))
    assert mi.fingerprint(again) == mi.fingerprint(model)


def test_a_saved_model_keeps_its_tokenizer(tmp_path):
    model = mi.load_model(zoo.hf("gpt2"), tokenizer=zoo.tokenizer())
    mi.save_model(model, tmp_path / "model")
    again = tokenizer_of(mi.load_model(tmp_path / "model"))
    assert again is not None
    assert again("the man went").input_ids == zoo.tokenizer()("the man went").input_ids


def test_a_saved_model_is_an_ordinary_folder_for_transformers(tmp_path):
    mi.save_model(zoo.zoo("llama"), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert gap(answers(plain, zoo.tokens()), answers(zoo.hf("llama"), zoo.tokens())) <= 1e-5


def test_a_full_disk_leaves_the_old_model_whole(tmp_path, monkeypatch):
    folder = mi.save_model(zoo.zoo("gpt2"), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        mi.save_model(zoo.zoo("gpt2"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_over_a_model_replaces_it(tmp_path):
    folder = mi.save_model(zoo.zoo("bert"), tmp_path / "model")
    mi.save_model(zoo.zoo("gpt2"), folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    assert "transformer.wte.weight" in load_file(folder / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_never_replaces_a_folder_with_other_files_in_it(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not part of a model \(thesis\.tex\)"):
        mi.save_model(zoo.zoo("gpt2"), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("how", ["in place", "through data", "replaced", "dtype"])
@torch.no_grad()
def test_a_fingerprint_changes_with_the_weights(how):
    model = zoo.zoo("gpt2")
    before = mi.fingerprint(model)
    embedding = cast(Any, model.original_model).transformer.wte.original_component
    weight = embedding.weight
    if how == "in place":
        weight[3, 4] += 1
    elif how == "through data":
        weight.data[3, 4] += 1
    elif how == "replaced":
        embedding.weight = torch.nn.Parameter(weight * 2)
    else:
        model.to(torch.float64, print_details=False)
    assert mi.fingerprint(model) != before


def test_equal_models_have_equal_fingerprints_and_others_different_ones():
    names = ["gpt2", "llama", "qwen2", "bert", "bert_classifier", "native", "native_bi"]
    assert len({mi.fingerprint(zoo.zoo(name)) for name in names + names}) == len(names)


def test_verifying_prints_and_returns_the_gap_to_hugging_face(capsys):
    account = mi.verify(zoo.zoo("gemma2"))
    assert account.ok
    assert account.logit_gap is not None and account.logit_gap < 1e-4
    assert account.kl_gap is not None and account.kl_gap < 1e-9
    assert "z" in account.working
    assert "within the tolerance" in " ".join(capsys.readouterr().out.split())


@torch.no_grad()
def test_verifying_notices_a_bridge_that_computes_something_else():
    model = zoo.zoo("llama")
    model.blocks[1].attn.hook_out.add_hook(lambda value, hook: value * 1.01)
    account = mi.verify(model)
    assert not account.ok
    assert account.kl_gap is not None and account.kl_gap > 0


def test_verifying_a_native_bridge_says_that_there_is_nothing_to_compare_with(capsys):
    account = mi.verify(zoo.zoo("native_attn"))
    assert account.logit_gap is None
    assert account.ok
    assert "mlp_out" in account.missing
    assert "native bridge" in " ".join(capsys.readouterr().out.split())
