"""Gradients of what is measured with respect to a gate on every head, batch by batch.

A head's gate multiplies its ``z``, so the derivative at 1 is ``z · ∂metric/∂z``: per token,
summed over a prompt's tokens, or over a whole batch.

Source: Michel et al. 2019, arXiv:1905.10650, section 4.1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Key
from mechinterp.engine.calls import metric_reader
from mechinterp.engine.runs import run_of
from mechinterp.hooks.observing import observe
from mechinterp.metrics import Metric
from mechinterp.record import Data
from mechinterp.sites import site_layers
from mechinterp.tasks import Text, answer_logits

Objective = Callable[[Tensor, Sequence[int]], Float[Tensor, " prompt"]]


def objective(model: TransformerBridge, data: Data, metrics: Mapping[str, Metric]) -> Objective:
    """Return what gives the metric of some prompts from their logits, with a gradient."""
    reader = replace(metric_reader(model, data, metrics)(None), vocabulary=None)
    positions = run_of(data, "clean").answer_positions

    def measured(logits: Tensor, prompts: Sequence[int]) -> Float[Tensor, " prompt"]:
        if not isinstance(data, Text):
            logits = answer_logits(logits, [positions[i] for i in prompts])
        return reader.read(logits, prompts)[:, 0]

    return measured


def gate_gradients(
    model: TransformerBridge,
    data: Data,
    metrics: Mapping[str, Metric],
    batch_size: int,
) -> Iterator[dict[int, Float[Tensor, "prompt pos head"]]]:
    """Yield, batch by batch, each token's ``z · ∂metric/∂z`` by layer; zero in the padding.

    The metric of a prompt depends on its own tokens alone, so one backward pass per batch
    gives the gradients of all its prompts.
    """
    measured, run = objective(model, data, metrics), run_of(data, "clean")
    keys: list[Key] = [("z", layer) for layer in site_layers(model, "z")]
    for start in range(0, len(data), batch_size):
        numbers = list(range(start, min(start + batch_size, len(data))))
        rows = slice(start, start + batch_size)
        with torch.enable_grad():
            seen, logits = observe(model, run.prompts, rows, keys, track=True)
            total = measured(logits, numbers).sum()
            found = torch.autograd.grad(total, [seen[key] for key in keys])
        mask = run.prompts.mask[rows]
        yield {
            layer: (seen[site, layer].detach() * gradient).double().sum(-1).cpu()
            * mask[:, : gradient.shape[1], None]
            for (site, layer), gradient in zip(keys, found, strict=True)
            if layer is not None
        }
