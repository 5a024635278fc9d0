"""Models in Hugging Face format: a folder, a name on the hub, a GGUF file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mechinterp.models.gguf import read_gguf
from mechinterp.models.native import MODEL_TYPE, load_native
from mechinterp.models.pruned.reading import is_pruned, read_pruned
from mechinterp.models.quiet import quiet
from mechinterp.models.wrap import attach_tokenizer, check_supported, wrap

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)


@dataclass(frozen=True)
class Reading:
    """How files are to be read; see `load_model`."""

    tokenizer: PreTrainedTokenizerBase | None
    device: str | torch.device | None
    device_map: str | dict[str, Any] | None
    dtype: torch.dtype
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool


def from_folder(folder: Path, name: str, how: Reading) -> TransformerBridge:
    """Load a local folder, to be called ``name``; see `load_model`."""
    stored = _stored_config(folder)
    _check_weights(folder, how.allow_pickle)
    tokenizer = how.tokenizer
    if tokenizer is None and any((folder / name).exists() for name in _TOKENIZER_FILES):
        tokenizer = _own_tokenizer(folder, trust_remote_code=how.trust_remote_code)
    if stored.get("model_type") != MODEL_TYPE:
        return wrap(_read(folder, how), tokenizer, name)
    if how.device_map is not None:
        raise ValueError("device_map does not apply to a native model. Pass device instead.")
    bridge = load_native(folder, stored, name, how.dtype, _default(how.device))
    if tokenizer is not None:
        attach_tokenizer(bridge, tokenizer)
    return bridge.eval()


def _own_tokenizer(where: str | Path, **told: Any) -> PreTrainedTokenizerBase:
    """Return a model's own tokenizer, with a token to pad by, which bridges want for text."""
    tokenizer = AutoTokenizer.from_pretrained(where, **told)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def from_hub(name: str, how: Reading) -> TransformerBridge:
    """Load a name on the hub, or from the hub's cache on this disk; see `load_model`."""
    try:
        module = _read(name, how)
        tokenizer = how.tokenizer or _own_tokenizer(
            name, revision=how.revision, trust_remote_code=how.trust_remote_code
        )
    except OSError as error:
        raise _hub_error(name, error) from error
    return wrap(module, tokenizer, name)


def from_gguf(path: Path, name: str, how: Reading) -> TransformerBridge:
    """Load a GGUF file, dequantised, to be called ``name``; see `load_model`."""
    with quiet():
        module, tokenizer = read_gguf(
            path,
            how.tokenizer,
            dtype=how.dtype,
            attn_implementation="eager",
            device_map=how.device_map,
        )
    return wrap(_placed(module, how), tokenizer, name)


def _read(where: str | Path, how: Reading) -> PreTrainedModel:
    source = {"revision": how.revision, "trust_remote_code": how.trust_remote_code}
    config = AutoConfig.from_pretrained(where, **source)
    architecture = (config.architectures or [None])[0]
    if architecture is None:
        raise ValueError(
            f"the config.json of {where} names no architecture, so it is unclear which head "
            "the model has. Load it with the right transformers class and pass that module."
        )
    check_supported(config, architecture)
    if is_pruned(config):
        return _read_pruned(where, config, architecture, how)
    # Code from the hub is reached through the automatic class only.
    kind: Any = getattr(transformers, architecture, AutoModelForCausalLM)
    with quiet():
        module, found = kind.from_pretrained(
            where,
            config=config,
            dtype=how.dtype,
            attn_implementation="eager",
            device_map=how.device_map,
            use_safetensors=None if how.allow_pickle else True,
            output_loading_info=True,
            **source,
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{where} lacks weights that {architecture} needs, for example {missing[0]}; "
            f"{len(missing)} would be random. The file is incomplete or belongs to another "
            "architecture."
        )
    return _placed(module, how)


def _read_pruned(
    where: str | Path, config: Any, architecture: str, how: Reading
) -> PreTrainedModel:
    if not Path(where).is_dir():
        raise ValueError(
            f"{where!r} is a pruned model, which is read from a folder. Run "
            f"`hf download {where} --local-dir ...` and pass that folder."
        )
    if how.device_map is not None:
        raise ValueError("device_map does not apply to a pruned model. Pass device instead.")
    with quiet():
        return _placed(read_pruned(Path(where), config, architecture, how.dtype), how)


def _placed(module: PreTrainedModel, how: Reading) -> PreTrainedModel:
    # transformers wraps ``to`` so that type checkers lose its signature.
    return module if how.device_map else cast(Any, module).to(_default(how.device))


def _default(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _stored_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
        hint = " Pass the .gguf file itself." if any(n.endswith(".gguf") for n in there) else ""
        if "adapter_config.json" in there:
            hint = " It is an adapter: merge it into its base model first."
        raise FileNotFoundError(
            f"{folder} has no config.json, so it holds no model in Hugging Face format; "
            f"it holds {', '.join(there) or 'nothing'}.{hint}"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}). Save the model again."
        ) from error


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    names = {path.name for path in folder.iterdir()}
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if not pickled:
        raise FileNotFoundError(
            f"{folder} has a config.json but no weights (model.safetensors). "
            "Fetch or save the whole model."
        )
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds its weights as pickle ({pickled[0]}), which can run any code when "
            "read. Pass allow_pickle=True if you trust where they come from."
        )


def _hub_error(name: str, error: OSError) -> OSError | ValueError:
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, GatedRepoError):
            return ValueError(
                f"{name!r} is gated: accept its terms on the hub, then run `hf auth login`."
            )
        if isinstance(chain, RepositoryNotFoundError):
            return ValueError(
                f"{name!r} is not a model on the Hugging Face hub (or it is private), and not "
                "a file or folder here. Check the name, or run `hf auth login`."
            )
        chain = chain.__cause__ or chain.__context__
    if "safetensors" in str(error):
        return ValueError(
            f"{name!r} has no safetensors weights on the hub, and pickled weights can run "
            "code. Pass allow_pickle=True if you trust it."
        )
    if "connect" not in str(error).lower() and "offline" not in str(error).lower():
        return error
    return ConnectionError(
        f"{name!r} is neither a file or folder here nor in the Hugging Face cache of this "
        "machine, and the hub cannot be reached. To work offline, use 'embedded', a local "
        f"folder or a .gguf file; or run `hf download {name}` where there is a network, copy "
        "its cache folder, and set HF_HUB_OFFLINE=1."
    )
