"""What the documentation shows works as it is written, and leaves no public name out."""

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

import mechinterp as mi

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
    from typer.main import get_command

    from mechinterp.cli.shared import app

    page = (DOCS / "how-to" / "command-line.md").read_text(encoding="utf-8")
    commands = set(getattr(get_command(app), "commands"))  # noqa: B009
    assert commands == set(re.findall(r"`mechinterp ([a-z]+)", page))
