"""Data without corrupted prompts: running text, and texts with a class label."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.metrics import Targets
from mechinterp.models import forward, is_causal
from mechinterp.names import unknown
from mechinterp.tasks.prompts import Prompts, as_prompts, choose, encode, pad
from mechinterp.tasks.run import rows_at_once


@dataclass(frozen=True, eq=False, repr=False)
class Text:
    """Running text, cut into prompts that fit the context.

    Attributes:
        name: What the text is called in results.
        prompts: The pieces, each with the beginning of sequence that its tokenizer gives.
        documents: Which document each piece comes from, counted from 0.
        context: The largest number of tokens a piece may have.
        metric: What methods measure unless they are told otherwise: the loss per token.
    """

    metric: ClassVar[str] = "loss"

    name: str
    prompts: Prompts
    documents: tuple[int, ...]
    context: int

    @classmethod
    def from_strings(
        cls,
        model: TransformerBridge,
        documents: str | Sequence[str],
        *,
        context: int | None = None,
        name: str = "text",
        prepend_bos: bool | None = None,
    ) -> "Text":
        """Return documents cut into consecutive pieces of at most ``context`` tokens.

        Special tokens at a document's beginning and end are put on each of its pieces. The
        pieces of a document do not overlap.

        Args:
            model: Whose tokenizer reads them.
            documents: One or several.
            context: Tokens of a piece; by default as many as the model takes.
            name: What results call the text.
            prepend_bos: Overrides the rule for the beginning of sequence.

        Raises:
            ValueError: ``context`` does not fit the model, or a document is empty.
        """
        texts = [documents] if isinstance(documents, str) else list(documents)
        context = model.cfg.n_ctx if context is None else context
        rows, _, bos = encode(model, texts, prepend_bos=prepend_bos)
        bare, _, _ = encode(model, texts, prepend_bos=False)
        pieces: list[list[int]] = []
        origin: list[int] = []
        for document, (row, body) in enumerate(zip(rows, bare, strict=True)):
            if not body:
                raise ValueError(f"document {document} is empty. Leave it out.")
            before, after = _around(row, body)
            room = context - len(before) - len(after)
            if not (room > 0 and context <= model.cfg.n_ctx):
                raise ValueError(
                    f"context={context} does not fit: this model holds up to {model.cfg.n_ctx} "
                    f"tokens, and {len(before) + len(after)} of them are special ones."
                )
            cuts = range(0, len(body), room)
            pieces += [[*before, *body[cut : cut + room], *after] for cut in cuts]
            origin += [document] * len(cuts)
        return cls(name, as_prompts(model, pad(pieces, bos=bos)), tuple(origin), context)

    @classmethod
    def from_tokens(
        cls, model: TransformerBridge, documents: Any, *, name: str = "text"
    ) -> "Text":
        """Return documents given as token ids, each of them one piece that stays as it is.

        Args:
            model: Whose vocabulary they are of.
            documents: ``Prompts``, a tensor, or a list of lists, of token ids.
            name: What results call the text.
        """
        prompts = as_prompts(model, documents)
        return cls(name, prompts, tuple(range(len(prompts))), model.cfg.n_ctx)

    @torch.no_grad()
    def loss(self, model: TransformerBridge, *, batch_size: int = 16) -> xr.DataArray:
        """Return the model's loss of every token given those before it in its piece.

        Unit: nats. Axes ``prompt`` and ``position``; NaN at a piece's first token, which
        nothing predicts, and after its end. The coordinate ``document`` says where a piece
        comes from. ``batch_size`` pieces run at once, fewer where their logits are large.

        Raises:
            ValueError: The model sees both sides, so it does not predict the next token.
        """
        if not is_causal(model):
            raise ValueError(
                "loss per token is that of predicting the next one, but this model sees both "
                "sides of a token. Use a causal language model."
            )
        values = np.full(self.prompts.tokens.shape, np.nan)
        at_once = rows_at_once(model, self.prompts.tokens.shape[1], batch_size)
        for start in range(0, len(self), at_once):
            batch = self.prompts[start : start + at_once]
            logits = forward(model, batch.tokens, batch.mask)
            for row, length in enumerate(batch.lengths.tolist()):
                log_probs = logits[row, : length - 1].double().log_softmax(-1)
                following = batch.tokens[row, 1:length, None].to(log_probs.device)
                nats = -log_probs.gather(-1, following)[:, 0].cpu()
                values[start + row, 1:length] = nats.numpy()
        return xr.DataArray(
            values,
            dims=("prompt", "position"),
            coords={
                "prompt": np.arange(len(self)),
                "position": np.arange(values.shape[1]),
                "document": ("prompt", list(self.documents)),
            },
            name="loss",
            attrs={"units": "nats"},
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> "Text":
        """Return some of the pieces."""
        index = choose(chosen, len(self))
        documents = tuple(self.documents[i] for i in index)
        return Text(self.name, self.prompts[index], documents, self.context)

    def __repr__(self) -> str:
        tokens = int(self.prompts.lengths.sum())
        return (
            f"Text({self.name!r}: {len(set(self.documents))} documents in {len(self)} pieces, "
            f"{tokens} tokens, context {self.context})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Labelled:
    """Texts with a class label, for classifiers and probes.

    Attributes:
        name: What the data is called in results.
        prompts: The texts.
        labels: The right class of each, counted from 0.
        classes: The classes' names.
        metric: What methods measure unless they are told otherwise.
    """

    metric: ClassVar[str] = "loss"

    name: str
    prompts: Prompts
    labels: Int[Tensor, " prompt"]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.prompts):
            raise ValueError(
                f"there are {len(self.prompts)} texts but {len(self.labels)} labels. "
                "Pass one per text."
            )
        if bool(((self.labels < 0) | (self.labels >= len(self.classes))).any()):
            raise ValueError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())}, but "
                f"there are {len(self.classes)} classes, 0..{len(self.classes) - 1}."
            )

    @classmethod
    def from_strings(
        cls,
        model: TransformerBridge,
        texts: Sequence[str],
        labels: Sequence[int | str],
        *,
        classes: Sequence[str] | None = None,
        name: str = "labelled",
        prepend_bos: bool | None = None,
    ) -> "Labelled":
        """Return texts with labels.

        Args:
            model: Whose tokenizer reads them.
            texts: One string each.
            labels: Their classes, as numbers or names.
            classes: The names in the model's order; by default the sorted names among
                ``labels``, or the numbers up to the largest.
            name: What results call them.
            prepend_bos: Overrides the rule for the beginning of sequence.

        Raises:
            ValueError: A label is not one of the classes, or the numbers differ.
        """
        prompts = as_prompts(model, list(texts), prepend_bos=prepend_bos)
        if classes is None:
            names = sorted({label for label in labels if isinstance(label, str)})
            numbers = [label for label in labels if isinstance(label, int)]
            classes = names or [str(k) for k in range(max(numbers, default=-1) + 1)]
        for label in labels:
            if isinstance(label, str) and label not in classes:
                raise ValueError(unknown("class", label, classes))
        numbered = [
            classes.index(label) if isinstance(label, str) else label for label in labels
        ]
        return cls(name, prompts, torch.tensor(numbered, dtype=torch.long), tuple(classes))

    @classmethod
    def from_jsonl(
        cls,
        path: str | PathLike[str],
        model: TransformerBridge,
        *,
        classes: Sequence[str] | None = None,
    ) -> "Labelled":
        """Return the texts of a JSON-lines file whose lines have ``text`` and ``label``.

        Args:
            path: The file.
            model: As in :meth:`from_strings`.
            classes: As there.

        Raises:
            ValueError: A line is no such object, or as in :meth:`from_strings`.
        """
        path = Path(path)
        texts, labels = [], []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                texts.append(row["text"])
                labels.append(row["label"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no object with text and label: {error!r}."
                ) from error
        return cls.from_strings(model, texts, labels, classes=classes, name=path.stem)

    @staticmethod
    def in_jsonl(path: str | PathLike[str]) -> bool:
        """Return whether the file ``path`` begins with a line of ``text`` and ``label``."""
        with Path(path).open(encoding="utf-8") as file:
            first = next((line for line in file if line.strip()), "")
        try:
            return {"text", "label"} <= set(json.loads(first))
        except (ValueError, TypeError):
            return False

    def targets(self, reference: Float[Tensor, "prompt d_class"] | None = None) -> Targets:
        """Return what metrics compare class logits with: the right class is the answer.

        ``reference`` logits are for ``kl``.
        """
        return Targets(self.labels[:, None], reference=reference)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> "Labelled":
        """Return some of the texts."""
        index = choose(chosen, len(self))
        return Labelled(
            self.name, self.prompts[index], self.labels[torch.tensor(index)], self.classes
        )

    def __repr__(self) -> str:
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        said = ", ".join(f"{n} {label}" for n, label in zip(counts, self.classes, strict=True))
        return f"Labelled({self.name!r}: {len(self)} texts: {said})"


def _around(row: list[int], body: list[int]) -> tuple[list[int], list[int]]:
    """Return what the tokenizer (or the BOS rule) put before and after a text's own tokens."""
    extra = len(row) - len(body)
    start = next((i for i in range(extra + 1) if row[i : i + len(body)] == body), 0)
    return row[:start], row[start + len(body) :]
