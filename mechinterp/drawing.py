"""How effects per place become one picture: a grid or a line, its marks, its title."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from mechinterp import inference, plotting
from mechinterp.results import Convention
from mechinterp.stats import bootstrap_interval

_MOST_ROWS = 24
_COLUMNS = ("position", "receiver")  # what runs to the right where there are several axes


def draw(
    effect: xr.DataArray,
    convention: Convention,
    *,
    label: str,
    scale: xr.DataArray | float = 1.0,
    intervals: str = "the mean",
    signed: bool = True,
    shown: slice = slice(None),
    ax: Axes | None = None,
) -> Axes:
    """Draw the mean effect of every place, times ``scale``: a grid over two axes, or a line.

    A dot in a grid, a filled point on a line: significant at 0.05 after correction for all
    cells by max-T, unless the effects are sizes (not ``signed``), which no test of the mean
    fits. Lines have a band, the 95 % interval of the mean over prompts times ``scale``;
    ``intervals`` says of what that is. Of the axis ``position`` the part ``shown`` is drawn.
    """
    draws, effect = effect.sizes["prompt"], inference.per_case(effect)
    mean = effect.mean("prompt", skipna=False)
    cells = xr.Dataset({"shown": mean * scale})
    n = effect.sizes["prompt"]
    tested = signed and n > 1
    cells["marked"] = (
        inference.adjusted_p(effect) < inference.ALPHA if tested else mean.isnull() & False
    )
    if effect.ndim > 2:
        note = inference.plot_note(effect, "dot:", tested=signed)
        cells = readable(_part(cells, shown))
        note += f"\n{cells.attrs['cut']}" if "cut" in cells.attrs else ""
        ax = plotting.heat_grid(
            cells["shown"], ax=ax, label=label, marked=cells["marked"], signed=signed
        )
    else:
        note = inference.plot_note(effect, "filled:", intervals=intervals, tested=signed)
        values = inference.per_prompt(effect)
        ends = [mean.copy(data=end) * scale for end in bootstrap_interval(values)]
        cells["low"], cells["high"] = xr.ufuncs.fmin(*ends), xr.ufuncs.fmax(*ends)
        cells = readable(_part(cells, shown))
        ax = plotting.line(
            cells["shown"],
            low=cells["low"],
            high=cells["high"],
            ax=ax,
            label=label,
            marked=cells["marked"] if tested else None,
        )
    plotting.title(ax, f"{what(convention)} · {about(convention, draws, n)}", note)
    return ax


def _part(cells: xr.Dataset, shown: slice) -> xr.Dataset:
    """Return the part of the positions that is to be drawn."""
    if shown == slice(0, None) or shown == slice(None):
        return cells
    if "position" not in cells.dims:
        raise ValueError(
            "there is no axis of positions to show a part of. Leave start and stop out."
        )
    part = cells.isel(position=shown)
    if not part.sizes["position"]:
        raise ValueError(
            f"no position lies between start={shown.start} and stop={shown.stop}: there are "
            f"{cells.sizes['position']}."
        )
    return part


def about(convention: Convention, draws: int, n: int) -> str:
    """Return direction, data and number of prompts, and of their draws if there are more."""
    several = f"{draws} draws of " if draws > n else ""
    over = f"{convention.data}, {several}{n} prompt{'s' if n > 1 else ''}"
    return " · ".join(filter(None, [convention.direction, over]))


def what(convention: Convention) -> str:
    """Return what was swept, in few words."""
    told = convention.settings
    if "receivers" not in told:
        return str(convention.site or "edges")
    senders = told["senders"] if isinstance(told["senders"], str) else "senders"
    sets = list(told["receivers"])
    ends = "receivers" if len(sets) > 1 or len(sets[0]) > 30 else sets[0]
    through = " through MLPs" if told["frozen"] == "attention" else ""
    return " → ".join([senders, *(", ".join(stop) for stop in told["via"]), ends]) + through


def readable(cells: xr.Dataset) -> xr.Dataset:
    """Reduce ``shown`` and what goes with it to one or two axes, with ticks one can read.

    Of more axes all but one become rows, and the rows with the largest values are kept;
    ``attrs["cut"]`` says how many of them where some are left out.
    """
    if "position" in cells.dims and "token" in cells.coords:
        places = zip(cells["position"].values, cells["token"].values, strict=True)
        named = [f"{place} {plotting.token_label(str(t))}".strip() for place, t in places]
        cells = cells.assign_coords(position=np.array(named, dtype=str))
    if cells["shown"].ndim > 2:
        cells = _strongest_rows(cells)
    if not cells.dims:
        cells = cells.expand_dims(place=["all positions"])
    return cells


def _strongest_rows(cells: xr.Dataset) -> xr.Dataset:
    """Return one row per place, for those with the largest size in any column."""
    axes = [str(dim) for dim in cells["shown"].dims]
    column = next((axis for axis in _COLUMNS if axis in axes), axes[-1])
    kept_axes = [axis for axis in axes if axis != column]
    rows = cells.stack(place=kept_axes, create_index=False).transpose("place", ...)
    labels = zip(*(rows[axis].values for axis in kept_axes), strict=True)
    names = [".".join(map(str, each)) for each in labels]
    rows = rows.drop_vars(kept_axes).assign_coords(
        place=("place", names, {"long_name": ".".join(kept_axes)})
    )
    size = np.abs(np.nan_to_num(rows["shown"].values)).max(1)
    kept = np.sort(np.argsort(-size, kind="stable")[:_MOST_ROWS])
    if len(kept) < len(names):
        what = ".".join(kept_axes)
        said = f"{len(kept)} of {len(names)} rows ({what}), those with the largest values"
        rows = rows.assign_attrs(cut=said)
    return rows.isel(place=kept)
