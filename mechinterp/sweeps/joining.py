"""Parts of one call joined into the result that the whole call would have given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechinterp.results import Result
from mechinterp.sweeps.items import Item


def joined(parts: Sequence[tuple[Item, Result]]) -> Result:
    """Return the parts of a call as one result: prompts after each other, layer by layer.

    Parts that are not there (yet) leave NaN in their place.
    """
    if len(parts) == 1:
        return parts[0][1]
    by_rows: dict[tuple[int, ...], list[Result]] = {}
    for item, result in sorted(parts, key=_order):
        by_rows.setdefault(tuple(item.part.get("prompts") or ()), []).append(result)
    pieces = [_layers(results) for results in by_rows.values()]
    first: Any = parts[0][1]
    whole = pieces[0] if len(pieces) == 1 else _along("prompt", pieces)
    arrays = {
        name: array.transpose(*first.data[name].dims) for name, array in whole.data_vars.items()
    }
    made = xr.Dataset(arrays, whole.coords, first.data.attrs)
    return type(first)(made, first.convention)


def _order(part: tuple[Item, Result]) -> tuple[int, int]:
    rows, layers = part[0].part.get("prompts"), part[0].part.get("layers")
    return (rows[0] if rows else 0, layers[0] if layers else 0)


def _layers(results: Sequence[Result]) -> xr.Dataset:
    data = [result.data for result in results]
    return data[0] if len(data) == 1 else _along("layer", data)


def _along(axis: str, parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Return datasets one after the other; other axes are those of all of them together."""
    swept = [name for name, array in parts[0].data_vars.items() if axis in array.dims]
    rest = [name for name in parts[0].data_vars if name not in swept]
    whole = xr.concat(
        [part[swept] for part in parts],
        axis,
        data_vars="minimal",
        coords="minimal",
        compat="override",
        join="outer",
        combine_attrs="override",
    )
    whole = whole.assign({name: parts[0][name] for name in rest})
    for name, coord in parts[0].coords.items():
        if coord.dtype.kind in "iu" and whole[name].dtype.kind == "f":
            kept = whole[name].values
            if not np.isnan(kept).any():
                whole = whole.assign_coords({name: (coord.dims, kept.astype(coord.dtype))})
    return whole
