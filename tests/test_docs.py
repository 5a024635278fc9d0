"""What the documentation shows works as it is written, and leaves no public name out."""

import json
import re
import shlex
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import yaml
from test_readme import script
from typer.main import get_command

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


def blocks(page: Path, language: str) -> list[str]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return fence.findall(page.read_text(encoding="utf-8"))


TYPED = [page for page in (*PAGES, ROOT / "README.md") if blocks(page, "(?:yaml|console)")]


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_what_a_page_shows_as_typed_is_understood(page):
    for block in blocks(page, "yaml"):
        assert read_spec(yaml.safe_load(block)).methods
    told = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    calls = re.findall(r"^\$ (mechinterp (?:[^\"\n]|\"[^\"]*\")*)", told, re.MULTILINE)
    assert bool(calls) == bool(told), "a console block shows no call of mechinterp"
    commands = vars(get_command(app))["commands"]
    for call in calls:
        words = shlex.split(call, comments=True)[1:]
        ends = [i for i, word in enumerate(words) if word in ("&", "|", ">")]
        words = words[: ends[0] if ends else None]
        commands[words[0]].make_context(words[0], words[1:])  # raises at a wrong option


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
