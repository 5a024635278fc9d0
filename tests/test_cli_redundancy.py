"""``mechinterp redundancy``: tables, figures and files, and wrong arguments."""

from pathlib import Path

import pytest

import mechinterp as mi
from mechinterp import cli

BOOK = Path(__file__).parent / "data" / "five_children.txt"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return int(exit_.value.code or 0)


def test_redundancy_prints_pairs_clusters_and_order_and_saves_all_of_it(tmp_path, capsys):
    out = tmp_path / "atlas"
    text = ("redundancy", "embedded", str(BOOK), "--n", "3", "--context", "32")
    causal = ("--task", "induction", "--prompts", "2", "--pairs", "flagged", "--flag", "1")
    assert run(*text, *causal, "--queries", "30", "--clusters", "20", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "Pairs most alike, five_children" in said and "js: 30 queries" in said
    assert "Largest interactions (nats of log-odds)" in said
    assert "Clusters by mean, 20 in all" in said
    assert "Suggested order of pruning: " in said and "(32 in all)" in said
    found = mi.load_result(out / "atlas.nc")
    assert isinstance(found, mi.RedundancyAtlas)
    order = [tuple(map(int, line.split("."))) for line in open_lines(out / "order.txt")]
    assert order == found.pruning_order()
    assert (out / "clusters.csv").read_text().startswith("cluster,size,representative")
    for name in ("redundancy", "interaction"):
        assert (out / f"{name}.png").stat().st_size > 5000


def open_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--view", "cossine"), "Did you mean 'cosine'"),
        (("--pairs", "al"), "Did you mean 'all'"),
        (("--queries", "9999999"), "Pass fewer, or more text"),
        (("--kind", "men", "--task", "induction", "--prompts", "2"), "Did you mean 'mean'"),
        (("--memory", "1KB"), "memory= is too small"),
        (("--out", str(BOOK)), "is a file"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, says, capsys):
    assert run("redundancy", "embedded", str(BOOK), "--n", "2", *arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
