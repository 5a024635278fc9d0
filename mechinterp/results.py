"""One kind of result: labelled numbers that carry the conventions they were made under.

A result is an ``xarray.Dataset`` with named axes beside a :class:`Convention`. Each method has
its own final class of result, which adds what its numbers mean and how they are drawn. Files
are netCDF, with everything that is not a number as JSON in their attributes.
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from html import escape
from importlib import import_module, metadata
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from mechinterp import html, inference, stats
from mechinterp._files import written_beside
from mechinterp.inference import FewPromptsWarning
from mechinterp.stats.flips import N_FLIPS
from mechinterp.stats.intervals import METHODS

FORMAT = 1
_PACKAGES = ("mechinterp-toolkit", "torch", "transformer-lens", "transformers", "xarray")

_R = TypeVar("_R", bound="Result")  # beartype checks methods one by one and knows no Self


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that reported numbers depend on."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, metadata.version(name)) for name in _PACKAGES)


@dataclass(frozen=True)
class Convention:
    """What has to be known to repeat a number or to compare it with another one.

    A field that a method has no use for stays ``None``. ``metrics`` maps each metric's name
    to its unit, ``settings`` takes whatever else the method was told, as JSON.
    """

    method: str
    model: str
    fingerprint: str
    processed_weights: bool
    dtype: str
    data: str
    bos: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    site: str | None = None
    direction: str | None = None
    positions: Any = None
    ablation: str | None = None
    normaliser: str | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        for name in ("metrics", "positions", "settings", "versions"):
            object.__setattr__(self, name, _as_json(getattr(self, name), name))

    def to_json(self) -> str:
        """Return the convention as one line of JSON; ``from_json`` gives back an equal one."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Convention":
        """Return the convention whose ``to_json`` is ``text``, without fields unknown here."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """Labelled numbers and the convention they were made under.

    ``data`` has named axes; values per prompt are kept, so means and intervals can be taken
    over any subset afterwards.
    """

    data: xr.Dataset
    convention: Convention

    @property
    @abstractmethod
    def effect(self) -> xr.DataArray:
        """The number that rankings sort by, in the metric's unit."""

    def effect_of(self, metric: str | None) -> xr.DataArray:
        """Return the effect by one metric (default: the first)."""
        return self.of_metric(self.effect, metric)

    @property
    def signed(self) -> bool:
        """Whether effects have a sign; otherwise they are sizes, and no test is made."""
        return True

    @property
    def chosen_of(self) -> int | None:
        """Out of how many cells these were chosen on the same prompts; None if not chosen."""
        return None

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result and return the axes that it was drawn on."""

    def to_frame(self) -> pd.DataFrame:
        """Return one row per number, with a column for every axis."""
        return self.data.to_dataframe().reset_index()

    def top(self, n: int = 10, *, metric: str | None = None) -> pd.DataFrame:
        """Return the ``n`` cells with the largest effect in size, the largest first.

        Columns: the axes of a cell, ``effect`` (mean over prompts, in the metric's unit),
        ``low`` and ``high``, the 95 % bootstrap interval of that mean, and ``p_adjusted``, its
        p-value corrected for all cells (``statistics`` says how). The line below the table
        says over how many prompts, and what so few of them cannot say; over one prompt the
        three are NaN; effects that are sizes have no p-value. Draws of one case count as one
        prompt. With several metrics, ``metric`` says which one ranks (default: the first).
        """
        effect = inference.per_case(self.effect_of(metric))
        if set(effect.dims) <= {"prompt"}:
            effect = effect.expand_dims(place=["all positions"])
        axes = [str(dim) for dim in effect.dims if dim != "prompt"]
        mean = effect.mean("prompt", skipna=False) if "prompt" in effect.dims else effect
        # NaN goes last.
        order = np.argsort(-self._rank(mean.values), axis=None, kind="stable")[:n]
        where = np.unravel_index(order, mean.shape)
        columns = {axis: effect[axis].values[i] for axis, i in zip(axes, where, strict=True)}
        table = NotedFrame(columns | {"effect": mean.values[where]})
        if "prompt" in effect.dims:
            shown = inference.per_prompt(effect)[where]
            table["low"], table["high"] = stats.bootstrap_interval(shown)
            if self.signed:
                table["p_adjusted"] = inference.adjusted_p(effect).values[where]
            table.attrs["note"] = self._note(effect, metric)
        return table

    def statistics(
        self,
        *,
        metric: str | None = None,
        by: str = "prompt",
        confidence: float = 0.95,
        method: str = METHODS[0],
        correction: str | None = "max_t",
        margin: float | None = None,
        n_flips: int = N_FLIPS,
        seed: int = 0,
    ) -> xr.Dataset:
        """Return every cell's mean effect over prompts, its interval and its p-values.

        ``effect``, ``low`` and ``high`` are in the metric's unit. ``p`` asks whether there is
        an effect at all (sign flips of whole prompts, two-sided), ``p_adjusted`` the same
        after looking at all cells, ``p_equivalent`` whether it is negligible: small when the
        mean surely lies within ±margin. The attributes record all of it.

        Args:
            metric: Which of several metrics (default: the first).
            by: What is resampled and flipped as a whole: each ``"prompt"``, to speak about
                prompts like these, or all of a ``"template"``, to speak about other templates.
            confidence: Of the interval.
            method: ``"percentile"``, or ``"BCa"``, which corrects for skew but covers too
                seldom where a few prompts have huge effects.
            correction: ``"max_t"`` bounds the chance of a single false call among the cells,
                ``"fdr"`` the share of false ones among the calls; None leaves it out. Cells
                that were chosen on the same prompts (an audit's) are corrected for all that
                they were chosen of, by Holm instead of max-T.
            margin: Largest effect that is negligible, in the metric's unit. Default: 5 % of
                the mean clean-corrupted gap; without these baselines, no ``p_equivalent``.
            n_flips: How many sign patterns, at least 1; all are gone through when this
                suffices. An audit's cells take 100 per cell that they were chosen of, at least.
            seed: Of resamples and flips.

        Raises:
            ValueError: The numbers have no prompt axis, or there is one prompt (template)
                only, so that there are no intervals; an unknown option; no template labels;
                the effects are sizes.

        Warns:
            FewPromptsWarning: There are fewer than 40 prompts (templates). It says how often
                such intervals truly cover, and whether any p below 0.05 exists.

        The sources stand in ``mechinterp.stats``.
        """
        if not self.signed:
            raise ValueError(
                "these effects are sizes, 0 or more, so no test asks whether their mean is 0. "
                "Score with signs (for atp*, grad_drop=False), or audit them."
            )
        effect = self.effect_of(metric)
        table = inference.statistics(
            effect,
            by=by,
            confidence=confidence,
            method=method,
            correction=correction,
            margin=self._margin(metric) if margin is None else margin,
            n_flips=n_flips,
            seed=seed,
            chosen_of=self.chosen_of,
        )
        if table.attrs["note"]:
            warnings.warn(f"{table.attrs['note']}.", FewPromptsWarning, stacklevel=2)
        return table

    def prompts_needed(
        self,
        half_width: float,
        *,
        metric: str | None = None,
        by: str = "prompt",
        confidence: float = 0.95,
    ) -> xr.DataArray:
        """Return how many prompts each cell needs for an interval of ``effect ± half_width``.

        Judged by the spread over these prompts. NaN where one prompt shows no spread.

        Args:
            half_width: In the metric's unit.
            metric: Which of several metrics (default: the first).
            by: ``"prompt"``, or ``"template"`` for the number of templates, each of as many
                prompts.
            confidence: Of the interval.

        Raises:
            ValueError: The numbers have no prompt axis or template labels, or ``half_width``
                is not positive.
        """
        effect = inference.per_case(self.effect_of(metric))
        values, clusters = inference.per_prompt(effect), inference.clusters_of(effect, by)
        needed = stats.prompts_needed(values, half_width, confidence, clusters)
        return effect.isel(prompt=0, drop=True).copy(data=needed).rename("prompts_needed")

    def _note(self, effect: xr.DataArray, metric: str | None) -> str:
        """Return the lines below ``top``'s table of effects over prompts."""
        return inference.table_note(effect, self.signed)

    def _rank(self, mean: np.ndarray) -> np.ndarray:
        """Return what ``top`` sorts by: the size of the effect."""
        return np.abs(mean)

    def _margin(self, metric: str | None) -> float | None:
        """The default margin of a negligible effect: NaN, with a warning, without a gap."""
        if not {"clean", "corrupted"} <= set(self.data):
            return None
        name = metric or next(iter(self.convention.metrics))
        runs = self.data[["clean", "corrupted"]]
        runs = runs.sel(metric=name) if "metric" in runs.dims else runs
        if doubt := inference.gap_doubt(runs, [name], "p_equivalent is NaN"):
            warnings.warn(f"{doubt} Pass margin= in the metric's unit.", stacklevel=3)
        return inference.NEGLIGIBLE * abs(float(inference.mean_gap(runs)))

    def of_metric(self, values: xr.DataArray, metric: str | None = None) -> xr.DataArray:
        """Return the part of ``values`` that belongs to one metric (default: the first).

        Raises:
            ValueError: ``metric`` is not one that was measured.
        """
        known = list(self.convention.metrics)
        if metric is not None and metric not in known:
            raise ValueError(f"metric {metric!r} was not measured, only {', '.join(known)}.")
        return values.sel(metric=metric or known[0]) if "metric" in values.dims else values

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what was measured, the largest effects, a picture."""
        return html.result_html(self)

    def equals(self, other: object) -> bool:
        """Whether ``other`` has the same class, numbers, labels and convention (NaN = NaN)."""
        return (
            type(other) is type(self)
            and isinstance(other, Result)
            and self.data.identical(other.data)
            and self.convention == other.convention
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the result to ``path`` as netCDF, completely or not at all; return the path.

        Raises:
            OSError: The disk is full or the folder is missing; an older file stays intact.
            ValueError: An attribute is not JSON, or a label contains a null character.
        """
        labels = {str(name): dict(array.attrs) for name, array in self.data.variables.items()}
        attributes = _as_json({"dataset": self.data.attrs, "variables": labels}, "attrs")
        stored = self.data.drop_attrs().drop_encoding()
        for name, attrs in labels.items():
            _refuse_null(name, stored[name].values)
            # Other readers of netCDF understand these two; ours reads the JSON.
            stored[name].attrs = {
                k: v
                for k, v in attrs.items()
                if k in ("units", "long_name") and isinstance(v, str)
            }
        stored.attrs = {
            "mechinterp_result": type(self).__name__,
            "mechinterp_format": FORMAT,
            "convention": self.convention.to_json(),
            "attributes": json.dumps(attributes),
        }
        with written_beside(path) as part:
            stored.to_netcdf(part, engine="h5netcdf")
        return Path(path)

    @classmethod
    def load(cls: type[_R], path: str | PathLike[str]) -> _R:
        """Return the result that ``save`` wrote to ``path``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, is not a result, or holds another kind of result.
        """
        kind, data, convention = _read(Path(path))
        if kind != cls.__name__:
            raise ValueError(
                f"{path} holds a {kind}, not a {cls.__name__}. Open it with mi.load_result."
            )
        return cls(data, convention)


class NotedFrame(pd.DataFrame):
    """A table that shows ``attrs["note"]`` below itself; what is cut out of it is plain."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *self._notes()])

    def _repr_html_(self) -> str | None:
        html = super()._repr_html_()  # pyright: ignore[reportCallIssue]
        notes = "<br>".join(map(escape, self._notes()))
        return f"{html}<p><small>{notes}</small></p>" if html and notes else html

    def _notes(self) -> list[str]:
        return self.attrs.get("note", "").splitlines()


def load_result(path: str | PathLike[str]) -> Result:
    """Return the result in the file ``path``, whichever method made it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, is not a result, or holds an unknown kind of result.
    """
    package = import_module("mechinterp")
    kind, data, convention = _read(Path(path))
    # Only public names are looked up: a file must not decide what gets imported.
    found = getattr(package, kind) if kind in package.__all__ else None
    if not (isinstance(found, type) and issubclass(found, Result)):
        raise ValueError(
            f"{path} holds a {kind!r}, which mechinterp {package.__version__} does not know. "
            "It was probably written by a newer version: update mechinterp-toolkit."
        )
    return found(data, convention)


def _read(path: Path) -> tuple[str, xr.Dataset, Convention]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so there is no result to load. "
            "result.save(path) writes one."
        )
    try:
        # Decoding of times is off: a metric's unit is a word, and may look like "days since".
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as opened:
            data = opened.load()
    except (OSError, ValueError, KeyError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as a result: it is not a netCDF-4 file, or it is truncated "
            f"({error}). Save the result again, or copy the file again."
        ) from error
    kind = data.attrs.get("mechinterp_result")
    if kind is None:
        raise ValueError(
            f"{path} is a netCDF file, but not one that mechinterp wrote. Read it with xarray."
        )
    if data.attrs["mechinterp_format"] > FORMAT:
        raise ValueError(
            f"{path} has format {data.attrs['mechinterp_format']}, this version reads up to "
            f"{FORMAT}. Update mechinterp-toolkit."
        )
    convention = Convention.from_json(data.attrs["convention"])
    attributes = json.loads(data.attrs["attributes"])
    data.attrs = attributes["dataset"]
    for name, attrs in attributes["variables"].items():
        data[name].attrs = attrs
    return str(kind), data, convention


def _as_json(value: object, name: str) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be JSON to be recorded, but {value!r} is not: {error}"
        ) from None


def _refuse_null(name: str, values: np.ndarray) -> None:
    if values.dtype.kind in "OU" and any("\0" in str(label) for label in values.flat):
        raise ValueError(
            f"labels of {name!r} contain a null character, which netCDF cuts off. Take it out."
        )
