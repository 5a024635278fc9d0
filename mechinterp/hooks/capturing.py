"""What a capture asks for: checked before anything runs, then cut out of what was seen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Key, by_position
from mechinterp.sites import AXES, head_axis, n_neurons, resolve_heads, resolve_layers
from mechinterp.tasks import Prompts, as_prompts
from mechinterp.tasks.positions import PositionSpec, Roles, position_lists

Ints = int | Sequence[int] | None


def located(model: TransformerBridge, data: Any) -> tuple[Prompts, Roles | None]:
    """Return the prompts of ``data`` as this model's tokens, and their roles if it has any."""
    return as_prompts(model, data), getattr(data, "roles", None)


class Request:
    """What a capture asks for, resolved and checked against the model and the prompts."""

    def __init__(
        self,
        model: TransformerBridge,
        prompts: Any,
        sites: str | Sequence[str],
        layers: Ints,
        heads: Ints,
        positions: PositionSpec | None,
    ) -> None:
        names = [sites] if isinstance(sites, str) else list(sites)
        if not names:
            raise ValueError("no sites were asked for. Pass at least one, such as 'z'.")
        self.prompts, self.roles = located(model, prompts)
        self.lengths = tuple(self.prompts.lengths.tolist())
        self.positions = "all" if positions is None else positions
        lists = position_lists(self.positions, self.lengths, self.roles)
        self.index = torch.full((len(lists), max(map(len, lists))), -1)
        for row, listed in enumerate(lists):
            self.index[row, : len(listed)] = torch.tensor(listed)
        self.all_positions = torch.equal(
            self.index, torch.where(self.prompts.mask, self.prompts.mask.cumsum(1) - 1, -1)
        )
        self.keys: list[Key] = [
            (name, layer) for name in names for layer in resolve_layers(model, name, layers)
        ]
        if heads is not None and not any(head_axis(name) for name in names):
            resolve_heads(model, names[0], 0, heads)  # raises: no head axis
        self.heads: dict[Key, tuple[int, ...] | None] = {}
        self.heads_asked = heads is not None
        for key in self.keys:
            asked = heads if head_axis(key[0]) else None
            found = resolve_heads(model, *key, asked)
            self.heads[key] = None if found is None else tuple(found)

    def stored(self, key: Key, tensor: Tensor, rows: slice) -> Tensor:
        """Return the part of a whole tensor that was asked for, padding set to zero."""
        site = key[0]
        index = self.index[rows].to(tensor.device)
        moved = by_position(site, tensor)
        if self.all_positions:
            moved = moved[:, : index.shape[1]]
        else:
            moved = moved[
                torch.arange(len(index), device=index.device)[:, None], index.clamp(0)
            ]
        heads = self.heads[key]
        if self.heads_asked and heads is not None:
            moved = moved[:, :, list(heads)]
        blank = (index < 0).reshape(*index.shape, *[1] * (moved.ndim - 2))
        return by_position(site, moved.masked_fill(blank, 0))

    @property
    def width(self) -> int:
        """Positions of the longest prompt: the key axis of ``scores`` and ``pattern``."""
        return self.prompts.tokens.shape[1]

    def numbers_per_position(self, model: TransformerBridge, key: Key) -> int:
        """Return how many numbers the site has at one position of one prompt, as stored."""
        site, layer = key
        heads = self.heads[key]
        sizes = {
            "d_model": model.cfg.d_model,
            "d_head": model.cfg.d_head,
            "key_pos": self.width,
            "head": len(heads or ()),
            "kv_head": len(heads or ()),
        }
        product = 1
        for axis in AXES[site]:
            if axis == "neuron":
                product *= n_neurons(model, layer)
            elif axis not in ("batch", "pos", "query_pos"):
                product *= sizes[axis]
        return product


def checked(key: Key, tensor: Tensor, rows: slice) -> Tensor:
    """Return the tensor, or raise if it has a NaN or an infinity that no mask explains.

    Raises:
        ValueError: Which site, layer and prompt.
    """
    site, layer = key
    fine = ~tensor.isnan() if site == "scores" else tensor.isfinite()
    if bool(fine.all()):
        return tensor
    prompt = rows.start + int((~fine).flatten(1).any(1).nonzero()[0])
    where = site if layer is None else f"{site} at layer {layer}"
    raise ValueError(
        f"{where} is NaN or infinite on prompt {prompt}. The weights may be damaged, or the "
        "dtype's range too small: load the model with dtype=torch.float32."
    )
