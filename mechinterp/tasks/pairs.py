"""Pairs of words that stand in some relation, and prompts that show it by example.

``Q: France`` / ``A: Paris``, a few times over, then a question without its answer: what the
relation is can only be told from the examples. A prompt's answer is kept with it, tokenised as
its continuation.

Source: the pairs and the format of Todd et al. 2023, arXiv:2310.15213.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from mechinterp.names import unknown
from mechinterp.tasks.prompts import Prompts, encode, pad

FORMAT = "Q: {input}\nA: {output}\n\n"
Words = tuple[str, str]


@dataclass(frozen=True)
class Pairs(Sequence[Words]):
    """Inputs and outputs that stand in one relation, such as countries and their capitals.

    Raises:
        ValueError: There are none, or an input or output is empty.
    """

    name: str
    words: tuple[Words, ...]

    def __post_init__(self) -> None:
        if not self.words:
            raise ValueError(f"{self.name!r} has no pairs. Pass (input, output) tuples.")
        for number, (question, answer) in enumerate(self.words):
            if not (question.strip() and answer.strip()):
                raise ValueError(
                    f"pair {number} of {self.name!r} has an empty side. "
                    "Fill it, or leave the pair out."
                )

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[Words]:
        return iter(self.words)

    def __getitem__(self, chosen: Any) -> Any:
        """Return one pair, or for a slice or a list of indices some of them as ``Pairs``."""
        if isinstance(chosen, int):
            return self.words[chosen]
        index = range(len(self))[chosen] if isinstance(chosen, slice) else chosen
        return Pairs(self.name, tuple(self.words[i] for i in index))

    def __repr__(self) -> str:
        question, answer = self.words[0]
        return f"Pairs({self.name!r}: {len(self)}, such as {question!r} -> {answer!r})"


def load_pairs(name: str) -> Pairs:
    """Return a packaged list of pairs; ``mi.pair_names()`` says which there are.

    Args:
        name: One of them, ``"country-capital"`` for instance.

    Raises:
        ValueError: There is no such list.
    """
    if name not in (known := pair_names()):
        raise ValueError(unknown("list of pairs", name, known))
    rows = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    return Pairs(name, tuple((str(row["input"]), str(row["output"])) for row in rows))


def pair_names() -> list[str]:
    """Return the names of the packaged lists of pairs."""
    names = [file.name for file in _folder().iterdir()]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def as_pairs(data: Any, method: str) -> Pairs:
    """Return ``data`` as pairs: ``Pairs``, the name of a packaged list, or (input, output)s.

    Raises:
        TypeError: It is nothing of these.
        ValueError: The name is unknown, or a side is empty.
    """
    if isinstance(data, Pairs):
        return data
    if isinstance(data, str):
        return load_pairs(data)
    if isinstance(data, Sequence) and all(
        isinstance(row, Sequence) and len(row) == 2 and all(isinstance(w, str) for w in row)
        for row in data
    ):
        return Pairs("pairs", tuple((str(row[0]), str(row[1])) for row in data))
    raise TypeError(
        f"{method} takes pairs of words as data, not a {type(data).__name__}. Pass "
        "mi.load_pairs('country-capital'), or a list of (input, output) tuples."
    )


def check_format(template: str) -> None:
    """Raise a ``ValueError`` unless a template has a place for input and output, in order."""
    if not 0 <= template.find("{input}") < template.find("{output}"):
        raise ValueError(
            f"template {template!r} must have {{input}} and, after it, {{output}}, as in "
            f"{FORMAT!r}."
        )


def few_shot_text(
    examples: Sequence[Words], query: Words, template: str = FORMAT
) -> tuple[str, str]:
    """Return a prompt that ends where the query's answer is due, and that answer.

    Spaces before the output belong to the answer.
    """
    shown = "".join(_filled(template, *example) for example in examples)
    opened = template[: template.index("{output}")]
    asked = opened.rstrip(" ")
    answer = opened[len(asked) :] + query[1]
    return shown + asked.replace("{input}", query[0]), answer


@dataclass(frozen=True, eq=False)
class Answered:
    """Prompts with their answers behind them, and where each answer begins."""

    prompts: Prompts
    begins: tuple[int, ...]

    @property
    def asked(self) -> Prompts:
        """The prompts without their answers."""
        rows = zip(self.prompts.rows, self.begins, strict=True)
        return pad([row[:at] for row, at in rows], None, self.prompts.bos)

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of each answer."""
        rows = zip(self.prompts.rows, self.begins, strict=True)
        return [row[at:] for row, at in rows]


def tokenise_answered(model: TransformerBridge, texts: Sequence[tuple[str, str]]) -> Answered:
    """Return prompts and answers as tokens, each answer tokenised as its continuation.

    Raises:
        ValueError: The model has no tokenizer, a prompt does not fit its context, or the
            tokenizer joins the end of a prompt with the beginning of its answer.
    """
    asked, _, bos = encode(model, [prompt for prompt, _ in texts])
    whole, _, _ = encode(model, [prompt + answer for prompt, answer in texts])
    rows, begins = [], []
    for (prompt, answer), before, row in zip(texts, asked, whole, strict=True):
        at = next(
            (i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b), None
        )
        at = min(len(before), len(row)) if at is None else at
        closing = before[at:]  # what a tokenizer puts after every text, such as [SEP]
        end = len(row) - len(closing)
        if row[end:] != closing or end <= at:
            raise ValueError(
                f"the tokenizer joins the end of the prompt {prompt[-20:]!r} with its answer "
                f"{answer!r}. Use a template in which a space or a line break is between."
            )
        rows.append(row[:end])
        begins.append(at)
    longest = max(map(len, rows))
    if longest > model.cfg.n_ctx:
        raise ValueError(
            f"the longest prompt has {longest} tokens with its answer, but this model's "
            f"context holds {model.cfg.n_ctx}. Show fewer examples."
        )
    return Answered(pad(rows, None, bos), tuple(begins))


def _filled(template: str, question: str, answer: str) -> str:
    return template.replace("{input}", question).replace("{output}", answer)


def _folder() -> Any:
    return files("mechinterp") / "data" / "function_vectors"
