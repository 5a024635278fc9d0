"""The engine's self-check: what it cannot compute exactly it runs in full, and says why."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from zoo import hf, tokens, zoo

import mechinterp as mi
from mechinterp.edits import Add, Apply, Edit, Replace, Scale, Zero
from mechinterp.hooks.taps import attached, foreign_hooks

model_of = cache(zoo)


def a_task(
    model: TransformerBridge, lengths: tuple[int, ...] = (5, 9, 7), bos: bool = False
) -> mi.Task:
    """Prompts of some lengths with a role; ``bos`` gives them all the same first token."""
    rows = {
        s: [tokens(1, n, seed=s + i)[0].tolist() for i, n in enumerate(lengths)]
        for s in (1, 20)
    }
    for row in [*rows[1], *rows[20]] if bos else []:
        row[0] = 1
    answers = [3 * i for i in range(len(lengths))]
    return mi.Task.from_tokens(
        model,
        clean=rows[1],
        corrupted=rows[20],
        answers=answers,
        distractors=[a + 1 for a in answers],
        roles={"who": [(2, 4)] * len(lengths)},
    )


def patch(model: TransformerBridge, task: mi.Task, **options: Any) -> mi.PatchingResult:
    """Three cells of ``z``, one in every layer."""
    options = {"positions": "who", "heads": 1} | options
    return mi.activation_patching(model, task, "z", **options)


def assert_same_numbers(mine: mi.PatchingResult, reference: mi.PatchingResult) -> None:
    """Patched runs and both baselines are equal, and the patches do something."""
    for name in ("patched", "clean", "corrupted"):
        theirs = reference.data[name].values
        atol = 1e-5 * float(np.abs(theirs).max() + 1)
        np.testing.assert_allclose(mine.data[name].values, theirs, rtol=0, atol=atol)
    assert np.abs(reference.effect.values).max() > 0.01


def path(result: mi.PatchingResult) -> str:
    return result.convention.settings["path"]


@contextmanager
def one_warning(reason: str) -> Iterator[None]:
    """The block warns once, that the whole model runs, and why."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert [each.category for each in found] == [mi.SlowPathWarning]
    assert re.search(reason, str(found[0].message)), str(found[0].message)


@contextmanager
def counted_runs(model: TransformerBridge) -> Iterator[list[int]]:
    """Yield a list that grows by one at every run of the model's own forward."""
    runs: list[int] = []
    inner = model.original_model.forward

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return inner(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.original_model, "forward", forward)
        yield runs


# ----------------------------------------------------------- models that are not what they seem

Misbehaviour = Callable[[Tensor, dict[str, Any]], Tensor | float]


def broken(name: str, layer: int, extra: Misbehaviour, part: str = "") -> TransformerBridge:
    """A model one module of which adds ``extra(input, arguments)`` to its output."""
    module = hf(name)
    place = module.get_submodule(f"model.layers.{layer}{part}")
    healthy = place.forward

    @wraps(healthy)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return healthy(hidden, *args, **kwargs) + extra(hidden, kwargs)

    place.__dict__["forward"] = forward
    return mi.load_model(module)


def the_mean(hidden: Tensor, _: dict[str, Any]) -> Tensor:
    return hidden.mean(1, keepdim=True)


