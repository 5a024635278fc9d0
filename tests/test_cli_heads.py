"""``mechinterp heads`` and ``mechinterp induction``: tables, figures, and wrong arguments."""

from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp import cli

BOOK = Path(__file__).parent / "data" / "five_children.txt"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return int(exit_.value.code or 0)


def test_heads_prints_a_table_per_kind_and_saves_scores_and_figure(tmp_path, capsys):
    out = tmp_path / "heads.nc"
    asked = ("--kinds", "induction,previous_token", "--n", "6", "--out", str(out))
    assert run("heads", "embedded", *asked) == 0
    said = capsys.readouterr().out
    assert "induction (share of attention)" in said and "previous token" in said
    assert "p_adjusted: against them, Holm over 32 heads" in said
    found = mi.load_result(out)
    assert isinstance(found, mi.HeadScores)
    assert found.kinds == ["induction", "previous_token"]
    assert out.with_suffix(".png").stat().st_size > 5000


def test_heads_reads_text_from_a_file(capsys):
    asked = ("--kinds", "rare_token", "--n", "2", "--nulls", "0")
    assert run("heads", "embedded", str(BOOK), *asked) == 0
    said = capsys.readouterr().out
    assert "rare token (share of queries)" in said and "\n\n" not in said


def test_induction_prints_the_account_and_saves_the_dossier(tmp_path, capsys):
    few = ("--sets", "4", "--prompts", "3", "--n", "3", "--k", "1", "--length", "12")
    text = ("--text", str(BOOK), "--late", "60", "--early", "20")
    assert run("induction", "embedded", *few, *text, "--out", str(tmp_path / "found")) == 0
    said = capsys.readouterr().out
    assert "second copy" in said and "nats at token 60 against token 20" in said
    assert (tmp_path / "found" / "dossier.png").stat().st_size > 5000
    assert (tmp_path / "found" / "account.txt").read_text().strip() in said
    assert mi.InductionDossier.load(tmp_path / "found").settings["least"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("heads", "embedded", "--kinds", "inducton"), "Did you mean 'induction'"),
        (("heads", "embedded", "--kinds", "rare_token"), "needs text"),
        (("heads", "embedded", "--out", "heads.png"), "must end in .nc"),
        (("induction", "embedded", "--text", "nowhere.txt"), "nowhere.txt"),
        (("induction", "embedded", "--out", str(BOOK)), "is a file"),
        (("induction", "embedded", "--length", "2"), "length=2 leaves too few"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, says, capsys):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
