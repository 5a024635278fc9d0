"""How each method's call is cut into items, and one item of it run.

A part of the prompts is the same call on fewer prompts; a part of the layers the same call
with fewer cells. Labels are those of the whole data, so that parts join without a seam, and
what stands in for a part that is taken out always comes from the whole data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.ablation import ablation_cells, head_ablation, mlp_ablation
from mechinterp.causal.attribution import attribution_patching
from mechinterp.causal.grid import Grid, grid_of, prompt_labels, step_tokens
from mechinterp.causal.parts import every_part
from mechinterp.causal.patching import activation_patching
from mechinterp.engine import Cell
from mechinterp.heads.kinds import check_kinds
from mechinterp.heads.pruning_curve import check_options, pruning_curve
from mechinterp.heads.scores import head_scores
from mechinterp.lens.asked import asked_of
from mechinterp.lens.logit_lens import logit_lens
from mechinterp.lens.states import units_of
from mechinterp.record import digest
from mechinterp.results import Result
from mechinterp.sites import resolve_layers
from mechinterp.tasks import Labelled, Task, Text, as_prompts

Arguments = Mapping[str, Any]
# The kinds of data that each method takes; the other combinations of a grid are left out.
TAKES: dict[str, tuple[type, ...]] = {
    "activation_patching": (Task,),
    "attribution_patching": (Task,),
    "head_ablation": (Task, Text, Labelled),
    "mlp_ablation": (Task, Text, Labelled),
    "pruning_curve": (Task, Text, Labelled),
    "head_scores": (Task, Text, Labelled),
    "logit_lens": (Task, Text),
}
_ABLATED = {"head_ablation": "z", "mlp_ablation": "mlp_out"}
_WITHOUT_METRIC = ("head_scores", "logit_lens")
_WITHOUT_MEMORY = ("attribution_patching",)
_ON_A_GRID = ("activation_patching", "attribution_patching")
_SEEDED = ("head_ablation", "mlp_ablation", "pruning_curve", "head_scores")


def measures(method: str) -> bool:
    """Whether the method takes a metric."""
    return method not in _WITHOUT_METRIC


def is_seeded(method: str, arguments: Arguments) -> bool:
    """Whether the numbers depend on a seed beside that of the prompts."""
    ablation = method in _ABLATED and arguments.get("kind") != "resample"
    return method in _SEEDED and not ablation


def layers_of(model: TransformerBridge, method: str, arguments: Arguments) -> list[int] | None:
    """Return the layers that the call sweeps, to cut it by; None where there are none.

    Raises:
        ValueError: The model lacks the site or a layer.
    """
    if method in _ABLATED:
        return sorted({part.layer for part in every_part(model, _ABLATED[method])})
    if method == "activation_patching" and arguments["site"] != "embed":
        found = resolve_layers(model, arguments["site"], arguments.get("layers"))
        return [layer for layer in found if layer is not None]
    return None


def checked(model: TransformerBridge, data: Any, method: str, arguments: Arguments) -> None:
    """Raise before anything runs where the whole call would.

    Raises:
        ValueError: A site, layer, head, role, position, kind of score or option does not
            exist, or positions of the two runs do not correspond.
    """
    if method in _ON_A_GRID and arguments.get("site"):
        _grid(model, data, {"align": "exact", **arguments})
    elif method == "logit_lens":
        units_of(model, arguments["site"], None, None, None)
        asked_of(model, data, as_prompts(model, data), arguments.get("positions"), None)
    elif method == "head_scores" and arguments.get("kinds") is not None:
        check_kinds(arguments["kinds"])
    elif method == "pruning_curve":
        check_options(arguments["options"])


def cells_of(
    model: TransformerBridge, data: Any, method: str, arguments: Arguments, part: Arguments
) -> int:
    """Return how many counterfactual runs (or places to score) the item has."""
    layers = part.get("layers")
    if method == "activation_patching":
        grid = _grid(model, data, {**arguments, **({"layers": layers} if layers else {})})
        return len(grid.places)
    if method in _ABLATED:
        every = every_part(model, _ABLATED[method])
        return sum(layers is None or one.layer in layers for one in every)
    heads = len(every_part(model, "z"))
    if method == "attribution_patching" and arguments["site"]:
        asked = {"align": "exact", **arguments}
        return len(_grid(model, data, asked).places)
    if method == "pruning_curve":
        return (arguments["draws"] + 1) * min(arguments["steps"], heads)
    return heads


def engine_cells(
    model: TransformerBridge, data: Any, method: str, arguments: Arguments, part: Arguments
) -> tuple[Any, list[Cell], str] | None:
    """Return the data, cells and run that the engine will be given; None where it is not.

    For ``mi.plan``. Of a pruning curve the cells that judge; ranking comes on top.
    """
    layers = part.get("layers")
    if method == "activation_patching":
        grid = _grid(model, data, {**arguments, **({"layers": layers} if layers else {})})
        return data, grid.cells(model, data), grid.base
    if method == "head_ablation":
        heads = None if layers is None else _heads(model, layers)
        kind = arguments["kind"]
        return data, ablation_cells(model, data, kind=kind, heads=heads), "clean"
    if method == "pruning_curve" and len(data) > 1:
        every = [one.pair for one in every_part(model, "z")]
        steps = min(arguments["steps"], len(every))
        sets = [every[: round((i + 1) * len(every) / steps)] for i in range(steps)]
        judge = data[len(data) // 2 :]
        cells = ablation_cells(model, judge, kind=arguments["kind"], heads=sets)
        return judge, cells, "clean"
    return None


def passes_of(model: TransformerBridge, method: str, arguments: Arguments) -> float:
    """Return about how many forward passes over its prompts a call costs; rough.

    A backward pass counts as two. For methods that the engine has no plan for.
    """
    if method == "attribution_patching":
        variant, steps = arguments["method"], arguments.get("steps", 5)
        if "ig" in variant:
            return 2.0 + 3 * steps
        return 2.0 + 3 * (len(model.blocks) if variant == "atp*" else 1)
    if method == "head_scores":
        return 2.0 * (1 + arguments["nulls"])
    return 3.0 if method == "logit_lens" else 1.0 + len(model.blocks)


def run_part(
    model: TransformerBridge,
    data: Any,
    method: str,
    arguments: Arguments,
    part: Arguments,
    memory: str,
) -> Result:
    """Return the method's result on a part of the data and layers, labelled as in the whole."""
    told = dict(arguments)
    if method not in _WITHOUT_MEMORY:
        told["memory"] = memory
    layers, rows = part.get("layers"), part.get("prompts")
    some = data if rows is None else data[slice(*rows)]
    if method in _ABLATED:
        found = _ablated(model, data, some, method, told, layers)
    elif method == "activation_patching":
        told |= {} if layers is None else {"layers": layers}
        found = activation_patching(model, some, **told)
    elif method == "attribution_patching":
        found = attribution_patching(model, some, **told)
    elif method == "pruning_curve":
        found = pruning_curve(model, some, **told)
    elif method == "head_scores":
        found = head_scores(model, some, **told)
    else:
        found = logit_lens(model, some, **told)
    return found if rows is None else _as_in_whole(found, model, data, rows, method, arguments)


