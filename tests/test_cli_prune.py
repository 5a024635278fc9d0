"""``mechinterp prune``: a curve, a smaller model in a folder, and wrong arguments."""

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


def test_a_dry_run_says_what_it_would_cost(capsys):
    assert run("prune", "embedded", BOOK, *FEW, "--dry-run") == 0
    assert "80 cells" in capsys.readouterr().out  # 32 + 24 + 16 + 8


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
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, says, capsys):
    assert run("prune", "embedded", BOOK, *FEW, *arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
