"""What the reference says of public functions: what they take, give back and raise."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType

import pytest
from conformance import public_methods

import mechinterp as mi

SECTIONS = ("Args", "Returns", "Raises", "Warns")
PLAIN = 2  # as many parameters may be described in the text instead of under Args


def functions() -> Iterator[tuple[str, FunctionType]]:
    """Every public function, and every public method of a public class."""
    for home, names in (("", mi.__all__), ("stats.", mi.stats.__all__)):
        for name in names:
            found = getattr(mi.stats if home else mi, name)
            if inspect.isfunction(found):
                yield home + name, found
            elif inspect.isclass(found) and found.__module__.startswith("mechinterp."):
                yield from methods(found)


def methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    for name, found in vars(kind).items():
        bare = getattr(found, "__func__", found)  # of a class or static method
        if inspect.isfunction(bare) and not name.startswith("_"):
            yield f"{kind.__name__}.{name}", inspect.unwrap(bare)


def of_class(name: str) -> bool:
    return name[0].isupper()


def section(doc: str, title: str) -> str:
    """The entries under one title of a docstring; nothing where it has none."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    return found[1] if found else ""


def text_of(doc: str) -> str:
    """A docstring without its sections."""
    return re.split(rf"^(?:{'|'.join(SECTIONS)}):$", doc, flags=re.MULTILINE)[0]


def raises(function: FunctionType) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(tree))


PUBLIC = dict(functions())
assert len(PUBLIC) > 100
every_function = pytest.mark.parametrize("name", PUBLIC)


@every_function
def test_a_docstring_says_what_each_parameter_is(name):
    function = PUBLIC[name]
    doc = inspect.getdoc(function) or ""
    assert doc, "no docstring"
    wanted = {p for p in inspect.signature(function).parameters if p not in ("self", "cls")}
    wanted -= {"ax"}  # of pictures: where to draw, everywhere
    listed = set(re.findall(r"^    \*{0,2}(\w+): ", section(doc, "Args"), re.MULTILINE))
    assert listed <= wanted | {"ax"}, "it describes what is not there"
    if listed or (not of_class(name) and len(wanted) > PLAIN):
        assert wanted <= listed
    else:
        assert {word for word in wanted if re.search(rf"\b{word}\b", text_of(doc))} == wanted


@every_function
def test_a_docstring_says_what_comes_back(name):
    function = PUBLIC[name]
    doc = inspect.getdoc(function) or ""
    if of_class(name):
        told = r"Return|Draw|Write|Say|Print|Whether|Put|Take|Add|Fit|Compare|Raise|Run"
        assert re.match(told, doc), "it does not begin with what it does"
    elif inspect.signature(function).return_annotation is not None:
        assert doc.startswith("Return ") or section(doc, "Returns")


@every_function
def test_a_docstring_says_what_is_raised(name):
    if raises(PUBLIC[name]):
        assert section(inspect.getdoc(PUBLIC[name]) or "", "Raises")


@pytest.mark.parametrize("name", sorted(set(public_methods()) - {"attention_patterns"}))
def test_a_method_names_its_source(name):
    assert re.search(r"^Source: |arXiv:\d{4}\.\d{5}", inspect.getdoc(PUBLIC[name]) or "", re.M)
