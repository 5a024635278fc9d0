"""The command line: a skin that starts fast, parses, and says in one line what is wrong."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from zoo import hf, tokenizer, zoo

import mechinterp as mi
from mechinterp import cli
from mechinterp.cli import shared
from mechinterp.models import load_model as real_load_model
from mechinterp.quickstart import quickstart


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every model the command line asks for is this one."""
    from mechinterp import models

    model = real_load_model(zoo("native_attn"))

    def load(source: object, **_: object) -> Any:
        return model

    monkeypatch.setattr(models, "load_model", load)
    monkeypatch.setattr(sys.modules["mechinterp.quickstart"], "load_model", load)
    return model


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return int(exit_.value.code or 0)


def test_a_result_is_saved_as_netcdf_or_not_at_all(tmp_path, capsys):
    out = tmp_path / "result.png"
    assert run("patch", "embedded", "induction", "z", "--out", str(out)) == 2
    assert "must end in .nc" in capsys.readouterr().err
    assert not out.exists()


def test_help_answers_without_torch_or_transformer_lens():
    code = """
import sys
from mechinterp.cli import main
try:
    main(["--help"])
except SystemExit as exit_:
    assert exit_.code == 0
heavy = {"torch", "transformers", "transformer_lens", "xarray", "pandas", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in (
        "quickstart",
        "sites",
        "tasks",
        "patch",
        "paths",
        "attribute",
        "icl",
        "report",
    ):
        assert command in done.stdout


COMMANDS: Any = vars(get_command(shared.app))["commands"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_fits_its_line_and_shows_calls_that_are_understood(name):
    command = COMMANDS[name]
    assert command.short_help and len(command.short_help) <= 60
    assert command.short_help.endswith(".")
    lines = [line.split() for line in (command.epilog or "").splitlines()]
    shown = [shlex.split(" ".join(line)) for line in lines if line[:1] == ["mechinterp"]]
    assert shown, f"{name} --help shows no call"
    for _, called, *arguments in shown:
        assert called == name
        command.make_context(called, arguments)  # raises where an option does not exist


@pytest.mark.parametrize(
    ("typed", "offers"), [("mechinterp pa", "patch"), ("mechinterp patch --win", "--window")]
)
def test_a_shell_completes_commands_and_options_without_torch(typed, offers):
    environment = {
        **os.environ,
        "_MECHINTERP_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    code = (
        "import sys\n"
        "from mechinterp.cli import main\n"
        "sys.argv = ['mechinterp']\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    told = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **told)
    assert offers in done.stdout.split(), done.stderr


def test_the_installed_command_knows_its_version():
    command = Path(sys.executable).with_name("mechinterp")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True)
    assert done.stdout == f"mechinterp {mi.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert run() == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quikstart"], "Did you mean 'quickstart'"),
        (["patch", "embedded"], "Missing argument 'TASK'"),
        (["patch", "embedded", "induction", "z", "--direktion", "noising"], "--direction"),
        (["patch", "embedded", "induction", "z", "--layers", "some"], "--layers 'some'"),
        (["patch", "embedded", "induction", "z", "--n", "many"], "Invalid value for '--n'"),
        (["patch", "x", "induction", "z", "--out", "/no/such/place/a.nc"], "does not exist"),
        (["sites", "embeded"], "Did you mean 'embedded'"),
        (
            ["attribute", "embedded", "induction", "z", "--audit", "0"],
            "'--audit': Input should be",
        ),
    ],
)
def test_wrong_arguments_give_one_line_and_exit_code_2(arguments, says, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inductoin", "z"], "Did you mean 'induction'"),
        (["induction", "zz"], "unknown site 'zz'"),
        (["induction", "z", "--direction", "noise"], "Did you mean 'noising'"),
        (["induction", "z", "--layers", "7"], "the model has layers 0..2"),
        (["induction", "z", "--positions", "ende"], "Did you mean 'end'"),
        (["induction", "z", "--metric", "logits"], "Did you mean 'logit'"),
        (["induction", "z", "--noise", "curent"], "Did you mean 'current'"),
        (["induction", "z", "--window", "9"], "pass 1 to 3 at z"),
    ],
)
def test_what_the_model_or_task_lacks_is_one_line_too(arguments, says, tiny, capsys):
    assert run("patch", "tiny", *arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_patch_prints_the_top_cells_and_saves_what_the_function_returns(tiny, tmp_path, capsys):
    out = tmp_path / "a.nc"
    arguments = ["--positions", "current,end", "--layers", "0:2", "--n", "3", "--out", str(out)]
    assert run("patch", "tiny", "induction", "resid_pre", *arguments) == 0
    task = mi.load_task("induction", tiny, 3)
    positions = ["current", "end"]
    expected = mi.activation_patching(
        tiny, task, "resid_pre", positions=positions, layers=[0, 1]
    )
    assert mi.load_result(out).equals(expected)
    assert out.with_suffix(".png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert "position" in printed and "current" in printed and "Mean logit_diff" in printed


def test_patch_traces_with_noise_and_windows(tiny, tmp_path):
    out = tmp_path / "a.nc"
    arguments = ["--noise", "current", "--window", "2", "--positions", "current,end"]
    arguments += ["--n", "2", "--out", str(out)]
    assert run("patch", "tiny", "induction", "attn_out", *arguments) == 0
    task = mi.noise_corruption(tiny, mi.load_task("induction", tiny, 2), role="current")
    expected = mi.activation_patching(
        tiny, task, "attn_out", positions=["current", "end"], window=2
    )
    assert mi.load_result(out).equals(expected)


def test_paths_and_attribute_save_what_their_functions_return(tiny, tmp_path, capsys):
    task = mi.load_task("induction", tiny, n=3)
    out = tmp_path / "paths.nc"
    wanted = ["embedded", "induction", "2.0.q@end,2.1.k", "--senders", "z,embed", "--n", "3"]
    assert run("paths", *wanted, "--through-mlps", "--out", str(out)) == 0
    same = mi.path_patching(
        tiny, task, ["2.0.q@end", "2.1.k"], senders=["z", "embed"], through_mlps=True
    )
    assert mi.load_result(out).equals(same) and out.with_suffix(".png").is_file()

    out = tmp_path / "scores.nc"
    asked = ["z", "--method", "ig", "--steps", "2", "--positions", "all", "--audit", "2"]
    assert run("attribute", "embedded", "induction", *asked, "--n", "3", "--out", str(out)) == 0
    scores = mi.attribution_patching(tiny, task, "z", method="ig", steps=2, positions="all")
    assert mi.load_result(out).equals(scores)
    audited = mi.load_result(out.with_name("scores.audit.nc"))
    assert audited.equals(mi.audit(tiny, task, scores, 2))
    assert "Rank correlation" in capsys.readouterr().out

    assert run("attribute", "embedded", "induction", "--method", "eap", "--n", "2") == 0
    assert "receiver" in capsys.readouterr().out


def test_an_audit_is_shown_with_its_own_top_and_says_what_it_is_of(tiny, capsys):
    asked = ["z", "--method", "atp*", "--no-grad-drop", "--positions", "all", "--audit", "2"]
    assert run("attribute", "tiny", "induction", *asked, "--n", "3") == 0
    _, table = capsys.readouterr().out.split("The top 2 of z by atp*, denoising, exactly")
    rows = [line.split() for line in table.splitlines()]
    header = next(i for i, row in enumerate(rows) if row[:1] == ["layer"])
    assert "p_adjusted" in rows[header] and rows[header + 3][0] == "low,"  # two rows, the note
    assert run("attribute", "tiny", "induction", "z", "--no-grad-drop", "--n", "3") == 2
    assert "has no grad_drop=False" in capsys.readouterr().err


def test_draws_of_noise_are_no_prompts_in_the_heading_either(tiny, capsys):
    arguments = ["--noise", "current", "--positions", "current,end", "--n", "2"]
    assert run("patch", "tiny", "induction", "resid_pre", *arguments) == 0
    assert ": 20 draws of 2 prompts" in capsys.readouterr().out


def test_figures_are_saved_with_all_that_stands_around_their_axes(tiny, tmp_path):
    from matplotlib.figure import Figure

    figure, out = Figure(figsize=(2, 2), dpi=150), tmp_path / "a.nc"
    figure.add_axes((0, 0, 1, 1)).set_title("far outside of the figure")
    shared.save_figure(figure, out)
    from matplotlib.image import imread

    assert min(imread(out.with_suffix(".png")).shape[:2]) > 310


@pytest.mark.parametrize("command", [["patch", "z"], ["paths", "logits"], ["attribute", "z"]])
def test_the_first_token_of_an_answer_may_stand_for_it(command, tmp_path, monkeypatch, capsys):
    from mechinterp import models

    model = real_load_model(hf("gpt2"), tokenizer=tokenizer())
    monkeypatch.setattr(models, "load_model", lambda *_, **__: model)
    rows = [
        {"clean": f"{a} gave it to", "corrupted": "Paul gave it to", "answers": f"{a} Tom"}
        for a in ("Mary", "John")
    ]
    path, out = tmp_path / "mine.jsonl", tmp_path / "out.nc"
    path.write_text("\n".join(map(json.dumps, rows)))
    name, what = command
    assert run(name, "tiny", str(path), what) == 2
    assert "first_token=True" in capsys.readouterr().err
    assert run(name, "tiny", str(path), what, "--first-token", "--out", str(out)) == 0
    assert mi.load_result(out).data.sizes["prompt"] == 2
    assert run(name, "tiny", "induction", what, "--first-token") == 2
    assert "first_token" in capsys.readouterr().err


def test_a_list_of_site_names_is_a_map_of_all_their_nodes(tiny, tmp_path):
    out = tmp_path / "map.nc"
    asked = ["q,k", "--senders", "0.1.z", "--n", "2", "--out", str(out)]
    assert run("paths", "tiny", "induction", *asked) == 0
    assert mi.load_result(out).data.sizes["receiver"] == 24


def test_paths_go_through_the_stops_that_are_named(tiny, tmp_path):
    out = tmp_path / "chain.nc"
    stops = ["--via", "1.0.v,1.1.q", "--senders", "0.1.z"]
    assert (
        run("paths", "embedded", "induction", "logits", *stops, "--n", "2", "--out", str(out))
        == 0
    )
    told = mi.load_result(out).convention.settings
    assert told["via"] == [["1.0.v", "1.1.q"]] and told["senders"] == ["0.1.z"]


def test_sites_and_tasks_are_listed(tiny, capsys):
    assert run("sites", "tiny") == 0
    printed = capsys.readouterr().out
    assert "resid_pre" in printed and "has no MLP" in printed
    assert run("tasks", "tiny") == 0
    printed = capsys.readouterr().out
    assert "induction" in printed and "no tokenizer" in printed


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("each", "each"),
        ("io, end", ["io", "end"]),
        ("-1", -1),
        ("2,-3", [2, -3]),
        ("2:6", slice(2, 6)),
        (":-1", slice(None, -1)),
    ],
)
def test_positions_are_read_as_in_python(text, means):
    assert shared.read_positions(text) == means


def test_layers_are_read_as_numbers_lists_and_ranges():
    read = [shared.read_integers("layers", text) for text in ("3", "1,4", "0:3", "-1")]
    assert read == [[3], [1, 4], [0, 1, 2], [-1]]


# ------------------------------------------------------------------------------- quickstart


def test_quickstart_writes_an_account_figures_and_results(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["mechinterp.quickstart"], "_LENGTH", 12)
    assert run("quickstart") == 0
    folder = tmp_path / "mechinterp-quickstart"
    assert sorted(p.name for p in folder.iterdir()) == [
        "ablation.png",
        "account.txt",
        "attention.nc",
        "attention.png",
        "circuit.png",
        "losses.json",
        "patching.nc",
        "patching.png",
        "paths.nc",
        "report.html",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["mechinterp-quickstart"]
    printed = capsys.readouterr().out
    assert (folder / "account.txt").read_text() in printed
    result = mi.load_result(folder / "patching.nc")
    assert result.convention.site == "z" and result.data["patched"].dims[1:] == (
        "layer",
        "head",
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Where heads look" in page and "1. Which heads carry the answer?" in page
    assert "The circuit" in page
    paths = mi.load_result(folder / "paths.nc")
    assert paths.convention.method == "path_patching" and "logits" in paths.data["receiver"]
    losses = json.loads((folder / "losses.json").read_text())
    assert len(losses["intact"]) == 23 and len(losses["control"]) == 8


def test_quickstart_leaves_nothing_half_done(tiny, tmp_path, monkeypatch):
    module = sys.modules["mechinterp.quickstart"]
    monkeypatch.setattr(module, "_LENGTH", 12)
    quiet = Console(quiet=True)
    out = quickstart(tmp_path / "out", console=quiet)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(
        module, "_ablate", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    for target in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            quickstart(target, console=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_quickstart_does_not_touch_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        quickstart(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        quickstart(tmp_path / "thesis.tex")


def test_the_attention_to_the_successor_is_one_for_an_ideal_induction_head():
    import torch

    from mechinterp.quickstart import _attention_at

    period, length = 4, 9  # a BOS and two copies of four tokens
    pattern = torch.zeros(1, length, length)
    pattern[0, :, 0] = 1.0
    for query in range(1 + period, length):
        pattern[0, query] = 0
        pattern[0, query, query - period + 1] = 1.0
    assert _attention_at(pattern, period, period - 1).item() == 1.0


def test_icl_scores_a_text_and_draws_it(tmp_path, capsys):
    text, out = tmp_path / "book.txt", tmp_path / "icl.nc"
    text.write_text("The rain went on and on, and the children stayed at home. " * 20)
    given = ["--late", "60", "--early", "10", "--out", str(out)]
    assert run("icl", "embedded", str(text), *given) == 0
    assert "score" in capsys.readouterr().out
    assert mi.IclResult.load(out).score < 0  # it repeats itself
    assert out.with_suffix(".png").exists()


def test_icl_draws_few_shot_curves_of_pairs(tmp_path, capsys):
    out = tmp_path / "few.nc"
    given = ["--shots", "0,2", "--n", "3", "--out", str(out)]
    assert run("icl", "embedded", "singular-plural", *given) == 0
    assert "shuffled_labels" in capsys.readouterr().out
    assert list(mi.load_result(out).data["shots"]) == [0, 2]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["country-captial"], "Did you mean 'country-capital'"),
        (["nowhere.txt"], "No such file"),
        (["country-capital", "--shots", "many"], "not a list of numbers"),
    ],
)
def test_icl_says_in_one_line_what_is_wrong(given, says, capsys):
    assert run("icl", "embedded", *given) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
