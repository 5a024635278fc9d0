"""A report is one file that shows every number and runs nothing that came with a prompt."""

import base64
import json
import re
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from test_cli import run
from test_plotting import patching
from zoo import zoo

import mechinterp as mi
from mechinterp.report import writing
from mechinterp.sweeps import local

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


def numbers(packed: dict[str, Any]) -> np.ndarray:
    """An array as the page unpacks it."""
    flat = np.frombuffer(base64.b64decode(packed["float32"]), dtype="<f4")
    return flat.reshape(packed["shape"])


def of_kind(html: str, kind: str) -> Any:
    return next(panel for panel in data_of(html) if panel["kind"] == kind)


def attention(length: int = 6, heads: tuple[str, ...] = ("0.0", "1.0")) -> mi.AttentionPatterns:
    """Made-up causal patterns of a prompt of hostile tokens."""
    rng = np.random.default_rng(0)
    weights = np.tril(rng.dirichlet(np.full(length, 0.3), (1, len(heads), length)))
    weights /= weights.sum(-1, keepdims=True)
    tokens = [HOSTILE[i % len(HOSTILE)] for i in range(length)]
    data = xr.Dataset(
        {
            "pattern": (
                ("prompt", "head", "query_pos", "key_pos"),
                np.rint(255 * weights).astype(np.uint8),
            ),
            "sharpness": (("prompt", "head"), np.full((1, len(heads)), 0.5)),
            "length": ("prompt", [length]),
        },
        {
            "prompt": [0],
            "head": list(heads),
            "query_pos": range(length),
            "key_pos": range(length),
            "token": (("prompt", "query_pos"), [tokens]),
        },
    )
    convention = replace(
        patching(layer=[0]).convention,
        method="attention_patterns",
        metrics={"sharpness": "share of attention"},
    )
    return mi.AttentionPatterns(data, convention)


