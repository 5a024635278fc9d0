"""The parts of a task put together: roles of both runs, answer positions, sets of answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models import is_causal, tokenizer_of
from mechinterp.tasks.answers import Answer, pad_sets, token_sets
from mechinterp.tasks.positions import RESERVED, Roles, position_lists
from mechinterp.tasks.prompts import Prompts, token_strings
from mechinterp.tasks.roles import Spans, places_of

Sides = Mapping[str, Prompts]
_PER_PROMPT = (
    *("clean", "corrupted", "answers", "distractors", "templates", "cases"),
    *("roles", "corrupted_roles", "answer_positions", "corrupted_answer_positions"),
)
AnswerAt = str | int | Sequence[str | int] | None


def assemble(
    model: TransformerBridge,
    sides: Sides,
    spans: Mapping[str, Roles | None],
    answers: Sequence[Answer],
    distractors: Sequence[Answer] | None,
    first_token: bool,
    answer_at: AnswerAt,
) -> dict[str, Any]:
    """Return a task's fields from its prompts (``clean``, perhaps ``corrupted``) and the rest.

    Raises:
        ValueError: A role is missing on one side, or an answer is not a single token.
    """
    clean, corrupted = sides["clean"], sides.get("corrupted")
    roles = with_end(spans["clean"] or {}, clean)
    fields: dict[str, Any] = {
        **sides,
        "roles": roles,
        "answer_positions": _answered(model, clean, roles, answer_at),
    }
    if corrupted is not None:
        theirs = both_sides(roles, spans["corrupted"], clean, corrupted)
        fields["corrupted_roles"] = theirs
        fields["corrupted_answer_positions"] = _answered(model, corrupted, theirs, answer_at)
    before = clean.text or (None,) * len(clean)
    for name, given in {"answers": answers, "distractors": distractors}.items():
        if given is not None:
            kind = name.removesuffix("s")
            sets = token_sets(model, given, before, kind=kind, first_token=first_token)
            fields[name] = pad_sets(sets)
    return fields | {"words": _words(model, fields)}


def token_spans(roles: Mapping[str, Any] | None, n: int) -> dict[str, Spans] | None:
    """Return token spans per prompt, repeating a span that serves all ``n`` prompts."""
    if roles is None:
        return None
    spans = {role: places_of(role, at, n) for role, at in roles.items()}
    return {role: tuple((int(a), int(b)) for a, b in each) for role, each in spans.items()}


def with_end(roles: Roles, prompts: Prompts) -> dict[str, Spans]:
    """Return the roles with ``"end"``, the last token of each prompt.

    Raises:
        ValueError: A role has a reserved name or the wrong number of spans, or a span is not
            within its prompt.
    """
    lengths = prompts.lengths.tolist()
    end = tuple((n - 1, n) for n in lengths)
    if roles.get("end", end) != end:
        raise ValueError("role 'end' is always the last token. Give yours another name.")
    if reserved := sorted(set(roles) & set(RESERVED)):
        raise ValueError(
            f"{reserved[0]!r} cannot be a role: it already means positions. "
            "Choose another name."
        )
    for role, spans in roles.items():
        if len(spans) != len(lengths):
            raise ValueError(
                f"role {role!r} has {len(spans)} spans for {len(lengths)} prompts. "
                "Pass one (start, end) per prompt."
            )
        for i, ((start, stop), n) in enumerate(zip(spans, lengths, strict=True)):
            if not 0 <= start < stop <= n:
                raise ValueError(
                    f"role {role!r} spans tokens {start}..{stop} of prompt {i}, which has {n}. "
                    "Pass (start, end) with 0 <= start < end, end exclusive."
                )
    return {**{role: tuple(spans) for role, spans in roles.items()}, "end": end}


def both_sides(
    roles: Roles, theirs: Roles | None, clean: Prompts, corrupted: Prompts
) -> dict[str, Spans]:
    """Return the corrupted prompts' roles: ``theirs``, or the clean ones carried over.

    Raises:
        ValueError: The numbers of prompts differ; some role is on one side only; or roles
            cannot be carried over because a pair of prompts differs in length.
    """
    if len(clean) != len(corrupted):
        raise ValueError(
            f"there are {len(clean)} clean but {len(corrupted)} corrupted prompts. "
            "Pass one corrupted prompt per clean one."
        )
    if theirs:
        completed = with_end(theirs, corrupted)
        if odd := sorted(set(completed) ^ set(roles)):
            raise ValueError(
                f"role {odd[0]!r} is given for one of clean and corrupted prompts only. "
                "Pass the same names in roles= and corrupted_roles=."
            )
        return completed
    named = {role: spans for role, spans in roles.items() if role != "end"}
    for i, (a, b) in enumerate(
        zip(clean.lengths.tolist(), corrupted.lengths.tolist(), strict=True)
    ):
        if named and a != b:
            raise ValueError(
                f"clean prompt {i} has {a} tokens but its corrupted one has {b}, so the roles "
                f"{sorted(named)} cannot be carried over. Pass corrupted_roles= as well."
            )
    return with_end(named, corrupted)


def collisions(
    answers: Int[Tensor, "prompt n_answer"],
    distractors: Int[Tensor, "prompt n_distractor"] | None,
) -> list[int]:
    """Return the prompts that have some token both as answer and as distractor."""
    if distractors is None:
        return []
    same = (answers[:, :, None] == distractors[:, None, :]) & (answers >= 0)[:, :, None]
    return same.any(-1).any(-1).nonzero().flatten().tolist()


def take(fields: Mapping[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """Return those fields of a task that go by prompt, for some of its prompts."""
    return {name: _part(fields[name], index) for name in _PER_PROMPT if name in fields}


def _part(value: Any, index: Sequence[int]) -> Any:
    if isinstance(value, Prompts):
        return value[index]
    if isinstance(value, Tensor):
        chosen = value[torch.tensor(index)]
        return chosen[:, (chosen >= 0).any(0)]
    if isinstance(value, Mapping):
        return {role: _part(spans, index) for role, spans in value.items()}
    return tuple(value[i] for i in index) if value else value


def _answered(
    model: TransformerBridge, prompts: Prompts, roles: Roles, answer_at: AnswerAt
) -> tuple[int, ...]:
    """Return where each prompt is answered: as told, else at the mask token or the end."""
    mask_id = None if is_causal(model) else getattr(tokenizer_of(model), "mask_token_id", None)
    if answer_at is None and mask_id is not None:
        return tuple(_only_mask(row, mask_id, i) for i, row in enumerate(prompts.rows))
    lengths = prompts.lengths.tolist()
    at = -1 if answer_at is None else answer_at
    if isinstance(at, str | int):
        return tuple(chosen[-1] for chosen in position_lists(at, lengths, roles))
    if len(at) != len(prompts):
        raise ValueError(
            f"answer_at has {len(at)} positions for {len(prompts)} prompts. Pass one per "
            "prompt, or a single one that serves them all."
        )
    return tuple(
        position_lists(each, [n], {role: spans[i : i + 1] for role, spans in roles.items()})[0][
            -1
        ]
        for i, (each, n) in enumerate(zip(at, lengths, strict=True))
    )


def _only_mask(row: list[int], mask_id: int, prompt: int) -> int:
    if row.count(mask_id) == 1:
        return row.index(mask_id)
    raise ValueError(
        f"prompt {prompt} has {row.count(mask_id)} mask tokens. A masked language model "
        "answers at the one mask token of each prompt. Put one in, or pass answer_at=."
    )


def _words(model: TransformerBridge, fields: Mapping[str, Any]) -> dict[int, str]:
    """Return every token id in use as text."""
    ids: set[int] = set()
    for value in fields.values():
        if isinstance(value, Prompts):
            ids.update(*value.rows)
        elif isinstance(value, Tensor):
            ids.update(value[value >= 0].tolist())
    listed = sorted(ids)
    return dict(zip(listed, token_strings(model, listed), strict=True))
