"""A report is one file that shows every number and runs nothing that came with a prompt."""

import json
import re
from typing import Any

from test_cli import run
from test_plotting import patching

import mechinterp as mi

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<b>"it\'s" & more</b>',
    "\n",
    "שלום",
    "🙂",
    "$x$",
]


def data_of(html: str) -> list[Any]:
    """What the panels of a report are drawn from."""
    found = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', html)
    return [json.loads(each) for each in found]


def test_a_report_loads_nothing_and_holds_every_number(tmp_path):
    result = patching(layer=range(4), head=range(5))
    html = mi.report(result, tmp_path / "a.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)
    cells = next(panel for panel in data_of(html) if panel["kind"] == "cells")
    assert [axis["name"] for axis in cells["axes"]] == ["layer", "head"]
    assert cells["values"]["mean"]["shape"] == [4, 5]


def test_a_prompt_cannot_inject_markup(tmp_path):
    result = patching(layer=range(2), position=range(6), token=HOSTILE)
    html = mi.report(result, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in html and "<b>" not in html
    cells = next(panel for panel in data_of(html) if panel["kind"] == "cells")
    assert "0 </script><script>alert(1)</script>" in cells["axes"][1]["labels"]


def test_the_command_line_writes_it(tmp_path, capsys):
    saved = patching(layer=range(2), head=range(2)).save(tmp_path / "a.nc")
    out = tmp_path / "a.html"
    assert run("report", str(saved), "-o", str(out)) == 0
    assert "Wrote" in capsys.readouterr().out and out.is_file()
