"""The numbers of one item in a Parquet file: a row per number, its axes in columns.

Any Parquet reader makes tables of many such files. What it takes to get the labelled result
back (shapes, labels, the convention) and the item itself stand in the file's metadata, so that
a lost ledger can be rebuilt from the files. Nothing is ever unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from mechinterp._files import written_beside
from mechinterp.results import Convention, Result
from mechinterp.sweeps.items import Item

FORMAT = 1
_KEY = b"mechinterp"
_NUMBERS = ("n", "seed", "window")


class DamagedValuesError(ValueError):
    """A file of values is not what was written."""


@dataclass(frozen=True)
class Written:
    """What is known about a file of values: its item, how it was made, and a digest.

    ``sha256`` is that of the numbers and their labels, whatever the file around them.
    ``machine`` says what computed them: ``device`` and ``threads``, on which the last bits
    depend.
    """

    item: Item
    sha256: str
    rows: int
    seconds: float
    finished: float
    machine: Mapping[str, Any]


def write_values(
    folder: Path,
    item: Item,
    result: Result,
    *,
    seconds: float,
    finished: float,
    machine: Mapping[str, Any],
) -> Written:
    """Write an item's result to ``folder/KEY.parquet``: complete, on the disk, or absent.

    Raises:
        OSError: The disk is full, or the folder is missing.
    """
    table, described = _table(item, result)
    found = _digest(result)
    told = {
        "format": FORMAT,
        "key": item.key,
        "item": item.to_json(),
        "sha256": found,
        "rows": table.num_rows,
        "seconds": seconds,
        "finished": finished,
        "machine": dict(machine),
        **described,
    }
    table = table.replace_schema_metadata({_KEY: json.dumps(told).encode()})
    with written_beside(path_of(folder, item.key), durable=True) as part:
        pq.write_table(table, part, compression="zstd")
    return Written(item, found, table.num_rows, seconds, finished, machine)


def path_of(folder: Path, key: str) -> Path:
    """Return where the values of an item are."""
    return folder / f"{key}.parquet"


def read_written(path: Path) -> Written:
    """Return what a file of values says about itself, without its numbers.

    Raises:
        DamagedValuesError: It is truncated, of another item than its name says, or no such
            file at all.
    """
    told, rows = _told(path)
    item = Item.from_json(told["item"])
    if rows != told["rows"] or item.key != told["key"] or path.stem != item.key:
        raise DamagedValuesError(
            f"{path} is not the file of values that its name says. "
            "Remove it and run the same spec again."
        )
    return Written(
        item,
        told["sha256"],
        rows,
        told["seconds"],
        told["finished"],
        told.get("machine", {}),
    )


def read_result(path: Path, sha256: str | None = None) -> Result:
    """Return the result in a file of values, equal to the one that was written.

    Raises:
        DamagedValuesError: It cannot be read, or its numbers are not those of the digest
            ``sha256`` (by default its own).
    """
    told, _ = _told(path)
    package = import_module("mechinterp")
    kind = told["result"]
    found: Any = getattr(package, kind) if kind in package.__all__ else None
    if not (isinstance(found, type) and issubclass(found, Result)):
        raise DamagedValuesError(f"{path} holds a {kind!r}, which is no kind of result here.")
    try:
        table = pq.read_table(path, columns=["variable", "value", "text"])
    except (OSError, pa.ArrowException) as error:
        raise DamagedValuesError(f"{path} cannot be read ({error}).") from error
    result = found(_dataset(table, told), Convention.from_json(told["convention"]))
    if _digest(result) != (sha256 or told["sha256"]):
        raise DamagedValuesError(
            f"the numbers in {path} are not those that were written. Remove the file and run "
            "the same spec again: it does what is missing."
        )
    return result


def _told(path: Path) -> tuple[dict[str, Any], int]:
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        if not path.is_file():
            raise DamagedValuesError(f"{path} is missing.") from error
        raise DamagedValuesError(f"{path} is not a whole Parquet file ({error}).") from error
    told = (metadata.metadata or {}).get(_KEY)
    if told is None:
        raise DamagedValuesError(f"{path} is Parquet, but not of a sweep.")
    found = json.loads(told)
    if found["format"] > FORMAT:
        raise DamagedValuesError(
            f"{path} was written by a newer version of mechinterp. Update mechinterp-toolkit."
        )
    return found, metadata.num_rows


def _table(item: Item, result: Result) -> tuple[pa.Table, dict[str, Any]]:
    data = result.data
    axes = list(
        dict.fromkeys(str(dim) for array in data.data_vars.values() for dim in array.dims)
    )
    columns: dict[str, list[Any]] = {name: [] for name in ("variable", *axes, "value", "text")}
    described: dict[str, Any] = {}
    for name, array in data.data_vars.items():
        numbers = array.values.dtype.kind in "fiub"
        flat = array.values.ravel()
        columns["variable"].append(pa.array([str(name)] * flat.size, pa.string()))
        index = np.indices(array.shape).reshape(array.ndim, flat.size)
        for axis in axes:
            if axis not in array.dims:
                columns[axis].append(pa.nulls(flat.size, _type(data, axis)))
                continue
            labels = _labels(data, axis)[index[array.dims.index(axis)]]
            columns[axis].append(pa.array(labels.tolist(), _type(data, axis)))
        value = flat.astype(np.float64) if numbers else None
        columns["value"].append(
            pa.array(value) if numbers else pa.nulls(flat.size, pa.float64())
        )
        text = (
            pa.nulls(flat.size, pa.string()) if numbers else pa.array(flat.astype(str).tolist())
        )
        columns["text"].append(text)
        described[str(name)] = {
            "dims": list(map(str, array.dims)),
            "shape": list(array.shape),
            "dtype": str(array.dtype) if numbers else "text",
            "attrs": dict(array.attrs),
        }
    made = {name: pa.chunked_array(parts) for name, parts in columns.items()}
    rows = len(made["variable"])
    said = {name: value for name, value in item.labels.items() if name not in made}
    grid = {
        name: pa.repeat(pa.scalar(value, pa.int64() if name in _NUMBERS else pa.string()), rows)
        for name, value in {**said, "call": item.call}.items()
    }
    coords = {
        str(name): {
            "dims": list(map(str, coord.dims)),
            "values": coord.values.tolist(),
            "dtype": "text" if coord.dtype.kind in "OU" else str(coord.dtype),
            "attrs": dict(coord.attrs),
        }
        for name, coord in data.coords.items()
    }
    return pa.table({**grid, **made}), {
        "result": type(result).__name__,
        "convention": result.convention.to_json(),
        "variables": described,
        "coords": coords,
        "attrs": dict(data.attrs),
    }


def _labels(data: xr.Dataset, axis: str) -> np.ndarray:
    labels = data[axis].values
    # Positions are numbers in one call and roles in another: one type for all of them.
    return labels.astype(str) if axis == "position" else labels


def _type(data: xr.Dataset, axis: str) -> pa.DataType:
    kind = _labels(data, axis).dtype.kind
    return {"i": pa.int64(), "u": pa.int64(), "f": pa.float64()}.get(kind, pa.string())


def _dataset(table: pa.Table, told: Mapping[str, Any]) -> xr.Dataset:
    value, text = table["value"].to_numpy(), table["text"]
    arrays, start = {}, 0
    for name, each in told["variables"].items():
        size = int(np.prod(each["shape"], dtype=int))
        if each["dtype"] == "text":
            flat = np.array(text.slice(start, size).to_pylist(), dtype=str)
        else:
            flat = value[start : start + size].astype(each["dtype"])
        shaped = flat.reshape(each["shape"])
        arrays[name] = xr.DataArray(shaped, dims=each["dims"], attrs=each["attrs"])
        start += size
    coords = {
        name: (each["dims"], _coord(each), each["attrs"])
        for name, each in told["coords"].items()
    }
    return xr.Dataset(arrays, coords, told["attrs"])


def _coord(each: Mapping[str, Any]) -> np.ndarray:
    return np.array(each["values"], dtype=str if each["dtype"] == "text" else each["dtype"])


def _digest(result: Result) -> str:
    """Return the sha256 of a result's numbers and labels."""
    found = sha256(type(result).__name__.encode())
    for name, array in sorted(result.data.variables.items(), key=lambda each: str(each[0])):
        found.update(f"{name}{tuple(array.dims)}{array.shape}{array.dtype.kind}".encode())
        if array.dtype.kind in "OU":
            found.update("\0".join(map(str, array.values.ravel())).encode())
        else:
            found.update(np.ascontiguousarray(array.values).tobytes())
    return found.hexdigest()
