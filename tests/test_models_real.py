"""Real models, fetched by scripts/fetch_models.py."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, GgufConfig

import mechinterp as mi
from mechinterp._cache import fetched
from mechinterp.models import forward, is_causal, n_layers, tokenizer_of

pytestmark = pytest.mark.slow


def needs(name):
    place = fetched(name)
    if place is None:
        pytest.skip(f"{name} is not in the cache; run python scripts/fetch_models.py {name}")
    return place


@pytest.fixture(scope="module")
def smollm():
    needs("smollm2-135m")
    return mi.load_model("smollm2-135m")


def test_smollm2_is_what_it_says(smollm):
    assert n_layers(smollm) == 30
    assert (smollm.cfg.n_heads, smollm.cfg.n_key_value_heads) == (9, 3)
    assert smollm.cfg.model_name == "smollm2-135m"
    tokenizer = tokenizer_of(smollm)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("The cat sat").input_ids) == "The cat sat"


@torch.no_grad()
def test_smollm2_knows_a_capital(smollm):
    tokenizer = tokenizer_of(smollm)
    assert tokenizer is not None
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(forward(smollm, tokens)[0, -1].argmax()) == " Paris"


@torch.no_grad()
def test_smollm2_agrees_with_transformers_own_reading_of_the_file(smollm):
    place = needs("smollm2-135m")
    plain = AutoModelForCausalLM.from_pretrained(
        place.parent,
        gguf_file=place.name,
        quantization_config=GgufConfig(dequantize=True),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    tokens = torch.randint(3, 49152, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = plain(tokens).logits
    assert (forward(smollm, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_smollm2_saves_as_a_normal_folder_and_loads_equal(smollm, tmp_path):
    again = mi.load_model(mi.save_model(smollm, tmp_path / "smollm2"))
    tokens = torch.tensor([[1, 504, 2644, 2643, 335]])
    assert torch.equal(forward(again, tokens), forward(smollm, tokens))
    assert mi.fingerprint(again) == mi.fingerprint(smollm)
    ours, theirs = tokenizer_of(again), AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert ours is not None
    assert ours("It's 3 pm.").input_ids == theirs("It's 3 pm.").input_ids


@torch.no_grad()
def test_minilm_answers_with_the_last_hidden_states_of_bert():
    place = needs("minilm")
    model = mi.load_model("minilm")
    assert not is_causal(model)
    tokenizer = tokenizer_of(model)
    assert tokenizer is not None
    batch = tokenizer(["A man is eating.", "Hi"], padding=True, return_tensors="pt")
    plain = BertModel.from_pretrained(place).eval()
    expected = plain(**batch).last_hidden_state
    ours = forward(model, batch.input_ids, batch.attention_mask.bool())
    seen = batch.attention_mask.bool()
    assert (ours - expected)[seen].abs().max() <= 1e-5 * expected[seen].abs().max()
