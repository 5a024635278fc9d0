"""The house rules: imports point down, importing costs nothing, public names are there."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mechinterp as mi

PACKAGE = Path(mi.__file__).parent
# A module may import from its own floor's earlier entries and from the floors before it.
FLOORS = [
    ["_version", "_cache", "_files", "_progress", "names", "draws"],
    ["results", "inference", "stats", "metrics", "plotting", "drawing", "html", "circuit_plot"],
    ["models"],
    ["sites", "nulls", "weights", "cost"],
    ["tasks.positions", "tasks.prompts"],
    ["activations"],
    ["edits"],
    ["tasks"],
    ["models.known"],  # a model with its task
    ["record"],
    ["hooks"],
    ["catalogue"],
    ["engine"],
    ["lens"],
    ["causal"],
    ["heads"],
    ["sweeps"],
    ["report"],
    ["quickstart"],
    ["cli"],
]


def floor(module: str) -> int:
    """The floor of ``mechinterp.<module>``; the most specific entry counts."""
    found = [
        (len(name), index)
        for index, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert found, f"mechinterp.{module} is on no floor: give it one in tests/test_house.py"
    return max(found)[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mechinterp"):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("mechinterp")}
    return {name.removeprefix("mechinterp.") for name in found if name != "mechinterp"}


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    module = ".".join(p for p in parts if p != "__init__")
    upward = {
        name
        for name in imports(path)
        if floor(name) > floor(module) and name.split(".")[0] != module.split(".")[0]
    }
    assert not upward, f"mechinterp.{module} imports from a higher floor"


def test_importing_the_package_loads_neither_torch_nor_transformer_lens():
    code = (
        "import sys, mechinterp; "
        "print([m for m in ('torch', 'transformer_lens', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", mi.__all__)
def test_a_public_name_is_there_and_says_what_it_is(name):
    value = getattr(mi, name)
    assert name == "__version__" or value.__doc__


def test_a_function_keeps_its_name_from_the_module_it_is_named_after():
    import_module("mechinterp.sites")
    import_module("mechinterp.tasks")

    assert callable(mi.sites)
    assert callable(mi.tasks)
    from mechinterp.tasks import Task

    assert mi.Task is Task


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'activation_pathcing'"):
        mi.activation_pathcing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
