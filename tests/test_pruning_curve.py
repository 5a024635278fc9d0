"""Pruning curves: what is left as heads go, on data that did not rank them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zoo
from known import known
from zoo import tokens

import mechinterp as mi
from mechinterp.causal import ablation
from mechinterp.heads import pruning_curve
from mechinterp.heads.held_out import held_out
from mechinterp.hooks import HookManager


def text(model, n: int = 8, seed: int = 1) -> mi.Text:
    return mi.Text.from_tokens(model, tokens(n, 9, seed=seed))


@pytest.fixture(scope="module")
def model():
    return zoo.zoo("llama")


@pytest.fixture(scope="module")
def curve(model):
    methods = ["ablation", "gradient", "random"]
    return mi.pruning_curve(
        model, text(model), evaluate_on=text(model, 6, 2), method=methods, steps=5, draws=4
    )


def test_every_point_is_the_model_without_those_heads(model, curve):
    judged = text(model, 6, 2)
    intact = judged.loss(model).mean("position")
    for method in ("ablation", "gradient"):
        for count in curve.data["removed"].values.tolist()[1:]:
            heads = curve.removed(method, count)
            assert len(set(heads)) == count
            one = mi.head_ablation(model, judged, heads=[heads])
            value = curve.data["value"].sel(ranked_by=method, removed=count)
            np.testing.assert_allclose(value, one.data["ablated"][:, 0], atol=1e-5)
    start = curve.data["value"].isel(removed=0)
    np.testing.assert_allclose(start.sel(ranked_by="random"), intact, atol=1e-5)


def test_all_orders_begin_and_end_alike(curve):
    ends = [curve.data[name].isel(removed=[0, -1]) for name in ("value", "random")]
    values = np.concatenate([each.values for each in ends])
    np.testing.assert_allclose(values, np.broadcast_to(values[:1], values.shape), atol=1e-5)
    assert curve.data["removed"].values.tolist() == [0, 2, 5, 7, 10, 12]


@pytest.mark.parametrize("kind", ["zero", "mean", "position_mean"])
def test_rescoring_is_a_greedy_loop(model, kind):
    data = text(model)
    curve = mi.pruning_curve(model, data, method="ablation", steps=12, draws=1, kind=kind)
    out: list[tuple[int, int]] = []
    manager = HookManager(model)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    half = data[:4]
    by_position = kind == "position_mean"
    means = manager.mean(half, "z", per_position=by_position)  # of the intact model, once

    def gone(layer: int, head: int) -> mi.edits.Edit:
        where = {"layers": layer, "heads": head}
        if kind == "zero":
            return mi.edits.Zero("z", **where)
        return mi.edits.Mean("z", means, per_position=by_position, **where)

    for _ in range(4):
        losses = {}
        for head in every:
            if head in out:
                continue
            with manager.edit(*(gone(*each) for each in [*out, head]), data=half):
                losses[head] = float(half.loss(model).mean())
        out.append(min(losses, key=losses.__getitem__))
    assert curve.removed("ablation", 4) == out
    assert curve.convention.settings["rescored"] == ["ablation"]
    assert (curve.convention.settings["reference"] is None) == (kind == "zero")


@pytest.mark.parametrize("method", ["ablation", "gradient"])
def test_corrupted_values_can_take_the_place_of_heads_that_are_rescored(model, method):
    rows = tokens(6, 9, seed=3)
    task = mi.Task.from_tokens(
        model,
        clean=rows.tolist(),
        corrupted=tokens(6, 9, seed=4).tolist(),
        answers=[3] * 6,
        distractors=[7] * 6,
    )
    curve = mi.pruning_curve(model, task, method=method, steps=4, draws=1, kind="corrupted")
    with HookManager(model).edit(
        mi.edits.Replace("z", HookManager(model).capture(task[1::2].corrupted, "z"))
    ):
        expected = mi.metrics.logit_diff(task[1::2].logits(model), task[1::2].targets())
    last = curve.data["value"].isel(ranked_by=0, removed=-1)
    np.testing.assert_allclose(last, expected, atol=1e-4)


def test_more_of_a_loss_is_worse_by_whatever_name(model):
    data = text(model)
    curve = mi.pruning_curve(model, data, steps=3, draws=3)
    named = mi.pruning_curve(model, data, steps=3, draws=3, metric={"surprisal": "loss"})
    assert curve.removed("gradient", 12) == named.removed("gradient", 12)
    mine = curve.against_random()["better"]
    assert named.against_random(metric="surprisal")["better"].tolist() == mine.tolist()


def test_what_judges_has_no_prompt_of_what_ranks(model):
    data = text(model)
    with pytest.raises(ValueError, match=r"2 of the 3 prompts of evaluate_on.*number 1"):
        others = mi.Text.from_tokens(
            model, [tokens(1, 9, seed=77)[0].tolist(), *data.prompts.rows[:2]]
        )
        mi.pruning_curve(model, data, evaluate_on=others)


def test_labels_are_halved_evenly_however_they_are_sorted(model):
    prompts = mi.Text.from_tokens(model, tokens(10, 7, seed=3)).prompts
    labels = torch.tensor([0] * 6 + [1] * 4)
    used, aside = held_out(mi.Labelled("x", prompts, labels, ("a", "b")), None, 0.5, "m")
    assert isinstance(used, mi.Labelled) and isinstance(aside, mi.Labelled)
    assert sorted(used.labels.tolist()) == sorted(aside.labels.tolist()) == [0, 0, 0, 1, 1]
    assert len({tuple(row) for row in [*used.prompts.rows, *aside.prompts.rows]}) == 10


def test_without_rescoring_both_of_a_redundant_pair_go_and_with_it_one_stays():
    found = known("redundant_pair", "multi_head", "learned")
    task, pair = found.task(8), found.circuit["previous_token"]
    total = len(found.patterns)
    for rescore, kept in ((False, 0), (True, 1)):
        curve = mi.pruning_curve(
            found.model, task, method="ablation", steps=total, rescore=rescore, draws=1
        )
        gone = curve.removed("ablation", total - len(found.heads) + (1 if rescore else 2))
        assert sum(head not in gone for head in pair) == kept
        left = curve.data["value"].sel(ranked_by="ablation", removed=len(gone)).mean()
        assert float(left) == pytest.approx(10.0 if rescore else 0.0, abs=1e-4)


def test_every_layer_keeps_its_least(model):
    curve = mi.pruning_curve(
        model, text(model), steps=3, min_heads_per_layer=1, draws=2, kind="mean"
    )
    assert curve.data["removed"].values.tolist() == [0, 3, 6, 9]
    gone = curve.removed("gradient", 9)
    assert {layer: sum(a == layer for a, _ in gone) for layer in range(3)} == {0: 3, 1: 3, 2: 3}


def test_half_of_the_data_ranks_and_the_other_half_judges(model):
    data = text(model)
    halved = mi.pruning_curve(model, data, steps=3, draws=2)
    given = mi.pruning_curve(model, data[:4], evaluate_on=data[4:], steps=3, draws=2)
    np.testing.assert_array_equal(halved.data["value"], given.data["value"])
    assert halved.convention.settings["ranked_on"] == given.convention.settings["ranked_on"]


def test_several_metrics_come_from_the_same_runs(model):
    metrics = {"loss": "loss", "accuracy": "accuracy"}
    both = mi.pruning_curve(model, text(model), steps=3, draws=2, metric=metrics)
    one = mi.pruning_curve(model, text(model), steps=3, draws=2)
    np.testing.assert_allclose(both.data["value"].sel(metric="loss"), one.data["value"])
    assert both.can_go(0.5, metric="accuracy").shape == (1, 3)


# ----------------------------------------------------------------- what follows from it


def made(values: np.ndarray, random: np.ndarray, metric: str) -> mi.PruningCurve:
    """A curve with the numbers given: ``method removed prompt`` and ``draw removed prompt``."""
    removed = np.arange(values.shape[1])
    data = xr.Dataset(
        {
            "value": (("ranked_by", "removed", "prompt"), values),
            "random": (("draw", "removed", "prompt"), random),
            "order": (("ranked_by", "place"), np.full((len(values), len(removed) - 1), "0.0")),
        },
        {
            "ranked_by": [f"method {i}" for i in range(len(values))],
            "removed": removed,
            "prompt": np.arange(values.shape[2]),
            "draw": np.arange(len(random)),
            "place": removed[1:],
        },
    )
    unit = {metric: "nats" if metric == "loss" else "share right"}
    convention = mi.Convention("pruning_curve", "m", "f", False, "float32", "d", "given", unit)
    worse = [metric] if metric == "loss" else []
    convention = replace(convention, settings={"worse": worse})
    return mi.PruningCurve(data, convention)


def test_the_area_of_a_straight_line_is_its_middle():
    values = np.linspace(1, 0, 5)[None, :, None] * np.ones((1, 1, 3))
    curve = made(values, values, "accuracy")
    np.testing.assert_allclose(curve.area(), 0.5)
    assert curve.against_random()["better"].tolist() == [0.0]


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("loss", -1)])
def test_better_is_more_of_a_metric_and_less_of_a_loss(metric, sign):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 1, 60))
    good = base - sign * np.linspace(0, 1, 6)[None, :, None] ** 2
    bad = base - sign * np.linspace(0, 1, 6)[None, :, None] + rng.normal(0, 0.02, (30, 6, 60))
    (row,) = made(good, bad, metric).against_random().to_dict("records")
    assert row["better"] > 0.1 and row["p"] < 0.01 and row["below"] == 0
    assert row["p_draws"] == pytest.approx(1 / 31)
    (row,) = made(bad[:1], np.repeat(good, 5, 0), metric).against_random().to_dict("records")
    assert row["better"] < -0.1 and row["below"] >= 3


def test_methods_are_compared_with_each_other_prompt_by_prompt():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 1, 40)) + np.zeros((1, 5, 1))
    fall = np.linspace(0, 1, 5)[None, :, None]
    values = np.concatenate([base - fall**2, base - fall + rng.normal(0, 0.01, base.shape)])
    curve = made(values, values, "accuracy")
    (row,) = curve.between().to_dict("records")
    assert (row["method"], row["than"]) == ("method 0", "method 1")
    expected = float(curve.area()[0].mean() - curve.area()[1].mean())
    assert row["better"] == pytest.approx(expected) and row["low"] < expected < row["high"]
    assert row["p"] == row["p_adjusted"] < 0.01
    (row,) = made(values, values, "loss").between().to_dict("records")
    assert row["better"] == pytest.approx(-expected)
    three = made(np.concatenate([values, base]), values, "accuracy").between()
    assert len(three) == 3
    assert bool((three["p_adjusted"] >= three["p"]).all())
    with pytest.raises(ValueError, match="method 0 alone"):
        made(values[:1], values, "accuracy").between()


def test_heads_can_go_until_the_bound_of_the_loss_meets_the_margin():
    rng = np.random.default_rng(1)
    means = np.array([0.0, 0.001, 0.005, 0.5, 0.001])
    values = 0.9 - means[None, :, None] + rng.normal(0, 0.001, (1, 5, 80))
    values[:, 0] = 0.9
    found = made(values, values, "accuracy").can_go(0.02)
    assert found["heads"].tolist() == [2]  # not 4, since 3 is too many
    assert found["share"].tolist() == [0.5]


def test_the_share_that_can_go_is_of_all_heads(model):
    told: dict[str, Any] = {"method": "random", "steps": 2, "min_heads_per_layer": 2}
    found = mi.pruning_curve(model, text(model), draws=2, **told).can_go(1e6)
    assert found["heads"].tolist() == [6] and found["share"].tolist() == [0.5]


def test_the_picture_names_each_method(curve):
    ax = curve.plot()
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert said == ["random orders", "ablation", "gradient", "random"]


def test_a_plan_comes_before_the_curve(model):
    told: dict[str, Any] = {"method": "ablation", "steps": 4, "draws": 2}
    judged = 4 * (1 + 2)
    plan = mi.pruning_plan(model, text(model), **told)
    assert plan.cells == 12 + 9 + 6 + 3 + judged
    assert mi.pruning_plan(model, text(model), rescore=False, **told).cells == 12 + judged
    chance = mi.pruning_plan(model, text(model), method="random", steps=4, draws=2)
    assert chance.cells == judged and chance.seconds < plan.seconds
    several = mi.pruning_plan(
        model,
        text(model),
        method=["shapley", "gradient"],
        steps=4,
        draws=2,
        options={"orders": 4},
    )
    assert several.cells == 4 * 12 + 3 * 4 + 4 * (2 + 2)


def test_a_plan_counts_the_cells_that_the_curve_runs(model, monkeypatch):
    ran = []
    for module in (pruning_curve, ablation):
        run = module.metrics_of_cells
        monkeypatch.setattr(
            module,
            "metrics_of_cells",
            lambda model, data, cells, run=run, **told: (
                ran.append(len(cells)) or run(model, data, cells, **told)
            ),
        )
    told: dict[str, Any] = {"method": ["ablation", "random"], "steps": 3, "draws": 2}
    mi.pruning_curve(model, text(model), **told)
    assert sum(ran) == mi.pruning_plan(model, text(model), **told).cells


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "ablations"}, "Did you mean 'ablation'"),
        ({"method": []}, "at least one method"),
        ({"method": ["gradient", "gradient"]}, "each once"),
        ({"steps": 0}, "at least 1"),
        ({"min_heads_per_layer": -1}, "min_heads_per_layer=-1 must be"),
        ({"min_heads_per_layer": 4}, "leaves nothing to prune"),
        ({"draws": 0}, "no band"),
    ],
)
def test_bad_arguments_are_said_at_once(model, arguments, says):
    with pytest.raises(ValueError, match=says):
        mi.pruning_curve(model, text(model), **arguments)


def test_a_metric_that_moves_in_steps_is_refused_by_gradients_before_any_run(model):
    for method in ("gradient", ["ablation", "gradient"]):
        with pytest.raises(ValueError, match=r"accuracy moves in steps.*method='ablation'"):
            mi.pruning_curve(model, text(model), method=method, metric="accuracy")
        with pytest.raises(ValueError, match="accuracy moves in steps"):
            mi.pruning_plan(model, text(model), method=method, metric="accuracy")


def test_data_that_ranks_does_not_judge(model):
    with pytest.raises(ValueError, match="flatter"):
        mi.pruning_curve(model, text(model), evaluate_on=text(model))
    with pytest.raises(ValueError, match="cannot be used and held out"):
        mi.pruning_curve(model, text(model, 1))
    with pytest.raises(TypeError, match="takes a Text"):
        task = mi.Task.from_tokens(model, clean=tokens(2, 6), answers=[3, 4])
        mi.pruning_curve(model, text(model), evaluate_on=task)


def test_what_was_not_removed_is_not_named(curve):
    with pytest.raises(ValueError, match="0 to 12"):
        curve.removed("ablation", 13)
    with pytest.raises(ValueError, match="is not on this curve"):
        curve.removed("shapley", 2)
