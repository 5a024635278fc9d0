"""``mechinterp prune``: a curve, a smaller model in a folder, and wrong arguments."""

import re
from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp import cli

BOOK = str(Path(__file__).parent / "data" / "five_children.txt")
FEW = ("--context", "24", "--n", "6", "--steps", "4", "--draws", "2")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return int(exit_.value.code or 0)


def test_prune_shows_a_curve_and_saves_the_smaller_model(tmp_path, capsys):
    out, curve = tmp_path / "smaller", tmp_path / "curve.nc"
    asked = ("--share", "0.25", "--fold", "mean", "--heal", "2")
    told = ("--out", str(out), "--curve", str(curve))
    assert run("prune", "embedded", BOOK, *FEW, *asked, *told) == 0
    said = capsys.readouterr().out
    assert "area against random orders" in said and "Healed in 2 steps" in said
    smaller = mi.load_model(out)
    assert sum(map(len, mi.pruning_of(smaller).heads.values())) == 8
    assert mi.cost(smaller).parameters < mi.cost(mi.load_model()).parameters
    assert isinstance(mi.load_result(curve), mi.PruningCurve)
    assert curve.with_suffix(".png").stat().st_size > 5000


def test_named_heads_go_without_a_curve(tmp_path, capsys):
    out = tmp_path / "smaller"
    asked = ("--heads", "0.1,2.5", "--fold", "mean", "--heal", "2", "--out", str(out))
    assert run("prune", "embedded", BOOK, *FEW, *asked) == 0
    said = capsys.readouterr().out
    assert "2 of 32 heads cut out" in said and "area against random" not in said
    assert mi.pruning_of(mi.load_model(out)).heads == {0: (1,), 2: (5,)}


def test_healing_is_told_in_the_metric_that_was_asked_for(capsys):
    few = ("--n", "8", "--steps", "2", "--draws", "2", "--method", "random")
    asked = ("--share", "0.2", "--heal", "2", "--metric", "accuracy")
    assert run("prune", "embedded", "induction", *few, *asked) == 0
    before, after = re.findall(
        r"accuracy (\S+) -> (\S+)\.$", capsys.readouterr().out, re.M
    ).pop()
    assert 0 <= float(before) <= 1 and 0 <= float(after) <= 1


def test_options_reach_the_method(tmp_path):
    curve = tmp_path / "curve.nc"
    asked = ("--option", "unit=token", "--option", "normalize_layers=true")
    assert run("prune", "embedded", BOOK, *FEW, *asked, "--curve", str(curve)) == 0
    options = mi.load_result(curve).convention.settings["options"]
    assert options == {"unit": "token", "normalize_layers": True}


def test_a_dry_run_says_what_it_would_cost(capsys):
    assert run("prune", "embedded", BOOK, *FEW, "--dry-run") == 0
    # The gradient at four steps, there and back; then the method and two random orders.
    assert f"{3 * 4 + 3 * 4} cells" in capsys.readouterr().out


def test_neurons_go_with_the_heads(tmp_path, capsys):
    asked = ("--share", "0.1", "--neurons", "0.3,0.4,2.7", "--out", str(tmp_path / "smaller"))
    assert run("prune", "embedded", BOOK, *FEW, "--method", "random", *asked) == 0
    assert "3 of 32 heads and 3 neurons cut out, by random" in capsys.readouterr().out
    assert mi.pruning_of(mi.load_model(tmp_path / "smaller")).neurons == {0: (3, 4), 2: (7,)}


def test_what_judges_neither_gives_means_nor_heals(monkeypatch, capsys):
    """Half of the text ranks; the other half is in no call but as what judges."""
    seen: dict[str, list] = {}

    def heal(model, data, *, evaluate_on, **_):
        seen["heal"] = [data, evaluate_on]
        raise SystemExit(0)

    def prune_heads(model, heads, *, fold, mean_data):
        seen["mean"] = [mean_data]
        return model

    monkeypatch.setattr(mi, "heal", heal)
    monkeypatch.setattr(mi, "prune_heads", prune_heads)
    asked = ("--share", "0.1", "--method", "random", "--fold", "mean", "--heal", "2")
    run("prune", "embedded", BOOK, *FEW, *asked)
    training, judging = seen["heal"]
    assert seen["mean"][0] is training
    own = {tuple(row) for row in training.prompts.rows}
    assert len(training) == len(judging) == 3
    assert not own & {tuple(row) for row in judging.prompts.rows}


def test_a_folder_of_other_things_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "thesis.tex").write_text("dear")
    monkeypatch.setattr(mi, "load_model", lambda _: pytest.fail("too late"))
    asked = ("--share", "0.5", "--out", str(tmp_path))
    assert run("prune", "embedded", BOOK, *FEW, *asked) == 2
    assert "not part of a model (thesis.tex)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "gradients"), "Did you mean 'gradient'"),
        (("--share", "1.5"), "between 0 and 1"),
        (("--out", "somewhere"), "say how much goes"),
        (("--heal", "5"), "say how much goes"),
        (("--share", "0.5", "--out", BOOK), "is a file"),
        (("--curve", "curve.png"), "must end in .nc"),
        (("--fold", "means"), "Did you mean 'mean'"),
        (("--fold", "resample"), "There are: "),
        (("--share", "0.9", "--min-heads", "2"), "at most 24 can go"),
        (("--share", "0.99"), "at most 31 can go"),
        (("--share", "0.5", "--neurons", "3"), "Pass 3.1,3.2"),
        (("--share", "0.5", "--neurons", "0.99999"), "neuron (0, 99999) does not exist"),
        (("--heads", "0.99"), "head (0, 99) does not exist"),
        (("--heads", "0.1", "--share", "0.5"), "Pass one of them"),
        (("--heads", "0.1", "--dry-run"), "without a curve"),
        (("--lora-rank", "4"), "Pass --heal"),
        (("--option", "units=token"), "Did you mean 'unit'"),
        (("--option", "orders=many"), "gives orders no int"),
        (("--metric", "accuracy", "--dry-run"), "accuracy moves in steps"),
        (("--steps", "0"), "steps=0 must be a whole number, at least 1"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, says, capsys):
    assert run("prune", "embedded", BOOK, *FEW, *arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
