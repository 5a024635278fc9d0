"""A tiny random model of every architecture the package promises, with no download.

Three layers, four heads (two key/value heads where the family has grouped queries), 97
words. Weights are well away from initialisation noise: logits reach about 3, so that an edit
that works moves them far above rounding.
"""

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native

D_VOCAB, N_CTX = 97, 64

_PLAIN = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
_FALCON = {
    name: value
    for name, value in _PLAIN.items()
    if name not in ("intermediate_size", "max_position_embeddings")
} | {"bias": False}

# name: (class, config). Built on demand, because configs are mutable.
_MODELS: dict[str, tuple[str, str, dict]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": D_VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": N_CTX,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _PLAIN),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _PLAIN),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {name: value for name, value in _PLAIN.items() if name != "intermediate_size"}
        | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _FALCON | {"multi_query": True}),
    "falcon_grouped": (
        "FalconForCausalLM",
        "FalconConfig",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _PLAIN),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _PLAIN),
    "bert_classifier": (
        "BertForSequenceClassification",
        "BertConfig",
        _PLAIN | {"num_labels": 3},
    ),
    "roberta_classifier": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _PLAIN | {"num_labels": 3},
    ),
}

CLASSIFIERS = ["bert_classifier", "roberta_classifier"]
ANSWERS_ONCE = set(CLASSIFIERS)
ENCODERS = ["bert", "roberta", *CLASSIFIERS]
NATIVE = ["native", "native_attn", "native_nonorm", "native_bi"]
CAUSAL = [name for name in _MODELS if name not in ENCODERS] + NATIVE[:-1]
HF = list(_MODELS)
NAMES = HF + NATIVE


def hf(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """The plain Hugging Face module, always with the same weights."""
    model_class, config_class, fields = _MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(tf, model_class)._from_config(
            getattr(tf, config_class)(**fields), attn_implementation="eager"
        )
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    # A classifier reads few numbers, so it needs larger weights.
                    parameter.normal_(std=0.6 if "classifier" in path else 0.15)
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return module.to(dtype).eval()


def zoo(name: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """The same model as a bridge."""
    from mechinterp.models import load_model

    if name not in NATIVE:
        return load_model(hf(name, dtype))
    fields = {
        "n_layers": 3,
        "d_model": 32,
        "n_ctx": N_CTX,
        "d_head": 8,
        "n_heads": 4,
        "d_vocab": D_VOCAB,
        "act_fn": "gelu",
        "d_mlp": 64,
        "seed": 0,
    } | {
        "native": {},
        # Without a final norm, only larger weights give logits of the usual size.
        "native_attn": {
            "attn_only": True,
            "normalization_type": None,
            "initializer_range": 0.22,
        },
        "native_nonorm": {"normalization_type": None, "initializer_range": 0.2},
        "native_bi": {"attention_dir": "bidirectional"},
    }[name]
    return load_model(boot_native(fields, dtype=dtype))


def tokens(n_prompts: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (n_prompts, length), generator=generator)


_WORDS = (
    "the a and to in of was is are he she it they him her his Mary John Tom Anna Paul Kate "
    "gave went store park school book ball drink key keys man men woman women near by with "
    "France Paris Italy Rome Spain Madrid Japan Tokyo capital said that who saw , . ? !"
)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per word, as many ids as the zoo's models have, no download."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *_WORDS.split()]
    words += [f"w{index}" for index in range(len(words), D_VOCAB)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def random_zoo(
    family: str,
    *,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    window: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> TransformerBridge:
    """A model of one of the zoo's families, of another shape and with other weights."""
    from mechinterp.models import load_model

    if family == "native":
        fields = {
            "n_layers": n_layers,
            "d_model": 32,
            "n_ctx": N_CTX,
            "d_head": 32 // n_heads,
            "n_heads": n_heads,
            "d_vocab": D_VOCAB,
            "act_fn": "gelu",
            "d_mlp": 64,
            "seed": seed,
            "attn_only": window == 2,
            "initializer_range": 0.2,
        }
        return load_model(boot_native(fields, dtype=dtype))
    model_class, config_class, fields = _MODELS[family]
    named: dict = {
        "n_layer" if family == "gpt2" else "num_hidden_layers": n_layers,
        "n_head" if family == "gpt2" else "num_attention_heads": n_heads,
    }
    own = {"num_key_value_heads": n_kv_heads, "sliding_window": window, "head_dim": 8}
    named |= {name: value for name, value in own.items() if name in fields}
    if "layer_types" in fields:
        types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        named["layer_types"] = types[:n_layers]
    config = getattr(tf, config_class)(**(fields | named))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(tf, model_class)._from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return load_model(module.to(dtype).eval())
