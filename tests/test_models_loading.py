"""Where models come from, and what is said when they cannot be had."""

import errno
import json
import shutil
import struct
from typing import Any, cast

import pytest
import torch
import zoo
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import mechinterp as mi
from mechinterp.models import forward, tokenizer_of
from mechinterp.models.load import EMBEDDED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny GPT-2 with a tokenizer."""
    where = tmp_path_factory.mktemp("models") / "tiny"
    return mi.save_model(mi.load_model(zoo.hf("gpt2"), tokenizer=zoo.tokenizer()), where)


@pytest.mark.parametrize("as_path", [str, lambda folder: folder], ids=["str", "Path"])
def test_a_folder_loads_in_float32_with_its_tokenizer_and_name(folder, as_path):
    model = mi.load_model(as_path(folder))
    assert model.original_model.dtype == torch.float32
    assert tokenizer_of(model) is not None
    assert model.cfg.model_name == "tiny"
    assert cast(Any, model.original_model).config._attn_implementation == "eager"


@torch.no_grad()
def test_the_embedded_model_needs_no_download_and_agrees_with_transformers():
    model = mi.load_model()
    assert model.cfg.model_name == "embedded"
    tokenizer = tokenizer_of(model)
    assert tokenizer is not None
    tokens = tokenizer("The man went to the", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    expected = plain(tokens).logits
    assert (forward(model, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_files_are_read_in_the_dtype_asked_for(folder, dtype):
    assert forward(mi.load_model(folder, dtype=dtype), zoo.tokens()).dtype == dtype


def test_a_device_map_passes_through(folder):
    model = mi.load_model(folder, device_map={"": "cpu"})
    assert torch.equal(
        forward(model, zoo.tokens()), forward(mi.load_model(folder), zoo.tokens())
    )


def test_a_given_tokenizer_is_used_unchanged(folder):
    tokenizer = zoo.tokenizer()
    assert tokenizer_of(mi.load_model(folder, tokenizer=tokenizer)) is tokenizer
    assert tokenizer_of(mi.load_model(zoo.zoo("gpt2"), tokenizer=tokenizer)) is tokenizer
    assert tokenizer("the man").input_ids == zoo.tokenizer()("the man").input_ids


def test_a_module_is_taken_over_unless_a_copy_is_asked_for():
    module = zoo.hf("gpt2")
    keys = list(module.state_dict())
    model = mi.load_model(module, copy=True)
    assert model.original_model is not module
    assert list(module.state_dict()) == keys
    assert mi.load_model(module).original_model is module
    with pytest.raises(ValueError, match="already wrapped"):
        mi.load_model(module)


def test_a_module_keeps_its_dtype_and_a_bridge_is_only_put_in_eval_mode():
    assert zoo.zoo("gpt2", torch.float64).original_model.dtype == torch.float64
    model = zoo.zoo("gpt2").train()
    assert mi.load_model(model) is model
    assert not model.training and not model.original_model.training


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"dtype": torch.float64},
        {"revision": "main"},
        {"device_map": "auto"},
        {"allow_pickle": True},
    ],
    ids=str,
)
def test_options_for_files_are_refused_for_modules_and_bridges(options):
    for source in (zoo.hf("gpt2"), zoo.zoo("gpt2")):
        with pytest.raises(ValueError, match=f"{next(iter(options))} apply to models read"):
            mi.load_model(source, **options)


@pytest.mark.parametrize("source", [3, None, ["gpt2"], nn.Linear(2, 2)], ids=repr)
def test_what_is_no_model_is_a_type_error(source):
    with pytest.raises(TypeError, match=r"cannot (load|wrap)"):
        mi.load_model(source)


def test_a_dtype_must_be_a_floating_one(folder):
    with pytest.raises(TypeError, match="floating dtype"):
        mi.load_model(folder, dtype=torch.int8)


def test_device_and_device_map_exclude_each_other(folder):
    with pytest.raises(ValueError, match="one of them"):
        mi.load_model(folder, device="cpu", device_map="auto")


@pytest.mark.parametrize("name", ["smollm2", "smollm2-135M-", "embeded", "mini-lm"])
def test_a_misspelt_name_is_answered_with_the_near_ones(name):
    with pytest.raises(ValueError, match=r"Did you mean '(smollm2-135m|embedded|minilm)'"):
        mi.load_model(name)


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm"])
def test_a_model_that_was_not_fetched_says_how_to_fetch_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"'{name}' was not fetched.*fetch_models\.py"):
        mi.load_model(name)


def test_without_a_network_a_hub_name_says_how_to_work_offline():
    with pytest.raises(ConnectionError, match=r"work offline.*local folder.*HF_HUB_OFFLINE=1"):
        mi.load_model("no-such-company/no-such-model")


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "model.gguf", "~/nothing"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="unknown file or folder"):
        mi.load_model(name)


def test_a_folder_without_configuration_says_what_it_holds(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*weights\.gguf.*itself"):
        mi.load_model(tmp_path)


def test_a_damaged_configuration_is_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gp')
    with pytest.raises(ValueError, match="not valid JSON"):
        mi.load_model(tmp_path / "m")


def test_a_configuration_without_weights_is_told(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no weights"):
        mi.load_model(tmp_path)


def test_missing_weights_are_never_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.attn.c_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*h\.1\.attn\.c_proj\.weight"):
        mi.load_model(tmp_path / "m")


def test_pickled_weights_are_read_only_when_allowed(folder, tmp_path):
    module = zoo.hf("gpt2")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle \(pytorch_model\.bin\).*allow_pickle=True"):
        mi.load_model(tmp_path)
    allowed = mi.load_model(tmp_path, allow_pickle=True)
    assert mi.fingerprint(allowed) == mi.fingerprint(mi.load_model(module))


@pytest.mark.parametrize("edit", [{"architectures": None}, {"architectures": []}], ids=str)
def test_a_configuration_without_architecture_is_told(folder, tmp_path, edit):
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | edit
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no architecture"):
        mi.load_model(tmp_path / "m")


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        mi.load_model(T5ForConditionalGeneration(config))


def test_a_model_without_a_language_head_names_the_class_that_has_one():
    with pytest.raises(ValueError, match="no adapter for GPT2Model"):
        mi.load_model(zoo.hf("gpt2").transformer)


def test_a_vision_model_is_refused():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(ValueError, match="made for vision"):
        mi.load_model(ViTModel(config))


def test_a_file_that_is_no_gguf_file_is_told(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"not a \.gguf file"):
        mi.load_model(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"abcdefgh")
    with pytest.raises(ValueError, match="does not start with 'GGUF'"):
        mi.load_model(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama as GGUF, unquantised, with a byte-level vocabulary of 97 tokens."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    module = zoo.hf("llama")
    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(zoo.D_VOCAB)
    letters = [chr(33 + i) for i in range(zoo.D_VOCAB - 4)]
    words = ["<pad>", "<bos>", "<eos>", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in module.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n_heads in heads.items():
            if part in key:  # llama.cpp keeps the two halves of a rotation side by side
                value = value.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        name = names.get_name(key.removesuffix(".weight"))
        writer.add_tensor(f"{name}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_a_gguf_file_gives_the_model_and_its_tokenizer_and_saves_as_a_folder(
    gguf_file, tmp_path
):
    model, tokens = mi.load_model(gguf_file), zoo.tokens()
    original = forward(zoo.zoo("llama"), tokens)
    torch.testing.assert_close(forward(model, tokens), original, rtol=0, atol=1e-5)
    tokenizer = tokenizer_of(model)
    assert tokenizer is not None and tokenizer.bos_token == "<bos>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc").input_ids) == ["ab", "c"]
    again = mi.load_model(mi.save_model(model, tmp_path / "folder"))
    assert torch.equal(forward(again, tokens), forward(model, tokens))
    assert mi.fingerprint(again) == mi.fingerprint(model)


@pytest.mark.parametrize("kept", [0.999, 0.6, 0.05, 0.01], ids=str)
def test_a_gguf_file_cut_short_is_told(gguf_file, tmp_path, kept):
    content = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match="cut short or damaged"):
        mi.load_model(tmp_path / "cut.gguf")


def test_reading_a_gguf_file_leaves_the_libraries_as_they_were(gguf_file, tmp_path):
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    mi.load_model(gguf_file)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3))
    with pytest.raises(ValueError, match="cut short"):
        mi.load_model(tmp_path / "cut.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_native_model_in_a_newer_format_says_to_update(tmp_path):
    folder = mi.save_model(zoo.zoo("native"), tmp_path / "native")
    stored = json.loads((folder / "config.json").read_text()) | {"format": 2}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="Update mechinterp"):
        mi.load_model(folder)


def test_an_unwritable_place_is_an_error_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        mi.save_model(zoo.zoo("gpt2"), tmp_path / "file")
    with pytest.raises(OSError) as caught:
        mi.save_model(zoo.zoo("gpt2"), tmp_path / "file" / "model")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
