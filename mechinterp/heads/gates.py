"""Hard-concrete gates: one on every head, trained to close where the model can do without.

Each gate is a random number in [0, 1] that is exactly 0 or 1 with some probability. Training
lowers the loss plus ``penalty`` times the expected number of open gates; the model's own
weights stay as they are.

Source: Louizos et al. 2018, arXiv:1712.01312; Voita et al. 2019, arXiv:1905.09418, with the
constants of its code.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.engine.cells import is_uniform
from mechinterp.engine.runs import run_of
from mechinterp.heads.gradient import objective
from mechinterp.hooks.editing import Action
from mechinterp.hooks.observing import Attached, observe
from mechinterp.hooks.taps import attached
from mechinterp.metrics import METRICS
from mechinterp.record import Data
from mechinterp.sites import n_heads, site_layers

TEMPERATURE, LOW, HIGH, EPSILON = 0.33, -0.1, 1.1, 1e-6
START = 2.0  # of every gate's log-odds: nine in ten are open at first
_LEARNING_RATE = 0.05


@dataclass(frozen=True, eq=False)
class Gates:
    """The trained gates: ``log_odds[layer]`` of each head, and how they came about.

    ``history[step]`` are the probabilities of being open, layer by layer, after so many steps.
    """

    log_odds: dict[int, Float[Tensor, " head"]]
    history: dict[int, dict[int, Float[Tensor, " head"]]]
    loss: float


def open_probability(log_odds: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """Return how probable it is that a gate is not exactly 0."""
    return torch.sigmoid(log_odds - TEMPERATURE * math.log(-LOW / HIGH))


def drawn(
    log_odds: Float[Tensor, " head"], noise: Float[Tensor, " head"]
) -> Float[Tensor, " head"]:
    """Return the gates that uniform ``noise`` in (0, 1) makes in training."""
    u = noise.clamp(EPSILON, 1 - EPSILON)
    raw = torch.sigmoid((u.log() - (1 - u).log() + log_odds) / TEMPERATURE)
    return (raw * (HIGH - LOW) + LOW).clamp(0, 1)


def settled(log_odds: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """Return the gates without noise (nor temperature), as they are used after training."""
    return (torch.sigmoid(log_odds) * (HIGH - LOW) + LOW).clamp(0, 1)


def train_gates(
    model: TransformerBridge,
    data: Data,
    *,
    penalty: float,
    steps: int,
    batch_size: int = 16,
    seed: int = 0,
    keep: int = 20,
) -> Gates:
    """Train a gate per head on the data's loss, with Adam, and return them.

    Each step draws a batch of prompts and one set of gates for it.

    Args:
        model: Left as it was.
        data: Whose loss (cross-entropy) is kept low.
        penalty: Nats of loss that an open head must be worth.
        steps: How many batches.
        batch_size: Prompts of a batch.
        seed: Of batches and gates.
        keep: How many states on the way are kept.

    Raises:
        ValueError: An edit in force is of particular prompts: batches are drawn anew.
    """
    _refuse_edits_of_prompts(model)
    layers = site_layers(model, "z")
    log_odds = {
        layer: torch.full((n_heads(model, "z", layer),), START, requires_grad=True)
        for layer in layers
    }
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(log_odds.values(), lr=_LEARNING_RATE)
    measured, run = objective(model, data, {"loss": METRICS["loss"]}), run_of(data, "clean")
    marks = {round(i * steps / keep) for i in range(keep + 1)} | {steps}
    history = {0: _open(log_odds)}
    last, chosen = [], batches(len(data), batch_size, generator)
    for step in progress(range(1, steps + 1), steps, "training gates"):
        index = next(chosen)
        prompts = run.prompts[index]
        noise = {k: torch.rand(len(v), generator=generator) for k, v in log_odds.items()}
        with torch.enable_grad():
            gates = {k: drawn(log_odds[k], noise[k]) for k in layers}
            _, logits = observe(model, prompts, slice(0, len(index)), [], put=_put(gates))
            loss = measured(logits, index).mean()
            opened = sum((open_probability(each).sum() for each in log_odds.values()), 0.0)
            total = loss + penalty * opened
            found = torch.autograd.grad(total, list(log_odds.values()))
        for each, gradient in zip(log_odds.values(), found, strict=True):
            each.grad = gradient
        optimiser.step()
        last = [*last[-19:], float(loss.detach())]
        if step in marks:
            history[step] = _open(log_odds)
    trained = {layer: each.detach().double() for layer, each in log_odds.items()}
    return Gates(trained, history, sum(last) / len(last))


def _refuse_edits_of_prompts(model: TransformerBridge) -> None:
    if not all(isinstance(tap, Action) and _serves_any_batch(tap) for tap in attached(model)):
        raise ValueError(
            "gates are trained on batches drawn from the data, but what is in force on this "
            "model is for particular prompts. Train outside that block, or edit whole prompts "
            "alike (Zero, Mean, Scale, Add at all positions)."
        )


def _serves_any_batch(action: Action) -> bool:
    return is_uniform(action.edit) and (action.everywhere or action.pairs is None)


def _open(log_odds: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {k: open_probability(each.detach().double()) for k, each in log_odds.items()}


def _put(gates: Mapping[int, Tensor]) -> Attached:
    def scale(gate: Tensor, own: Tensor) -> Tensor:
        return own * gate.to(own)[:, None]

    return [(("z", layer), partial(scale, gate)) for layer, gate in gates.items()]


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield prompts' numbers without end, each round through all of them in a new order."""
    waiting: list[int] = []
    while True:
        while len(waiting) < min(size, n):
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[: min(size, n)]
        waiting = waiting[min(size, n) :]
