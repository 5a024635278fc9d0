"""Tasks from frames: prompts with named slots, filled once clean and once corrupted.

``"When {io} left, {subject} spoke to"``: a slot's name is the role that its filling plays, so
roles need no searching and hold in both prompts, however many tokens the fillings have.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models import is_causal
from mechinterp.tasks.answers import Answer, why_not_one_token
from mechinterp.tasks.prompts import require_tokenizer
from mechinterp.tasks.task import Task

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Pair:
    """One frame with its two fillings, and the answers to the clean one."""

    frame: str
    clean: Mapping[str, str]
    corrupted: Mapping[str, str]
    answers: Answer
    distractors: Answer
    template: str


def packaged_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file that comes with the package."""
    text = files("mechinterp").joinpath("data", "tasks", f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def fill(frame: str, filling: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return the frame with its slots filled, and each filling's span in characters."""
    text, spans = "", {}
    for i, part in enumerate(_SLOT.split(frame)):
        if i % 2:
            spans[part] = (len(text), len(text) + len(filling[part]))
            part = filling[part]
        text += part
    return text, spans


def task_from_pairs(
    name: str,
    model: TransformerBridge,
    pairs: Iterable[Pair],
    n: int | None,
    seed: int,
    *,
    first_token: bool = False,
    dropped: Mapping[str, int] | None = None,
    **fields: Any,
) -> Task:
    """Return ``n`` of the pairs as a task, drawn under ``seed``; all of them by default.

    Pairs whose answer or distractor is not a single token are left out and counted in
    ``info["dropped"]``, unless ``first_token`` lets the first token stand for them. A masked
    language model gets its mask token at the end of each prompt, and answers there.

    Raises:
        ValueError: No pair is left, or fewer than ``n``.
    """
    ending = "" if is_causal(model) else f" {_mask_token(model)}."
    reasons = Counter(dropped or {})
    usable: list[Pair] = []
    example = ""
    for pair in pairs:
        wrong = None if first_token else _why_unusable(model, pair)
        if wrong is None:
            usable.append(pair)
        else:
            reasons["an answer is not a single token"] += 1
            example = example or f", for instance {wrong}"
    if not usable:
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        advice = " Pass first_token=True to compare first tokens." if example else ""
        raise ValueError(
            f"no prompt of {name!r} suits this tokenizer ({why}{example}).{advice}"
        )
    clean = [fill(pair.frame + ending, pair.clean) for pair in usable]
    corrupted = [fill(pair.frame + ending, pair.corrupted) for pair in usable]
    task = Task.from_strings(
        model,
        clean=[text for text, _ in clean],
        corrupted=[text for text, _ in corrupted],
        answers=[pair.answers for pair in usable],
        distractors=[pair.distractors for pair in usable],
        roles=_columns([spans for _, spans in clean]),
        corrupted_roles=_columns([spans for _, spans in corrupted]),
        templates=tuple(pair.template for pair in usable),
        first_token=first_token,
        name=name,
        info={"dropped": dict(reasons)},
        **fields,
    )
    return draw(task, n, seed)


def draw(task: Task, n: int | None, seed: int) -> Task:
    """Return ``n`` prompts of a task, the same ones for the same seed; all when ``n`` is None.

    Raises:
        ValueError: The task has fewer, or ``n`` is not positive.
    """
    if n is None or n == len(task):
        return task
    if not 0 < n < len(task):
        raise ValueError(
            f"n={n} prompts of {task.name!r} were asked for, but {len(task)} suit this model. "
            f"Pass 1..{len(task)}, or leave n out."
        )
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(seed))
    return task[sorted(order[:n].tolist())]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {role: [row[role] for row in rows] for role in rows[0]}


def _why_unusable(model: TransformerBridge, pair: Pair) -> str | None:
    """Return what is wrong with the first answer or distractor that is not one token."""
    prompt = fill(pair.frame, pair.clean)[0]
    for given in (pair.answers, pair.distractors):
        for answer in [given] if isinstance(given, str | int) else given:
            if isinstance(answer, str) and (wrong := why_not_one_token(model, answer, prompt)):
                return wrong
    return None


def _mask_token(model: TransformerBridge) -> str:
    mask_token = require_tokenizer(model).mask_token
    if mask_token is None:
        raise ValueError(
            "this model sees both sides of a token and its tokenizer has no mask token, so "
            "there is nowhere to ask for a word. Use a causal or a masked language model."
        )
    return mask_token
