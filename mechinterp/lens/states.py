"""States to read: what passes a site, cut to the rows that are asked for.

The residual stream and what a layer adds to it are vectors as they are. A head or a neuron is
read by what it alone adds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Key
from mechinterp.engine.direct import head_results, neuron_results
from mechinterp.engine.sizes import as_bytes, default_budget, pass_bytes, shape_of, size
from mechinterp.hooks.observing import observe
from mechinterp.models import input_device
from mechinterp.sites import AXES, n_heads, n_neurons, resolve_heads, resolve_layers
from mechinterp.tasks import Prompts

READABLE = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "result", "mlp_post")
_MOST_NEURONS = 512


@dataclass(frozen=True, eq=False)
class Unit:
    """One thing that is read out at a layer: all that passes there, a head or a neuron."""

    layer: int
    index: int | None = None


def units_of(
    model: TransformerBridge,
    site: str,
    layers: int | Sequence[int] | None,
    heads: int | Sequence[int] | None,
    neurons: int | Sequence[int] | None,
) -> list[Unit]:
    """Return what is read out, layer by layer.

    Raises:
        ValueError: The site cannot be read, or a layer, head or neuron does not exist.
    """
    if site in AXES and site not in READABLE:
        raise ValueError(
            f"{site} does not write into the residual stream as it is, so it cannot be read "
            f"out. Use one of {', '.join(READABLE)}."
        )
    at = [layer for layer in resolve_layers(model, site, layers) if layer is not None]
    if neurons is not None and site != "mlp_post":
        raise ValueError(f"{site} has no neurons. Leave neurons out, or use site='mlp_post'.")
    if site == "mlp_post":
        if neurons is None:
            raise ValueError(
                f"mlp_post has {n_neurons(model, at[0])} neurons a layer, too many to read "
                "each one out. Name them: layers=3, neurons=[5, 17]."
            )
        return [Unit(layer, i) for layer in at for i in _neurons(model, layer, neurons)]
    if site == "result":
        return [
            Unit(layer, head)
            for layer in at
            for head in resolve_heads(model, site, layer, heads) or ()
        ]
    if heads is not None:
        resolve_heads(model, site, at[0], heads)  # raises: no head axis
    return [Unit(layer) for layer in at]


def _neurons(model: TransformerBridge, layer: int, neurons: int | Sequence[int]) -> list[int]:
    asked = [neurons] if isinstance(neurons, int) else list(neurons)
    count = n_neurons(model, layer)
    for each in asked:
        if not -count <= each < count:
            raise ValueError(
                f"neuron {each} does not exist: layer {layer} has neurons 0..{count - 1}."
            )
    chosen = [each % count for each in asked]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"neurons {asked} must name at least one, and each once.")
    if len(chosen) > _MOST_NEURONS:
        raise ValueError(
            f"at most {_MOST_NEURONS} neurons can be read out at once. Name fewer."
        )
    return chosen


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts after one run: the rows asked for, and their states.

    ``prompt`` and ``step`` say which entry of the index a row is. ``logits`` are the model's
    own there, ``last`` what left its last block.
    """

    prompt: Int[Tensor, " row"]
    step: Int[Tensor, " row"]
    logits: Float[Tensor, "row d_vocab"]
    last: Float[Tensor, "row d_model"]
    seen: dict[Key, Float[Tensor, "row ..."]]

    def states(
        self, model: TransformerBridge, site: str, layer: int, units: Sequence[Unit]
    ) -> Iterator[Float[Tensor, "row d_model"]]:
        """Yield the states of a layer's units at the rows, one unit after the other."""
        if site == "result":
            heads = [unit.index for unit in units if unit.index is not None]
            found = head_results(model, layer, self.seen["z", layer], heads)
        elif site == "mlp_post":
            neurons = [unit.index for unit in units if unit.index is not None]
            found = neuron_results(model, layer, self.seen[site, layer], neurons)
        else:
            found = self.seen[site, layer][:, None]
        yield from found.unbind(1)


def read_keys(site: str, layers: Sequence[int]) -> list[Key]:
    """Return the places to see for a site: a head's result is made of its ``z``."""
    return [("z" if site == "result" else site, layer) for layer in layers]


def batches(
    model: TransformerBridge,
    prompts: Prompts,
    index: Int[Tensor, "prompt step"],
    keys: Sequence[Key],
    budget: float | int,
) -> Iterator[Batch]:
    """Run the model on as many prompts as fit in ``budget`` bytes, and yield their rows.

    Raises:
        ValueError: Not even one prompt fits; the message says what does.
    """
    last: Key = ("resid_post", len(model.blocks) - 1)
    wanted = list(dict.fromkeys([*keys, last]))
    at_once = prompts_at_once(model, prompts, wanted, budget)
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        prompt, step = (index[rows] >= 0).nonzero(as_tuple=True)
        if not len(prompt):
            continue
        position = index[rows][prompt, step]
        with torch.no_grad():
            seen, logits = observe(model, prompts, rows, wanted)
        cut = {}
        for key in wanted:
            tensor = seen.pop(key)
            cut[key] = tensor[prompt.to(tensor.device), position.to(tensor.device)]
        own = logits[prompt.to(logits.device), position.to(logits.device)]
        del seen, logits
        yield Batch(prompt + start, step, own, cut[last], cut)


def prompts_at_once(
    model: TransformerBridge, prompts: Prompts, keys: Sequence[Key], budget: float | int
) -> int:
    """Return how many prompts to run at once within ``budget`` bytes."""
    shape, width = shape_of(model), prompts.tokens.shape[1]
    sizes = {"d_model": shape.d_model, "d_head": shape.d_head, "neuron": shape.d_mlp}
    numbers = 0
    for site, layer in keys:
        each = 1
        for axis in AXES[site][2:]:
            if axis == "head":
                each *= n_heads(model, site, layer if layer is not None else 0)
            else:
                each *= sizes[axis]
        numbers += 2 * each  # where it was seen, and the rows of it
    kept = width * (numbers + 2 * shape.d_vocab) * shape.itemsize

    def needed(n: int) -> int:
        return n * kept + pass_bytes(shape, n, width, width, n * width, shape.d_vocab)

    if needed(1) > budget:
        raise ValueError(
            f"memory= is too small to run one prompt of {width} tokens: that alone takes about "
            f"{size(needed(1))}. Allow twice that much, or cut the text into shorter pieces."
        )
    n = min(len(prompts), 64)
    while needed(n) > budget:
        n -= 1
    return n


def budget_of(model: TransformerBridge, memory: int | float | str | None) -> int:
    """Return how many bytes a lens may take: what was said, or 60 % of what is free."""
    if memory is None:
        return min(default_budget(input_device(model)), 4_000_000_000)
    return as_bytes(memory)
