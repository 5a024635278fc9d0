"""The spec of a sweep: typed, plain data only, and clear about what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.sweeps.items import Item
from mechinterp.sweeps.spec import METHODS, Spec, json_schema, read_spec
from mechinterp.sweeps.template import TEMPLATE

SMALL = {"models": "embedded", "tasks": "induction", "methods": ["head_ablation"]}
SWEEPS = Path(__file__).parents[1] / "scripts" / "sweeps"


def with_method(**told):
    return {**SMALL, "methods": [told]}


def test_one_or_many_may_be_given_and_lists_make_a_grid():
    spec = read_spec({**SMALL, "seeds": 3, "prompts": [8, 16]})
    assert (spec.seeds, spec.prompts, spec.tasks) == ((3,), (8, 16), ("induction",))
    asked = with_method(
        method="activation_patching", sites=["z", "q"], directions=["denoising", "noising"]
    )
    (method,) = read_spec(asked).methods
    assert [(each["site"], each["direction"]) for each in method.grid()] == [
        ("z", "denoising"),
        ("z", "noising"),
        ("q", "denoising"),
        ("q", "noising"),
    ]


def test_yaml_and_toml_say_the_same(tmp_path):
    one, other = tmp_path / "a.yaml", tmp_path / "a.toml"
    one.write_text("models: embedded\ntasks: [ioi]\nmethods: [{method: logit_lens}]\n")
    other.write_text('models = "embedded"\ntasks = ["ioi"]\n[[methods]]\nmethod="logit_lens"\n')
    assert read_spec(one) == read_spec(other)
    assert read_spec(read_spec(one).model_dump()) == read_spec(one)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({**SMALL, "modles": "x"}, "unknown key 'modles'. Did you mean 'models'"),
        ({**SMALL, "split": {"prompt": 3}}, "key in split 'prompt'. Did you mean 'prompts'"),
        (
            {**SMALL, "models": [{"source": "embedded", "dtyp": "float32"}]},
            "key in models.0 'dtyp'. Did you mean 'dtype'",
        ),
        (
            with_method(method="activation_patching", sites="z", postions="all"),
            "key in methods.0 'postions'. Did you mean 'positions'",
        ),
        (with_method(method="head_ablatoin"), "Did you mean 'head_ablation'"),
        (with_method(method="head_ablation", kinds="zeros"), "Did you mean 'zero'"),
        (with_method(method="activation_patching"), "methods.0.sites is missing"),
        (with_method(method="logit_lens", split={"layers": 2}), "by layers, but by prompts"),
        (
            with_method(method="head_ablation", kinds=["resample"], split={"prompts": 2}),
            "cannot be split by prompts",
        ),
        ({**SMALL, "prompts": 0}, "greater than 0"),
        ({"models": "embedded", "methods": ["head_ablation"]}, "Give tasks: or texts:"),
        ({**SMALL, "methods": []}, "methods"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_the_nearest_that_exists(wrong, says):
    with pytest.raises(ValueError) as error:
        read_spec(wrong)
    assert says in str(error.value)


AWAY = ["../a.csv", "/tmp/a.csv", "a/../../b.csv", "C:\\a.csv", "~/a.csv"]


@pytest.mark.parametrize("path", AWAY)
def test_no_path_in_a_spec_leaves_the_runs_folder(path):
    with pytest.raises(ValueError, match="leaves the run's folder"):
        read_spec({**SMALL, "export": path})
    assert read_spec({**SMALL, "export": "tables/a.csv"}).export == "tables/a.csv"


@pytest.mark.parametrize(
    "text",
    [
        "models: !!python/object/apply:os.system ['touch sprung']",
        "models: !!python/name:os.system",
        "models: !!python/object/new:os.system ['touch sprung']",
    ],
)
def test_yaml_that_wants_a_python_object_is_refused_and_nothing_is_built(
    text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="asks for a Python object to be built"):
        read_spec(tmp_path / "a.yaml")
    assert not (tmp_path / "sprung").exists()


def test_a_key_that_stands_there_twice_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("models: embedded\ntasks: [ioi]\ntasks: [induction]\n")
    with pytest.raises(ValueError, match="'tasks' stands there twice"):
        read_spec(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "a: [", "is not YAML"),
        ("a.toml", "a = [", "is not TOML"),
        ("a.yaml", "- 1", "holds no keys"),
        ("a.json", "{}", "ending .yaml, .yml or .toml"),
    ],
)
def test_what_is_no_spec_is_said(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        read_spec(tmp_path / name)


def test_a_missing_file_names_those_that_are_there(tmp_path):
    (tmp_path / "heads.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'heads.yaml'"):
        read_spec(tmp_path / "head.yaml")


def test_a_spec_cannot_ask_for_code_or_pickle():
    for key in ("trust_remote_code", "allow_pickle"):
        with pytest.raises(ValueError, match="unknown key"):
            read_spec({**SMALL, "models": [{"source": "x", key: True}]})


def test_relative_paths_are_meant_from_the_specs_own_folder(tmp_path):
    text = "models: [./m, {source: ../n}]\ntasks: [./a.jsonl, ioi]\nmethods: [head_ablation]\n"
    (tmp_path / "a.yaml").write_text(text)
    spec = read_spec(tmp_path / "a.yaml")
    assert spec.tasks == (str(tmp_path / "a.jsonl"), "ioi")
    assert [m.source for m in spec.models] == [str(tmp_path / "m"), str(tmp_path.parent / "n")]


def test_the_template_is_a_spec_and_its_comments_name_every_method_and_key():
    spec = Spec.model_validate(yaml.safe_load(TEMPLATE))
    assert spec.tasks == ("able",)
    for name in METHODS:
        assert name in TEMPLATE
    for name in Spec.model_fields:
        assert f"{name}:" in TEMPLATE
    uncommented = TEMPLATE.replace("#  - method", "  - method").replace("#    ", "    ")
    assert len(read_spec(yaml.safe_load(uncommented)).methods) == len(METHODS)


def test_the_json_schema_takes_what_is_right_and_refuses_what_is_not():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    whole = json.loads(read_spec(SMALL).model_dump_json())
    assert validator.is_valid(whole)
    assert not validator.is_valid({**whole, "modles": 1})
    short = {"models": "embedded", "tasks": "ioi", "methods": "head_ablation", "prompts": 4}
    assert validator.is_valid(short) and read_spec(short)
    assert not validator.is_valid({**short, "methods": "activation_patching"})  # needs sites


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_sweeps_are_specs(path):
    assert read_spec(path).methods


def test_a_key_with_nothing_after_it_is_left_at_its_default(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("models: embedded\ntasks: ioi\ntexts:\nmethods: head_ablation\n")
    assert read_spec(path).texts is None


def test_a_python_folder_is_no_python_object(tmp_path):
    path = tmp_path / "python" / "spec.yaml"
    path.parent.mkdir()
    path.write_text("models: [python")
    with pytest.raises(ValueError, match="is not YAML"):
        read_spec(path)


def test_a_spec_is_read_without_torch():
    code = (
        "import sys; from mechinterp.sweeps.spec import read_spec, json_schema; json_schema(); "
        "from mechinterp.sweeps import items, template; "
        "print([m for m in ('torch', 'transformer_lens', 'xarray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# -------------------------------------------------------------------------------------- keys


def item(**changed):
    told = {
        "model": {"source": "embedded", "dtype": "float32", "name": "embedded"},
        "data": {"name": "ioi", "n": 4, "seed": 0, "label": "ioi", "count": 4},
        "method": "head_ablation",
        "arguments": {"kind": "zero", "metric": "logit_diff"},
        "part": {"prompts": [0, 2]},
        "split": {"prompts": 2},
        "identity": {"fingerprint": "f", "data_sha256": "d", "versions": {"torch": "2"}},
        "memory": "1GB",
        "cells": 3,
        "work": 6,
    }
    return Item(**{**told, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": {"fingerprint": "g", "data_sha256": "d", "versions": {"torch": "2"}}},
        {"identity": {"fingerprint": "f", "data_sha256": "e", "versions": {"torch": "2"}}},
        {"identity": {"fingerprint": "f", "data_sha256": "d", "versions": {"torch": "3"}}},
        {"model": {"source": "embedded", "dtype": "bfloat16", "name": "embedded"}},
        {"method": "mlp_ablation"},
        {"arguments": {"kind": "mean", "metric": "logit_diff"}},
        {"arguments": {"kind": "zero", "metric": "prob"}},
        {"part": {"prompts": [2, 4]}},
        {"split": {"prompts": 4}},
        {"memory": "2GB"},
    ],
)
def test_the_key_changes_with_whatever_the_numbers_depend_on(changed):
    assert item(**changed).key != item().key
    assert (item(**changed).call == item().call) == (changed.keys() == {"part"})


def test_the_key_does_not_ask_where_the_weights_and_tokens_lay():
    moved = item(
        model={"source": "/elsewhere", "dtype": "float32", "name": "embedded"},
        data={"name": "/a/ioi", "n": None, "seed": 1, "label": "ioi", "count": 4},
    )
    assert moved.key == item().key


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_an_item_comes_back_from_json_with_its_key(arguments):
    one = item(arguments=arguments)
    back = Item.from_json(one.to_json())
    assert back == one and back.key == one.key
