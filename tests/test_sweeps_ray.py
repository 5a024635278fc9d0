"""A run on a real local Ray cluster: the same bits, also when a worker is killed."""

import threading
import time
from typing import Any

import psutil
import pytest
import torch
from zoo import hf, zoo

import mechinterp as mi
from mechinterp.sweeps import compare
from mechinterp.sweeps.shipping import packed, unpacked

SPEC: dict[str, Any] = {
    "tasks": "induction",
    "prompts": 4,
    "seeds": [0, 1],
    "methods": [
        {"method": "head_ablation", "kinds": ["zero", "mean"]},
        {"method": "activation_patching", "sites": ["z", "resid_pre"]},
    ],
    "split": {"prompts": 2},
}


@pytest.mark.parametrize("name", ["native", "gpt2", "gemma3", "bert"])
def test_a_model_that_was_shipped_is_the_same_and_shares_its_memory(name):
    model = zoo(name)
    shipped = packed(model)
    assert len(shipped.structure) < shipped.nbytes
    other = unpacked(shipped)
    assert mi.fingerprint(other) == mi.fingerprint(model)
    tokens = torch.arange(3, 9)[None]
    assert torch.equal(model(tokens), other(tokens))
    before = shipped.arrays[0].copy()
    pointers = {p.data_ptr() for p in other.parameters()}
    assert any(array.ctypes.data in pointers for array in shipped.arrays)
    assert (shipped.arrays[0] == before).all()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    mi.save_model(mi.load_model(hf("gpt2")), tmp_path / "model")
    return tmp_path / "model"


def actors() -> list[psutil.Process]:
    """The processes of this cluster's actors."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if p.is_running() and "ray::Computer" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_cluster_gives_the_same_bits_when_a_worker_is_killed(one_thread, folder, tmp_path):
    pytest.importorskip("ray")
    spec = {**SPEC, "models": str(folder)}
    alone = mi.run(spec, tmp_path / "alone", output="quiet")
    killed: list[int] = []

    def kill_one() -> None:
        values = tmp_path / "cluster" / "values"
        while not list(values.glob("*.parquet")):
            time.sleep(0.02)
        (victim, *_) = actors()
        killed.append(victim.pid)
        victim.kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    found = mi.run(spec, tmp_path / "cluster", backend="ray", workers=2, output="quiet")
    killer.join(timeout=10)
    assert killed and found.status().complete and not found.failures
    same = compare.compared(alone, found)
    assert same.same
    assert same.calls["equal"].tolist() == same.calls["both"].tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_model_with_a_device_map_is_placed_by_accelerate_inside_its_actor(
    one_thread, folder, tmp_path
):
    pytest.importorskip("ray")
    small = {**SPEC, "seeds": 0, "methods": ["head_ablation"]}
    alone = mi.run({**small, "models": str(folder)}, tmp_path / "alone", output="quiet")
    mapped = {**small, "models": {"source": str(folder), "device_map": "auto"}}
    found = mi.run(mapped, tmp_path / "run", backend="ray", workers=1, output="quiet")
    assert found.status().complete, found.failures
    assert compare.compared(alone, found, tolerance=1e-5).same


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_item_that_fails_on_a_cluster_is_recorded_with_its_traceback(
    one_thread, folder, tmp_path
):
    pytest.importorskip("ray")
    bad = {"method": "head_scores", "n": 2, "length": 60, "copies": 4}
    spec = {**SPEC, "models": str(folder), "seeds": 0, "methods": ["mlp_ablation", bad]}
    found = mi.run(spec, tmp_path / "run", backend="ray", workers=1, output="quiet")
    assert found.status().failed == 1 and found.status().done == 2
    ((_, error),) = found.failures.items()
    assert "Traceback" in error and "context holds 63" in error


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_more_workers_than_the_cluster_has_places_for_are_refused(folder, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(ValueError, match=r"2 workers need a CPU each.*Pass workers=1"):
            mi.run({**SPEC, "models": str(folder)}, tmp_path / "run", backend="ray", workers=2)
    finally:
        ray.shutdown()
