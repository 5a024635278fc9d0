"""The logit lens: what the model would predict if it stopped at a layer.

Every state is read out by the model's own closing (`mechinterp.engine.closing`): the real
final norm, whose scale is the state's own, the unembedding and the output transform. The last
``resid_post`` therefore gives the model's own logits, which every run checks.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import bar
from mechinterp.engine.closing import Closing, tolerated
from mechinterp.lens.asked import Asked, Tokens, asked_of
from mechinterp.lens.lens_result import LensResult, labelled
from mechinterp.lens.readout import Final, Reading, read
from mechinterp.lens.states import Batch, Unit, batches, budget_of, read_keys, units_of
from mechinterp.lens.tuned import TunedLens
from mechinterp.models import fingerprint
from mechinterp.record import convention_of
from mechinterp.tasks import PositionSpec, Task, Text, as_data, as_prompts


def logit_lens(
    model: TransformerBridge,
    data: Any,
    *,
    site: str = "resid_post",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    positions: PositionSpec | None = None,
    targets: Tokens | None = None,
    lens: TunedLens | None = None,
    memory: int | float | str | None = None,
) -> LensResult:
    """Read out what passes a site at every layer and position, as if it were the end.

    Args:
        model: Left as it was. Edits in force on it apply.
        data: A ``Task`` (its clean prompts are read) or a ``Text``.
        site: ``resid_pre``, ``resid_mid``, ``resid_post``; ``attn_out`` and ``mlp_out``, what
            a layer adds; ``result``, what each head adds; ``mlp_post``, what single neurons
            add (activation times output row). What is added is read alone, as if it were the
            whole stream. Behind a post-norm (Gemma), heads and neurons count with their share
            of what it gave.
        layers: Layers to read; all that have the site by default.
        heads: Heads to read on ``result``; all by default.
        neurons: Which neurons to read on ``mlp_post``, in each of the layers.
        positions: Where to read. By default a task where it is answered, a text at each
            position. Of a role of several tokens the last is read.
        targets: Tokens to follow, strings or ids. By default a task's answers and distractors,
            and in a text the true next token.
        lens: A tuned lens, which translates ``resid_pre`` or ``resid_post`` first.
        memory: Bytes, or a size such as ``"2GB"``, to take beside the model; 60 % of what is
            free by default, 4 GB at most. Logits are made for some rows and tokens at a time.

    Returns:
        Per ``prompt``, ``layer`` and ``position``: the top token and its probability;
        ``entropy``, ``kl`` (of the model's own distribution from this one) and ``surprisal`` of
        a text's true next token, in nats; per ``target`` its ``logit``, ``prob`` and ``rank``
        (0 is the top).

    Raises:
        TypeError: ``data`` is neither a task nor a text.
        ValueError: The model has no unembedding; a site, layer, head, neuron, role or position
            does not exist; a target is not one token; the tuned lens was fitted on another
            model or has no such site; the memory is too small for one prompt. All before the
            model runs.
        RuntimeError: The last residual stream, read out, is not what the model says.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    as_data(data, accepts=(Task, Text), method="logit_lens")
    prompts = as_prompts(model, data)
    closing = Closing(model, "logit_lens")
    units = units_of(model, site, layers, heads, neurons)
    asked = asked_of(model, data, prompts, positions, targets)
    budget = budget_of(model, memory)
    if lens is not None:
        lens.check(model, site)
    found = _Numbers(asked, units)
    keys = read_keys(site, [layer for layer, _ in _by_layer(units)])
    with bar(len(prompts), f"reading {site}") as advance:
        done = 0
        for batch in batches(model, prompts, asked.index, keys, budget // 2):
            sets = asked.sets[batch.prompt, batch.step]
            final = Final.of(batch.logits)
            check_closing(closing, batch)
            for layer, some in _by_layer(units):
                for unit, states in zip(
                    some, batch.states(model, site, layer, some), strict=True
                ):
                    if lens is not None:
                        states = lens.translate(states, site, layer)
                    found.put(unit, batch, read(closing, states, final, sets, budget // 2))
            advance(int(batch.prompt.max()) + 1 - done)
            done = int(batch.prompt.max()) + 1
    settings = {
        "kl": "KL(final || lens)",
        "targets": asked.targets,
        "lens": "logit" if lens is None else lens.name,
        "read_alone": site not in ("resid_pre", "resid_mid", "resid_post"),
    }
    data_set, metrics = labelled(model, data, asked, units, site, found.arrays)
    return LensResult(
        data_set,
        convention_of(
            "logit_lens",
            model,
            data,
            metrics,
            fingerprint(model),
            settings,
            site=site,
            positions="answer" if positions is None and isinstance(data, Task) else positions,
        ),
    )


def check_closing(closing: Closing, batch: Batch) -> None:
    """Raise unless the last residual stream, read out, gives the model's own logits.

    Raises:
        RuntimeError: It does not, beyond rounding. Then no layer's reading means anything.
    """
    rows = torch.linspace(0, len(batch.last) - 1, min(8, len(batch.last))).long()
    with torch.no_grad():
        read_out = closing.logits(batch.last[rows])
    own = batch.logits[rows]
    off = float((read_out.double() - own.double()).abs().max())
    allowed = tolerated(own.dtype, own)
    if not off <= allowed:
        raise RuntimeError(
            "the last residual stream read out differs from the model's own logits by "
            f"{off:.3g} (allowed: {allowed:.3g}), so this model does not end in norm and "
            "unembedding alone, or a hook changes its end. No lens can be trusted here."
        )


class _Numbers:
    """The numbers of a lens, filled in batch by batch: ``prompt unit step`` and targets."""

    def __init__(self, asked: Asked, units: Sequence[Unit]) -> None:
        prompts, steps = asked.index.shape
        self.units = {id(unit): i for i, unit in enumerate(units)}
        shape = (prompts, len(units), steps)
        names, n = ("entropy", "kl", "top_prob", "surprisal"), len(asked.targets)
        self.arrays: dict[str, np.ndarray] = {name: np.full(shape, np.nan) for name in names}
        self.arrays["top_id"] = np.full(shape, -1, dtype=np.int64)
        if n:
            for name in ("logit", "prob", "rank"):
                self.arrays[name] = np.full((*shape, n), np.nan)

    def put(self, unit: Unit, batch: Batch, reading: Reading) -> None:
        """Write what a unit says at a batch's rows."""
        where = (batch.prompt.numpy(), self.units[id(unit)], batch.step.numpy())
        for name in ("entropy", "kl", "top_prob", "top_id"):
            self.arrays[name][where] = _numpy(getattr(reading, name))
        self.arrays["surprisal"][where] = -_numpy(reading.log_prob[:, -1])
        if "logit" in self.arrays:
            self.arrays["logit"][where] = _numpy(reading.logit[:, :-1])
            self.arrays["prob"][where] = _numpy(reading.log_prob[:, :-1].exp())
            ranks = _numpy(reading.rank[:, :-1].double())
            self.arrays["rank"][where] = np.where(ranks < 0, np.nan, ranks)


def _numpy(tensor: Float[Tensor, "..."] | Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _by_layer(units: Sequence[Unit]) -> list[tuple[int, list[Unit]]]:
    return [(layer, list(some)) for layer, some in groupby(units, key=lambda u: u.layer)]
