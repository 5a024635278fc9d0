"""The grid of a sweep: which places there are to patch, and how they are labelled.

Patching, its approximations and their audit sweep the same places: layers, heads where the
site has any, and steps of the position axis, each checked to mean the same in both runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Activations
from mechinterp.edits import Replace
from mechinterp.engine.cells import Cell
from mechinterp.engine.runs import Run, run_activations, run_of
from mechinterp.names import unknown
from mechinterp.sites import AXES, head_axis, resolve_heads, resolve_layers
from mechinterp.tasks import Labelled, Task, Text
from mechinterp.tasks.positions import PositionSpec, position_axis, position_lists
from mechinterp.tasks.prompts import token_strings

Steps = list[tuple[str | int, PositionSpec]]
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """The places to patch: layers, heads and position steps, and those that exist.

    A cell at a layer patches ``window`` layers around it, as many as there are.
    """

    site: str
    direction: str
    layers: list[int | None]
    units: list[int | None]
    steps: Steps
    places: list[Place]
    align: Literal["exact", "last"]
    window: int
    n_layers: int

    @property
    def base(self) -> str:
        """The run that is patched."""
        return "corrupted" if self.direction == "denoising" else "clean"

    @property
    def source(self) -> str:
        """The run that the values come from."""
        return "clean" if self.direction == "denoising" else "corrupted"

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many layers, heads and steps there are."""
        return len(self.layers), len(self.units), len(self.steps)

    @property
    def read_layers(self) -> list[int] | None:
        """The layers whose activations the patches read; None for a site without layers."""
        if self.site == "embed":
            return None
        return sorted({at for layer in self.layers for at in self._around(layer)})

    def _around(self, layer: int | None) -> list[int]:
        """Return the layers of the window, which is Meng's: one more before than after."""
        if layer is None:
            return []
        first, last = layer - self.window // 2, layer - (-self.window // 2)
        return list(range(max(0, first), min(self.n_layers, last)))

    def edit(self, place: Place, source: Activations) -> Replace:
        """Return the patch at one place."""
        i, j, k = place
        return Replace(
            self.site,
            source,
            layers=self._around(self.layers[i]) or None,
            heads=self.units[j],
            positions=self.steps[k][1],
            align=self.align,
        )

    def cells(
        self, model: TransformerBridge, task: Task, places: Sequence[Place] | None = None
    ) -> list[Cell]:
        """Return one cell per place (all by default), reading a run the sweep will compute."""
        source = run_activations(model, task, self.source, self.site, layers=self.read_layers)
        return [Cell(self.edit(place, source)) for place in places or self.places]

    def spread(self, values: Float[np.ndarray, "cell prompt metric"]) -> np.ndarray:
        """Return one value per place on the whole grid: ``prompt layer head step metric``.

        NaN stays where a layer has fewer heads than others.
        """
        whole = np.full((values.shape[1], *self.shape, values.shape[2]), np.nan)
        for number, (i, j, k) in enumerate(self.places):
            whole[:, i, j, k] = values[number]
        return whole

    def axes(self, positions: PositionSpec) -> dict[str, list[Any] | None]:
        """Return the labels of the layer, head and position axes; None for one not swept."""
        axis = head_axis(self.site)
        return {
            "layer": None if self.site == "embed" else self.layers,
            axis or "head": self.units if axis else None,
            "position": None if positions == "all" else [label for label, _ in self.steps],
        }


def grid_of(
    model: TransformerBridge,
    task: Task,
    site: str,
    *,
    direction: str,
    positions: PositionSpec,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    align: str = "exact",
    window: int = 1,
) -> Grid:
    """Return the places that a sweep of ``site`` patches.

    Raises:
        ValueError: A site, layer, head, role or position does not exist, the task has no
            corrupted run, or positions of the two runs do not correspond.
    """
    check_option("direction", direction, ("denoising", "noising"))
    check_option("align", align, ("exact", "last"))
    n_layers = len(model.blocks)
    if not 1 <= window <= n_layers or (site == "embed" and window > 1):
        raise ValueError(
            f"window={window} is no number of layers to patch together: pass 1 to "
            f"{1 if site == 'embed' else n_layers} at {site}."
        )
    swept = resolve_layers(model, site, layers)
    heads_at = {layer: resolve_heads(model, site, layer, heads) or [None] for layer in swept}
    units = list(dict.fromkeys(unit for each in heads_at.values() for unit in each))
    corrupted, clean = run_of(task, "corrupted"), run_of(task, "clean")
    steps = steps_of(site, positions, clean, corrupted, align)
    places = [
        (i, j, k)
        for (i, layer), (j, head), k in product(
            enumerate(swept), enumerate(units), range(len(steps))
        )
        if head in heads_at[layer]
    ]
    exact = cast(Literal["exact", "last"], align)
    return Grid(site, direction, swept, units, steps, places, exact, window, n_layers)


