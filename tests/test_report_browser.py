"""A report in a browser without network: charts are there, no error, and everything answers.

Needs the Python package ``playwright`` and a Chromium of the system (``apt-get install
chromium``); without them these tests skip.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from test_plotting import patching
from test_report import HOSTILE, attention
from zoo import zoo

import mechinterp as mi

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)
SHOTS = os.environ.get("MECHINTERP_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass
class Opened:
    """A page of a report, and whatever it complained of."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def readout(self, panel: str) -> str:
        return self.page.locator(f"{panel} output.readout").last.inner_text()

    def shoot(self, name: str) -> None:
        if SHOTS is not None:
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    contexts = []

    def open_(path: Path, **settings: Any) -> Opened:
        context = browser.new_context(offline=True, **settings)
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on(
            "console",
            lambda said: (
                found.complaints.append(said.text)
                if said.type in ("error", "warning")
                else None
            ),
        )
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on("dialog", lambda dialog: found.complaints.append(dialog.message))
        found.page.on(
            "request",
            lambda request: (
                found.complaints.append(request.url)
                if not request.url.startswith(("file:", "data:", "blob:"))
                else None
            ),
        )
        found.page.goto(path.as_uri())
        found.page.wait_for_selector("[data-drawn]")
        return found

    yield open_
    for context in contexts:
        context.close()


def panel(title: str) -> str:
    return f'section.panel:has(h3:text-is("{title}"))'


def plain(shown: Any) -> str:
    """What is written there, without the signs that keep right-to-left words together."""
    return shown.inner_text().replace("\u2068", "").replace("\u2069", "")


CELLS, LARGEST = panel("Effect of every cell"), panel("Largest effects")


def test_cells_answer_to_pointer_keyboard_and_choices(opened, tmp_path):
    result = patching(layer=range(4), head=range(5))
    view = opened(mi.report(result, tmp_path / "a.html"))
    page = view.page
    svg = page.locator(f"{CELLS} .chart svg").last
    assert page.locator(f"{CELLS} .chart svg rect").count() >= 20
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + 20)
    assert view.readout(CELLS).startswith("layer 3, head ")
    assert "95 % interval" in view.readout(CELLS)

    page.locator(f"{CELLS} .chart").focus()
    for _ in range(9):
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    share = float(result.recovered.sel(layer=1, head=1))
    assert view.readout(CELLS).startswith(f"layer 1, head 1: {share:.3g} (95 % interval ")
    assert "p < 0.001 corrected" in view.readout(CELLS)

    page.locator(f"{CELLS} select").nth(0).select_option("effect on logit_diff (nats)")
    page.locator(f"{CELLS} select").nth(1).select_option("prompt 2")
    page.locator(f"{CELLS} .chart").focus()
    page.keyboard.press("ArrowRight")
    own = float(result.effect.sel(layer=1, head=2, prompt=2))
    said = view.readout(CELLS).removeprefix("layer 1, head 2: ")
    assert float(said) == pytest.approx(own, rel=0.006)
    assert not view.complaints
    view.shoot("cells")


def test_tables_sort_filter_and_show_what_charts_show(opened, tmp_path):
    result = patching(layer=range(4), head=range(5))
    view = opened(mi.report(result, tmp_path / "a.html"))
    page = view.page
    page.locator(LARGEST).scroll_into_view_if_needed()
    page.locator(f"{LARGEST} tbody tr").first.wait_for()

    def column(i: int) -> list[str]:
        return page.locator(f"{LARGEST} tbody td:nth-child({i + 1})").all_inner_texts()

    page.get_by_role("button", name="Show all rows").click()
    assert len(column(0)) == 20
    page.locator(f"{LARGEST} th button", has_text="effect").click()
    effects = [float(each) for each in column(2)]
    assert effects == sorted(effects, reverse=True)
    page.locator(f"{LARGEST} th button", has_text="effect").press("Enter")
    assert [float(each) for each in column(2)] == sorted(effects)
    heading = page.locator(f"{LARGEST} th", has_text="effect")
    assert heading.get_attribute("aria-sort") == "ascending"
    page.locator(f"{LARGEST} input[type=search]").fill(column(2)[0])
    assert len(column(0)) < 20

    page.locator(f"{CELLS} summary").click()
    page.locator(f"{CELLS} caption").wait_for(state="attached")  # comes a moment later
    assert "20 rows" in page.locator(f"{CELLS} .table").inner_text()
    assert not view.complaints


