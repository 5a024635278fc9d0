"""Few-shot curves: what examples in the prompt do to accuracy, and which part of them does it.

Beside true examples, the labels may be shuffled among them (is the relation learned?) or the
words be unrelated ones in the same format (or only the format?).

Source: the tasks and the format of Todd et al. 2023, arXiv:2310.15213; the controls of Min et
al. 2022, arXiv:2202.12837.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.heads.examples import CONDITIONS, check_enough, drawn_texts
from mechinterp.heads.few_shot_result import METRICS, FewShotResult
from mechinterp.models import fingerprint, forward, is_causal
from mechinterp.names import unknown
from mechinterp.record import convention_of
from mechinterp.tasks import Text
from mechinterp.tasks.pairs import (
    FORMAT,
    Answered,
    Pairs,
    as_pairs,
    check_format,
    load_pairs,
    tokenise_answered,
)
from mechinterp.tasks.prompts import pad
from mechinterp.tasks.run import rows_at_once


def few_shot(
    model: TransformerBridge,
    data: Any,
    *,
    shots: Sequence[int] = (0, 1, 2, 4, 8),
    conditions: Sequence[str] = CONDITIONS,
    n: int | None = 100,
    content: Any = None,
    template: str = FORMAT,
    seed: int = 0,
    batch_size: int = 8,
) -> FewShotResult:
    """Return how often, and how surely, the model answers after so many examples.

    Answers are read off by teacher forcing: ``exact`` is 1 where every token of the answer is
    the model's first choice given those before it, as in greedy decoding; ``first_token`` asks
    that of the answer's first token only; ``log_prob`` is the log-probability of the whole
    answer, in nats. Intervals are over queries.

    Args:
        model: A causal language model with a tokenizer.
        data: Pairs of words: ``mi.load_pairs(name)``, its name, or (input, output) tuples.
        shots: Numbers of examples.
        conditions: ``"true"``; ``"shuffled_labels"``, outputs in other places of the same
            prompt; ``"new_content"``, other words in the same format.
        n: How many queries, drawn under ``seed``; None for all. Examples are drawn per query
            from the other pairs, and more examples begin with those of fewer.
        content: The pairs whose inputs and outputs ``"new_content"`` shows, drawn apart from
            each other; a packaged list by default, and recorded.
        template: The format, with ``{input}`` and ``{output}``.
        seed: Of queries and examples.
        batch_size: Prompts run at once, fewer where their logits would be more than 100
            million numbers; their lengths may differ.

    Raises:
        TypeError: ``data`` is no pairs of words.
        ValueError: Too few pairs, an unknown condition, a template without places, no
            tokenizer, prompts longer than the context, or a model that is no causal language
            model: all before the model runs.

    Source: Min et al. 2022, arXiv:2202.12837; tasks and format: Todd et al. 2023,
    arXiv:2310.15213.
    """
    pairs = as_pairs(data, "few_shot")
    numbers, kinds = _checked(model, pairs, shots, conditions, n, template)
    other = _content(pairs, content)
    if "new_content" in kinds and len(other) < numbers[-1]:
        raise ValueError(
            f"content has {len(other)} pairs, but {numbers[-1]} examples are to be shown. "
            "Pass as many pairs."
        )
    rng = np.random.default_rng(seed)
    queries = np.sort(rng.permutation(len(pairs))[:n]).tolist()

    cells = [(kind, k) for kind in kinds for k in numbers if k or kind == kinds[0]]
    answered = [
        tokenise_answered(
            model,
            drawn_texts(queries, pairs, k, kind, content=other, template=template, seed=seed),
        )
        for kind, k in cells
    ]
    values = np.zeros((len(METRICS), len(kinds), len(numbers), len(queries)))
    for (kind, k), prompts in progress(
        zip(cells, answered, strict=True), len(cells), "few-shot prompts"
    ):
        # Without examples all conditions are the same prompt.
        rows = slice(None) if not k else kinds.index(kind)
        found = answer_scores(model, prompts, batch_size)
        values[:, rows, numbers.index(k)] = found[:, None] if not k else found
    return FewShotResult(
        xr.Dataset(
            {"value": (("metric", "condition", "shots", "prompt"), values)},
            coords={
                "metric": list(METRICS),
                "condition": kinds,
                "shots": ("shots", numbers, {"long_name": "examples"}),
                "prompt": queries,
                "input": ("prompt", [pairs[query][0] for query in queries]),
                "output": ("prompt", [pairs[query][1] for query in queries]),
            },
        ),
        convention_of(
            "few_shot",
            model,
            _all(pairs, answered),
            METRICS,
            fingerprint(model),
            {
                "template": template,
                "content": other.name if "new_content" in kinds else None,
                "scored": "teacher forcing; exact: every answer token is the first choice",
            },
            seed=seed,
        ),
    )


@torch.no_grad()
def answer_scores(
    model: TransformerBridge, answered: Answered, batch_size: int = 8
) -> np.ndarray:
    """Return ``exact``, ``first_token`` and ``log_prob`` of each prompt's answer."""
    found = np.zeros((len(METRICS), len(answered.begins)))
    lengths = answered.prompts.lengths.tolist()
    step = rows_at_once(model, answered.prompts.tokens.shape[1], batch_size)
    for start in range(0, len(lengths), step):
        batch = answered.prompts[start : start + step]
        logits = forward(model, batch.tokens, batch.mask)
        for row in range(len(batch)):
            prompt = start + row
            places = slice(answered.begins[prompt] - 1, lengths[prompt] - 1)
            answer = batch.tokens[row, places.start + 1 : places.stop + 1].to(logits.device)
            there = logits[row, places].double()
            right = there.argmax(-1) == answer
            log_probs = there.log_softmax(-1).gather(1, answer[:, None])
            found[:, prompt] = (bool(right.all()), bool(right[0]), float(log_probs.sum()))
    return found