def check_option(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` that suggests near names unless the value is known."""
    if value not in known:
        raise ValueError(unknown(name, value, known))


def labelled(
    arrays: Mapping[str, Float[np.ndarray, "prompt ..."] | Bool[np.ndarray, "layer ..."]],
    dims: Mapping[str, Sequence[str]],
    axes: Mapping[str, Sequence[Any] | None],
    task: Task,
    tokens: Sequence[str] = (),
) -> xr.Dataset:
    """Return the arrays with named axes; one without labels was not swept and is left out.

    ``tokens`` are the texts at the steps of the position axis.
    """
    coords: dict[str, Any] = {
        axis: labels for axis, labels in axes.items() if labels is not None
    }
    if "position" in coords:
        if not all(isinstance(label, int) for label in coords["position"]):
            coords["position"] = [str(label) for label in coords["position"]]
        if any(tokens):
            coords["token"] = ("position", list(tokens))
    coords |= prompt_labels(task)
    unswept = [axis for axis, labels in axes.items() if labels is None]
    made = {name: xr.DataArray(values, dims=dims[name]) for name, values in arrays.items()}
    return xr.Dataset(
        {
            name: array.squeeze([axis for axis in unswept if axis in array.dims], drop=True)
            for name, array in made.items()
        },
        coords=coords,
    )


def prompt_labels(data: Task | Text | Labelled) -> dict[str, Any]:
    """Return the labels of the prompt axis: numbers, templates, and cases where shared.

    The pieces of a text have their document for a template.
    """
    labels: dict[str, Any] = {"prompt": np.arange(len(data))}
    if isinstance(data, Text):
        labels["template"] = ("prompt", [f"document {number}" for number in data.documents])
    if isinstance(data, Task):
        labels["template"] = ("prompt", list(data.templates))
        if len(set(data.cases)) < len(data):
            labels["case"] = ("prompt", list(data.cases))
    return labels


def step_tokens(model: TransformerBridge, task: Task, steps: Steps) -> list[str]:
    """Return the token at each numbered step where all clean prompts share it, else ``""``."""
    lengths = task.clean.lengths.tolist()
    shared = []
    for label, spec in steps:
        places = position_lists(spec, lengths, task.roles)
        ids = {int(task.clean.tokens[i, pos]) for i, (pos, *_) in enumerate(places)}
        one = isinstance(label, int) and len(ids) == 1
        shared.append(token_strings(model, [ids.pop()])[0].replace("\0", "␀") if one else "")
    return shared


def steps_of(
    site: str, positions: PositionSpec, clean: Run, corrupted: Run, align: str
) -> Steps:
    """Return the steps of the position axis, checked to mean the same place in both runs."""
    ours, theirs = clean.prompts.lengths.tolist(), corrupted.prompts.lengths.tolist()
    unequal = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    if unequal and ("key_pos" in AXES[site] or not all(map(_is_relative, _parts(positions)))):
        advice = (
            f"{site} has keys, which roles cannot align. Use prompts of equal length."
            if "key_pos" in AXES[site]
            else f"Patch by role: positions={sorted(clean.roles)}."
            if clean.roles
            else "Name roles in the task, or use a corruption of equal length."
        )
        raise ValueError(
            f"clean has {unequal[0][0]} tokens but corrupted has {unequal[0][1]}, so positions "
            f"do not correspond. {advice}"
        )
    steps = position_axis(positions, ours, clean.roles)
    for label, spec in steps:
        pairs = zip(
            position_lists(spec, ours, clean.roles),
            position_lists(spec, theirs, corrupted.roles),
            strict=True,
        )
        for prompt, (a, b) in enumerate(pairs):
            if len(a) != len(b) and align == "exact":
                raise ValueError(
                    f"{label!r} is {len(a)} tokens in clean prompt {prompt} but {len(b)} in "
                    "the corrupted one. Pass align='last' to pair the spans from their ends."
                )
    return steps


def _parts(positions: PositionSpec) -> list[Any]:
    return [positions] if isinstance(positions, str | int | slice) else list(positions)


def _is_relative(part: str | int | slice) -> bool:
    """Whether a position means the same place in prompts of different lengths."""
    return (
        part < 0
        if isinstance(part, int)
        else part not in ("each", "all") and isinstance(part, str)
    )