def test_a_report_loads_nothing_and_holds_every_number(tmp_path):
    result = patching(layer=range(4), head=range(5))
    html = mi.report(result, tmp_path / "a.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)
    cells = of_kind(html, "cells")
    assert [axis["name"] for axis in cells["axes"]] == ["layer", "head"]
    effect = result.effect.transpose("prompt", "layer", "head")
    np.testing.assert_allclose(numbers(cells["per_prompt"]), effect, rtol=1e-6)
    np.testing.assert_allclose(numbers(cells["values"]["mean"]), effect.mean("prompt"), 1e-6)
    with pytest.warns(mi.FewPromptsWarning):
        table = result.statistics(correction="max_t")
    for name, of in (("low", "low"), ("high", "high"), ("p", "p_adjusted")):
        np.testing.assert_allclose(numbers(cells["values"][name]), table[of], 1e-6)
    (share, factor), (_, one) = cells["scales"]
    assert share == "recovered share of logit_diff" and one == 1.0
    np.testing.assert_allclose(effect.mean("prompt") * factor, result.recovered)
    assert of_kind(html, "table")["rows"][0][:2] == [1, 1]


def test_every_token_and_pattern_arrives_as_it_was(tmp_path):
    result = attention()
    html = mi.report(result, tmp_path / "a.html").read_text(encoding="utf-8")
    (prompt,) = of_kind(html, "attention")["prompts"]
    assert prompt["tokens"][:2] == [HOSTILE[0], HOSTILE[1].replace(" ", "·")]
    assert prompt["tokens"][2:5] == ["↵", f"\u2068{HOSTILE[3]}\u2069", HOSTILE[4]]
    for packed, head in zip(prompt["patterns"], result.heads, strict=True):
        own = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(6, 6)
        np.testing.assert_allclose(own / 255, result.pattern(head), atol=1e-6)


def test_a_prompt_cannot_inject_markup(tmp_path):
    result = patching(layer=range(2), position=range(6), token=HOSTILE)
    html = mi.report(result, tmp_path / "a.html", title=HOSTILE[0], account=HOSTILE[1])
    text = html.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<b>" not in text
    assert "0 " + HOSTILE[0] in of_kind(text, "cells")["axes"][1]["labels"]
    assert "<script>alert" not in result._repr_html_() and '<b>"' not in result._repr_html_()


def test_a_prompt_of_512_tokens_stays_under_three_megabytes(tmp_path):
    heads = 24
    rng = np.random.default_rng(0)
    result = attention(512, tuple(f"0.{i}" for i in range(heads)))
    noise = rng.integers(0, 3, result.data["pattern"].shape, dtype=np.uint8)  # packs badly
    data = result.data.assign(pattern=result.data["pattern"] + np.tril(noise))
    path = mi.report(mi.AttentionPatterns(data, result.convention), tmp_path / "a.html")
    assert path.stat().st_size < 3_000_000
    view = of_kind(path.read_text(encoding="utf-8"), "attention")
    assert 0 < len(view["heads"]) < heads
    assert f"of {heads} heads are in this file" in view["note"]


def test_a_large_grid_stays_under_three_megabytes(tmp_path):
    result = patching(layer=range(30), position=range(512), token=["word"] * 512, n=40)
    path = mi.report(result, tmp_path / "a.html")
    assert path.stat().st_size < 3_000_000
    note = of_kind(path.read_text(encoding="utf-8"), "cells")["note"]
    assert "Of single prompts, the first 9 are in this file" in note


def test_a_folder_becomes_one_report_with_what_was_left_out(tmp_path):
    folder = tmp_path / "runs"
    (folder / "more").mkdir(parents=True)
    patching(layer=range(2)).save(folder / "b.nc")
    patching("noising", layer=range(2)).save(folder / "more" / "a.nc")
    (folder / "c.nc").write_text("not a result")
    (folder / "notes.txt").write_text("nor is this")
    html = mi.report(folder, tmp_path / "a.html").read_text(encoding="utf-8")
    assert re.findall(r'<li><a href="#result-\d"><bdi>([^<]*)', html) == ["b", "more/a"]
    assert "Left out: " in html and "c.nc cannot be read as a result" in html
    assert "<h1><bdi>runs</bdi></h1>" in html


def test_a_sweeps_run_becomes_one_report_a_section_a_call(tmp_path, monkeypatch):
    spec = {
        "name": "two sites",
        "models": "tiny",
        "tasks": "induction",
        "prompts": 2,
        "methods": [{"method": "activation_patching", "sites": ["z", "resid_pre"]}],
    }
    made = mi.run(spec, tmp_path / "run", models={"tiny": zoo("native_attn")}, output="quiet")
    html = mi.report(tmp_path / "run", tmp_path / "a.html").read_text(encoding="utf-8")
    assert html == mi.report(made, tmp_path / "b.html").read_text(encoding="utf-8")
    assert re.findall(r'<li><a href="#result-\d"><bdi>([^<]*)', html) == [
        "activation patching · induction · site z",
        "activation patching · induction · site resid_pre",
    ]
    assert "<h1><bdi>two sites</bdi></h1>" in html
    monkeypatch.setattr(writing, "_MOST_CALLS", 1)
    html = mi.report(made, tmp_path / "b.html").read_text(encoding="utf-8")
    assert "Left out: 1 more calls of the run" in html and "site resid_pre" not in html


def test_the_circuit_of_paths_and_the_tree_of_heads_are_drawn(tmp_path):
    model = zoo("gpt2")
    task = mi.load_task("induction", model, 2)
    text = mi.Text.from_tokens(model, [[1, 5, 9, 5, 9, 5, 2, 3, 7, 3, 8, 4]] * 2)
    for result, title in (
        (mi.path_patching(model, task, "logits", positions="end"), "The circuit"),
        (mi.attribution_patching(model, task, method="eap"), "The circuit"),
        (mi.redundancy_atlas(model, text, queries=8), "Heads by likeness"),
        (patching(layer=range(2)), None),
    ):
        html = mi.report(result, tmp_path / "a.html").read_text(encoding="utf-8")
        drawn = re.findall(r"<summary>(The circuit|Heads by likeness)</summary>", html)
        assert drawn == ([] if title is None else [title])


def test_a_run_with_nothing_done_has_nothing_to_report(tmp_path, monkeypatch):
    monkeypatch.setattr(local.Workbench, "do", lambda *_: 1 / 0)
    spec = {"models": "tiny", "tasks": "induction", "prompts": 2, "methods": "head_ablation"}
    mi.run(spec, tmp_path / "run", models={"tiny": zoo("native_attn")}, output="quiet")
    with pytest.raises(ValueError, match=r"nothing is done in .*run yet"):
        mi.report(tmp_path / "run", tmp_path / "a.html")


def test_what_is_no_result_is_refused_with_the_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    text = tmp_path / "a.txt"
    text.write_text("not a result")
    out = tmp_path / "a.html"
    for source, error, says in (
        (tmp_path / "empty", ValueError, r"empty has no results, that is no \.nc file"),
        (tmp_path / "none", FileNotFoundError, "none does not exist"),
        (text, ValueError, "not a netCDF-4 file"),
    ):
        with pytest.raises(error, match=says):
            mi.report(source, out)
    assert not out.exists()


def test_where_it_cannot_be_written_is_said_before_any_work(tmp_path):
    result = patching(layer=range(2))
    with pytest.raises(ValueError, match=r"does not end in \.html"):
        mi.report(result, tmp_path / "a.pdf")
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        mi.report(result, tmp_path / "nowhere" / "a.html")
    (tmp_path / "a.html").mkdir()
    with pytest.raises(OSError, match=r"a\.html"):
        mi.report(result, tmp_path / "a.html")
    assert [each.name for each in tmp_path.iterdir()] == ["a.html"]


def test_a_report_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    assert mi.report(patching(layer=range(2)), tmp_path / "a.html").is_file()


def test_the_command_line_writes_it(tmp_path, capsys):
    saved = patching(layer=range(2), head=range(2)).save(tmp_path / "a.nc")
    out = tmp_path / "a.html"
    assert run("report", str(saved), "-o", str(out)) == 0
    assert "Wrote" in capsys.readouterr().out and out.is_file()
    assert run("report", str(tmp_path / "none.nc"), "-o", str(out)) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_a_saved_result_is_drawn_in_the_format_of_its_name(name, begins, tmp_path, capsys):
    saved = patching(layer=range(3)).save(tmp_path / "a.nc")
    assert run("plot", str(saved), "-o", str(tmp_path / name)) == 0
    assert (tmp_path / name).read_bytes().startswith(begins)
    for wrong, says in (
        (["-o", "a.bmp"], "must end in one of .png, .svg, .pdf"),
        (["-o", str(tmp_path / "none" / "a.png")], "Create it first"),
        (["--diagram", "-o", str(tmp_path / "b.png")], "no paths to draw"),
    ):
        assert run("plot", str(saved), *wrong) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_a_notebook_shows_numbers_and_a_picture():
    result = patching(layer=range(4), head=range(5))
    html = result._repr_html_()
    assert "<b>PatchingResult</b>" in html and "logit_diff (nats)" in html
    (png,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(png).startswith(b"\x89PNG")
    assert f"{result.top(1)['effect'].item():.4g}" in html


def test_what_cannot_be_drawn_or_ranked_is_named_in_a_notebook():
    class Odd(mi.PatchingResult):
        def plot(self, *_: Any, **__: Any) -> Any:
            raise ValueError("no <picture> today")

    made = patching(layer=range(2))
    html = Odd(made.data, made.convention)._repr_html_()
    assert "No picture: no &lt;picture&gt; today" in html and "<table" in html


def test_the_picture_of_a_notebook_is_not_shown_twice(monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))
    monkeypatch.setattr(pyplot, "figure", lambda **told: kept.append(1) or Figure(**told))
    kept: list[int] = []
    closed = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    patching(layer=range(4))._repr_html_()
    assert kept == [1] and len(closed) == 1


def test_a_result_survives_a_saved_notebook_and_nbconvert(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    exporters = pytest.importorskip("nbconvert").HTMLExporter
    result = patching(layer=range(2), position=range(6), token=HOSTILE)
    shown = nbformat.v4.new_output(
        "execute_result", {"text/html": result._repr_html_()}, execution_count=1
    )
    cell = nbformat.v4.new_code_cell("result", outputs=[shown], execution_count=1)
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    html, _ = exporters().from_notebook_node(nbformat.read(path, as_version=4))
    assert "data:image/png;base64," in html and "<b>PatchingResult</b>" in html
    assert f"{result.top(1)['effect'].item():.4g}" in html and "<script>alert" not in html