def check_causal(model: TransformerBridge, method: str) -> None:
    """Raise a ``ValueError`` unless the model predicts the next token."""
    if not is_causal(model):
        raise ValueError(
            f"{method} reads what comes next, but this model sees both sides of a token. Use a "
            "causal language model."
        )


def _checked(
    model: TransformerBridge,
    pairs: Pairs,
    shots: Sequence[int],
    conditions: Sequence[str],
    n: int | None,
    template: str,
) -> tuple[list[int], list[str]]:
    """Return the numbers of examples in order, and the conditions."""
    check_causal(model, "few_shot")
    check_format(template)
    numbers, kinds = sorted(set(shots)), list(dict.fromkeys(conditions))
    for kind in kinds:
        if kind not in CONDITIONS:
            raise ValueError(unknown("condition", kind, CONDITIONS))
    if not numbers or numbers[0] < 0 or not kinds:
        raise ValueError(
            f"shots={tuple(shots)}, conditions={tuple(conditions)}: pass at least one number "
            "of examples, 0 or more, and one condition."
        )
    if n is not None and not n >= 1:
        raise ValueError(f"n={n} asks no query. Pass at least 1, or None for all.")
    check_enough(pairs, numbers[-1], needs_another="shuffled_labels" in kinds)
    return numbers, kinds


def _content(pairs: Pairs, content: Any) -> Pairs:
    if content is not None:
        return as_pairs(content, "content=")
    return load_pairs(
        "country-capital" if pairs.name == "singular-plural" else "singular-plural"
    )


def _all(pairs: Pairs, answered: Sequence[Answered]) -> Text:
    """Return every prompt that was run, as one text, for the record."""
    rows = [row for each in answered for row in each.prompts.rows]
    prompts = pad(rows, None, answered[0].prompts.bos)
    return Text(pairs.name, prompts, tuple(range(len(rows))), prompts.tokens.shape[1])
