"""Results keep every number, label and convention, or say clearly why they cannot."""

import errno
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.axes import Axes

from mechinterp.plotting import new_axes
from mechinterp.results import Convention, Result, load_result
from mechinterp.stats import bootstrap_interval


@dataclass(frozen=True, eq=False)
class ToyResult(Result):
    @property
    def effect(self) -> xr.DataArray:
        return self.data["patched"]

    def plot(self, ax: Axes | None = None) -> Axes:
        return ax or new_axes()


@dataclass(frozen=True, eq=False)
class OtherResult(ToyResult):
    pass


def convention(**changes: Any) -> Convention:
    fields: dict[str, Any] = {
        "method": "toy",
        "model": "tiny",
        "fingerprint": "ab" * 32,
        "processed_weights": False,
        "dtype": "float32",
        "data": "made up",
        "bos": "given",
        "metrics": {"logit_diff": "nats"},
    }
    return Convention(**(fields | changes))


def toy(values: np.ndarray | None = None, **changes: Any) -> ToyResult:
    values = np.arange(12.0).reshape(3, 4) if values is None else values
    data = xr.Dataset(
        {"patched": (("prompt", "layer"), values, {"units": "nats", "long_name": "after"})},
        coords={"prompt": range(values.shape[0]), "layer": range(values.shape[1])},
        attrs={"note": "made by hand"},
    )
    return ToyResult(data, convention(**changes))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text() | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
labels = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
floats = st.sampled_from([np.float32, np.float64])
flags = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


@settings(max_examples=40, **flags)  # pyright: ignore[reportArgumentType]
@given(
    values=floats.flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=2, max_dims=2))
    ),
    attrs=st.dictionaries(st.text(min_size=1), json_values, max_size=3),
    settings_=st.dictionaries(st.text(), json_values, max_size=3),
    positions=json_values,
    data=st.data(),
)
def test_a_saved_result_loads_as_an_equal_one(
    tmp_path, values, attrs, settings_, positions, data
):
    roles = data.draw(st.lists(labels, min_size=values.shape[1], max_size=values.shape[1]))
    dataset = xr.Dataset(
        {
            "patched": (("prompt", "position"), values, attrs),
            "kept": (("prompt",), np.arange(values.shape[0]) % 2 == 0),
            "count": ((), 7),
        },
        coords={"position": np.array(roles, dtype=str), "prompt": np.arange(values.shape[0])},
        attrs=attrs,
    )
    result = ToyResult(dataset, convention(settings=settings_, positions=positions))
    loaded = ToyResult.load(result.save(tmp_path / "toy.nc"))
    assert loaded.equals(result)
    assert loaded.data["patched"].dtype == values.dtype
    assert loaded.data["kept"].dtype == bool
    assert loaded.data["patched"].attrs == attrs
    assert loaded.data.attrs == attrs


def test_results_with_another_number_label_attribute_convention_or_class_are_not_equal():
    result = toy()
    assert result.equals(toy())
    assert not result.equals(toy(np.arange(12.0).reshape(3, 4) + 1e-9))
    assert not result.equals(toy(seed=1))
    assert not result.equals(
        ToyResult(result.data.assign_coords(layer=[0, 1, 2, 4]), convention())
    )
    assert not result.equals(ToyResult(result.data.assign_attrs(note="else"), convention()))
    assert not result.equals(OtherResult(result.data, result.convention))
    assert not result.equals("a result")


def test_nan_is_kept_and_equals_itself(tmp_path):
    values = np.array([[np.nan, 1.0], [np.inf, -np.inf]])
    result = toy(values)
    assert ToyResult.load(result.save(tmp_path / "a.nc")).equals(result)


def test_a_full_disk_leaves_the_old_file_intact_and_nothing_beside_it(tmp_path, monkeypatch):
    path = toy().save(tmp_path / "a.nc")
    before = path.read_bytes()

    def full(self: xr.Dataset, target: Any, **_: Any) -> None:
        target.write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(OSError, match="No space left"):
        toy(seed=3).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        toy().save(tmp_path / "nowhere" / "a.nc")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = toy(np.random.default_rng(0).normal(size=(30, 40))).save(tmp_path / "a.nc")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"a\.nc cannot be read as a result.*truncated"):
        ToyResult.load(path)


