"""What the README shows works as it is written."""

import re
from pathlib import Path

import matplotlib
import pytest

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


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_what_it_links_to_is_there(path):
    assert (README.parent / path).exists()