def the_mean_beyond_eight_tokens(hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | float:
    beyond = (kwargs["position_ids"] >= 8).any(1)
    return hidden.mean(1, keepdim=True) * beyond[:, None, None]


def the_first_token(hidden: Tensor, _: dict[str, Any]) -> Tensor:
    return hidden[:, :1]


def the_amount_of_padding(hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """How many of the input's positions no query may look at: none, except in padding."""
    mask = kwargs["attention_mask"][..., -hidden.shape[1] :]
    seen = (mask if mask.dtype == torch.bool else mask == 0).any(-2)
    return 0.3 * (~seen).sum(-1, keepdim=True).to(hidden).expand(len(hidden), 1, 1) * hidden


@pytest.mark.parametrize(
    ("part", "layer", "direction"),
    [("", 0, "denoising"), (".mlp", 2, "noising")],
)
def test_a_model_that_mixes_positions_outside_attention_is_run_in_full(part, layer, direction):
    model = broken("llama", layer, the_mean, part)
    task = a_task(model)
    with one_warning("differ by .* position by position"):
        result = patch(model, task, direction=direction)
    assert path(result) == "full"
    assert_same_numbers(result, patch(model, task, direction=direction, method="reference"))
    assert path(patch(model_of("llama"), task, direction=direction)) == "fast"


def test_what_only_goes_wrong_in_counterfactual_runs_is_caught_too():
    # Every run starts with the same token, so base runs never notice which one is first.
    model = broken("llama", 1, the_first_token)
    task = a_task(model, bos=True)
    with one_warning("an edit of z that starts at layer"):
        result = patch(model, task)
    assert path(result) == "full"
    assert_same_numbers(result, patch(model, task, method="reference"))


@pytest.mark.parametrize("longest", [7, 8])
def test_what_only_goes_wrong_in_long_prompts_is_caught_once_prompts_are_long(longest):
    model = broken("llama", 1, the_mean_beyond_eight_tokens)
    short, long = a_task(model, (longest,)), a_task(model, (12,))
    result = patch(model, short)
    assert path(result) == "fast"
    assert_same_numbers(result, patch(model, short, method="reference"))
    with one_warning("differ by"):
        result = patch(model, long)
    assert path(result) == "full"
    assert_same_numbers(result, patch(model, long, method="reference"))


def test_what_only_goes_wrong_in_one_type_of_layer_is_caught():
    model = broken("gemma3", 1, the_mean)
    config: Any = model.original_model.config
    types = config.layer_types
    assert types == ["sliding_attention", "full_attention", "sliding_attention"]
    task = a_task(model)
    with one_warning("differ by"):
        result = patch(model, task)
    assert path(result) == "full"
    assert_same_numbers(result, patch(model, task, method="reference"))


def test_what_only_goes_wrong_in_padded_prompts_is_caught():
    model = broken("llama", 1, the_amount_of_padding)
    even, padded = a_task(model, (7, 7)), a_task(model, (5, 9))
    result = patch(model, even)
    assert path(result) == "fast"
    assert_same_numbers(result, patch(model, even, method="reference"))
    with one_warning("differ by"):
        result = patch(model, padded)
    assert path(result) == "full"
    assert_same_numbers(result, patch(model, padded, method="reference"))


# --------------------------------------------------------------------------- what is remembered


def test_the_check_is_remembered_until_a_weight_changes():
    model = zoo("llama")
    task = a_task(model)
    with counted_runs(model) as first:
        patch(model, task)
    with counted_runs(model) as second:
        patch(model, task)
    assert len(second) < len(first)
    with torch.no_grad():
        next(model.original_model.parameters()).add_(0.01)
    with counted_runs(model) as third:
        patch(model, task)
    assert len(third) == len(first)


def test_the_check_is_made_anew_under_edits_in_force():
    model = zoo("llama")
    task = a_task(model)
    with counted_runs(model) as first:
        patch(model, task)
    with mi.HookManager(model).edit(Scale("mlp_out", 0.5, layers=1)):
        with counted_runs(model) as inside:
            patch(model, task)
        with counted_runs(model) as again:
            patch(model, task)
    with counted_runs(model) as after:
        patch(model, task)
    assert len(inside) == len(first)
    assert len(again) == len(after) < len(first)


def test_a_check_that_failed_is_remembered_too():
    model = broken("llama", 1, the_mean)
    task = a_task(model)
    for _ in range(2):
        with one_warning("differ by"):
            assert path(patch(model, task)) == "full"


# ------------------------------------------------------------------------------- edits in force

DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(0))
IN_FORCE: dict[str, list[Edit]] = {
    "a shift of resid_pre": [Add("resid_pre", DIRECTION, layers=1, positions=[0, 2])],
    "a head's z, by role": [Zero("z", layers=1, heads=1, positions="who")],
    "half an MLP": [Scale("mlp_out", 0.5, layers=1)],
    "a knocked-out key": [
        Replace("scores", -torch.inf, layers=1, heads=0, positions="end", key_positions=[0, 1])
    ],
    "a shift of embed": [Add("embed", DIRECTION, scale=0.3, positions=1)],
    "two, nested": [
        Scale("attn_out", 2.0, layers=0, positions="who"),
        Zero("z", layers=2, heads=0, positions="end"),
    ],
    "two of one place, nested": [
        Scale("resid_post", 0.5, layers=0),
        Add("resid_pre", DIRECTION, layers=1, positions="end"),
    ],
}


@cache
def without_edits(direction: str) -> np.ndarray:
    model = model_of("llama")
    return patch(model, a_task(model), direction=direction).data["patched"].values


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *((name, "denoising") for name in IN_FORCE),
        ("a head's z, by role", "noising"),
        ("a knocked-out key", "noising"),
        ("two, nested", "noising"),
    ],
)
def test_edits_in_force_stay_in_force_and_need_no_slow_path(name, direction):
    model = model_of("llama")
    task, manager = a_task(model), mi.HookManager(model)
    plain = without_edits(direction)
    with ExitStack() as blocks:
        for edit in IN_FORCE[name]:
            blocks.enter_context(manager.edit(edit, data=task))
        mine = patch(model, task, direction=direction)
        reference = patch(model, task, direction=direction, method="reference")
    assert path(mine) == "fast"
    assert_same_numbers(mine, reference)
    moved = mine.data["patched"].values - plain
    assert np.abs(moved).max() > 1e-3
    assert not attached(model)


