"""The panels that only one kind of result has: lens tables, attention, waterfalls, scores."""

from functools import singledispatch

import numpy as np
import xarray as xr

from mechinterp import inference
from mechinterp.causal.self_repair_result import SelfRepair
from mechinterp.heads.attention_result import AttentionPatterns
from mechinterp.heads.scores_result import HeadScores
from mechinterp.lens.attribution_result import DirectAttributionResult
from mechinterp.lens.lens_result import LABELS, LensResult
from mechinterp.report.panels import (
    AttentionPrompt,
    AttentionView,
    Axis,
    Cells,
    Chart,
    LensPrompt,
    LensTable,
    Line,
    Lines,
    Panel,
    Waterfall,
    token,
)
from mechinterp.results import Result
from mechinterp.stats import bootstrap_interval

_MOST_LENS_CELLS = 60_000  # layers x positions of all prompts that a panel carries
_MOST_PATTERN_BYTES = 1_100_000  # of all heads, packed; base64 makes a third more of it


@singledispatch
def own_panels(result: Result) -> list[Panel]:
    """Return the panels that only this kind of result has."""
    return []


def has_own_cells(result: Result) -> bool:
    """Whether the panel of all effects would show nothing that its own panels do not."""
    return isinstance(result, AttentionPatterns | DirectAttributionResult | HeadScores)


@own_panels.register
def _attention(result: AttentionPatterns) -> list[Panel]:
    names = result.data["head"].values.tolist()
    lengths = result.data["length"].values.tolist()
    packed, used, heads = [], 0, 0
    for j in range(len(names)):
        column = [
            AttentionPrompt.packed(result.data["pattern"].values[i, j, :n, :n])
            for i, n in enumerate(lengths)
        ]
        used += sum(map(len, column))
        if heads and used > _MOST_PATTERN_BYTES:
            break
        packed.append(column)
        heads += 1
    prompts = [
        AttentionPrompt(
            f"prompt {prompt}",
            [token(word) for word in result.tokens(prompt)],
            [column[i] for column in packed],
        )
        for i, prompt in enumerate(result.data["prompt"].values.tolist())
    ]
    note = ""
    if heads < len(names):
        note = (
            f"{heads} of {len(names)} heads are in this file, the first of them. For others: "
            "mi.attention_patterns(model, data, heads=[(layer, head)])."
        )
    return [AttentionView("Where heads look", names[:heads], prompts, note)]


@own_panels.register
def _lens(result: LensResult) -> list[Panel]:
    if not {"head", "neuron"}.isdisjoint(result.data.dims):
        return []
    return [_lens_table(result), _trajectories(result)]


