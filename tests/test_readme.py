"""What the README shows works as it is written."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from conformance import public_methods

import mechinterp as mi

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""


def blocks(*languages: str) -> list[str]:
    fence = re.compile(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return fence.findall(TEXT)


def test_the_examples_run(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"induction_z.nc"}


def test_there_are_exactly_two_set_up_commands():
    commands = [line for block in blocks("sh", "bash") for line in block.splitlines()]
    assert [c for c in commands if "pip install" in c] == [
        "pip install -c constraints.txt -e . && mechinterp quickstart",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


TABLED = re.findall(
    r"`((?:mi\.|HookManager\()[^`]+)`", "\n".join(re.findall(r"^\|.*", TEXT, re.M))
)


def named(call: ast.Call) -> Any:
    """What a call is of; None where it is a method of what another call returns."""
    parts, node = [], call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in ("mi", "HookManager"):
        return None
    found: Any = mi if node.id == "mi" else mi.HookManager
    for part in reversed(parts):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("shown", TABLED)
def test_the_calls_in_tables_take_what_is_shown(shown):
    calls = [node for node in ast.walk(ast.parse(shown)) if isinstance(node, ast.Call)]
    whole = [each for each in calls if named(each) is not None]
    assert whole or not calls
    for call in whole:
        signature = inspect.signature(named(call))
        signature.bind(*call.args, **{str(word.arg): word.value for word in call.keywords})


def test_every_method_has_its_line():
    functions = {name for name in public_methods() if name != "attention_patterns"}
    assert functions <= set(re.findall(r"mi\.(\w+)", " ".join(TABLED)))


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_what_it_links_to_is_there(path):
    assert (README.parent / path).exists()
