"""The lens on the command line: tables, files and one line for what is wrong."""

from pathlib import Path

import pytest
from test_cli import run, tiny
from zoo import hf, tokenizer

import mechinterp as mi

__all__ = ["tiny"]  # the fixture


@pytest.fixture
def wordy(monkeypatch: pytest.MonkeyPatch) -> object:
    """Every model the command line asks for reads words."""
    from mechinterp import models

    model = models.load_model(hf("llama"), tokenizer=tokenizer())
    monkeypatch.setattr(models, "load_model", lambda source, **_: model)
    return model


@pytest.mark.usefixtures("tiny")
def test_a_task_is_read_ranked_and_saved(tmp_path, capsys):
    out = tmp_path / "lens.nc"
    arguments = ("lens", "embedded", "induction", "--n", "3", "--layers", "0:3")
    assert run(*arguments, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "resid_post, logit lens" in said and "Effect: logit_diff (nats of log-odds)" in said
    found = mi.load_result(out)
    assert isinstance(found, mi.LensResult)
    assert found.data.sizes["layer"] == 3 and out.with_suffix(".png").is_file()


@pytest.mark.usefixtures("wordy")
def test_single_neurons_are_read_out(tmp_path, capsys):
    out = tmp_path / "neurons.nc"
    asked = ("--site", "mlp_post", "--layers", "1", "--neurons", "3,7", "--out", str(out))
    assert run("lens", "embedded", "induction", "--n", "3", *asked) == 0
    assert "mlp_post, logit lens" in capsys.readouterr().out
    assert list(mi.load_result(out).data["neuron"].values) == ["1.3", "1.7"]


@pytest.mark.usefixtures("tiny")
def test_attribution_is_a_flag(tmp_path, capsys):
    out = tmp_path / "shares.nc"
    arguments = ("lens", "embedded", "induction", "--n", "3", "--attribution")
    assert run(*arguments, "--out", str(out)) == 0
    assert "direct logit attribution" in capsys.readouterr().out
    assert isinstance(mi.load_result(out), mi.DirectAttributionResult)


def test_a_text_file_is_read_through_a_tuned_lens(tmp_path, wordy, capsys):
    path = tmp_path / "story.txt"
    path.write_text("Mary and John went to the store . " * 6)
    text = mi.Text.from_strings(wordy, path.read_text(), context=16)
    tuned = mi.TunedLens.fit(wordy, text, steps=2, tokens=16).save(tmp_path / "lens.st")
    given = ("lens", "embedded", str(path), "--context", "16", "--targets", "store")
    assert run(*given, "--tuned", str(tuned)) == 0
    assert "tuned (text, 2 steps) lens" in capsys.readouterr().out
    assert run(*given, "--tuned", str(tmp_path / "none")) == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["induction", "--site", "resid_pots"], "Did you mean 'resid_post'"),
        (["induction", "--layers", "9"], "layer 9 does not exist"),
        (["induction", "--layers", "x"], "is not a list of numbers"),
        (["induction", "--attribution", "--layers", "1"], "Leave --layers out"),
        (["story.txt", "--attribution"], "needs answers"),
        (["story.txt"], "there is no file story.txt"),
        (["induction", "--memory", "lots"], "is no size"),
        (["induction", "--out", "x.png"], "must end in .nc"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(arguments, says, capsys):
    assert run("lens", "embedded", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_an_empty_file_has_nothing_to_read(tmp_path, wordy, capsys):
    Path(tmp_path / "empty.txt").write_text(" \n")
    assert wordy is not None
    assert run("lens", "embedded", str(tmp_path / "empty.txt")) == 2
    assert "is empty" in capsys.readouterr().err