def test_a_token_shows_where_it_attends(opened, tmp_path):
    result = attention()
    view = opened(mi.report(result, tmp_path / "a.html"))
    page, tokens = view.page, panel("Where heads look")
    page.locator(f"{tokens} [data-head]").wait_for(state="attached")
    page.locator(f"{tokens} .token").nth(3).hover()
    readout = page.locator(f"{tokens} output").first
    best = int(result.pattern((0, 0)).values[3].argmax())
    assert f"3 {HOSTILE[3]} looks at {best} " in plain(readout)
    page.locator(f"{tokens} select").first.select_option("1.0")
    page.wait_for_selector('[data-head="1.0"]', state="attached")
    page.locator(f"{tokens} .tokens").focus()
    page.keyboard.press("ArrowRight")
    share = result.pattern((1, 0)).values[4]
    assert f"Head 1.0: 4 {HOSTILE[4]} looks at {int(share.argmax())} " in plain(readout)
    assert f"{round(100 * float(share.max()))} %" in readout.inner_text()

    page.locator(f"{tokens} .chart").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    one = float(result.pattern((1, 0)).values[2, 1])
    assert f": {100 * one:.1f} %" in view.readout(tokens)
    assert not view.complaints
    view.shoot("attention")


def test_hostile_text_does_not_run(opened, tmp_path):
    result = patching(layer=range(2), position=range(6), token=HOSTILE)
    other = attention()
    folder = tmp_path / "runs"
    folder.mkdir()
    result.save(folder / "<img src=x onerror=alert(1)>.nc")
    other.save(folder / "b.nc")
    account = "</script><script>alert(2)</script><img src=x onerror=alert(3)>"
    view = opened(mi.report(folder, tmp_path / "a.html", title=HOSTILE[0], account=account))
    assert HOSTILE[0] in view.page.locator("h1").inner_text()
    assert view.page.locator("nav a").count() == 2
    view.page.locator("nav a").last.click()
    assert not view.complaints
    assert view.page.locator("main script:not([type='application/json'])").count() == 0


def test_even_a_script_that_got_in_would_not_run(opened, tmp_path):
    path = mi.report(patching(layer=range(2)), tmp_path / "a.html")
    html = path.read_text(encoding="utf-8")
    path.write_text(html.replace("</main>", "<script>window.bad = 1</script></main>"))
    view = opened(path)
    assert view.page.evaluate("window.bad === undefined")
    assert any("Content Security Policy" in said for said in view.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_reader_s_colours_and_fits_a_narrow_screen(opened, tmp_path, scheme):
    path = mi.report(patching(layer=range(30), head=range(12)), tmp_path / "a.html")
    view = opened(path, color_scheme=scheme, viewport={"width": 380, "height": 800})
    page = view.page
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    view.shoot(f"narrow-{scheme}")
    page.emulate_media(media="print")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)", "dark paper is printed"
    page.emulate_media(media="screen")
    page.locator("#theme").press("Enter")
    assert page.evaluate(theme) != scheme
    assert not view.complaints


def test_numbers_that_were_not_measured_are_shown_as_such(opened, tmp_path):
    result = patching(layer=range(3), head=range(3))
    patched = result.data["patched"].where(result.data["layer"] != 0)
    result = mi.PatchingResult(result.data.assign(patched=patched), result.convention)
    view = opened(mi.report(result, tmp_path / "a.html"))
    view.page.locator(f"{CELLS} .chart").focus()
    view.page.keyboard.press("ArrowDown")
    assert view.readout(CELLS) == "layer 0, head 0: not measured"
    assert view.page.locator(f"{CELLS} .chart svg text", has_text="\u00d7").count() == 3
    assert not view.complaints


def test_five_hundred_tokens_can_be_zoomed_into(opened, tmp_path):
    words = [f"word{i}" for i in range(500)]
    result = patching(layer=range(3), position=range(500), token=words, n=2)
    view = opened(mi.report(result, tmp_path / "a.html"))
    page = view.page
    assert page.locator(f"{CELLS} .chart svg rect").count() >= 1500
    page.locator(f"{CELLS} input[type=number]").first.fill("480")
    page.locator(f"{CELLS} input[type=number]").first.press("Enter")
    page.locator(f"{CELLS} .chart").focus()
    page.keyboard.press("ArrowRight")
    assert "481 word481" in view.readout(CELLS)
    assert not view.complaints


