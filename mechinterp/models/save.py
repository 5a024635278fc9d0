"""Write a model to a folder, completely or not at all."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mechinterp.models.native import save_native
from mechinterp.models.plain import unwrap
from mechinterp.models.pruned.card import card_files, parts_of, write_card
from mechinterp.models.pruned.record import pruning_of
from mechinterp.models.quiet import quiet
from mechinterp.models.run import tokenizer_of

# What a saved model may consist of; a folder with anything else in it is not ours to replace.
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
)


def save_model(
    model: TransformerBridge, folder: str | Path, *, card: object | Sequence[object] = ()
) -> Path:
    """Save weights (safetensors), configuration and tokenizer; `load_model` reads them back.

    A Hugging Face model becomes a normal folder that ``transformers`` reads as well, unless
    it was pruned: layers of different shapes are what ``transformers`` cannot read and
    `load_model` can. A pruned model's folder has a model card, ``README.md``, that says what
    was pruned from what; the record itself is in ``config.json`` (``pruned_heads``,
    ``pruned_neurons``, ``pruning_steps``).

    The folder is written beside its final place and then renamed, so a model that was there
    before stays whole if anything fails.

    Args:
        model: The model.
        folder: Where to; a model that is there is replaced.
        card: What else the model card shows, one thing or several in order: Markdown text,
            a result (its picture), or a matplotlib figure or axes. A pruning curve, say.

    Returns:
        The folder.

    Raises:
        TypeError: The card has something that is neither a text nor a picture.
        ValueError: The folder holds other files than a model's, or the model cannot be
            unwrapped (see `unwrap`).
    """
    folder = Path(folder).expanduser().resolve()
    shown = parts_of(card)
    check_replaceable(folder)
    module, tokenizer = unwrap(model), tokenizer_of(model)
    pruning = pruning_of(model)
    with _folder_beside(folder) as part:
        if isinstance(module, PreTrainedModel):
            with quiet():
                # A pruned model is read by its own names, not by those of older versions.
                module.save_pretrained(part, save_original_format=not pruning.steps)
        else:
            save_native(model, module, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if pruning.steps or shown:
            write_card(model, shown, part)
        _check_saved(part)
    return folder


def check_replaceable(folder: Path) -> None:
    """Raise a ``ValueError`` if a model's folder would take the place of something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file. Give the name of a folder.")
    known = {path for pattern in _MODEL_FILES for path in folder.glob(pattern)}
    known |= set(card_files(folder))
    others = sorted(path.name for path in folder.iterdir() if path not in known)
    if others:
        raise ValueError(
            f"{folder} holds files that are not part of a model ({', '.join(others[:5])}), and "
            "saving replaces the whole folder. Choose a new or empty one."
        )


def _check_saved(part: Path) -> None:
    """A half-written configuration would only be noticed when someone loads it."""
    json.loads((part / "config.json").read_text(encoding="utf-8"))


@contextmanager
def _folder_beside(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``; put it in that place if the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid4().hex[:8]
    part = folder.with_name(f".{folder.name}.{mark}.part")
    old = folder.with_name(f".{folder.name}.{mark}.old")
    part.mkdir()
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        try:
            part.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
