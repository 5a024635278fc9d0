"""A sweep's results: those of the methods themselves, and in every shape that is asked for."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from sweeping import SPEC, run_small, tiny
from zoo import hf, zoo

import mechinterp as mi
from mechinterp import cli
from mechinterp.sweeps import compare, progress
from mechinterp.sweeps.estimate import estimated
from mechinterp.sweeps.local import work
from mechinterp.sweeps.opening import open_ledger
from mechinterp.sweeps.places import inside, place_of
from mechinterp.sweeps.planning import planned
from mechinterp.sweeps.spec import read_spec
from mechinterp.sweeps.values import read_result, read_written, write_values
from mechinterp.sweeps.workbench import Workbench

N = 6
METHODS: list[dict[str, Any]] = [
    {"method": "activation_patching", "sites": ["z", "k", "embed"], "windows": 1},
    {"method": "activation_patching", "sites": "resid_pre", "directions": "noising"},
    {"method": "activation_patching", "sites": "attn_out", "positions": ["end"], "windows": 2},
    {"method": "head_ablation", "kinds": ["zero", "mean", "position_mean", "corrupted"]},
    {"method": "head_ablation", "kinds": "resample", "split": {"layers": 2}},
    {"method": "mlp_ablation"},
    {"method": "attribution_patching", "variants": ["atp", "eap"], "sites": "z"},
    {"method": "pruning_curve", "steps": 3, "draws": 2, "rankings": ["random", "gradient"]},
    {"method": "head_scores", "n": 3, "length": 8, "copies": 2, "nulls": 1},
    {"method": "head_scores", "on": "data", "kinds": ["induction", "first_token"], "nulls": 0},
    {"method": "logit_lens", "sites": ["resid_post", "attn_out"]},
]


def spec_of(methods, **told):
    return {
        "models": "tiny",
        "tasks": "induction",
        "prompts": N,
        "methods": methods,
        "split": {"prompts": 4, "layers": 2},
        **told,
    }


@pytest.fixture(scope="module")
def model():
    return mi.load_model(zoo("gpt2"))


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("methods") / "run"
    return mi.run(spec_of(METHODS), out, models={"tiny": model}, output="quiet")


CALLS = {
    "activation_patching": lambda m, d, a: mi.activation_patching(m, d, **a, memory="1GB"),
    "head_ablation": lambda m, d, a: mi.head_ablation(m, d, **a, memory="1GB"),
    "mlp_ablation": lambda m, d, a: mi.mlp_ablation(m, d, **a, memory="1GB"),
    "attribution_patching": lambda m, d, a: mi.attribution_patching(m, d, **a),
    "pruning_curve": lambda m, d, a: mi.pruning_curve(m, d, **a, memory="1GB"),
    "head_scores": lambda m, d, a: mi.head_scores(m, d, **a),
    "logit_lens": lambda m, d, a: mi.logit_lens(m, d, **a, memory="1GB"),
}


def test_joined_results_are_those_of_one_call_with_labels_and_convention(made, model):
    assert not made.failures
    seen = 0
    for found in made.results():
        item = found.item
        data = mi.load_task("induction", model, N) if item.data else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = CALLS[item.method](model, data, dict(item.arguments))
        got = found.result
        assert type(got) is type(whole) and found.complete, item
        xr.testing.assert_allclose(whole.data, got.data, atol=1e-5)
        assert {v: a.dims for v, a in whole.data.items()} == {
            v: a.dims for v, a in got.data.items()
        }
        assert set(whole.data.coords) == set(got.data.coords), item
        assert got.convention == whole.convention, item
        seen += len(found.rows) > 1
    assert len(made.results()) == 19 and seen > 10


def test_a_split_that_cuts_nothing_gives_the_same_bits_as_the_call(model, tmp_path):
    spec = spec_of([{"method": "head_ablation", "kinds": ["mean"]}], split={})
    run = mi.run(spec, tmp_path / "run", models={"tiny": model}, output="quiet")
    task = mi.load_task("induction", model, N)
    whole = mi.head_ablation(model, task, kind="mean", memory="1GB")
    assert run.results().one().equals(whole)


def test_values_come_back_as_they_were_written(made, tmp_path):
    for row in made.rows("done"):
        path = made.folder / "values" / f"{row.key}.parquet"
        result, item = read_result(path), read_written(path).item
        told = {"device": "abacus", "threads": 7}
        again = write_values(tmp_path, item, result, seconds=1.0, finished=2.0, machine=told)
        assert again.sha256 == row.sha256
        assert read_written(tmp_path / path.name) == again
        assert read_result(tmp_path / path.name).equals(result)


def test_every_number_has_its_row_whatever_the_method(made):
    frame = made.to_frame()
    expected = sum(
        sum(a.size for a in found.result.data.data_vars.values()) + _shared(found)
        for found in made.results()
    )
    assert len(frame) == expected
    for each in ("model", "method", "site", "kind", "variable", "value", "prompt", "layer"):
        assert each in frame
    found = made.results(method="activation_patching", site="z").one()
    mine = frame[(frame.method == "activation_patching") & (frame.site == "z")]
    patched = mine[mine.variable == "patched"].set_index(
        ["prompt", "layer", "head", "position"]
    )
    assert patched.loc[(5, 2, 3, "7"), "value"] == float(
        found.data["patched"].sel(prompt=5, layer=2, head=3, position=7)
    )


def _shared(found):
    """Numbers that every part by layers has again: the baselines."""
    by_rows: dict[str, list[Any]] = {}
    for row in found.rows:
        by_rows.setdefault(str(row.item.part.get("prompts")), []).append(row)
    parts = len(next(iter(by_rows.values())))
    data = found.result.data
    rest = [a.size for a in data.data_vars.values() if "layer" not in a.dims]
    return (parts - 1) * sum(rest) if parts > 1 else 0


def test_duckdb_answers_over_the_numbers_and_reads_nothing_else(made, tmp_path):
    asked = "SELECT kind, count(*) AS n FROM numbers WHERE method = 'head_ablation' GROUP BY 1"
    kinds = ("zero", "mean", "position_mean", "corrupted", "resample")
    assert dict(made.sql(asked).values) == dict.fromkeys(kinds, N * 12 + N * 2)
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for wrong in (f"SELECT * FROM read_csv('{tmp_path}/secret.csv')", "SELEC 1"):
        with pytest.raises(ValueError, match="DuckDB"):
            made.sql(wrong)


def test_results_are_chosen_by_label_and_shown_as_a_tree(made):
    assert len(made.results(method="head_ablation")) == 5
    with pytest.raises(ValueError, match="there is not one result but 5"):
        made.results(method="head_ablation").one()
    with pytest.raises(ValueError, match="Did you mean 'site'"):
        made.results(sites="z")
    tree = made.to_xarray(method="logit_lens")
    (name,) = [n for n in tree["logit_lens"].children if "site=attn_out" in n]
    expected = made.results(method="logit_lens", site="attn_out").one()
    xr.testing.assert_equal(tree["logit_lens"][name].to_dataset(), expected.data)


def test_two_runs_are_compared_number_by_number(tmp_path):
    a = run_small(tmp_path / "a")
    other = {**SPEC, "methods": SPEC["methods"][:1], "seeds": [0, 1]}
    b = run_small(tmp_path / "b", other)
    same = compare.compared(a, mi.open_run(tmp_path / "a"))
    assert same.same and "equal bit for bit" in same.summary and not len(same.cells)
    found = compare.compared(a, b)
    assert not found.same and not len(found.cells)
    assert (found.calls[["only A", "only B"]].to_numpy().sum(0) > 0).all()

    moved = tiny()
    import torch

    with torch.no_grad():
        next(moved.parameters()).mul_(1.01)
    c = mi.run(SPEC, tmp_path / "c", models={"tiny": moved}, output="quiet")
    found = compare.compared(a, c)
    largest = found.cells.iloc[0]
    assert largest["difference"] == abs(largest["value A"] - largest["value B"])
    assert found.cells["difference"].is_monotonic_decreasing
    assert compare.compared(a, c, tolerance=1e9).same


# ------------------------------------------------------------------------------- what is asked


def test_tasks_that_the_model_cannot_do_are_left_out_and_said(tmp_path, model, caplog):
    spec = read_spec(spec_of(["head_ablation"], tasks="able", least_accuracy=0.0))
    plan = planned(spec, Workbench(given={"tiny": model}))
    assert {item.data["label"] for item in plan.items} == {"induction"}
    assert any("cannot run ioi" in why for why in plan.left_out)
    impossible = read_spec(spec_of(["head_ablation"], tasks="able", least_accuracy=1.0))
    with pytest.raises(ValueError, match="nothing to do"):
        planned(impossible, Workbench(given={"tiny": model}))


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"tasks": "inductoin"}, "Did you mean 'induction'"),
        ({"metrics": "logits"}, "Did you mean 'logit'"),
        ({"methods": [{"method": "activation_patching", "sites": "zz"}]}, "unknown site 'zz'"),
        (
            {"methods": [{"method": "activation_patching", "sites": "z", "positions": "ende"}]},
            "Did you mean 'end'",
        ),
        ({"texts": "no.txt"}, "no file no.txt"),
    ],
)
def test_what_does_not_exist_is_said_before_anything_is_written(told, says, model, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        mi.run(
            {**spec_of(["head_ablation"]), **told},
            tmp_path / "run",
            models={"tiny": model},
            output="quiet",
        )
    assert says in str(error.value)
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_text_is_swept_where_a_method_takes_it(tmp_path, model):
    from zoo import tokenizer

    worded = mi.load_model(hf("gpt2"), tokenizer=tokenizer())
    (tmp_path / "book.txt").write_text("the king said that the queen saw him . " * 6)
    spec = spec_of(
        ["head_ablation", {"method": "activation_patching", "sites": "z"}],
        texts=str(tmp_path / "book.txt"),
        context=16,
        prompts=None,
    )
    spec["tasks"] = None
    run = mi.run(spec, tmp_path / "run", models={"tiny": worded}, output="quiet")
    (found,) = run.results()
    text = mi.Text.from_strings(worded, (tmp_path / "book.txt").read_text(), context=16)
    whole = mi.head_ablation(worded, text, memory="1GB")
    np.testing.assert_allclose(found.result.data["ablated"], whole.data["ablated"], atol=1e-5)
    assert list(found.result.data["template"].values) == list(whole.data["template"].values)


def test_the_table_is_exported_into_the_folder_and_never_out_of_it(tmp_path, model):
    spec = spec_of(["head_ablation"], export="tables/all.csv")
    run = mi.run(spec, tmp_path / "run", models={"tiny": model}, output="quiet")
    assert len(pd.read_csv(tmp_path / "run/tables/all.csv")) == len(run.to_frame())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tables").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="leads out of"):
        mi.run(spec, other, models={"tiny": model}, output="quiet")
    assert not list(elsewhere.iterdir())
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "values").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="Remove the link"):
        run_small(tmp_path / "third")
    with pytest.raises(ValueError, match="leads out of"):
        inside(place_of(tmp_path / "run", make=False), tmp_path)


def test_pickled_weights_and_remote_code_need_their_flag(tmp_path):
    import torch

    module = hf("gpt2")
    folder = tmp_path / "pickled"
    module.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    spec = spec_of(["head_ablation"], models=str(folder))
    with pytest.raises(ValueError, match="allow_pickle=True if you trust"):
        mi.run(spec, tmp_path / "run", output="quiet")
    assert mi.run(spec, tmp_path / "run", output="quiet", allow_pickle=True).status().complete

    coded = tmp_path / "coded"
    module = hf("gpt2")
    module.save_pretrained(coded)
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "mine.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        mi.run({**spec, "models": str(coded)}, tmp_path / "run2", output="quiet")
    assert not (tmp_path / "sprung").exists()


def test_unknown_words_for_backend_and_workers_are_refused(tmp_path):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"backend": "rays"}, "Did you mean 'ray'"),
        ({"workers": 0}, "workers=0 does nothing"),
        ({"workers": 2}, "are of this process"),
    ]
    for told, says in wrong:
        with pytest.raises(ValueError, match=says):
            run_small(tmp_path / "run", **told)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        mi.open_run(tmp_path / "nothing")


# -------------------------------------------------------------------------------- the estimate


def test_a_dry_run_counts_what_is_left_and_leaves_nothing(tmp_path, monkeypatch, model):
    monkeypatch.setattr("mechinterp.sweeps.workbench.load_model", lambda *_, **__: model)
    spec = read_spec(spec_of([METHODS[1], METHODS[4], METHODS[6], METHODS[10]]))
    found = estimated(spec, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    assert found.items == len(planned(spec, Workbench(given={"tiny": model})).items)
    assert found.seconds > 0 and found.memory > 0 and found.disk > 0 and found.done == 0
    assert f"{found.items} items to do" in str(found)
    small = read_spec(spec_of([METHODS[4]]))
    mi.run(small, tmp_path / "run", models={"tiny": model}, output="quiet")
    again = estimated(spec, tmp_path / "run")
    assert again.done > 0 and again.items + again.done == found.items


def test_what_is_written_is_about_what_was_estimated(made, tmp_path, model, monkeypatch):
    monkeypatch.setattr("mechinterp.sweeps.workbench.load_model", lambda *_, **__: model)
    spec = read_spec(spec_of([METHODS[1], METHODS[4]]))
    disk = estimated(spec, None).disk
    mi.run(spec, tmp_path / "run", models={"tiny": model}, output="quiet")
    real = sum(path.stat().st_size for path in (tmp_path / "run" / "values").iterdir())
    assert disk / 2 < real < 2 * disk


# -------------------------------------------------------------------------------- what is said


def test_events_come_as_lines_of_json(tmp_path, capsys):
    mi.run(SPEC, tmp_path / "run", models={"tiny": tiny()}, output="json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "planned" and kinds[-1] == "finished"
    assert kinds.count("started") == kinds.count("done") == events[-1]["items"]
    assert events[-2]["seconds_left"] == 0 and events[-2]["cells_per_second"] > 0


def test_a_bar_shows_items_rate_and_time_left_where_there_is_a_terminal(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    mi.run(SPEC, tmp_path / "run", models={"tiny": tiny()}, output="progress")
    said = capsys.readouterr().err
    assert "/19 items" in said and "cells/s" in said and "left" in said


def test_the_time_left_is_that_of_the_work_left(monkeypatch):
    clock = iter([10.0, 14.0, 14.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    tally = progress.Tally(items=3, done=0, work=100, work_done=0)
    tally.count({"event": "started"})
    tally.count({"event": "done", "work": 20, "cells": 8})
    assert tally.left == 16.0 and tally.rate == 2.0
    assert (progress.span(185), progress.span(7385)) == ("3:05", "2:03:05")


def test_a_worker_that_waits_is_through_when_the_others_are(tmp_path, model):
    place = place_of(tmp_path / "run", make=True)
    bench = Workbench(given={"tiny": model})
    plan = planned(read_spec(spec_of(["mlp_ablation"])), bench)
    with open_ledger(place) as ours:
        ours.plan(plan.name, "{}", plan.items)
        ours.register(1, "cpu")
        seen: list[Any] = []
        work(place, ours, plan.name, bench, seen.append, wait=True)
        assert not ours.waiting_for_others(plan.name)
        assert [e["event"] for e in seen] == ["started", "done"] * len(plan.items)


# --------------------------------------------------------------------------- the command line


def call(*arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, arguments)))
    return int(exit_.value.code or 0)


@pytest.fixture
def shell(monkeypatch, tmp_path) -> Path:
    model = tiny()
    monkeypatch.setattr("mechinterp.sweeps.workbench.load_model", lambda *_, **__: model)
    (tmp_path / "spec.yaml").write_text(json.dumps(SPEC))
    return tmp_path


def test_from_a_shell_a_sweep_is_run_watched_read_and_compared(shell, capsys):
    spec, out = shell / "spec.yaml", shell / "out"
    assert call("run", spec, "--out", out, "--dry-run") == 0
    assert "19 items to do" in capsys.readouterr().out and not out.exists()
    assert call("run", spec, "--out", out, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert call("run", spec, "--out", out) == 0
    assert "small: 19 of 19 items done" in capsys.readouterr().out
    assert call("status", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done"] == 19
    assert call("results", out) == 0
    assert "largest effect" in capsys.readouterr().out
    assert call("results", out, "--sql", "SELECT count(*) AS many FROM numbers") == 0
    assert "many" in capsys.readouterr().out
    assert call("results", out, "--csv", shell / "all.csv") == 0
    assert len(pd.read_csv(shell / "all.csv")) == len(mi.open_run(out).to_frame())
    assert call("diff", out, out) == 0
    assert "equal bit for bit" in capsys.readouterr().out


def test_exit_codes_tell_failures_and_full_disks(shell, capsys, monkeypatch):
    spec, out = shell / "spec.yaml", shell / "out"

    def broken(*_):
        raise RuntimeError("bananas")

    with monkeypatch.context() as patched:
        patched.setattr(Workbench, "do", broken)
        assert call("run", spec, "--out", out, "--quiet") == 1
    assert "--retry-failed does them again" in capsys.readouterr().err
    assert call("status", out) == 1
    assert "RuntimeError: bananas" in capsys.readouterr().out
    assert call("status", out, "--tracebacks") == 1
    assert "Traceback" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        import errno

        from mechinterp.sweeps import values

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(values.pq, "write_table", full)
        assert call("run", spec, "--out", out, "--quiet", "--retry-failed") == 3
    assert "the disk is full" in capsys.readouterr().err
    assert call("run", spec, "--out", out, "--quiet", "--retry-failed") == 0


def test_init_writes_a_spec_once_and_prints_the_schema(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert call("init", path) == 0 and read_spec(path).name == "first-sweep"
    assert call("init", path) == 2
    assert "is there already" in capsys.readouterr().err
    assert call("init", "--schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Spec"


def test_a_typo_in_a_spec_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("modles: embedded\n")
    assert call("run", tmp_path / "a.yaml", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "Did you mean 'models'" in said and said.count("\n") == 1