def _ablated(
    model: TransformerBridge,
    data: Any,
    some: Any,
    method: str,
    told: dict[str, Any],
    layers: Sequence[int] | None,
) -> Result:
    drawn = told["kind"] in ("mean", "position_mean")
    if some is not data and drawn:
        told["reference"] = data
    if method == "mlp_ablation":
        found = mlp_ablation(model, some, mlps=layers, **told)
    else:
        heads = None if layers is None else _heads(model, layers)
        found = head_ablation(model, some, heads=heads, **told)
    if layers is not None:
        found = _gridded(found)
    settings = {**found.convention.settings, "sets": "every part by itself"}
    settings.pop("reference", None)
    return replace(found, convention=replace(found.convention, settings=settings))


def _gridded(found: Any) -> Any:
    """Return sets of one part each on the grid of layers and heads, as the whole call has."""
    parts = [label.split(".") for label in found.data["set"].values.tolist()]
    layers = sorted({int(layer) for layer, _ in parts})
    ablated = found.data["ablated"].transpose("set", ...)
    rest = [dim for dim in ablated.dims if dim != "set"]
    if parts[0][1] == "mlp":
        order = [parts.index([str(layer), "mlp"]) for layer in layers]
        whole, axes = ablated.values[order], {"layer": layers}
    else:
        heads = sorted({int(head) for _, head in parts})
        whole = np.full((len(layers), len(heads), *ablated.shape[1:]), np.nan)
        for value, (layer, head) in zip(ablated.values, parts, strict=True):
            whole[layers.index(int(layer)), heads.index(int(head))] = value
        axes = {"layer": layers, "head": heads}
    made = xr.DataArray(whole, dims=(*axes, *rest), attrs=ablated.attrs)
    data = found.data.drop_vars(["ablated", "set"])
    data = data.assign(ablated=made.transpose("prompt", ...)).assign_coords(axes)
    return replace(found, data=data[["ablated", "intact"]])


def _heads(model: TransformerBridge, layers: Sequence[int]) -> list[tuple[int, int]]:
    return [part.pair for part in every_part(model, "z") if part.layer in layers]


def _as_in_whole(
    found: Any,
    model: TransformerBridge,
    data: Any,
    rows: Sequence[int],
    method: str,
    arguments: Arguments,
) -> Any:
    """Return the result of some prompts with the labels that they have among all."""
    own = slice(*rows)
    coords: dict[str, Any] = {}
    for name, label in prompt_labels(data).items():
        coords[name] = (label[0], label[1][own]) if isinstance(label, tuple) else label[own]
    dropped = [name for name in ("template", "case") if name in found.data.coords]
    labelled = found.data.drop_vars(dropped).assign_coords(coords)
    if method == "activation_patching" and "position" in labelled.dims:
        tokens = step_tokens(model, data, _grid(model, data, arguments).steps)
        labelled = labelled.drop_vars("token", errors="ignore")
        if any(tokens):
            labelled = labelled.assign_coords(token=("position", tokens))
    settings = {**found.convention.settings, "data_sha256": digest(data)}
    return replace(
        found, data=labelled, convention=replace(found.convention, settings=settings)
    )


def _grid(model: TransformerBridge, data: Task, arguments: Arguments) -> Grid:
    names = ("site", "direction", "positions", "layers", "heads", "align", "window")
    return grid_of(model, data, **{n: arguments[n] for n in names if n in arguments})
