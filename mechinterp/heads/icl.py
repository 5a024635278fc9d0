"""The in-context-learning score: how much better late tokens are predicted than early ones.

Source: Olsson et al. 2022, arXiv:2209.11895 (loss of the 500th token minus loss of the 50th).
"""

from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.heads.icl_result import IclResult
from mechinterp.models import fingerprint, is_causal, tokenizer_of
from mechinterp.record import convention_of
from mechinterp.tasks import Text, as_data


def icl_score(
    model: TransformerBridge,
    data: Any,
    *,
    late: int = 500,
    early: int = 50,
    start: int | None = None,
    batch_size: int = 16,
) -> IclResult:
    """Return the loss at the ``late``-th token minus that at the ``early``-th, and the curve.

    Unit: nats. Negative when the model predicts better the more text it has seen, 0 when
    context does not help. Tokens are counted from 1 within each piece of the text, without
    what stands before it: with a BOS the 500th token is the one at position 500, without one
    at position 499. Both losses come from the same pieces, those with at least ``late``
    tokens; the curve goes as far as all of these do.

    Args:
        model: A causal language model.
        data: A ``Text``, in pieces long enough: ``mi.Text.from_strings(model, documents,
            context=512)`` for the defaults.
        late: Which token is late; any two that differ.
        early: Which is early.
        start: How many tokens at the beginning of each piece are no text. By default the
            special tokens that all pieces begin with or, for a model without tokenizer, the
            token that all of several pieces begin with.
        batch_size: Pieces run at once.

    Raises:
        TypeError: ``data`` is not a ``Text``.
        ValueError: No piece is long enough (it says how long one must be and how many
            qualify), ``early`` is not before ``late``, nothing predicts the early token, or
            the model is no causal language model.

    Source: Olsson et al. 2022, arXiv:2209.11895.
    """
    text = as_data(data, (Text,), "icl_score")
    chosen, skipped = pieces(model, text, late=late, early=early, start=start)
    loss = chosen.loss(model, batch_size=batch_size).values[:, skipped:]
    common = int(chosen.prompts.lengths.min()) - skipped
    documents = [f"document {number}" for number in chosen.documents]
    labelled = xr.Dataset(
        {"loss": (("prompt", "token"), loss[:, :common], {"units": "nats"})},
        coords={
            "prompt": np.arange(len(chosen)),
            "token": ("token", np.arange(1, common + 1), {"long_name": "token in context"}),
            "template": ("prompt", documents),
        },
    )
    settings = {
        "late": late,
        "early": early,
        "start": skipped,
        "counted": "tokens of the text from 1, without those at the start",
        "pieces": f"{len(chosen)} of {len(text)} have at least {late} tokens of text",
    }
    return IclResult(
        labelled,
        convention_of(
            "icl_score", model, chosen, {"loss": "nats"}, fingerprint(model), settings
        ),
    )


def pieces(
    model: TransformerBridge, text: Text, *, late: int, early: int, start: int | None
) -> tuple[Text, int]:
    """Return the pieces that are scored, and how many tokens at their beginning are no text.

    Raises:
        ValueError: As ``icl_score``, before any forward pass.
    """
    check_tokens(late, early)
    if not is_causal(model):
        raise ValueError(
            "loss per token is that of predicting the next one, but this model sees both "
            "sides of a token. Use a causal language model."
        )
    skipped = opening(model, text) if start is None else start
    if skipped < 0 or early + skipped < 2:
        raise ValueError(
            "nothing comes before the first token, so it has no loss. Pass early=2 or more, "
            "or a text with a BOS (start= says how many tokens at the beginning are no text)."
        )
    return _long_enough(model, text, late, skipped), skipped


def check_tokens(late: int, early: int) -> None:
    """Raise a ``ValueError`` unless the early token comes before the late one."""
    if not 1 <= early < late:
        raise ValueError(f"early={early} must be at least 1 and before late={late}.")


def opening(model: TransformerBridge, text: Text) -> int:
    """Return with how many tokens that are no text every piece begins.

    These are special tokens; for a model without tokenizer, one that all pieces begin with.
    """
    tokenizer, rows = tokenizer_of(model), text.prompts.rows
    if tokenizer is None:
        return int(len(rows) > 1 and len({row[0] for row in rows}) == 1)
    special = set(tokenizer.all_special_ids)
    count = 0
    while all(len(row) > count and row[count] in special for row in rows):
        count += 1
    return count


def _long_enough(model: TransformerBridge, text: Text, late: int, skipped: int) -> Text:
    lengths = (text.prompts.lengths - skipped).tolist()
    kept = [piece for piece, length in enumerate(lengths) if length >= late]
    if kept:
        return text[kept]
    needed, room = late + skipped, model.cfg.n_ctx
    fits = (
        f"Cut longer documents with mi.Text.from_strings(model, documents, context={needed})"
        if needed <= room
        else f"This model's context holds {room}"
    )
    raise ValueError(
        f"0 of {len(text)} pieces have the {late} tokens that late={late} needs ({needed} with "
        f"what stands at the start); the longest has {max(lengths)}. {fits}, or pass a smaller "
        "late=."
    )