def test_a_foreign_file_is_refused(tmp_path):
    text, foreign = tmp_path / "a.txt", tmp_path / "a.nc"
    text.write_text("not a result")
    xr.Dataset({"x": ("y", [1, 2])}).to_netcdf(foreign, engine="h5netcdf")
    with pytest.raises(ValueError, match="not a netCDF-4 file"):
        ToyResult.load(text)
    with pytest.raises(ValueError, match="not one that mechinterp wrote"):
        load_result(foreign)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_result(tmp_path / "none.nc")


def test_a_result_of_another_kind_is_refused(tmp_path):
    path = toy().save(tmp_path / "a.nc")
    with pytest.raises(ValueError, match="holds a ToyResult, not a OtherResult"):
        OtherResult.load(path)
    with pytest.raises(ValueError, match=r"'ToyResult', which mechinterp .* does not know"):
        load_result(path)


def test_a_file_of_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mechinterp.results.FORMAT", 99)
    path = toy().save(tmp_path / "a.nc")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99"):
        ToyResult.load(path)


def test_what_json_cannot_hold_is_refused_when_the_convention_is_made():
    with pytest.raises(ValueError, match="settings must be JSON"):
        convention(settings={"rate": float("nan")})
    with pytest.raises(ValueError, match="positions must be JSON"):
        convention(positions=slice(1, 2))


def test_a_convention_survives_json_and_ignores_fields_it_does_not_know():
    made = convention(positions=("io", "end"), settings={"a": (1, 2)})
    assert Convention.from_json(made.to_json()) == made
    assert Convention.from_json(made.to_json()[:-1] + ', "of_the_future": 1}') == made


def test_top_ranks_by_the_size_of_the_mean_effect_and_puts_nan_last():
    values = np.array([[1.0, -5.0, np.nan, 2.0], [1.0, -6.0, 3.0, 4.0]])
    table = toy(values).top(4)
    assert table["layer"].tolist() == [1, 3, 0, 2]
    assert table["effect"].tolist()[:3] == [-5.5, 3.0, 1.0] and np.isnan(
        table["effect"].iloc[3]
    )


def test_top_gives_the_interval_of_each_mean():
    values = np.random.default_rng(0).normal(size=(40, 3)) + np.array([0, 3, -9])
    table = toy(values).top(2)
    low, mean, high = (table[name].to_numpy() for name in ("low", "effect", "high"))
    assert table["layer"].tolist() == [2, 1]
    assert np.all(low < mean) and np.all(mean < high) and np.all(high - low < 1)


def test_a_metric_that_was_not_measured_is_an_error():
    with pytest.raises(ValueError, match="'rank' was not measured, only logit_diff"):
        toy().top(metric="rank")


def test_the_frame_has_one_row_per_number():
    frame = toy().to_frame()
    assert len(frame) == 12 and set(frame) == {"prompt", "layer", "patched"}
    assert frame["patched"].tolist() == list(range(12))


@pytest.mark.parametrize("size", [8, 30])
def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says(size):
    rng = np.random.default_rng(0)
    low, high = bootstrap_interval(rng.normal(1.0, 2.0, size=(400, size)), n_resamples=500)
    covered = ((low <= 1.0) & (high >= 1.0)).mean()
    assert 0.86 < covered < 0.98


def test_equal_samples_give_a_point_and_a_single_one_gives_nothing():
    low, high = bootstrap_interval(np.array([[2.0, 2.0, 2.0], [1.0, 2.0, 3.0]]))
    assert low[0] == high[0] == 2.0 and low[1] < 2.0 < high[1]
    assert np.isnan(bootstrap_interval(np.array([3.0]))).all()


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(1).normal(size=(3, 10))
    assert np.array_equal(
        bootstrap_interval(values, seed=4), bootstrap_interval(values, seed=4)
    )
