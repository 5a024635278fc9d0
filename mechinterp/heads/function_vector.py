"""A function vector: the heads' indirect effects, the vector, and what it does in zero-shot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._files import written_beside
from mechinterp.drawing import draw
from mechinterp.edits import Add
from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.heads.function_vector_effect import FunctionVectorEffect
from mechinterp.metrics import METRICS, UNITS
from mechinterp.models import fingerprint, n_layers
from mechinterp.record import convention_of
from mechinterp.results import Result
from mechinterp.sites import resolve_layers
from mechinterp.tasks import Task
from mechinterp.tasks.pairs import as_pairs, few_shot_text, tokenise_answered

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class IndirectEffects(Result):
    """What each head's mean output does where the labels are shuffled.

    ``data["patched"]`` (prompt, layer, head) is the probability of the right answer's first
    token with the head's mean over true prompts put in at the last token; ``data["clean"]``
    (prompt) is that of the prompt with shuffled labels as it is. NaN where a layer has fewer
    heads.
    """

    @property
    def effect(self) -> xr.DataArray:
        """Probability with the head's mean minus without, per prompt; its mean is the AIE."""
        return (self.data["patched"] - self.data["clean"]).rename("effect")

    def strongest(self, n: int) -> list[Head]:
        """Return the ``n`` heads with the largest average indirect effect, largest first."""
        mean = self.effect.mean("prompt")
        order = np.argsort(-mean.values, axis=None, kind="stable")[:n]  # NaN goes last
        where = zip(*np.unravel_index(order, mean.shape), strict=True)
        return [(int(mean["layer"][i]), int(mean["head"][j])) for i, j in where]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the average indirect effect of every head; a dot: p < 0.05 after max-T."""
        return draw(
            self.effect, self.convention, label="average indirect effect (probability)", ax=ax
        )


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """A relation as one vector, with the heads that it sums.

    Attributes:
        effects: The average indirect effect of every head, per prompt.
        written: Per layer what each head writes at the last token, ``[head, d_model]``.
        written_shuffled: The same where the labels are shuffled: what these heads write in
            this format whatever the relation.
        heads: The heads that the vector sums, strongest first.
    """

    effects: IndirectEffects
    written: Mapping[int, Float[Tensor, "head d_model"]]
    written_shuffled: Mapping[int, Float[Tensor, "head d_model"]]
    heads: tuple[Head, ...]

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """The sum of what the heads write: add it to the residual stream."""
        return _summed(self.written, self.heads)

    @property
    def control(self) -> Float[Tensor, " d_model"]:
        """The sum of what the same heads write under shuffled labels, as long as the vector."""
        found = _summed(self.written_shuffled, self.heads)
        return found / found.norm() * self.vector.norm()

    def of_heads(self, heads: int | Sequence[Head]) -> "FunctionVector":
        """Return the vector that sums other ``heads``: the strongest so many, or those named.

        Raises:
            ValueError: There is no such head.
        """
        chosen = self.effects.strongest(heads) if isinstance(heads, int) else list(heads)
        for layer, head in chosen:
            if layer not in self.written or not 0 <= head < len(self.written[layer]):
                raise ValueError(f"head ({layer}, {head}) does not exist. Pass (layer, head)s.")
        return replace(self, heads=tuple(chosen))

    def evaluate(
        self,
        model: TransformerBridge,
        data: Any = None,
        *,
        layer: int | Sequence[int] | None = None,
        scale: int | float = 1.0,
        n_random: int = 100,
        seed: int = 0,
        memory: Memory = None,
    ) -> FunctionVectorEffect:
        """Add the vector to the residual stream where no example is shown, and measure.

        It is added to ``resid_post`` of one layer (of each of several in turn) at the last
        token of ``Q: x`` / ``A:``; beside it, of the same norm, random directions and the
        ``control``.

        Args:
            model: The model that the vector was made on.
            data: Pairs of words, by default those held out.
            layer: One or several; a third of the way up by default, as in Todd et al.
            scale: How many times the vector is added.
            n_random: How many random directions.
            seed: Of these.
            memory: As in ``mi.activation_patching``.

        Returns:
            The metrics with and without the vector, per layer and query, beside the random
            vectors and the control.

        Raises:
            ValueError: Another model; words that the vector was made from; no such layer.
        """
        made = self.effects.convention
        if fingerprint(model) != made.fingerprint:
            raise ValueError(
                f"this vector was made on another model, {made.model} (fingerprint "
                f"{made.fingerprint[:12]}…). Make one on this model."
            )
        told = made.settings
        pairs = as_pairs(told["held_out"] if data is None else data, "evaluate")
        if seen := {row[0] for row in told["train"]} & {row[0] for row in pairs}:
            raise ValueError(
                f"the vector was made from {len(seen)} of these words, such as "
                f"{sorted(seen)[0]!r}. Pass others, or leave data out for those held out."
            )
        if n_random < 1:
            raise ValueError(f"n_random={n_random}: pass at least 1 direction to compare with.")
        chosen = n_layers(model) // 3 if layer is None else layer
        layers = resolve_layers(model, "resid_post", chosen)
        answered = tokenise_answered(
            model, [few_shot_text([], row, told["template"]) for row in pairs]
        )
        first = torch.tensor([[row[0]] for row in answered.answers])
        name = made.data.removesuffix(", labels shuffled")
        task = Task(f"{name}, zero-shot", answered.asked, first, metric="log_prob")
        vectors = [
            scale * self.vector,
            scale * self.control,
            *_random(scale * self.vector, n_random, seed),
        ]
        cells = [
            Cell(Add("resid_post", vector, layers=at, positions="end"))
            for at in layers
            for vector in vectors
        ]
        names = ("log_prob", "accuracy")
        metrics = {name: METRICS[name] for name in names}
        found = metrics_of_cells(model, task, cells, on="clean", metrics=metrics, memory=memory)
        values = found.values.cpu().numpy().reshape(len(layers), -1, len(pairs), len(names))
        dims = ("layer", "prompt", "metric")
        return FunctionVectorEffect(
            xr.Dataset(
                {
                    "with_vector": (dims, values[:, 0]),
                    "with_control": (dims, values[:, 1]),
                    "with_random": (("layer", "draw", "prompt", "metric"), values[:, 2:]),
                    "zero_shot": (("prompt", "metric"), found.runs["clean"].cpu().numpy()),
                },
                coords={
                    "layer": np.array(layers),
                    "draw": np.arange(n_random),
                    "prompt": np.arange(len(pairs)),
                    "metric": list(names),
                    "input": ("prompt", [row[0] for row in pairs]),
                    "output": ("prompt", [row[1] for row in pairs]),
                },
            ),
            convention_of(
                "FunctionVector.evaluate",
                model,
                task,
                {name: UNITS[name] for name in names},
                found.fingerprint,
                {
                    "heads": [list(head) for head in self.heads],
                    "norm": float(self.vector.norm()),
                    "scale": scale,
                    "words": "held out" if data is None else "given",
                    "answer": "first token",
                    "template": told["template"],
                },
                site="resid_post",
                positions="end",
                seed=seed,
            ),
        )

    def save(self, folder: str | Path) -> Path:
        """Write the effects (netCDF) and the vectors (safetensors) into a folder."""
        folder = Path(folder)
        folder.mkdir(exist_ok=True)
        self.effects.save(folder / "effects.nc")
        both = {"true": self.written, "shuffled": self.written_shuffled}
        tensors = {
            f"{name}.{at}": each.contiguous().cpu()
            for name, written in both.items()
            for at, each in written.items()
        }
        told = {"heads": json.dumps([list(head) for head in self.heads])}
        with written_beside(folder / "written.safetensors") as part:
            save_file(tensors, part, metadata=told)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "FunctionVector":
        """Return the vector that ``save`` wrote into ``folder``.

        Raises:
            FileNotFoundError: There is no such folder, or a file is missing.
        """
        effects = IndirectEffects.load(Path(folder) / "effects.nc")
        path = Path(folder) / "written.safetensors"
        with safe_open(path, framework="pt") as opened:
            heads = json.loads(opened.metadata()["heads"])
        written: dict[str, dict[int, Tensor]] = {"true": {}, "shuffled": {}}
        for key, each in load_file(path).items():
            name, _, at = key.partition(".")
            written[name][int(at)] = each
        chosen = tuple((layer, head) for layer, head in heads)
        return cls(effects, written["true"], written["shuffled"], chosen)


def head_grid(heads: Sequence[Head], patched: np.ndarray, base: np.ndarray) -> xr.Dataset:
    """Return one value per head and prompt as layer x head, NaN where there is no head."""
    layers = sorted({layer for layer, _ in heads})
    width = max(head for _, head in heads) + 1
    values = np.full((len(base), len(layers), width), np.nan)
    for row, (layer, head) in zip(patched, heads, strict=True):
        values[:, layers.index(layer), head] = row
    return xr.Dataset(
        {"patched": (("prompt", "layer", "head"), values), "clean": ("prompt", base)},
        coords={
            "prompt": np.arange(len(base)),
            "layer": layers,
            "head": np.arange(width),
        },
    )


def _summed(written: Mapping[int, Tensor], heads: Sequence[Head]) -> Tensor:
    return torch.stack([written[layer][head] for layer, head in heads]).sum(0)


def _random(vector: Tensor, n: int, seed: int) -> list[Tensor]:
    """Return random directions, each as long as the vector."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, len(vector), generator=generator).to(vector)
    return list(drawn / drawn.norm(dim=-1, keepdim=True) * vector.norm())
