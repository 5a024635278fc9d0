"""The engine's arguments: what it refuses, what it frees, and how it splits work by memory."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from zoo import tokens, zoo

import mechinterp as mi
from mechinterp.edits import Add, Edit, Replace, Scale, Zero
from mechinterp.engine.calls import metric_reader
from mechinterp.engine.packing import pack
from mechinterp.engine.passes import Pass
from mechinterp.engine.runs import run_of, runs_of
from mechinterp.engine.sweep import sweep
from mechinterp.hooks import HookManager
from mechinterp.metrics import Targets, logit_diff, resolve_metrics

model_of = cache(zoo)
LENGTHS = (5, 9, 7)


def a_task(
    model: TransformerBridge, lengths: tuple[int, ...] = LENGTHS, **fields: Any
) -> mi.Task:
    """Prompts of some lengths with a role inside."""
    rows = {
        s: [tokens(1, n, seed=s + i)[0].tolist() for i, n in enumerate(lengths)]
        for s in (1, 20)
    }
    n = len(lengths)
    return mi.Task.from_tokens(
        model,
        **{
            "clean": rows[1],
            "corrupted": rows[20],
            "answers": list(range(n)),
            "distractors": [*range(1, n), 0] if n > 1 else [1],
            "roles": {"who": [(2, 4)] * n},
        }
        | fields,
    )


@torch.no_grad()
def plain_logits(
    model: TransformerBridge, task: mi.Task, cells: list[mi.Cell], on: str = "clean"
) -> Tensor:
    """The oracle: one hooked run of the whole model per cell."""
    manager, run = HookManager(model), run_of(task, on)
    return torch.stack([run.answers(manager, *cell.edits) for cell in cells])


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    atol = 1e-5 * float(theirs.abs().max() + 1)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


CELLS = [
    mi.Cell(Zero("z", layers=0, heads=0)),
    mi.Cell(Scale("resid_pre", 0.5, layers=1, positions="who")),
    mi.Cell(Zero("mlp_out", layers=1, positions=1)),
    mi.Cell([Zero("k", layers=2, heads=1, positions=0), Zero("embed", positions="end")]),
]


# ----------------------------------------------------------------------- refused before any run


@contextmanager
def nothing_runs(model: TransformerBridge) -> Iterator[None]:
    """A forward pass inside the block fails the test."""

    def run(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model ran")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.original_model, "forward", run)
        yield


def refused(
    message: str,
    cells: list[mi.Cell] | None = None,
    model: TransformerBridge | None = None,
    task: mi.Task | None = None,
    **options: Any,
) -> None:
    """``cell_metrics`` with these arguments is a ValueError before any forward pass."""
    model = model_of("llama") if model is None else model
    task = a_task(model) if task is None else task
    with nothing_runs(model), pytest.raises(ValueError, match=message):
        mi.cell_metrics(model, task, CELLS[:1] if cells is None else cells, **options)


def test_no_cells_are_refused():
    refused("no cells to run", [])


def test_a_cell_needs_an_edit():
    with pytest.raises(ValueError, match="without edits is the base run"):
        mi.Cell([])


TWICE: dict[str, tuple[Edit, Edit]] = {
    "the same head": (Zero("z", layers=1, heads=0), Replace("z", 1.0, layers=1, heads=[0, 2])),
    "one head and all": (Zero("z", layers=1), Replace("z", 1.0, layers=1, heads=3)),
    "positions by other names": (
        Zero("mlp_out", layers=1, positions="who"),
        Replace("mlp_out", 1.0, layers=[0, 1], positions=3),
    ),
    "leaving a block and entering the next": (
        Zero("resid_post", layers=0),
        Replace("resid_pre", 1.0, layers=1, positions=0),
    ),
    "a scaling undone": (Scale("mlp_post", 2.0, layers=1), Zero("mlp_post", layers=1)),
    "the same keys": (
        Replace("scores", -1.0, layers=1, positions="end", key_positions=[0, 1]),
        Zero("scores", layers=1, positions="end", key_positions=1),
    ),
    "embed": (Zero("embed"), Replace("embed", 1.0, positions=0)),
}


@pytest.mark.parametrize("name", TWICE)
def test_two_values_for_one_place_are_refused(name):
    refused("twice at the same place.*would undo", [CELLS[0], mi.Cell(TWICE[name])])


def test_the_message_says_which_cell_and_place_is_edited_twice():
    pair = mi.Cell([Zero("z", layers=2, heads=0), Replace("z", 1.0, layers=2, heads=0)])
    refused("cell 1 edits z at layer 2 of prompt 0 twice", [CELLS[0], pair])


def test_equal_values_for_one_place_are_no_conflict():
    model = model_of("llama")
    once = [Zero("z", layers=1), Replace("mlp_out", 0.5, layers=0, positions="who")]
    twice = [*once, Zero("z", layers=[1, 2], heads=0, positions=2), once[1]]
    more = [*once, Zero("z", layers=2, heads=0, positions=2)]
    values = mi.cell_metrics(model, a_task(model), [mi.Cell(twice), mi.Cell(more)])
    assert_close(values[0], values[1])


NOT_TWICE: dict[str, tuple[Edit, ...]] = {
    "other heads": (Zero("z", layers=1, heads=0), Zero("z", layers=1, heads=1)),
    "other positions": (
        Zero("mlp_out", layers=1, positions=0),
        Replace("mlp_out", 0.5, layers=1, positions="end"),
    ),
    "other layers": (Zero("resid_pre", layers=1), Zero("resid_pre", layers=2)),
    "other keys": (
        Replace("scores", -1.0, layers=1, positions="end", key_positions=0),
        Replace("scores", -2.0, layers=1, positions="end", key_positions=1),
    ),
    "added twice": (
        Add("resid_pre", torch.ones(32), layers=1),
        Add("resid_pre", 2 * torch.ones(32), layers=1),
    ),
    "put, then scaled": (Replace("mlp_out", 1.0, layers=1), Scale("mlp_out", 0.5, layers=1)),
    "put and added, between blocks": (
        Replace("resid_post", 1.0, layers=0, positions=0),
        Add("resid_pre", torch.arange(32.0), layers=1),
    ),
}


def test_edits_of_one_cell_that_do_not_undo_each_other_apply_in_their_order():
    model = model_of("llama")
    task, cells = a_task(model), [mi.Cell(edits) for edits in NOT_TWICE.values()]
    assert_close(mi.cell_logits(model, task, cells), plain_logits(model, task, cells))


def test_a_block_is_left_before_the_next_is_entered_however_edits_are_listed():
    model = model_of("llama")
    task = a_task(model)
    shift = Add("resid_pre", torch.arange(32.0), layers=1)
    cells = [mi.Cell([shift, Replace("resid_post", 1.0, layers=0)])]
    assert_close(mi.cell_logits(model, task, cells), plain_logits(model, task, cells))
    undone = Add("resid_post", torch.arange(32.0), layers=0)
    refused("twice at the same place", [mi.Cell([Zero("resid_pre", layers=1), undone])])


def test_positions_beyond_a_prompt_are_refused():
    cells = [mi.Cell(Zero("z", layers=1, positions=6))]
    refused("position 6 does not exist in prompt 0, which has 5 tokens", cells)


def test_layers_heads_and_roles_that_do_not_exist_are_refused():
    refused("layer 3 does not exist", [mi.Cell(Zero("z", layers=3))])
    refused(r"head.* 4", [mi.Cell(Zero("z", layers=0, heads=4))])
    refused("role 'whom'.*who", [mi.Cell(Zero("z", positions="whom"))])


def test_a_cell_made_for_another_model_is_refused():
    other = mi.fingerprint(model_of("gpt2"))
    mine = mi.fingerprint(model_of("llama"))
    message = f"another model .fingerprint {other[:12]}…; this model is {mine[:12]}…"
    refused(message, [CELLS[0], mi.Cell(CELLS[0].edits, fingerprint=other)])
    model = model_of("llama")
    mi.cell_logits(model, a_task(model), [mi.Cell(CELLS[0].edits, fingerprint=mine)])


def test_activations_of_another_model_are_refused_where_they_say_so():
    model = model_of("llama")
    task = a_task(model)
    acts = HookManager(model).capture(task, "resid_pre", layers=1)
    for info, fits in (
        (mi.fingerprint(model_of("gpt2")), False),
        (mi.fingerprint(model), True),
    ):
        named = dataclasses.replace(acts, info={"fingerprint": info})
        cells = [mi.Cell(Replace("resid_pre", named, layers=1))]
        if fits:
            mi.cell_logits(model, task, cells)
        else:
            refused("activations that a cell reads were made with another model", cells)


def test_a_run_that_does_not_exist_is_refused():
    refused("unknown run 'dirty'|run 'dirty'", on="dirty")
    model = model_of("llama")
    refused("no corrupted run", task=a_task(model, corrupted=None), on="corrupted")


@pytest.mark.parametrize("memory", ["2 potatoes", "", "-1GB", 0, -5, "GB"])
def test_what_is_no_size_is_refused(memory):
    refused("is no size. Pass bytes, or a size such as '2GB'", memory=memory)


@pytest.mark.parametrize("lengths", [(5, 9, 7), (4,), (31, 17)])
def test_too_little_memory_is_refused_and_the_smallest_that_works_does(lengths):
    model = model_of("llama")
    task, cells = a_task(model, lengths), CELLS[:3]
    for little in (1, "2kB"):
        with nothing_runs(model), pytest.raises(ValueError, match="too small") as found:
            mi.cell_logits(model, task, cells, memory=little)
    smallest = re.search(r"smallest that works is (.*?)\. ", str(found.value))
    assert smallest is not None
    mine = mi.cell_logits(model, task, cells, memory=smallest[1])
    assert_close(mine, plain_logits(model, task, cells))


def test_a_metric_of_a_wrong_shape_is_refused():
    refused(r"'metric' returned shape \(\) for 3 prompts", metric=lambda x, _: x.mean())
    refused(r"shape \(3, 97\) for 3 prompts", metric=lambda x, _: x)
    refused("nothing.*prob", metric="nothing")


def test_options_of_screening_that_do_not_exist_are_refused():
    model = model_of("llama")
    task = a_task(model)
    options: dict[str, Any] = {"site": "z", "positions": "who"}
    with nothing_runs(model):
        with pytest.raises(ValueError, match=r"'int4'.*bfloat16"):
            mi.activation_patching(model, task, **options, screen="int4")
        with pytest.raises(ValueError, match="screen= is the engine's"):
            mi.activation_patching(
                model, task, **options, screen="bfloat16", method="reference"
            )
        with (
            pytest.raises(ValueError, match="would lack the edits"),
            HookManager(model).edit(Zero("z", layers=0)),
        ):
            mi.activation_patching(model, task, **options, screen="bfloat16")


def test_data_that_is_no_task_is_refused():
    model = model_of("llama")
    with nothing_runs(model):
        for call in (mi.cell_metrics, mi.cell_logits, mi.plan):
            with pytest.raises(TypeError, match=f"{call.__name__}.*Task"):
                call(model, tokens(), CELLS[:1])


# -------------------------------------------------------------------------------------- metrics


def nan_for_prompt_2(calls: int) -> Any:
    """A metric that is NaN for the prompt whose answer is 2, from its ``calls``-th call on."""
    left = [calls]

    def metric(logits: Tensor, targets: Targets) -> Tensor:
        left[0] -= 1
        wrong = (targets.answers[:, 0] == 2) & (left[0] <= 0)
        return logits[:, 0].masked_fill(wrong, torch.nan)

    return metric


def test_a_metric_that_is_always_nan_is_refused_with_the_prompts_number():
    model = model_of("llama")
    with pytest.raises(
        ValueError, match="NaN or infinite on prompts 2; the cause is the metric"
    ):
        mi.cell_metrics(model, a_task(model), CELLS[:1], metric=nan_for_prompt_2(0))


def test_a_metric_that_is_finite_on_every_run_is_not_refused_for_made_up_logits():
    model = model_of("llama")
    task = a_task(model)
    logits = plain_logits(model, task, CELLS[:1])[0]
    runs = torch.cat([logits, task.logits(model), task.logits(model, "corrupted")])
    low = runs.amin(0)
    token = int(low.argmax())

    def metric(logits: Tensor, _: Targets) -> Tensor:
        return (logits[:, token] - low[token] + 0.01).log()

    mine = mi.cell_metrics(model, task, CELLS[:1], metric=metric)
    assert_close(mine[0, :, 0], metric(logits, task.targets()).double())


@pytest.mark.parametrize("calls", [3, 4])
def test_a_metric_that_is_nan_on_a_run_is_an_error_with_the_prompts_number(calls):
    model = model_of("llama")
    with pytest.raises(ValueError, match="NaN or infinite on prompts 2; the cause is the met"):
        mi.cell_metrics(model, a_task(model), CELLS, metric=nan_for_prompt_2(calls))


def test_logits_that_are_nan_are_an_error_that_names_a_prompt():
    model = model_of("llama")
    cells = [CELLS[0], mi.Cell(Replace("resid_pre", torch.nan, layers=1, positions=0))]
    with pytest.raises(ValueError, match=r"prompts .*1.*; the cause is the model's logits"):
        mi.cell_metrics(model, a_task(model), cells)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_metric_that_needs_all_prompts_at_once_gets_them(name):
    model = model_of(name)
    task = a_task(model)
    weights = torch.tensor([1.0, -2.0, 3.0])
    seen: set[int] = set()

    def weighted(logits: Tensor, _: Targets) -> Tensor:
        value = logits[:, 3] * weights
        seen.add(len(logits))
        return value

    def against_the_mean(logits: Tensor, targets: Targets) -> Tensor:
        value = logit_diff(logits, targets)
        return value - value.mean()

    metrics = {"weighted": weighted, "relative": against_the_mean}
    mine, reference = (
        mi.activation_patching(
            model, task, "z", positions="who", heads=1, metric=metrics, method=method
        ).data["patched"]
        for method in ("engine", "reference")
    )
    np.testing.assert_allclose(mine.values, reference.values, atol=2e-5)
    assert seen == {3}


@pytest.mark.parametrize("name", ["gemma2", "phi", "bert"])
def test_several_metrics_agree_with_the_reference(name):
    model = model_of(name)
    task = a_task(model)
    metrics = {
        "kl": "kl",
        "diff": "logit_diff",
        "rank": "rank",
        "own": lambda x, _: x[:, 5].exp(),
    }
    for metric in (metrics, "logit_diff"):
        mine, reference = (
            mi.activation_patching(
                model, task, "z", positions="who", heads=1, metric=metric, method=method
            ).data
            for method in ("engine", "reference")
        )
        for run in ("patched", "clean", "corrupted"):
            np.testing.assert_allclose(mine[run].values, reference[run].values, atol=3e-5)
    made = metric_reader(model, task, resolve_metrics("logit_diff"))(None)
    few = None if made.vocabulary is None else made.vocabulary.tolist()
    assert few == (None if name == "bert" else [0, 1, 2])


# --------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_any_split_of_the_work_gives_the_same_numbers(name, monkeypatch):
    model = model_of(name)
    task = a_task(model)
    expected = mi.cell_logits(model, task, CELLS)
    assert_close(expected, plain_logits(model, task, CELLS))
    passes: list[int] = []
    inner = Pass.run
    monkeypatch.setattr(Pass, "run", lambda self, at: passes.append(1) or inner(self, at))
    counts = []
    for columns in (50, 20, 9):
        passes.clear()
        monkeypatch.setattr("mechinterp.engine.sizes.CPU_COLUMNS", columns)
        torch.testing.assert_close(
            mi.cell_logits(model, task, CELLS), expected, rtol=0, atol=2e-5
        )
        counts.append(len(passes))
    if name == "llama":  # an encoder's parts are no passes
        assert counts == sorted(set(counts)) and counts[0] > 1


def only_with(rows: int) -> Any:
    """``Pass.run`` that is out of memory beyond some counterfactual rows."""
    inner = Pass.run

    def run(self: Pass, answers: np.ndarray) -> Tensor:
        if self.keep is None and len(self.packing.rows) > rows:
            raise torch.OutOfMemoryError("no memory left")
        return inner(self, answers)

    return run


@pytest.mark.parametrize("rows", [4, 1])
def test_out_of_memory_halves_the_work_and_goes_on(rows, monkeypatch):
    model = model_of("llama")
    task = a_task(model)
    expected = mi.cell_logits(model, task, CELLS)
    monkeypatch.setattr(Pass, "run", only_with(rows))
    torch.testing.assert_close(mi.cell_logits(model, task, CELLS), expected, rtol=0, atol=2e-5)


def test_out_of_memory_in_the_first_sweep_on_a_model_halves_the_work_and_goes_on(monkeypatch):
    model = zoo("llama")
    task = a_task(model)
    expected = plain_logits(model, task, CELLS)
    monkeypatch.setattr(Pass, "run", only_with(1))
    assert_close(mi.cell_logits(model, task, CELLS), expected)


def test_out_of_memory_in_the_base_runs_halves_them_too(monkeypatch):
    model = model_of("llama")
    task = a_task(model)
    expected = mi.cell_logits(model, task, CELLS)
    inner = Pass.run

    def run(self: Pass, answers: np.ndarray) -> Tensor:
        if self.keep is not None and len(self.packing.rows) > 4:
            raise torch.OutOfMemoryError("no memory left")
        return inner(self, answers)

    monkeypatch.setattr(Pass, "run", run)
    torch.testing.assert_close(mi.cell_logits(model, task, CELLS), expected, rtol=0, atol=2e-5)


def test_out_of_memory_with_a_single_row_is_raised(monkeypatch):
    model = model_of("llama")
    task = a_task(model)
    mi.cell_logits(model, task, CELLS)
    monkeypatch.setattr(Pass, "run", only_with(0))
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        mi.cell_logits(model, task, CELLS)


def test_another_error_of_the_model_is_raised_as_it_is(monkeypatch):
    model = model_of("llama")
    task = a_task(model)
    mi.cell_logits(model, task, CELLS)
    inner = Pass.run

    def run(self: Pass, answers: np.ndarray) -> Tensor:
        if self.keep is None:
            raise RuntimeError("no such kernel")
        return inner(self, answers)

    monkeypatch.setattr(Pass, "run", run)
    with pytest.raises(RuntimeError, match="no such kernel"):
        mi.cell_logits(model, task, CELLS)


# ------------------------------------------------------------------------------------- planning


def test_a_plan_counts_what_a_sweep_will_compute_and_runs_none_of_it(monkeypatch):
    model = model_of("llama")
    task = a_task(model)
    cells = [
        *mi.patching_cells(model, task, "z", positions="end"),
        mi.Cell(Zero("z", layers=2, heads=0, positions=[0])),
    ]
    monkeypatch.setattr(Pass, "run", lambda *_: pytest.fail("a sweep ran"))
    plan = mi.plan(model, task, cells, on="corrupted")
    assert plan.cells == 13
    # At the end of the prompt every cell counts; what the last layer does earlier is not read
    # by the last token's query at all, but an engine that counts it is only slower.
    assert 12 * 3 <= plan.rows <= plan.cells * 3
    assert plan.full_token_layers == 13 * 3 * 9 * 3
    base = sum(LENGTHS) * 2 * 3
    ends = sum(4 * 3 * layers for layers in (3, 2, 1))
    assert base + ends <= plan.token_layers < plan.full_token_layers / 2
    assert plan.path == "fast" and not plan.why
    assert plan.flop > 0 and plan.seconds > 0 and plan.peak_bytes > 0 and plan.passes >= 1
    printed = str(plan)
    for said in ("13 cells", f"{plan.rows} runs", "token-layers", "GFLOP", "path: fast"):
        assert said in printed
    assert printed in plan._repr_html_()


def test_a_plan_with_anothers_hook_in_place_says_why_it_is_slow():
    model = zoo("llama")
    task = a_task(model)
    model.hook_dict["blocks.1.hook_out"].add_hook(lambda tensor, hook: tensor * 1.1)
    plan = mi.plan(model, task, CELLS)
    assert plan.path == "full" and "blocks.1.hook_out" in plan.why
    assert plan.token_layers == plan.full_token_layers
    assert "path: full (hooks that are not ours" in str(plan)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_patching_between_runs_of_the_same_tokens_is_free_and_exact(name):
    model = model_of(name)
    clean = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
    task = a_task(model, clean=clean, corrupted=clean)
    cells = mi.patching_cells(model, task, "z", positions="who", layers=[0, 1])
    assert mi.plan(model, task, cells, on="corrupted").rows == 0
    result = mi.activation_patching(model, task, "z", positions="who", layers=[0, 1]).data
    for patched in result["patched"].stack(cell=("layer", "head", "position")).T.values:
        assert np.array_equal(patched, result["corrupted"].values)
        assert np.array_equal(patched, result["clean"].values)


# ------------------------------------------------------------------------------------ screening


def test_screening_computes_the_top_cells_exactly_and_the_others_nearly():
    model = model_of("gpt2")
    task = a_task(model, (7, 7))
    heads = [0, 2]
    exact = mi.activation_patching(model, task, "z", heads=heads)
    screened = mi.activation_patching(model, task, "z", heads=heads, screen="bfloat16")
    marked = screened.data["exact"].values
    assert 20 <= marked.sum() < marked.size
    mine, theirs = screened.data["patched"].values, exact.data["patched"].values
    np.testing.assert_allclose(mine[:, marked], theirs[:, marked], rtol=0, atol=1e-6)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=0.1)
    assert np.abs(mine[:, ~marked] - theirs[:, ~marked]).max() > 1e-5
    size = np.abs(exact.effect.values.mean(0))
    top = np.argsort(size, axis=None)[-8:]
    assert marked.reshape(-1)[top].all()
    assert screened.convention.settings["screen"] == "bfloat16"
    for run in ("clean", "corrupted"):
        np.testing.assert_allclose(
            screened.data[run].values, exact.data[run].values, rtol=0, atol=1e-6
        )


# ---------------------------------------------------------------------------- common beginnings


def test_rows_that_begin_alike_are_computed_once():
    model = model_of("llama")
    common = tokens(1, 10, seed=3)[0].tolist()
    clean = [common + tokens(1, n, seed=n)[0].tolist() for n in (2, 4, 3, 1)]
    task = a_task(model, (12, 14, 13, 11), clean=clean, corrupted=None)
    cells = [mi.Cell(Zero("z", layers=0, heads=0))]
    made = sweep(model, list(runs_of(task).values()), "clean", cells)
    assert made.shares
    together = pack(made.rows, 60, made.prompts.beginnings)
    apart = pack(made.rows, 60)
    assert (apart.row >= 0).sum() == 50
    assert (together.row >= 0).sum() == 10 + 10
    packed: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        inner = Pass.run

        def run(self: Pass, answers: np.ndarray) -> Tensor:
            packed.append(int((self.packing.row >= 0).sum()))
            return inner(self, answers)

        mi.cell_logits(model, task, cells)  # the self-check comes with the first sweep
        patched.setattr(Pass, "run", run)
        mine = mi.cell_logits(model, task, cells)
    assert packed == [20, 20]  # the base runs, then the cell's
    assert_close(mine, plain_logits(model, task, cells))


def test_rows_that_are_edited_apart_are_not_taken_for_alike():
    model = model_of("llama")
    common = tokens(1, 6, seed=3)[0].tolist()
    clean = [common + tokens(1, n, seed=n)[0].tolist() for n in (2, 4, 3)]
    task = a_task(model, (8, 10, 9), clean=clean, corrupted=None)
    donors = HookManager(model).capture(tokens(3, 10, seed=8), "z", layers=0)
    cells = [
        mi.Cell(Replace("z", donors, layers=0, heads=0, positions=[0, 1])),
        mi.Cell(Zero("resid_pre", layers=0, positions=-6)),
        mi.Cell(Zero("k", layers=0, positions=[2])),
        mi.Cell([Zero("mlp_out", layers=0, positions=1), Zero("z", layers=1, positions=-5)]),
    ]
    assert_close(mi.cell_logits(model, task, cells), plain_logits(model, task, cells))
