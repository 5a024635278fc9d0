"""What the base runs leave behind for the counterfactual runs to start from."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.activations import Key
from mechinterp.engine.prompted import Prompted
from mechinterp.engine.runs import Run


@dataclass(eq=False)
class Base:
    """What the base runs left: per node, the residual stream, keys, values, and sites.

    ``node[prompt, position]`` numbers the nodes, -1 beyond the prompt. ``resid[layer]`` is what
    enters a layer (the last entry leaves the last), ``keys[layer]`` a pair
    ``node kv_head d_head``, ``sites`` the activations that cells read.
    """

    prompts: Prompted
    node: Int[np.ndarray, "prompt pos"]
    resid: dict[int, Float[Tensor, "node d_model"]] = field(default_factory=dict)
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sites: dict[Key, Tensor] = field(default_factory=dict)

    def padded(self, run: Run, key: Key) -> Float[Tensor, "prompt pos ..."]:
        """Return one site of one run, padded with zeros beyond each prompt."""
        start, width = self.prompts.offset[run.name], run.prompts.tokens.shape[1]
        node = torch.from_numpy(self.node[start : start + len(run), :width])
        values = self.sites[key]
        found = values[node.clamp(0).to(values.device)]
        blank = (node < 0).reshape(*node.shape, *[1] * (found.ndim - 2)).to(found.device)
        return found.masked_fill_(blank, 0)