def _lens_table(result: LensResult) -> LensTable:
    data = result.data.transpose("prompt", "layer", "position", ...)
    labels = {"top_prob": "probability of the first choice"}
    arrays: dict[str, xr.DataArray] = {"top_prob": data["top_prob"]}
    for name in ("entropy", "kl", "surprisal"):
        arrays[name], labels[name] = data[name], LABELS[name]
    for target in data["target"].values.tolist() if "target" in data.dims else []:
        for name in ("prob", "rank"):
            key = f"{name} of {target}"
            arrays[key] = data[name].sel(target=target) + (1 if name == "rank" else 0)
            labels[key] = f"{'rank (1: top)' if name == 'rank' else 'probability'} of {target}"
    arrays = {name: own for name, own in arrays.items() if not bool(own.isnull().all())}
    words, places = np.unique(data["top_token"].values.astype(str), return_inverse=True)
    places = np.where(data["top_id"].values < 0, -1, places.reshape(data["top_token"].shape))
    kept = max(1, _MOST_LENS_CELLS // max(1, places[0].size))
    prompts = []
    for i, label in enumerate(data["prompt"].values[:kept]):
        inside = np.flatnonzero((places[i] >= 0).any(0))
        tokens = data["token"].values[i][inside]
        at = data["position"].values[inside]
        prompts.append(
            LensPrompt(
                f"prompt {label}",
                [f"{p} {token(str(t))}" for p, t in zip(at, tokens, strict=True)],
                places[i][:, inside].astype(np.int32),
                {name: own.values[i][:, inside] for name, own in arrays.items()},
            )
        )
    note = "" if kept >= len(places) else f"The first {kept} of {len(places)} prompts."
    return LensTable(
        "First choice at every layer",
        [str(layer) for layer in data["layer"].values],
        [token(str(word)) for word in words],
        prompts,
        {name: labels[name] for name in arrays},
        note,
    )


def _trajectories(result: LensResult) -> Lines:
    """Return means over prompts (and positions) at every layer, with their intervals."""
    data = result.data
    layers = [str(layer) for layer in data["layer"].values]
    told = data["target"].values.tolist() if "target" in data.dims else []
    charts = []
    for name in ("rank", "prob", "entropy", "kl", "surprisal"):
        if name not in data or bool(data[name].isnull().all()):
            continue
        targets = told if "target" in data[name].dims else [None]
        lines = []
        for target in targets:
            own = data[name] if target is None else data[name].sel(target=target)
            label = LABELS[name] if target is None else token(str(target))
            lines.append(Line(label, *_over_prompts(own, logarithmic=name == "rank")))
        charts.append(Chart(LABELS[name], lines, name == "rank"))
    n = inference.per_case(data["entropy"]).sizes["prompt"]
    note = "One prompt: no intervals." if n == 1 else f"Bands: 95 % intervals over {n} prompts."
    return Lines("Along the layers", Axis("layer", layers), charts, note)


def _over_prompts(values: xr.DataArray, *, logarithmic: bool) -> list[np.ndarray]:
    """Return mean, low and high per layer; geometric of ranks, which count from 0 there."""
    if logarithmic:
        values = xr.ufuncs.log(values + 1)
    own = inference.per_case(values.mean("position")).transpose("layer", "prompt")
    low, high = bootstrap_interval(inference.per_prompt(own))
    found = [own.mean("prompt").values, low, high]
    return [np.exp(each) for each in found] if logarithmic else found


@own_panels.register
def _direct(result: DirectAttributionResult) -> list[Panel]:
    name, unit = next(iter(result.convention.metrics.items()))
    shares = inference.per_case(result.effect).transpose("prompt", "component")
    labels = [str(label) for label in shares["component"].values]
    return [_waterfall("What writes the answer", f"share of {name} ({unit})", labels, shares)]


@own_panels.register
def _repair(result: SelfRepair) -> list[Panel]:
    name, unit = next(iter(result.convention.metrics.items()))
    found: list[Panel] = []
    for one in result.data["set"].values.tolist():
        own = result.data.sel(set=one)
        change = own["change"].dropna("component", how="all").transpose("component", "prompt")
        labels = [f"without {one}", *map(str, change["component"].values), "final norm's scale"]
        stacked = [own["direct"].values, *change.values, own["rescaling"].values]
        shares = xr.DataArray(
            np.stack(stacked, 1), {"prompt": own["prompt"].values}, ("prompt", "component")
        )
        if "case" in own.coords:
            shares = inference.per_case(shares.assign_coords(case=("prompt", own["case"].data)))
        title, label = f"What taking out {one} does", f"change of {name} ({unit})"
        found.append(_waterfall(title, label, labels, shares))
    return found


def _waterfall(title: str, unit: str, parts: list[str], shares: xr.DataArray) -> Waterfall:
    low, high = bootstrap_interval(shares.values.T.astype(float))
    prompts = [f"prompt {label}" for label in shares["prompt"].values]
    n = len(prompts)
    note = "One prompt: no intervals." if n == 1 else inference.interval_note(n, "means")
    return Waterfall(title, unit, parts, prompts, shares.values, low, high, note)


@own_panels.register
def _scores(result: HeadScores) -> list[Panel]:
    mean = result.mean().transpose("layer", "head")
    axes = [
        Axis("kind", [f"{kind} ({unit})" for kind, unit in result.convention.metrics.items()]),
        Axis("layer", [str(layer) for layer in mean["layer"].values]),
        Axis("head", [str(head) for head in mean["head"].values]),
    ]
    values = {"mean": np.stack([mean[kind].values for kind in result.kinds])}
    note = "Scores of single heads."
    if "p_adjusted" in result.data:
        p = result.data["p_adjusted"].transpose("kind", "layer", "head").sel(kind=result.kinds)
        values["p"] = p.values
        note = "p: such a score in an untrained model, corrected for all heads (Holm)."
    signed = bool((values["mean"] < 0).any())
    return [Cells("Scores of every head", axes, values, [("score", 1.0)], signed, note)]
