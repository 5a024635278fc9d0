"""The notebooks as texts (CI executes them): each asks one question and doubts its answer."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
HEAD = "# %%"


def cells(script: Path) -> list[tuple[str, str]]:
    """Kind and source of each cell of a ``py:percent`` script."""
    found = []
    for part in re.split(rf"^(?={HEAD})", script.read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(("markdown" if "[markdown]" in head else "code", body.strip()))
    return found


every_notebook = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


@every_notebook
def test_a_notebook_asks_one_question_draws_and_says_what_would_have_changed_the_answer(script):
    prose = "\n\n".join(source for kind, source in cells(script) if kind == "markdown")
    titles = re.findall(r"^# (.+)$", prose, re.MULTILINE)
    assert len(titles) == 1 and titles[0].endswith("?")
    last = re.findall(r"^## (.+)$", prose, re.MULTILINE)[-1]
    assert last == "What would have changed the answer"
    code = "\n".join(source for kind, source in cells(script) if kind == "code")
    assert re.search(r"\.(plot|figure|waterfall|scatter)\(", code)


@every_notebook
def test_the_two_files_of_a_notebook_are_equal(script):
    saved = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in saved] == cells(script)


@every_notebook
def test_a_notebook_shows_its_pictures_and_no_errors(script):
    saved = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in saved for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]


@every_notebook
def test_a_notebook_imports_nothing_that_is_not_public(script):
    code = "\n".join(source for kind, source in cells(script) if kind == "code")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("mechinterp")
        elif isinstance(node, ast.Import):
            assert not [each for each in node.names if each.name.startswith("mechinterp.")]