def test_an_edit_of_whole_prompts_reaches_the_end_of_a_longer_corrupted_prompt():
    model = model_of("llama")
    clean, corrupted = (
        [tokens(1, n, seed=n)[0].tolist() for n in many] for many in ((6, 8), (9, 11))
    )
    task = mi.Task.from_tokens(
        model, clean=clean, corrupted=corrupted, answers=[3, 4], distractors=[7, 8]
    )
    with mi.HookManager(model).edit(Zero("z", layers=0, heads=1), data=task):
        mine = mi.activation_patching(model, task, "resid_pre", positions=[-1])
        reference = mi.activation_patching(
            model, task, "resid_pre", positions=[-1], method="reference"
        )
    assert path(mine) == "fast"
    assert_same_numbers(mine, reference)


def test_leaving_a_block_in_which_only_the_engine_ran_raises_nothing():
    model = model_of("llama")
    task = a_task(model)
    for _ in range(2):  # the second time without the self-check's plain runs
        with mi.HookManager(model).edit(*IN_FORCE["two, nested"], data=task):
            patch(model, task)


def test_ablating_and_steering_around_a_sweep_equal_the_reference():
    model = model_of("gemma2")
    task, manager = a_task(model), mi.HookManager(model)
    donors = tokens(3, 9, seed=5)
    with (
        manager.ablate("z", kind="mean", mean_data=donors, layers=0, heads=2, data=task),
        manager.steer("resid_post", DIRECTION, layer=0, positions="end", data=task),
        manager.ablate("mlp_out", kind="resample", mean_data=donors, layers=1, positions=[1]),
    ):
        mine, reference = patch(model, task), patch(model, task, method="reference")
    assert path(mine) == "fast"
    assert_same_numbers(mine, reference)


def test_edits_in_force_apply_to_cells_of_every_kind():
    model = model_of("llama")
    task, manager = a_task(model), mi.HookManager(model)
    edits = [Zero("resid_pre", layers=1, positions=0), Scale("k", 0.5, layers=2, heads=1)]
    with manager.edit(Add("resid_post", DIRECTION, layers=1, positions="who"), data=task):
        mine = mi.cell_logits(model, task, [mi.Cell(edit) for edit in edits])
        for logits, edit in zip(mine, edits, strict=True):
            with manager.edit(edit, data=task):
                expected = task.logits(model)
            torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("method", ["reference", "engine"])
def test_an_edit_in_force_that_nothing_reaches_is_reported_also_after_a_sweep(method):
    model = model_of("llama")
    short, long = a_task(model, (5, 6)), a_task(model, (9, 9))
    with (
        pytest.raises(mi.HookNotFiredError, match="nowhere to act"),
        mi.HookManager(model).edit(Zero("z", layers=1, positions="end"), data=long),
    ):
        patch(model, short, method=method, layers=1)


# -------------------------------------------------------------------------------- others' hooks


def scaled(module: object, args: object, output: Tensor) -> Tensor:
    return output * 1.1


