"""Figures look as they did, say what is missing, and stand hostile tokens and long prompts."""

import io
from dataclasses import replace
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from test_plotting import patching, texts
from test_report import HOSTILE, attention

import mechinterp as mi
from mechinterp import plotting
from mechinterp.circuit_plot import Edge, Node, path_diagram
from mechinterp.html import figure_of, png_of


def fingerprint(drawn: Axes | Figure) -> int:
    """The difference hash of a picture: which of 12 x 12 patches are darker than the next.

    Fonts and lines may move a little between versions of matplotlib; few bits then change.
    """
    with mpl.rc_context({"figure.dpi": 100}):
        picture = Image.open(io.BytesIO(png_of(drawn, dpi=60))).convert("L")
    small = np.asarray(picture.resize((13, 12), Image.Resampling.BOX), dtype=float)
    bits = (np.diff(small, axis=1) > 1.0).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def paths(n: int = 12, sizes: tuple[float, ...] = (2.0, -1.0, 0.02)) -> mi.PatchingResult:
    """Made-up paths from three senders into the queries of one head and the logits."""
    rng = np.random.default_rng(0)
    senders, receivers = ["embed", "0.1.z", "0.mlp_out"], ["1.2.q", "logits"]
    effect = np.array([sizes, [each / 2 for each in sizes]]).T
    patched = effect + rng.normal(0, 0.1, (n, 3, 2))
    data = xr.Dataset(
        {
            "patched": (("prompt", "sender", "receiver"), patched),
            "clean": ("prompt", rng.normal(4, 0.1, n)),
            "corrupted": ("prompt", np.zeros(n)),
        },
        {"prompt": range(n), "sender": senders, "receiver": receivers},
    )
    told = {
        "senders": senders,
        "receivers": {each: [each] for each in receivers},
        "via": [],
        "frozen": "attention and MLPs",
    }
    made = patching(layer=[0]).convention
    made = replace(made, method="path_patching", settings=told, site=None)
    return mi.PatchingResult(data, made)


def tokens_by_layers() -> xr.DataArray:
    values = np.linspace(-1, 1, 40).reshape(4, 10)
    values[0, 0] = np.nan
    names = {"layer": range(4), "position": [f"t{i}" for i in range(10)]}
    return xr.DataArray(values, dims=list(names), coords=names)


