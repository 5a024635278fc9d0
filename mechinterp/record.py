"""What results record about how they were made, and on which data."""

import hashlib
from collections.abc import Mapping
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from mechinterp.edits import Apply, Edit
from mechinterp.metrics import METRICS, UNITS, Metric
from mechinterp.models import processed_weights
from mechinterp.results import Convention
from mechinterp.tasks import Labelled, Task, Text
from mechinterp.tasks.positions import Roles, as_label
from mechinterp.tasks.prompts import as_prompts

Data = Task | Text | Labelled


def convention_of(
    method: str,
    model: TransformerBridge,
    data: Data,
    metrics: Mapping[str, Metric | str],
    fingerprint: str,
    settings: Mapping[str, Any],
    **fields: Any,
) -> Convention:
    """Return the convention of a result; ``fields`` are those that the method has a use for.

    ``metrics`` gives each number's unit, or the metric that has one.
    """
    positions = fields.pop("positions", None)
    prompts = data.clean if isinstance(data, Task) else data.prompts
    corruption = [described(edit) for edit in data.corruption] if isinstance(data, Task) else []
    return Convention(
        method=method,
        model=str(model.cfg.model_name),
        fingerprint=fingerprint,
        processed_weights=processed_weights(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        data=data.name,
        bos=prompts.bos,
        metrics={
            name: fn if isinstance(fn, str) else unit_of(fn) for name, fn in metrics.items()
        },
        positions=_positions(positions),
        settings={
            **({"corruption": corruption} if isinstance(data, Task) else {}),
            "data_sha256": digest(data),
            **settings,
        },
        **fields,
    )


def digest(data: Data) -> str:
    """Return the sha256 of prompts, answers, roles and corruption: what a result is about."""
    found = hashlib.sha256()
    if isinstance(data, Task):
        runs, numbers = (data.clean, data.corrupted), (data.answers, data.distractors)
        places = (data.answer_positions, data.corrupted_answer_positions)
        said = [*map(str, places), *(str(described(edit)) for edit in data.corruption)]
        said += [_spans(data.roles), _spans(data.corrupted_roles or {})]
        order = list(dict.fromkeys(data.cases))
        said.append(str([order.index(case) for case in data.cases]))
    else:
        runs = (data.prompts,)
        numbers = (data.labels,) if isinstance(data, Labelled) else ()
        said = []
    for prompts in runs:
        if prompts is not None:
            for tensor in (prompts.tokens, prompts.mask):
                found.update(str(tuple(tensor.shape)).encode())
                found.update(tensor.cpu().contiguous().numpy().tobytes())
    for tokens in numbers:
        found.update(b"" if tokens is None else tokens.cpu().contiguous().numpy().tobytes())
    for text in said:
        found.update(text.encode())
    return found.hexdigest()


def source_of(model: TransformerBridge, reference: Any) -> dict[str, str]:
    """Return what a record says of the data that means and resamples come from.

    Its name and what identifies its content; raw prompts are told by their tokens.
    """
    if isinstance(reference, Data):
        return {"name": reference.name, "sha256": digest(reference)}
    prompts = as_prompts(model, reference)
    whole = Text("prompts", prompts, tuple(range(len(prompts))), prompts.tokens.shape[1])
    return {"name": "prompts", "sha256": digest(whole)}


def _positions(positions: Any) -> Any:
    """Return positions as JSON: slices as ``"2:6"``, by themselves or in a list."""
    if isinstance(positions, list | tuple):
        return [as_label(part) for part in positions]
    return as_label(positions) if isinstance(positions, slice) else positions


def _spans(roles: Roles) -> str:
    """Return where every role lies, one text for the same places in any order."""
    return str(
        sorted((name, [tuple(map(int, at)) for at in each]) for name, each in roles.items())
    )


def unit_of(fn: Metric) -> str:
    """Return a metric's unit, empty for a user's own."""
    return next((UNITS[name] for name, known in METRICS.items() if known is fn), "")


def described(edit: Edit) -> dict[str, Any]:
    """Return an edit as JSON values; of a function only its name, since it cannot be stored."""
    if isinstance(edit, Apply):
        return {"kind": edit.kind, "site": edit.site, "name": edit.name}
    return edit.to_dict()