HOOKS: dict[str, tuple[str, Callable[[TransformerBridge], Any]]] = {
    "of transformer-lens": (
        r"blocks\.1\.hook_out",
        lambda model: model.hook_dict["blocks.1.hook_out"].add_hook(
            lambda tensor, *, hook: tensor * 1.1
        ),
    ),
    "of torch, after": (
        r"blocks\.1\..*mlp",
        lambda model: model.blocks[1].mlp.register_forward_hook(scaled),
    ),
    "of torch, on the wrapped module": (
        r"blocks\.1\..*mlp",
        lambda model: model.blocks[1].mlp.original_component.register_forward_hook(scaled),
    ),
    "of torch, on a hook point": (
        r"blocks\.1\.hook_out",
        lambda model: model.hook_dict["blocks.1.hook_out"].register_forward_hook(scaled),
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_with_anothers_hook_in_place_every_cell_runs_the_whole_model(name):
    model = zoo("llama")
    task = a_task(model)
    before = task.logits(model)
    where, attach = HOOKS[name]
    attach(model)
    found, logits = foreign_hooks(model), task.logits(model)
    assert float((logits - before).abs().max()) > 1e-3
    with one_warning(f"hooks that are not ours .*({where})"):
        result = patch(model, task)
    assert path(result) == "full"
    assert_same_numbers(result, patch(model, task, method="reference"))
    assert foreign_hooks(model) == found != []
    assert torch.equal(task.logits(model), logits)


def test_anothers_hook_sees_what_it_would_see_without_the_engine():
    model = zoo("llama")
    task = a_task(model)
    shapes: list[tuple[int, ...]] = []
    point = model.hook_dict["blocks.1.hook_out"]
    point.add_hook(lambda tensor, hook: shapes.append(tuple(tensor.shape)))
    with one_warning("blocks.1.hook_out"):
        patch(model, task, layers=1)
    assert set(shapes) == {(3, 9, 32)}


# ------------------------------------------------------------------------------ leaves no trace


def state(model: TransformerBridge) -> dict[str, Any]:
    """Everything about a model that a sweep might leave changed."""
    kept: dict[str, Any] = {"taps": attached(model), "foreign": foreign_hooks(model)}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        buffers = {key: id(value) for key, value in module._buffers.items()}
        point = len(getattr(module, "fwd_hooks", ()))
        own = sorted(vars(module))
        kept[name] = ([list(each) for each in hooks], buffers, point, own, module.training)
    kept["weights"] = {
        name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()
    }
    return kept


class Failing:
    """A metric that fails at its ``at``-th call; the first two are trials before any run."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, logits: Tensor, targets: Any) -> Tensor:
        self.left -= 1
        if not self.left:
            raise ArithmeticError("no such number")
        return logits[:, 0]


@pytest.mark.parametrize("name", ["native", "bert"])
def test_a_sweep_leaves_the_model_as_it_was(name):
    model = model_of(name)
    task = a_task(model)
    patch(model, task)  # what transformer-lens makes when first used is made by now
    logits, before = task.logits(model), state(model)
    for site in ("embed", "scores"):
        mi.activation_patching(
            model,
            task,
            site,
            positions="who",
            layers=None if site == "embed" else 1,
            metric="kl",
        )
    assert state(model) == before
    assert torch.equal(task.logits(model), logits)


@pytest.mark.parametrize("name", ["llama", "native", "bert"])
def test_a_sweep_whose_metric_fails_leaves_the_model_as_it_was(name):
    model = model_of(name)
    task = a_task(model)
    patch(model, task)
    logits, before = task.logits(model), state(model)
    for at in (3, 5):  # after two trials: of the first run, and of the cells
        with pytest.raises(ArithmeticError, match="no such number"):
            patch(model, task, metric=Failing(at))
    assert state(model) == before
    assert torch.equal(task.logits(model), logits)


@pytest.mark.parametrize("name", ["llama", "native", "bert"])
def test_a_sweep_whose_edit_fails_leaves_the_model_as_it_was(name):
    model = model_of(name)
    task = a_task(model)

    def fail(own: Tensor) -> Tensor:
        raise ArithmeticError("no such edit")

    patch(model, task)
    logits, before = task.logits(model), state(model)
    for edit in (Apply("embed", fail), Apply("resid_pre", fail, layers=1), Apply("z", fail)):
        with pytest.raises(ArithmeticError, match="no such edit"):
            mi.cell_logits(model, task, [mi.Cell(edit)])
    assert state(model) == before
    assert torch.equal(task.logits(model), logits)


def test_a_sweep_that_fails_inside_a_block_leaves_its_edits_in_force():
    model = model_of("llama")
    task = a_task(model)
    with mi.HookManager(model).edit(Scale("mlp_out", 0.5, layers=1)):
        expected = task.logits(model)
        with pytest.raises(ArithmeticError):
            patch(model, task, metric=Failing(4))
        assert torch.equal(task.logits(model), expected)
    assert float((task.logits(model) - expected).abs().max()) > 1e-3


def test_a_slow_sweep_whose_metric_fails_leaves_the_model_as_it_was():
    model = broken("llama", 1, the_mean)
    task = a_task(model)
    with one_warning("differ by"):
        patch(model, task)
    logits, before = task.logits(model), state(model)
    with (
        pytest.warns(mi.SlowPathWarning),
        pytest.raises(ArithmeticError, match="no such number"),
    ):
        patch(model, task, metric=Failing(5))
    assert state(model) == before
    assert torch.equal(task.logits(model), logits)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_pattern_that_attends_to_later_positions_is_run_in_full(layers):
    model = model_of("llama")
    task = a_task(model)
    mean = mi.edits.Mean(
        "pattern", mi.HookManager(model).capture(task, "pattern"), layers=layers
    )
    with pytest.warns(mi.SlowPathWarning, match="may attend to later positions"):
        mine = mi.cell_logits(model, task, [mi.Cell(mean)])
    with torch.no_grad(), mi.HookManager(model).edit(mean, data=task):
        plain = task.logits(model)
    torch.testing.assert_close(mine[0], plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    assert float((plain - task.logits(model)).abs().max()) > 1e-3
