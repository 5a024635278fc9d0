"""The method that CONTRIBUTING.md adds is put in place as the page shows, and checked."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import conformance
import pytest
import xarray as xr
from test_house import floor, imports
from zoo import zoo

import mechinterp as mi

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
BLOCKS = re.findall(
    r'^```python title="([^"]+)"\n(.*?)^```',
    PAGE.read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
SHOWN = dict(BLOCKS)
FILE = "mechinterp/causal/mlp_scaling.py"
MODULE = FILE.removesuffix(".py").replace("/", ".")


@pytest.fixture
def added(tmp_path, monkeypatch) -> Path:
    """The file in place, as if it stood where the page says."""
    path = tmp_path / Path(FILE).name
    path.write_text(SHOWN[FILE], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, MODULE, module)
    spec.loader.exec_module(module)
    home: dict[str, list[str]] = {}
    exec(SHOWN["mechinterp/__init__.py"], {"_HOME": home})
    for name in home[MODULE]:
        monkeypatch.setitem(vars(mi)["_MODULE_OF"], name, MODULE)
    monkeypatch.setattr(mi, "__all__", sorted([*mi.__all__, *home[MODULE]]))
    return path


def entry() -> conformance.Method:
    """The line that the page adds to the table of methods."""
    table: dict[str, conformance.Method] = {}
    exec(SHOWN["tests/conformance.py"], {**vars(conformance), "METHODS": table})
    return table["mlp_scaling"]


def test_the_layout_names_every_module_of_the_package_on_its_floor():
    package = Path(mi.__file__).parent
    text = PAGE.read_text(encoding="utf-8")
    table = re.findall(r"^\|.+\| (`.+?) \|.+\|$", text, re.MULTILINE)
    rows = [re.findall(r"`([\w/.]+?)(?:\.py|/)`", row) for row in table]
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert {name for row in rows for name in row if "/" not in name} == folders | modules
    lowest = [min(floor(name.replace("/", ".")) for name in row) for row in rows]
    assert lowest == sorted(lowest, reverse=True)


def test_every_check_that_is_named_is_one_that_ci_runs():
    text = PAGE.read_text(encoding="utf-8")
    ran = (PAGE.parent / ".ci" / "run").read_text(encoding="utf-8")
    [shown] = re.findall(r"^```sh\n(.*?)^```", text[text.index("## How to run") :], re.M | re.S)
    commands = re.findall(r"^([^#\n]+?)(?:\s*#.*)?$", shown, re.MULTILINE)
    each = [part for command in commands for part in command.split(" && ")]
    missing = [c for c in each if c not in ran and c not in ("pytest", ".ci/run")]
    assert len(each) > 5 and not missing


def test_the_page_shows_the_file_and_its_three_lines():
    assert [title for title, _ in BLOCKS] == [
        FILE,
        "mechinterp/__init__.py",
        "tests/conformance.py",
        "tests/test_mlp_scaling.py",
    ]


def test_the_added_method_is_missed_in_the_table_until_it_is_there(added):
    assert set(conformance.public_methods()) - set(conformance.METHODS) == {"mlp_scaling"}


def test_the_added_method_conforms(added, tmp_path):
    check: Any = vars(mi)["__getattr__"]("mlp_scaling")
    conformance.check_method(check, entry(), zoo("gpt2"), tmp_path)


def test_the_added_file_imports_downwards(added):
    assert all(floor(name) <= floor("causal.mlp_scaling") for name in imports(added))


def test_the_added_tests_pass(added):
    names: dict[str, Any] = {"mi": mi, "xr": xr, "pytest": pytest}
    exec(SHOWN["tests/test_mlp_scaling.py"], names)
    model = zoo("gpt2")
    given = {"model": model, "task": conformance.pair(model)}
    tests = {name: test for name, test in names.items() if name.startswith("test_")}
    assert len(tests) == 3
    for test in tests.values():
        wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
        test(**{name: given[name] for name in wanted})
