"""What the README shows works as it is written, and its numbers are those of scripts."""

import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conformance import public_methods

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(*languages: str) -> list[str]:
    fence = re.compile(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return fence.findall(TEXT)


TABLED = re.findall(
    r"`((?:mi|manager|result)\.[^`]+\([^`]*)`", "\n".join(re.findall(r"^\|.*", TEXT, re.M))
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder in which the examples ran from top to bottom, and the names that they left."""
    matplotlib.use("agg")
    folder, names = tmp_path_factory.mktemp("readme"), {}
    with contextlib.chdir(folder):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
    yield folder, names
    plt.close("all")


def test_the_examples_run(ran):
    folder, _ = ran
    assert [path.name for path in folder.iterdir()] == ["induction_z.nc"]


@pytest.mark.filterwarnings("ignore::mechinterp.FewPromptsWarning")
@pytest.mark.parametrize("call", TABLED)
def test_the_calls_in_tables_run_as_they_stand(call, ran, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eval(call, dict(ran[1]))
    plt.close("all")


def test_every_method_has_its_line():
    assert set(public_methods()) <= set(re.findall(r"mi\.(\w+)", " ".join(TABLED)))


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "scripts/results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_benchmark_table_is_what_the_script_measured():
    bench = script("bench_patching")
    start, end = bench.MARKS
    table = TEXT.partition(start)[2].partition(end)[0].strip()
    assert table == bench.markdown(measured("bench_patching"))


def test_the_seconds_of_path_patching_are_what_the_script_measured():
    [told] = re.findall(r"^Path patching.*?\n\n", TEXT, re.M | re.S)
    found = {
        (row["receivers"], row["senders"], row["mlps"]): row
        for row in measured("bench_paths")["rows"]
    }
    frozen, answer = (found["the queries of layer 24", "z", m] for m in ("frozen", "answer"))
    assert f"the {frozen['paths']} heads" in told
    for row in (frozen, answer):
        assert f"{row['seconds']:.1f} s" in told and f"{row['plain_seconds']:.0f} s" in told


def test_the_seconds_by_onednn_are_what_the_script_measured():
    [told] = re.findall(r"^On AMD processors.*?\n\n", TEXT, re.M | re.S)
    found = measured("bench_products")
    assert found["held_back"]
    for row in found["rows"]:
        assert f"{row['onednn']:.1f} s instead of {row['mkl']:.1f} s" in " ".join(told.split())


def test_the_seconds_of_head_ablation_are_what_the_script_measured():
    [told] = re.findall(r"^Head ablation there.*?\n\n", TEXT, re.M | re.S)
    found = measured("bench_ablation")
    rows = [row for kind in ("single heads", "greedy") for row in found[kind]["rows"]]
    assert len(rows) == 7
    assert f"all {rows[0]['cells']} heads" in told and f"{rows[0]['prompts']} prompts" in told
    assert all(f"{row['seconds']:.0f} s" in told for row in rows)


def test_the_kills_are_those_that_the_script_counted():
    found = measured("sweep_killing")
    assert f"{found['kills']} times at random" in TEXT
    assert not any(
        found[key] for key in ("items_lost", "items_doubled", "rounds_with_other_numbers")
    )


def test_there_are_exactly_two_set_up_commands():
    commands = [line for block in blocks("sh", "bash") for line in block.splitlines()]
    assert [c for c in commands if "pip install" in c] == [
        "pip install -c constraints.txt -e . && mechinterp quickstart",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_what_it_links_to_is_there(path):
    assert (README.parent / path).exists()
