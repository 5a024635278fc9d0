"""What a lens saw: numbers per prompt, layer and position, and the pictures people know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge

from mechinterp import inference, plotting
from mechinterp.drawing import draw
from mechinterp.lens.asked import Asked
from mechinterp.lens.states import Unit
from mechinterp.metrics import UNITS
from mechinterp.results import Result
from mechinterp.stats import bootstrap_interval
from mechinterp.tasks import Task
from mechinterp.tasks.prompts import token_texts

Value = Literal["prob", "rank", "logit", "entropy", "kl", "surprisal"]
LABELS = {
    "prob": "probability",
    "rank": "rank (1: top), geometric mean",
    "logit": "logit",
    "entropy": "entropy (nats)",
    "kl": "KL(final || lens) (nats)",
    "surprisal": "surprisal of the next token (nats)",
}
_OF_TARGETS = ("prob", "rank", "logit")
_MOST_COLUMNS = 16


@dataclass(frozen=True, eq=False)
class LensResult(Result):
    """What each state would predict if the model ended there.

    ``data`` has the axes ``prompt``, ``layer`` (``head`` too for heads; ``neuron``, as
    ``layer.neuron``, instead of both for neurons) and ``position``. ``entropy`` of the
    prediction, ``kl`` (KL(final ‖ lens): 0 where the state already says what the model will)
    and ``surprisal`` of the true next token are in nats; ``top_id``, ``top_token`` and
    ``top_prob`` are the prediction's first choice. With a ``target`` axis: ``logit``, ``prob``
    and ``rank`` (0: first) of the tokens that are followed; of a set, the mean logit, the sum
    of probabilities, the best rank. NaN (-1 for ids) where a prompt has no such position.
    """

    @property
    def effect(self) -> xr.DataArray:
        """What rankings sort by: the first of the convention's metrics.

        The logit difference of answer and distractor where both are followed, else the
        probability of the first target, else the KL to the model's own prediction.
        """
        (name,) = self.convention.metrics
        if name == "logit_diff":
            logit = self.data["logit"]
            found = logit.sel(target="answer", drop=True) - logit.sel(
                target="distractor", drop=True
            )
        elif name == "prob":
            found = self.data["prob"].isel(target=0, drop=True)
        else:
            found = self.data[name]
        return found.rename("effect")

    @property
    def signed(self) -> bool:
        """Whether effects have a sign: differences of logits do."""
        return "logit_diff" in self.convention.metrics

    def plot(
        self,
        ax: Axes | None = None,
        *,
        prompt: int | None = None,
        value: Value | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Axes:
        """Draw one prompt as a grid of layers and tokens, or several as lines over layers.

        The grid has the first choice of the prediction in each cell, coloured by its
        probability or another ``value``. Lines are means over prompts (and positions) with
        the 95 % interval over prompts. Heads and neurons: the mean effect of each.

        Args:
            ax: Where to draw; a new figure by default.
            prompt: Which prompt to draw as a grid; by default the only one.
            value: What is drawn. Default: a grid's colours are probabilities of the first
                choice; lines are ranks of the targets, of running text the surprisal.
            start: The first position of the grid, counted from the prompt's first.
            stop: The one after the last; 16 after ``start`` by default.

        Raises:
            ValueError: The value was not measured; there is no such prompt, or no position in
                the range.
        """
        if value is not None and value not in self.data and value not in LABELS:
            raise ValueError(f"value={value!r} is none of {', '.join(LABELS)}.")
        if value in _OF_TARGETS and value not in self.data and prompt is None:
            raise ValueError(
                f"no targets were followed, so there is no {value}. Pass targets=."
            )
        if not {"head", "neuron"}.isdisjoint(self.data.dims):
            (name,) = self.convention.metrics
            label = f"mean {name} ({self.convention.metrics[name]})"
            return draw(self.effect, self.convention, label=label, signed=self.signed, ax=ax)
        many = self.data.sizes["prompt"] > 1 or self.data.sizes["position"] == 1
        if prompt is None and many:
            return self._lines(ax, value)
        return self._grid(ax, 0 if prompt is None else prompt, value or "prob", start, stop)

    def figure(self) -> Figure:
        """Draw what happens along the layers: rank, probability and entropy beside each other.

        Means over prompts (and positions) with 95 % intervals over prompts; without targets
        the entropy alone, with the KL to the model's own prediction where that is defined.

        Raises:
            ValueError: Heads or neurons were read, which ``plot`` ranks.
        """
        if not {"head", "neuron"}.isdisjoint(self.data.dims):
            raise ValueError(
                "heads and neurons have no trajectory along the layers. Use plot()."
            )
        shown: list[Value] = ["rank", "prob", "entropy"]
        if "rank" not in self.data:
            shown = ["entropy", "kl"]
        width = plotting.NOTEBOOK_WIDTH + 1.0 if len(shown) == 3 else plotting.NOTEBOOK_WIDTH
        figure = plotting.new_figure(width, 3.1)
        for ax, value in zip(figure.subplots(1, len(shown)), shown, strict=True):
            self._lines(ax, value)
            ax.set_title("", loc="left")
            for note in list(ax.texts):
                note.remove()
            named = ax.get_legend()
            if named is not None and value == "rank":  # the same lines as in the next panel
                named.remove()
        n = inference.per_case(self.data["entropy"]).sizes["prompt"]
        bands = "one prompt: no intervals" if n == 1 else f"95 % intervals over {n} prompts"
        heading = f"{self._title('along the layers')} · {bands}"
        figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
        return figure

    def _grid(
        self, ax: Axes | None, prompt: int, value: str, start: int, stop: int | None
    ) -> Axes:
        prompts = self.data.sizes["prompt"]
        if not 0 <= prompt < prompts:
            raise ValueError(f"prompt {prompt} was not read: there are 0..{prompts - 1}.")
        data = self.data.isel(prompt=prompt)
        inside = np.flatnonzero((data["top_id"] >= 0).any("layer").values)
        end = start + _MOST_COLUMNS if stop is None else stop
        if not 0 <= start < min(end, len(inside)):
            raise ValueError(
                f"no position lies between start={start} and stop={end}: prompt {prompt} has "
                f"{len(inside)}, from 0 on."
            )
        shown = data.isel(position=inside[start:end])
        colours = shown["top_prob" if value == "prob" else value]
        colours = colours.isel(target=0) if "target" in colours.dims else colours
        words = [[str(word) for word in row] for row in shown["top_token"].values]
        columns = [
            plotting.token_label(str(token)) or str(place)
            for place, token in zip(
                shown["position"].values, shown["token"].values, strict=True
            )
        ]
        label = "probability of the first choice" if value == "prob" else LABELS[value]
        ax = plotting.word_grid(
            colours.transpose("layer", "position").drop_vars("token"),
            words,
            ax=ax,
            label=label,
            columns=columns,
            limit=1.0 if value == "prob" else None,
        )
        ax.set_xlabel("token read, in its order")
        note = f"positions {start} to {start + len(columns) - 1} of {len(inside)}"
        plotting.title(
            ax, self._title(f"prompt {prompt}"), note if len(inside) > len(columns) else ""
        )
        return ax

    def _lines(self, ax: Axes | None, value: Value | None) -> Axes:
        told = list(self.data["target"].values) if "target" in self.data.dims else []
        if value is None:
            value = "rank" if told and told != ["next"] else "surprisal"
            if bool(self.data[value].isnull().all()):
                value = "kl"
        values = self.data[value].mean("position")
        if value == "rank":
            values = xr.ufuncs.log(self.data["rank"] + 1).mean("position")
        if "target" not in values.dims:
            values = values.expand_dims(target=[LABELS[value]])
        values = inference.per_case(values.transpose("layer", "target", "prompt"))
        n = values.sizes["prompt"]
        mean, ends = values.mean("prompt"), bootstrap_interval(inference.per_prompt(values))
        drawn = [mean, *(mean.copy(data=end) for end in ends)]
        if value == "rank":
            drawn = [xr.ufuncs.exp(each) for each in drawn]
        ax = plotting.trajectories(
            *drawn, ax=ax, label=LABELS[value], logarithmic=value == "rank"
        )
        note = (
            "one prompt: no intervals" if n == 1 else f"bands: 95 % interval over {n} prompts"
        )
        plotting.title(ax, self._title(f"{n} prompt{'s' if n > 1 else ''}"), note)
        return ax

    def _title(self, what: str) -> str:
        lens = f"{self.convention.settings['lens']} lens"
        return f"{lens} · {self.convention.site} · {self.convention.data}, {what}"


def labelled(
    model: TransformerBridge,
    data: Any,
    asked: Asked,
    units: Sequence[Unit],
    site: str,
    arrays: Mapping[str, np.ndarray],
) -> tuple[xr.Dataset, dict[str, str]]:
    """Return arrays ``prompt unit step`` with named axes, and the metric that ranks them."""
    layers = list(dict.fromkeys(unit.layer for unit in units))
    inner = list(dict.fromkeys(unit.index for unit in units))
    coords: dict[str, Any] = {"prompt": np.arange(len(asked.prompts))}
    if site == "mlp_post":
        axes, shape = ["neuron"], [len(units)]
        coords["neuron"] = [f"{unit.layer}.{unit.index}" for unit in units]
    else:
        axes, shape = ["layer"], [len(layers)]
        coords["layer"] = layers
        if site == "result":
            axes, shape = ["layer", "head"], [len(layers), len(inner)]
            coords["head"] = inner
    numbered = all(isinstance(label, int) for label in asked.labels)
    coords["position"] = asked.labels if numbered else [str(label) for label in asked.labels]
    coords["token"] = (("prompt", "position"), _tokens_read(model, asked))
    if asked.targets:
        coords["target"] = [name.replace("\0", "␀") for name in asked.targets]
    if isinstance(data, Task):
        coords["template"] = ("prompt", list(data.templates))
        if len(set(data.cases)) < len(data):
            coords["case"] = ("prompt", list(data.cases))
    place = [
        (i,) if site == "mlp_post" else _place(unit, layers, inner, site)
        for i, unit in enumerate(units)
    ]
    found = {}
    for name, array in arrays.items():
        blank = -1 if name == "top_id" else np.nan
        whole = np.full((len(array), *shape, *array.shape[2:]), blank, dtype=array.dtype)
        whole[(slice(None), *np.array(place).T)] = array
        dims = ["prompt", *axes, "position", *["target"] * (array.ndim > 3)]
        found[name] = (dims, whole)
    dims, ids = found["top_id"]
    found["top_token"] = (dims, token_texts(model, ids))
    both = {"answer", "distractor"} <= set(asked.targets)
    name = "logit_diff" if both else "prob" if asked.targets else "kl"
    return xr.Dataset(found, coords), {name: UNITS[name]}


def _place(
    unit: Unit, layers: Sequence[int], inner: Sequence[int | None], site: str
) -> tuple[int, ...]:
    at = layers.index(unit.layer)
    return (at, inner.index(unit.index)) if site == "result" else (at,)


def _tokens_read(model: TransformerBridge, asked: Asked) -> np.ndarray:
    read = asked.prompts.tokens.cpu().gather(1, asked.index.clamp(min=0))
    return token_texts(model, torch.where(asked.index < 0, -1, read).numpy())
