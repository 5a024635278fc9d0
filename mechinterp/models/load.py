"""One door for every kind of model."""

import copy as copying
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechinterp._cache import FETCHED, fetched
from mechinterp.models.pretrained import Reading, from_folder, from_gguf, from_hub
from mechinterp.models.wrap import attach_tokenizer, wrap
from mechinterp.names import unknown

_NAMED = ["embedded", *FETCHED]
EMBEDDED = Path(__file__).parents[1] / "data" / "embedded"


def load_model(
    source: object = "embedded",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    copy: bool = False,
) -> TransformerBridge:
    """Return ``source`` as a transformer-lens bridge in eval mode, with raw numerics.

    Args:
        source: One of

            - ``"embedded"``, the small language model that comes with the package;
            - ``"smollm2-135m"`` or ``"minilm"``: the copy that ``scripts/fetch_models.py``
              fetched, else the hub;
            - a local folder in Hugging Face format, or one that `save_model` wrote;
            - a ``.gguf`` file, whose weights are dequantised and whose tokenizer is used;
            - a name on the Hugging Face hub;
            - a ``transformers`` module, which is taken over: its submodules are replaced;
            - a bridge, which is put in eval mode and otherwise left as it is.
        tokenizer: Use this one instead of the model's own.
        device: Where to put the weights. By default a CUDA device if there is one, else the
            CPU; modules and bridges stay where they are.
        device_map: Spread the weights as ``transformers`` does; excludes ``device``.
        dtype: What to read files as. Modules and bridges keep their own.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run the model's own Python code from the hub.
        allow_pickle: Accept weights stored as pickle, which can run code when read. By
            default only safetensors are read.
        copy: Wrap a deep copy of a module, so that the module itself stays plain.

    Raises:
        TypeError: ``source`` is none of the above.
        ValueError: Unknown name, unsupported architecture, damaged file, unsafe weights, or
            arguments that do not apply to this kind of source.
        FileNotFoundError: A path that does not exist, or a folder that holds no model.
        ConnectionError: The hub is needed and cannot be reached.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}; it must be a floating dtype like torch.float32.")
    if device is not None and device_map is not None:
        raise ValueError(
            "both device and device_map were given, but a device_map places every layer. "
            "Pass one of them."
        )
    if isinstance(source, nn.Module):
        for_files = {
            "device": device is not None,
            "device_map": device_map is not None,
            "dtype": dtype != torch.float32,
            "revision": revision is not None,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
        }
        return _from_module(
            source, tokenizer, copy, [a for a, given in for_files.items() if given]
        )
    if not isinstance(source, str | Path):
        raise TypeError(
            f"cannot load a model from a {type(source).__name__}. Pass a name, a folder, a "
            ".gguf file, a transformers module or a TransformerBridge."
        )
    if copy:
        raise ValueError(
            "copy=True applies to a module; what is read from files is new anyway. "
            "Leave it out."
        )
    how = Reading(
        tokenizer, device, device_map, dtype, revision, trust_remote_code, allow_pickle
    )
    place = _local(source)
    if place is None:
        return (
            _not_fetched(str(source), how) if source in FETCHED else from_hub(str(source), how)
        )
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} applies to the hub, but {place} is on this disk. "
            "Leave it out."
        )
    there = place.resolve()
    name = there.name if place.is_dir() else there.stem  # a folder's name may have dots
    name = str(source) if source in _NAMED else name
    return (from_folder if place.is_dir() else from_gguf)(place, name, how)


def _not_fetched(name: str, how: Reading) -> TransformerBridge:
    try:
        return from_hub(FETCHED[name][1], how)
    except ConnectionError as error:
        raise ConnectionError(
            f"{name!r} was not fetched yet: `python scripts/fetch_models.py` brings it with no "
            f"model hub. From the hub, {error}"
        ) from error


def _from_module(
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    copy: bool,
    inapplicable: list[str],
) -> TransformerBridge:
    kind = type(module).__name__
    if inapplicable:
        raise ValueError(
            f"{', '.join(inapplicable)} apply to models read from files, but a {kind} was "
            "given, which keeps its weights as they are. Convert it with .to(...)."
        )
    if isinstance(module, TransformerBridge):
        if copy:
            raise ValueError(
                "copy=True applies to a transformers module, but a bridge was given. "
                "Pass copy.deepcopy(mi.unwrap(bridge)) for a second, separate one."
            )
        if tokenizer is not None:
            attach_tokenizer(module, tokenizer)
        return module.eval()
    if not isinstance(module, PreTrainedModel):
        raise TypeError(
            f"cannot wrap a {kind}: only models from transformers (PreTrainedModel) and "
            "bridges are supported."
        )
    return wrap(copying.deepcopy(module) if copy else module, tokenizer)


def _local(source: str | Path) -> Path | None:
    """Return the file or folder that ``source`` means, or None if it is a name on the hub."""
    if source == "embedded":
        return EMBEDDED
    if source in FETCHED:
        return fetched(str(source))
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(
            f"{path} is not a .gguf file. For other formats, pass the whole folder."
        )
    text = str(source)
    if isinstance(source, Path) or path.suffix == ".gguf" or text[:1] in ("/", ".", "~"):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(unknown("file or folder", path.name, beside[:20]))
    if "/" not in text and get_close_matches(text.lower(), _NAMED, n=1, cutoff=0.7):
        raise ValueError(unknown("model", text, _NAMED))
    return None
