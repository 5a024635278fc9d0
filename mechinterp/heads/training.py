"""Over training: induction, in-context learning and loss, checkpoint by checkpoint.

Source: Olsson et al. 2022, arXiv:2209.11895: the three change together, in a phase change.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.heads.icl import check_tokens, icl_score, opening, pieces
from mechinterp.heads.icl_result import IclResult
from mechinterp.heads.training_result import TrainingCurve
from mechinterp.heads.watching import watched
from mechinterp.models import fingerprint, load_model
from mechinterp.record import convention_of
from mechinterp.sites import n_heads, site_layers
from mechinterp.tasks import Text, as_data, repeated_tokens

_LENGTH, _COPIES = 25, 4


def training_curve(
    models: Mapping[int, Any] | str | Path,
    data: Any,
    *,
    late: int = 500,
    early: int = 50,
    start: int | None = None,
    n_draws: int = 16,
    seed: int = 0,
    batch_size: int = 16,
) -> TrainingCurve:
    """Return induction score, in-context score and loss of every checkpoint of a training run.

    The induction score is prefix matching (Olsson et al. 2022): on 25 random tokens repeated 4
    times behind a start token, the attention from copies 2 to 4 to the tokens that followed
    all earlier occurrences of the current one; 1 is ideal. In-context score and loss (nats)
    are measured on ``data``, on the same pieces for every checkpoint, as in ``mi.icl_score``.

    Args:
        models: Checkpoints by training step: models, or what ``mi.load_model`` opens, loaded
            one at a time; or a folder with one folder ``step-<number>`` for each.
        data: A ``Text``, tokenised as for all of the checkpoints.
        late: Which token is late.
        early: Which is early.
        start: As in ``mi.icl_score``.
        n_draws: How many sequences of random tokens.
        seed: Of these.
        batch_size: Pieces run at once.

    Raises:
        TypeError: ``data`` is no ``Text``.
        ValueError: There are no checkpoints or no draws, the checkpoints differ in shape or
            vocabulary, the vocabulary is too small for distinct random tokens, or the text too
            short (see ``mi.icl_score``): before the first forward pass, or that of the
            checkpoint that differs.
        FileNotFoundError: The folder does not exist.

    Source: Olsson et al. 2022, arXiv:2209.11895.
    """
    text = as_data(data, (Text,), "training_curve")
    check_tokens(late, early)
    for name, value in (("n_draws", n_draws), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    found = _by_step(models)
    asked: dict[str, Any] = {
        "late": late,
        "early": early,
        "start": start,
        "batch_size": batch_size,
    }
    scores: list[IclResult] = []
    induction: list[np.ndarray] = []
    prints: dict[str, str] = {}
    shape: tuple[int, ...] = ()
    model: Any = None  # the last one, after the loop
    for step, source in progress(found.items(), len(found), "checkpoints"):
        model = load_model(source)
        shape = shape or _shape(model)
        if _shape(model) != shape:
            raise ValueError(
                f"the checkpoint of step {step} has other layers, heads or tokens than the "
                "first. Pass checkpoints of one training run."
            )
        if int(text.prompts.tokens.max()) >= model.cfg.d_vocab:
            raise ValueError(
                f"the text has tokens that this vocabulary of {model.cfg.d_vocab} has not. "
                "Pass a text tokenised for these checkpoints."
            )
        pieces(model, text, late=late, early=early, start=start)
        induction.append(prefix_matching(model, _start(model, text, start), n_draws, seed))
        scores.append(icl_score(model, text, **asked))
        prints[str(step)] = fingerprint(model)
    values = np.stack(induction)
    loss = np.stack([each.data["loss"].mean("token").values for each in scores])
    icl = np.stack([each.effect.sel(token=late).values for each in scores])
    last = scores[-1]
    return TrainingCurve(
        xr.Dataset(
            {
                "induction": (("step", "layer", "head"), values),
                "icl": (("step", "prompt"), icl),
                "loss": (("step", "prompt"), loss),
            },
            coords={
                "step": ("step", list(found), {"long_name": "training step"}),
                "layer": site_layers(model, "pattern"),
                "head": np.arange(values.shape[-1]),
                "prompt": last.data["prompt"].values,
                "template": ("prompt", last.data["template"].values),
            },
        ),
        convention_of(
            "training_curve",
            model,
            text,
            {"induction": "attention", "icl": "nats", "loss": "nats"},
            prints[str(list(found)[-1])],
            {
                **{name: last.convention.settings[name] for name in ("late", "early", "start")},
                "random_tokens": f"{_LENGTH}, {_COPIES} times",
                "n_draws": n_draws,
                "checkpoints": prints,
            },
            seed=seed,
        ),
    )


def prefix_matching(
    model: TransformerBridge, start: list[int], n: int, seed: int
) -> Float[np.ndarray, "layer head"]:
    """Return each head's prefix-matching score by the protocol of Olsson et al. 2022."""
    prompts = repeated_tokens(
        model, n, _LENGTH, copies=_COPIES, distinct=True, start=start, seed=seed
    )
    return watched(model, prompts, ["induction"])["induction"].mean(0)


def _shape(model: TransformerBridge) -> tuple[int, ...]:
    """Return the size of the vocabulary and the number of heads of every layer."""
    layers = site_layers(model, "pattern")
    return model.cfg.d_vocab, *(n_heads(model, "z", layer) for layer in layers)


def _start(model: TransformerBridge, text: Text, start: int | None) -> list[int]:
    """Return the tokens that stand before a text, as in the data."""
    return text.prompts.rows[0][: opening(model, text) if start is None else start]


def _by_step(models: Mapping[int, Any] | str | Path) -> dict[int, Any]:
    """Return the checkpoints in the order of their steps."""
    if isinstance(models, Mapping):
        found = dict(models)
    else:
        folder = Path(models).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} with checkpoints.")
        found = dict(_numbered(folder))
    if not found:
        raise ValueError(
            "there are no checkpoints. Pass {step: model or path}, or a folder with one folder "
            "step-<number> for each."
        )
    return dict(sorted(found.items()))


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if path.is_dir() and number.isdecimal():
            yield int(number), path
