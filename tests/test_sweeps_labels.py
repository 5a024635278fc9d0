"""Calls that differ are told apart, in tables, trees, comparisons and failures."""

import pandas as pd
import pytest
import torch
from sweeping import tiny

import mechinterp as mi
from mechinterp.sweeps import local
from mechinterp.sweeps.compare import compared
from mechinterp.sweeps.planning import planned
from mechinterp.sweeps.spec import read_spec
from mechinterp.sweeps.workbench import Workbench

TWICE = [
    {"method": "attribution_patching", "variants": "ig", "sites": "z", "steps": steps}
    for steps in (2, 3)
]


def spec_of(methods, **told):
    return {"models": "tiny", "tasks": "induction", "prompts": 2, "methods": methods, **told}


def plan(spec, **models):
    return planned(read_spec(spec), Workbench(given=models or {"tiny": tiny()}))


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    out = tmp_path_factory.mktemp("twice") / "run"
    return mi.run(spec_of(TWICE), out, models={"tiny": tiny()}, output="quiet")


def test_calls_that_differ_in_any_argument_have_labels_of_their_own(twice):
    first, second = (found.item.labels for found in twice.results())
    assert {k for k in first if first[k] != second[k]} == {"options"}
    assert '"steps":2' in first["options"] and '"steps":3' in second["options"]
    assert len(twice.to_xarray().leaves) == len(twice.results()) == 2


def test_a_comparison_pairs_every_number_with_its_own(twice):
    found = compared(twice, twice)
    assert found.same and len(found.calls) == 2
    assert sum(found.calls["both"].tolist()) == len(twice.to_frame())


def test_options_that_are_the_same_everywhere_stay_out_of_the_trees_names(tmp_path):
    spec = spec_of([{"method": "head_ablation"}, *TWICE])
    run = mi.run(spec, tmp_path / "run", models={"tiny": tiny()}, output="quiet")
    names = {node.path for node in run.to_xarray().leaves}
    assert len(names) == 3 and sum("options=" in name for name in names) == 2


def test_what_a_number_was_computed_on_is_kept(twice):
    told = {"device": local.device_name(), "threads": torch.get_num_threads()}
    assert all(found.machines == [told] for found in twice.results())


def test_every_failure_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(local.Workbench, "do", lambda *_: 1 / 0)
    run = mi.run(spec_of(TWICE), tmp_path / "run", models={"tiny": tiny()}, output="quiet")
    assert len(run.failures) == run.status().failed == 2


def test_two_cuts_of_one_call_are_refused():
    cuts = [{"method": "head_ablation", "split": {"prompts": n}} for n in (1, 2)]
    with pytest.raises(ValueError, match=r"the same call twice.*Name the method once"):
        plan(spec_of(cuts))


def test_models_and_files_of_one_name_are_told_by_their_whole_path(tmp_path):
    spec = read_spec(
        {
            "models": ["a/best", "b/best", "org/other", "x\\model.gguf"],
            "texts": ["p/book.txt", "q/book.txt", "q/tale.txt"],
            "methods": "head_ablation",
        }
    )
    assert spec.model_names == ["a/best", "b/best", "other", "model.gguf"]
    names = [spec.data_name(name) for name in spec.texts or ()]
    assert names == ["p/book.txt", "q/book.txt", "tale.txt"]
    other = tiny()
    next(other.parameters()).data.mul_(2)
    told = spec_of("head_ablation", models=["a/best", "b/best"])
    items = plan(told, **{"a/best": tiny(), "b/best": other}).items
    assert [item.labels["model"] for item in items] == ["a/best", "b/best"]


# ------------------------------------------------------------------------- what keys depend on


def test_another_kind_in_the_list_changes_no_key_of_the_rest():
    split = {"prompts": 1, "layers": 1}
    few = plan(spec_of({"method": "head_ablation", "kinds": ["zero"]}, split=split))
    more = plan(
        spec_of({"method": "head_ablation", "kinds": ["zero", "resample"]}, split=split)
    )
    assert {item.key for item in few.items} < {item.key for item in more.items}
    with pytest.raises(ValueError, match="cannot be split by prompts"):
        alone = {"method": "head_ablation", "kinds": "resample", "split": {"prompts": 1}}
        read_spec(spec_of(alone))


def test_seeds_count_on_text_where_something_is_drawn_and_it_is_said_where_not(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("a b c d e f g h " * 8)
    model = mi.load_model("embedded")
    spec = {
        "models": "embedded",
        "texts": str(book),
        "context": 8,
        "seeds": [0, 1],
        "methods": {"method": "head_ablation", "kinds": ["zero", "resample"]},
    }
    found = plan(spec, embedded=model)
    seeds = pd.DataFrame([item.labels for item in found.items])[["kind", "seed"]]
    assert seeds.value_counts().to_dict() == {
        ("zero", 0): 1,
        ("resample", 0): 1,
        ("resample", 1): 1,
    }
    assert found.left_out == (
        "head_ablation of book.txt with seed 1: nothing in it is drawn, so its numbers are "
        "those of seed 0.",
    )


# ------------------------------------------------------------------------- said before it runs


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"memory": "lots"}, "memory='lots' is no size"),
        ({"methods": {"method": "logit_lens", "sites": "resid_pots"}}, "resid_post"),
        ({"methods": {"method": "attribution_patching", "sites": "zz"}}, "'z'"),
        ({"methods": {"method": "head_scores", "kinds": "inductoin"}}, "induction"),
        (
            {"methods": {"method": "head_scores", "on": "data", "kinds": "inductoin"}},
            "induction",
        ),
        (
            {
                "methods": {
                    "method": "pruning_curve",
                    "options": {"gradient": {"unti": "token"}},
                }
            },
            "unit",
        ),
    ],
)
def test_a_value_that_no_method_takes_is_said_when_planning(told, says):
    with pytest.raises(ValueError, match=says):
        plan(spec_of(**{"methods": "head_ablation", **told}))
