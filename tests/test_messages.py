"""Error messages as a set: sentences that say what was asked, what is true, what to do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from zoo import zoo

import mechinterp as mi

PACKAGE = Path(mi.__file__).parent
SAID = ("ValueError", "TypeError", "FileNotFoundError", "RuntimeError", "ImportError")
# Messages that their caller completes, or that never reach a user as they are.
PARTS = ("tasks/answers.py", "sweeps/spec.py", "engine/wiring.py", "engine/packing.py")


def messages() -> Iterator[tuple[str, ast.expr]]:
    """Every message that is written out where it is raised, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in PARTS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            kind = node.exc.func
            if isinstance(kind, ast.Name) and kind.id in SAID and node.exc.args:
                yield f"{name}:{node.lineno}", node.exc.args[0]


def ends(message: ast.expr) -> str | None:
    """The last letter of a message; None where it ends in a value."""
    last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
    if isinstance(last, ast.Constant) and isinstance(last.value, str):
        return last.value[-1:]
    return None


def test_every_message_is_a_sentence():
    found = dict(messages())
    assert len(found) > 400
    cut = [place for place, message in found.items() if ends(message) not in (None, ".")]
    assert not cut, "these messages do not end in a full stop"


@pytest.fixture(scope="module")
def model():
    return zoo("gpt2")


@pytest.fixture(scope="module")
def task(model):
    return mi.load_task("induction", model, 4)


# What a user does wrong, and the words for what was asked, what is true and what to do.
CASES = {
    "a misspelt task": (
        lambda m, t: mi.load_task("inductoin", m),
        "'inductoin'",
        "'induction'",
    ),
    "too many prompts": (lambda m, t: mi.load_task("induction", m, 0), "n=0", "Pass"),
    "a misspelt site": (
        lambda m, t: mi.activation_patching(m, t, "resid_pot"),
        "'resid_pot'",
        "Did you mean",
        "There are",
    ),
    "a layer beyond the last": (
        lambda m, t: mi.activation_patching(m, t, "z", layers=99),
        "layer 99",
        "layers 0..",
    ),
    "a head beyond the last": (
        lambda m, t: mi.head_ablation(m, t, heads=[(0, 99)]),
        "head (0, 99)",
        "heads 0..",
    ),
    "a role that is not there": (
        lambda m, t: mi.activation_patching(m, t, "z", positions="subjct"),
        "'subjct'",
        "There are: 'current'",
    ),
    "a direction": (
        lambda m, t: mi.activation_patching(m, t, "z", direction="nosing"),
        "'nosing'",
        "'noising'",
    ),
    "a metric": (
        lambda m, t: mi.head_ablation(m, t, metric="logit_dif"),
        "'logit_dif'",
        "'logit_diff'",
    ),
    "a kind of ablation": (
        lambda m, t: mi.head_ablation(m, t, kind="meen"),
        "'meen'",
        "'mean'",
    ),
    "a kind of score": (
        lambda m, t: mi.head_scores(m, kinds="indction"),
        "'indction'",
        "'induction'",
    ),
    "a size of memory": (
        lambda m, t: mi.head_ablation(m, t, memory="lots"),
        "memory='lots'",
        "Pass bytes, or a size such as '2GB'",
    ),
    "too little memory": (
        lambda m, t: mi.head_ablation(m, t, memory=1),
        "memory=1",
        "Allow that much",
    ),
    "the model twice": (lambda m, t: mi.head_ablation(m, m), "TransformerBridge", "mi.Task"),
    "strings without a tokenizer": (
        lambda m, t: mi.HookManager(m).capture("some words", "z"),
        "no tokenizer",
        "Pass token ids",
    ),
    "all heads pruned": (
        lambda m, t: mi.prune_heads(m, [(i, j) for i in range(3) for j in range(4)]),
        "all 12 heads",
        "Leave at least one",
    ),
    "means of nothing": (
        lambda m, t: mi.prune_heads(m, [(0, 0)], fold="mean"),
        "fold='mean'",
        "Pass mean_data=",
    ),
    "a lens of attention": (
        lambda m, t: mi.logit_lens(m, t, site="pattern"),
        "pattern",
        "Use one of resid_pre",
    ),
    "a file that is not there": (lambda m, t: mi.load_result("no.nc"), "no.nc", "save(path)"),
    "a report as text": (
        lambda m, t: mi.report(mi.head_ablation(m, t), "a.txt"),
        "a.txt",
        "does not end in .html",
        "Name it so",
    ),
    "a run that is not there": (lambda m, t: mi.open_run("nowhere"), "no run", "makes one"),
    "paths to nowhere": (
        lambda m, t: mi.path_patching(m, t, "1.0.qq"),
        "'1.0.qq'",
        "'q'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_message_says_what_was_asked_what_is_true_and_what_to_do(name, model, task):
    wrong, *words = CASES[name]
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as raised:
        wrong(model, task)
    said = str(raised.value)
    assert all(word in said for word in words), said
    assert said.endswith("."), said