@pytest.mark.parametrize("axes", [{"layer": [0]}, {"layer": [0], "head": [0]}, {}])
def test_a_single_layer_or_head_is_shown(opened, tmp_path, axes):
    view = opened(mi.report(patching(**axes), tmp_path / "a.html"))
    if axes:
        view.page.locator(f"{CELLS} .chart").focus()
        view.page.keyboard.press("ArrowRight")
        assert "95 % interval" in view.readout(CELLS)
    assert not view.complaints


def test_a_run_of_a_sweep_opens_with_all_its_calls(opened, tmp_path):
    spec = {
        "models": "tiny",
        "tasks": "induction",
        "prompts": 2,
        "methods": [{"method": "activation_patching", "sites": ["z", "resid_pre"]}],
    }
    made = mi.run(spec, tmp_path / "run", models={"tiny": zoo("native_attn")}, output="quiet")
    view = opened(mi.report(made, tmp_path / "a.html"))
    assert view.page.locator("section.result").count() == 2
    assert not view.complaints
    view.shoot("run")


def test_a_waterfall_adds_up(opened, tmp_path):
    shares = xr.DataArray(
        np.array([[1.0, -0.25, 3.0], [2.0, -0.75, 4.0]]),
        dims=("prompt", "component"),
        coords={"prompt": [0, 1], "component": ["embed", "0.1", "mlp 0"]},
    )
    data = xr.Dataset({"share": shares, "total": shares.sum("component")}).assign_coords(
        kind=("component", ["embed", "head", "mlp"]),
        layer=("component", [-1, 0, 0]),
        head=("component", [-1, 1, -1]),
    )
    made = replace(patching(layer=[0]).convention, settings={"attributed": "logit_diff"})
    result = mi.DirectAttributionResult(data, made)
    view = opened(mi.report(result, tmp_path / "a.html"))
    falls = panel("What writes the answer")
    view.page.locator(f"{falls} .chart").focus()
    for expected in ("0.1: -0.500", "mlp 0: 3.50", "total: 4.50"):
        view.page.keyboard.press("ArrowDown")
        assert view.readout(falls).startswith(expected)
    view.page.locator(f"{falls} select").first.select_option("prompt 1")
    view.page.locator(f"{falls} .chart").focus()
    view.page.keyboard.press("ArrowDown")
    assert view.readout(falls) == "total: 5.25"
    assert not view.complaints
    view.shoot("waterfall")


def test_a_part_of_a_waterfall_that_was_not_measured_is_said_to_be_none(opened, tmp_path):
    text = mi.load_model(zoo("gpt2"))
    result = mi.direct_logit_attribution(text, mi.load_task("induction", text, 3))
    share = result.data["share"].copy()
    share[:, 1] = np.nan
    result = mi.DirectAttributionResult(result.data.assign(share=share), result.convention)
    view = opened(mi.report(result, tmp_path / "a.html"))
    falls = panel("What writes the answer")
    view.page.locator(f"{falls} select").nth(1).select_option(index=1)
    view.page.locator(f"{falls} .chart").focus()
    view.page.keyboard.press("ArrowDown")
    assert "not measured" in view.readout(falls)
    bars = view.page.locator(f"{falls} [aria-label=bar] rect")
    assert all("NaN" not in (bars.nth(i).get_attribute("x") or "") for i in range(bars.count()))
    assert not view.complaints


def test_of_many_axes_the_part_with_the_largest_number_is_shown_first(opened, tmp_path):
    result = patching(
        metrics=("logit_diff", "prob"), layer=range(3), head=range(3), position=range(4)
    )
    view = opened(mi.report(result, tmp_path / "a.html"))
    page = view.page
    chosen = f"{CELLS} select"
    heads, metrics = page.locator(chosen).nth(2), page.locator(chosen).nth(3)
    assert heads.input_value() == "1" and metrics.input_value() == "logit_diff (nats)"
    page.locator(f"{CELLS} .chart").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    mean = result.effect.mean("prompt").sel(layer=1, head=1, position=1)
    told = f"head 1, metric logit_diff (nats), layer 1, position 1: {float(mean[0]):.3g} ("
    assert view.readout(CELLS).startswith(told)
    metrics.select_option("prob (nats)")
    assert page.locator(f"{CELLS} .legend-box", has_text="effect: prob (nats)").count() == 1
    assert not view.complaints