PICTURES = {
    "grid": (
        lambda: plotting.heat_grid(tokens_by_layers(), label="effect (nats)"),
        0x70070070030037677FC3FD3FF3FF117060,
    ),
    "attention": (lambda: attention(20).plot(), 0x5115811814C1961A5023D12D73212B16B119),
    "small multiples": (
        lambda: attention(20, ("0.0", "0.1", "1.0")).figure(),
        0x4003272353B2BB25B23B26B30B10A10A1112,
    ),
    "diagram": (lambda: paths().diagram(), 0x15E001421021429008828488011031021019),
    "waterfall": (
        lambda: plotting.waterfall(
            {"embed": np.ones(3), "0.1": -0.5 * np.ones(3), "total": 0.5 * np.ones(3)}
        ),
        0x400001001001C01C01C0106006006054A54A,
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_looks_as_it_did(name):
    draw, known = PICTURES[name]
    changed = (fingerprint(draw()) ^ known).bit_count()
    assert changed <= 14, f"{changed} of 144 patches changed: look at it"


def test_the_fingerprint_tells_pictures_apart():
    seen = [fingerprint(draw()) for draw, _ in PICTURES.values()]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert (one ^ other).bit_count() > 20


def test_missing_cells_are_hatched_and_the_scale_says_so():
    ax = plotting.heat_grid(tokens_by_layers(), label="effect")
    assert ax.patch.get_hatch()
    assert ax.figure.axes[1].get_ylabel() == "effect; hatched: not measured"


@pytest.mark.parametrize("length", [1, 6, 500])
def test_hostile_and_many_tokens_are_drawn(length):
    result = attention(length)
    for drawn in (result.plot(), result.figure()):
        assert png_of(drawn).startswith(b"\x89PNG")
    shown = texts(result.plot().get_xticklabels())
    assert len(shown) <= 40 and (length < 500 or len(shown) > 10)


def test_a_part_of_a_long_prompt_can_be_drawn():
    ax = attention(60).plot(start=10, stop=14)
    assert len(ax.get_xticks()) == 4
    result = patching(layer=range(2), position=range(60), token=[f"t{i}" for i in range(60)])
    grid = result.plot(start=50, stop=53)
    assert texts(grid.get_xticklabels()) == ["50 t50", "51 t51", "52 t52"]
    with pytest.raises(ValueError, match="no position lies between start=70"):
        result.plot(start=70)
    with pytest.raises(ValueError, match="no axis of positions"):
        patching(layer=range(2)).plot(start=1)


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_every_format_can_be_written(form, tmp_path):
    result = patching(layer=range(2), position=range(6), token=HOSTILE)
    path = tmp_path / f"a.{form}"
    figure_of(result.plot()).savefig(path)
    figure_of(paths().diagram()).savefig(path)
    assert path.stat().st_size > 1000
    assert form != "svg" or "<script" not in path.read_text(encoding="utf-8")


def test_a_sign_that_no_font_has_becomes_a_box():
    assert plotting.token_label("a\U0001f9ff") == "a▯"
    assert plotting.drawable("é שלום $") == r"é שלום \$"


def test_a_diagram_has_every_node_at_its_layer_and_every_weight():
    result = paths()
    ax = result.diagram()
    heights = {
        text.get_text(): text.get_position()[1] for text in ax.texts if text.get_bbox_patch()
    }
    assert heights["embed"] < heights["0.1"] == heights["0 mlp"] < heights["1.2"]
    assert heights["1.2"] < heights["logits"]
    arrows = [patch for patch in ax.patches if type(patch).__name__ == "FancyArrowPatch"]
    assert len(arrows) == 6
    widest = max(arrows, key=lambda arrow: arrow.get_linewidth())
    assert f"q {float(result.effect.mean('prompt').max()):+.1f}" in heights
    assert widest.get_linestyle() == "-" and any(a.get_linestyle() != "-" for a in arrows)
    assert len(result.diagram(n=2).patches) == 2


def test_places_have_no_diagram():
    with pytest.raises(ValueError, match="measured places, not edges"):
        patching(layer=range(2)).diagram()
    with pytest.raises(ValueError, match="n=0 draws no edge"):
        paths().diagram(n=0)
    with pytest.raises(ValueError, match="no edges to draw"):
        path_diagram([])


def test_a_node_steps_aside_when_an_arrow_passes():
    low, middle, high = Node("0.0", 0.0), Node("1.0", 1.0), Node("2.0", 2.0)
    other = Node("2.1", 2.0)
    ax = path_diagram([Edge(low, high, 1.0), Edge(low, other, 1.0), Edge(middle, high, 0.1)])
    at = {text.get_text(): text.get_position() for text in ax.texts}
    for name in ("2.0", "2.1"):
        passing = (at["0.0"][0] + at[name][0]) / 2
        assert abs(at["1.0"][0] - passing) > 0.08


def test_a_waterfall_has_the_colours_of_grids_and_says_what_was_not_measured():
    bars = {"up": [2.0, 1.0], "down": [-1.0, -1.0], "lost": [np.nan, 1.0], "total": [1.0, 0.0]}
    ax = plotting.waterfall({name: np.array(each) for name, each in bars.items()})
    colours = [to_hex(bar.get_facecolor()).upper() for bar in ax.patches]
    assert colours[:2] == [plotting.UP, plotting.DOWN]
    scale = colormaps[plotting.DIVERGING]
    for colour, place in ((plotting.UP, 0.8), (plotting.DOWN, 0.2)):
        assert to_rgb(colour) == pytest.approx(scale(place)[:3], abs=0.02)
    assert [text.get_text() for text in ax.texts] == [" not measured"]
    lefts = [(bar.get_window_extent().x0, 0.0) for bar in ax.patches]
    assert ax.transData.inverted().transform(lefts)[:, 0] == pytest.approx([0, 0.5, 0.5, 0])


def test_a_waterfall_ends_at_its_total():
    rng = np.random.default_rng(0)
    bars = {name: rng.normal(size=5) for name in ("a", "b", "c")}
    total = np.sum(list(bars.values()), axis=0)
    ax = plotting.waterfall({**bars, "total": total}, label="nats")
    boxes: list[Any] = [patch for patch in ax.patches if hasattr(patch, "get_width")]
    for left, right in pairwise(boxes[:-1]):
        assert left.get_x() + left.get_width() == pytest.approx(right.get_x())
    assert boxes[-2].get_x() + boxes[-2].get_width() == pytest.approx(boxes[-1].get_width())


def lens_of(length: int) -> mi.LensResult:
    """A lens result of one prompt of hostile tokens, with made-up numbers."""
    rng = np.random.default_rng(0)
    dims = ("prompt", "layer", "position")
    words = np.array([HOSTILE[i % len(HOSTILE)] for i in range(length)])
    shape = (1, 3, length)
    numbers = {
        name: (dims, rng.random(shape)) for name in ("top_prob", "entropy", "kl", "surprisal")
    }
    data = xr.Dataset(
        {
            **numbers,
            "top_id": (dims, rng.integers(0, 9, shape)),
            "top_token": (dims, np.broadcast_to(words, shape)),
        },
        {
            "prompt": [0],
            "layer": range(3),
            "position": range(length),
            "token": (("prompt", "position"), words[None]),
        },
    )
    told = patching(layer=range(2)).convention
    settings = {"lens": "logit"}
    return mi.LensResult(
        data, replace(told, method="logit_lens", metrics={"kl": "nats"}, settings=settings)
    )


@pytest.mark.parametrize("length", [2, 6, 500])
def test_hostile_and_many_tokens_are_drawn_in_a_lens_table(length):
    ax = lens_of(length).plot(prompt=0)
    assert len(ax.get_xticks()) == min(length, 16)
    png_of(ax)


def test_a_part_of_a_lens_table_is_drawn_and_a_wrong_one_refused():
    result = lens_of(40)
    ax = result.plot(prompt=0, start=10, stop=35)
    words = texts(ax.texts)
    assert len(ax.get_xticks()) == 25 and "positions 10 to 34 of 40" in words
    narrow = result.plot(prompt=0, start=10, stop=13)
    assert figure_of(narrow).get_figwidth() < figure_of(ax).get_figwidth()
    with pytest.raises(ValueError, match="start=40 and stop=56: prompt 0 has 40, from 0 on"):
        result.plot(prompt=0, start=40)
    with pytest.raises(ValueError, match=r"prompt 3 was not read: there are 0\.\.0"):
        result.plot(prompt=3)
