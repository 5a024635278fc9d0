"""GGUF files, dequantised by transformers into an ordinary model with its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import transformers.modeling_gguf_pytorch_utils as slow_path
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def read_gguf(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in ``path``, its weights unpacked, and the tokenizer it carries.

    ``options`` go to ``from_pretrained``. A given ``tokenizer`` is returned instead.

    Raises:
        ValueError: Not a GGUF file, or one that is cut short.
    """
    with _parsed_once() as reader:
        _check_whole(path, reader)
        module = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # An entry left here would make the unpacked model refuse to be saved.
    vars(module.config).pop("quantization_config", None)
    return cast(PreTrainedModel, module), cast(PreTrainedTokenizerBase, tokenizer)


def _check_whole(path: Path, reader: Any) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file: it does not start with 'GGUF'. "
                "Fetch it again, or pass another file."
            )
    try:
        reader(str(path))
    # What running off the end of the file raises depends on where that happens.
    except (IndexError, OverflowError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or damaged: its header "
            f"describes more than the file holds ({error}). Fetch it again."
        ) from error


class _Reader(gguf.GGUFReader):
    """gguf 0.19's reader without ``np.memmap``'s cost per access: a vocabulary has 10^5."""

    def _get(
        self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None
    ) -> np.ndarray:
        kind, start = np.dtype(dtype), int(offset)
        values = self._bytes[start : start + kind.itemsize * int(count)].view(kind)
        if len(values) < count:
            raise IndexError(f"{count} values of {kind} at byte {start} are missing")
        order = override_order or self.byte_order
        return values if order in "I<" else values.view(kind.newbyteorder(order))

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.asarray(self.data)


@contextmanager
def _parsed_once() -> Iterator[Any]:
    """Let transformers share one reading of the file, silently, while the block lasts.

    transformers 5.23 parses a GGUF file four times and rebuilds gguf's table of names for
    every module, which turns 10 seconds for SmolLM2-135M into 90.
    """
    reader, names = cache(_Reader), cache(gguf.get_tensor_name_map)
    originals = gguf.GGUFReader, gguf.get_tensor_name_map, vars(slow_path)["tqdm"]
    setattr(gguf, "GGUFReader", reader)  # noqa: B010  pyright takes a class for constant
    setattr(gguf, "get_tensor_name_map", names)  # noqa: B010
    setattr(slow_path, "tqdm", lambda items, **_: items)  # noqa: B010
    try:
        yield reader
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals[:2]
        setattr(slow_path, "tqdm", originals[2])  # noqa: B010
