"""What the documentation shows works as it is written, and leaves no public name out."""

import json
import re
import shlex
from itertools import takewhile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import yaml
from conformance import public_methods
from test_readme import script
from typer.main import get_command
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp.cli.shared import app
from mechinterp.sweeps.spec import read_spec

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


def blocks(page: Path, language: str) -> list[str]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return fence.findall(page.read_text(encoding="utf-8"))


def typed(page: Path) -> list[list[str]]:
    """The calls of mechinterp that a page shows in a shell, as words."""
    told = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    calls = re.findall(r"^\$ mechinterp ((?:[^\"\n]|\"[^\"]*\")*)", told, re.MULTILINE)
    assert len(calls) == len(re.findall(r"^\$", told, re.MULTILINE)), "not all are mechinterp's"
    found = [shlex.split(call, comments=True) for call in calls]
    return [list(takewhile(lambda word: word not in ("&", "|", ">"), words)) for words in found]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    text = page.read_text(encoding="utf-8")
    try:
        for block in BLOCK.finditer(text):
            above = "\n" * text[: block.start(1)].count("\n")  # errors name the page's line
            exec(compile(above + block[1], str(page), "exec"), names)
    finally:
        plt.close("all")
    type_in(page)


def type_in(page: Path) -> None:
    """Run what a page shows in a shell, all but sweeps, which take a minute."""
    for block in blocks(page, "yaml"):
        Path(re.findall(r"^# (\S+\.yaml)$", block, re.MULTILINE)[0]).write_text(block)
    for words in typed(page):
        if words[0] != "run" or "--dry-run" in words:
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, f"{words}: {done.output}"


COMING = sorted((DOCS / "how-to").glob("from-*.md"))


@pytest.mark.parametrize("page", COMING, ids=lambda page: page.stem)
def test_the_new_calls_of_those_who_come_from_elsewhere_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    first = BLOCK.search(text)
    assert first is not None
    names: dict = {}
    exec(first[1], names)
    rows = re.findall(r"^\| (.+?) \| `([^|]+)` \|$", text, re.MULTILINE)
    assert len(rows) == text.count("\n| ") - 2, "a row has no call"
    for _, call in rows:
        if call != 'mi.load_model("gpt2")':  # which needs a hub
            exec(call, dict(names))


TYPED = [page for page in (*PAGES, ROOT / "README.md") if blocks(page, "(?:yaml|console)")]


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_what_a_page_shows_as_typed_is_understood(page):
    for block in blocks(page, "yaml"):
        assert read_spec(yaml.safe_load(block)).methods
    commands = vars(get_command(app))["commands"]
    for words in typed(page):
        commands[words[0]].make_context(words[0], words[1:])  # raises at a wrong option


WITHOUT_CODE = [page for page in TYPED if page in PAGES and page not in WITH_CODE]


@pytest.mark.parametrize("page", WITHOUT_CODE, ids=name_of)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    type_in(page)


METHODS = sorted((DOCS / "methods").glob("*.md"))
PARTS = ("Source", "Convention", "Cost", "Limits")


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_every_method_has_question_formula_code_source_convention_cost_and_limits(page):
    _, *sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sections
    for section in sections:
        name = section.partition("\n")[0]
        fences = re.findall(r"^```(\w*)$", section, re.MULTILINE)[::2]  # those that open
        assert "" in fences, f"{name} has no formula"
        assert "python" in fences, f"{name} has no code"
        assert re.search(r"^\*[^*]+\?\*", section, re.MULTILINE), f"{name} asks nothing"
        found = re.findall(r"^\*\*(\w+)\.\*\*", section, re.MULTILINE)
        assert [part for part in found if part in PARTS] == list(PARTS), f"{name} has {found}"


def test_every_method_is_on_a_page_of_methods():
    told = "\n".join(page.read_text(encoding="utf-8") for page in METHODS)
    assert set(public_methods()) <= set(re.findall(r"\bmi\.(\w+)\(", told))


def test_the_coverage_of_intervals_is_what_the_script_stored():
    coverage = script("coverage")
    text = (DOCS / "methods" / "statistics.md").read_text(encoding="utf-8")
    start, end = coverage.MARKS
    shown = text.partition(start)[2].partition(end)[0].strip()
    assert shown == coverage.markdown(json.loads(coverage.TABLE.read_text(encoding="utf-8")))


def test_every_public_name_has_its_place_in_the_reference():
    named = re.findall(
        r"^::: [\w.]+\.(\w+)$",
        "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "reference").glob("*.md")),
        re.MULTILINE,
    )
    modules = {"edits", "metrics", "stats", "__version__"}
    assert set(mi.__all__) - modules <= set(named)
    assert set(mi.stats.__all__) | {kind.__name__ for kind in mi.edits.KINDS.values()} <= set(
        named
    )


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(map(name_of, PAGES))


def test_every_command_is_on_the_page_of_commands():
    page = (DOCS / "how-to" / "command-line.md").read_text(encoding="utf-8")
    commands = set(getattr(get_command(app), "commands"))  # noqa: B009
    assert commands == set(re.findall(r"`mechinterp ([a-z]+)", page))
