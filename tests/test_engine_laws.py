"""Laws of the engine: whatever the model, the prompts and the cells, it equals plain runs."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_engine import plain_logits
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge import TransformerBridge
from zoo import random_zoo, tokens

import mechinterp as mi
from mechinterp.edits import Add, Edit, Mean, Noise, Project, Replace, Resample, Scale, Zero
from mechinterp.engine import sizes as engine_sizes
from mechinterp.engine.cells import resolve
from mechinterp.engine.checking import TOLERANCE
from mechinterp.engine.runs import run_of
from mechinterp.hooks import HookManager
from mechinterp.sites import AXES, SITES, head_axis, n_heads, site_layers

FAMILIES = [
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "neox",
    "llama",
    "gemma2",
    "gemma3",
    "opt",
    "phi",
    "falcon",
    "native",
    "bert",
]
KINDS = [
    "other run",
    "zero",
    "scale",
    "add",
    "project",
    "mean",
    "position mean",
    "resample",
    "number",
]
QUICK = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)

shapes = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 4),
        "n_heads": st.sampled_from([2, 4]),
        "n_kv_heads": st.sampled_from([1, 2]),
        "window": st.integers(2, 6),
        "seed": st.integers(0, 99),
    }
)
lengths = st.lists(st.integers(3, 11), min_size=1, max_size=4)
# One edit as plain numbers, made into an edit of the model at hand later.
drafts = st.lists(
    st.tuples(*[st.integers(0, 999)] * 4, st.sampled_from(KINDS)), min_size=1, max_size=4
)
cell_drafts = st.lists(drafts, min_size=1, max_size=5)
# Noise has a law of its own, beside kinds that leave the logits their usual size.
noisy = st.sampled_from(["noise", "noise", "other run", "scale", "add", "resample"])
noisy_drafts = st.lists(
    st.lists(st.tuples(*[st.integers(0, 999)] * 4, noisy), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


def a_task(model: TransformerBridge, sizes: list[int], shared: int, seed: int) -> mi.Task:
    """Random prompts that begin alike; a role that lies elsewhere in each."""
    start = tokens(1, shared, seed=seed)[0].tolist() if shared else []

    def rows(which: int) -> list[list[int]]:
        made = [tokens(1, n, seed=seed + 7 * n + which)[0].tolist() for n in sizes]
        return [(start + row)[: len(row)] for row in made]

    who = [(n // 2, min(n, n // 2 + 2)) for n in sizes]
    return mi.Task.from_tokens(
        model,
        clean=rows(1),
        corrupted=rows(2),
        answers=[0] * len(sizes),
        distractors=[1] * len(sizes),
        roles={"who": who},
        answer_positions=[n - 1 - (n > 4) for n in sizes],
    )


def an_edit(
    model: TransformerBridge, draft: tuple[int, int, int, int, str], source: Any
) -> Edit:
    """The edit that a draft means on this model."""
    a, b, c, d, kind = draft
    there = [s for s in SITES if s == "embed" or site_layers(model, s)]
    site = there[a % len(there)]
    layer = (
        None if site == "embed" else site_layers(model, site)[b % len(site_layers(model, site))]
    )
    keyed = "key_pos" in AXES[site]
    where: dict[str, Any] = {
        "layers": layer,
        "positions": ["all", "end", "who", 1, -2, [0, "end"], slice(1, 3)][c % 7],
    }
    if head_axis(site) and layer is not None and d % 3:
        count = n_heads(model, site, layer)
        where["heads"] = [d % count, (d + 1) % count] if d % 3 == 2 and count > 1 else d % count
    if site == "mlp_post" and d % 2 and kind not in ("other run", "add", "project"):
        where["neurons"] = [d % 64, (d + 1) % 64]
    if keyed and d % 4 == 1:
        where["key_positions"] = ["end", 0, "who"][d % 3]
    if keyed and kind not in ("other run", "zero", "position mean"):
        kind = "scale"  # the others have values of their own for keys, or for the masked ones
    if keyed and kind == "position mean" and site == "scores":
        kind = "zero"
    generator = torch.Generator().manual_seed(d)
    size = {"d_model": model.cfg.d_model, "d_head": model.cfg.d_head}.get(AXES[site][-1])
    size = size or source[site, layer].shape[-1]
    direction = torch.randn(size, generator=generator, dtype=torch.float64).to(
        source["embed"].dtype
    )
    made: dict[str, Edit] = {
        "other run": Replace(site, source, **where),
        "zero": Zero(site, **where),
        "scale": Scale(site, 0.3, **where),
        "mean": Mean(site, source, **where),
        "position mean": Mean(site, source, per_position=True, **where),
        "resample": Resample(site, source, seed=d, **where),
        "number": Replace(site, 0.5, **where),
    }
    if not keyed:
        made["noise"] = Noise(site, 0.5, seed=d % 3, **where)
        made["add"] = Add(site, direction, scale=0.5, **where)
        made["project"] = Project(site, direction, **where)
    return made[kind]


EXAMPLES = st.tuples(
    st.sampled_from(FAMILIES),
    shapes,
    lengths,
    st.integers(0, 3),
    cell_drafts,
    st.sampled_from(["clean", "corrupted"]),
    st.sampled_from([12, 40, 4096]),
)


# Found by the slow law: nothing or a constant is left of the stream, so the norms after it make
# rounding large, of the engine and of a plain run.
SHAPE = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "window": 2, "seed": 0}
OTHER = (0, 0, 0, 0, "other run")
UNSTEADY = [
    ("mistral", SHAPE, [3], 0, [[OTHER, (282, 0, 0, 0, "zero")]], "clean", 12),
    ("gpt2", SHAPE, [4], 0, [[OTHER, (324, 0, 0, 0, "zero")]], "clean", 12),
    (
        "native",
        SHAPE | {"window": 3, "seed": 4},
        [3],
        0,
        [[OTHER], [OTHER, OTHER, OTHER, (338, 0, 0, 0, "number")]],
        "clean",
        12,
    ),
]


@QUICK
@given(EXAMPLES)
@example(UNSTEADY[0])
@example(UNSTEADY[1])
@example(UNSTEADY[2])
def test_random_cells_on_random_models_equal_plain_runs(example):
    check_equal(torch.float32, *example)


@QUICK
@given(
    st.tuples(
        st.sampled_from(FAMILIES),
        shapes,
        lengths,
        st.integers(0, 3),
        noisy_drafts,
        st.sampled_from(["clean", "corrupted"]),
        st.sampled_from([12, 40, 4096]),
    )
)
def test_random_cells_on_runs_with_noise_equal_plain_runs(example):
    check_equal(torch.float32, *example, noised=True)


class TrueDouble(TorchFunctionMode):
    """Keeps transformers from doing softmaxes and norms of a float64 model in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@QUICK
@given(EXAMPLES)
def test_in_true_double_precision_they_agree_to_a_billionth(example):
    with TrueDouble():
        check_equal(torch.float64, *example)


@pytest.mark.slow
@settings(QUICK, max_examples=40)
@given(EXAMPLES)
def test_more_random_cells_on_random_models_equal_plain_runs(example):
    check_equal(torch.float32, *example)


def check_equal(
    dtype: torch.dtype,
    family: str,
    shape: dict[str, int],
    sizes: list[int],
    shared: int,
    drafted: list,
    on: str,
    columns: int,
    noised: bool = False,
) -> None:
    """Fail unless the engine gives the logits of plain hooked runs, cell by cell.

    Where edits leave nothing or a constant of the stream, the norms after it enlarge rounding:
    how much, plain runs in both precisions say.
    """
    example = (family, shape, sizes, shared, drafted, on, noised)
    model, task, cells = drawn(dtype, *example)
    if not cells:
        return
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(engine_sizes, "CPU_COLUMNS", columns)
        mine = mi.cell_logits(model, task, cells, on=on)
    single = plain_logits(*drawn(torch.float32, *example), on)
    precise = drawn(torch.float64, *example)
    with TrueDouble():
        double = plain_logits(*precise, on)
    largest = torch.maximum(
        run_of(task, on).answers(HookManager(model)).abs().max(), double.abs().max()
    )
    rounding = (single - double).abs().amax(-1, keepdim=True)
    if dtype == torch.float64:
        plain, allowed = double, 1e-9 * largest
        allowed = allowed.where(rounding < TOLERANCE[torch.float32] * largest, largest)
    else:
        plain, allowed = single, TOLERANCE[dtype] * largest + 10 * rounding
    steady = rounding.max() < TOLERANCE[torch.float32] / 10 * largest
    assert not (said and steady), said[0].message
    assert ((mine - plain).abs() <= allowed).all(), (mine - plain).abs().amax((1, 2))


def drawn(
    dtype: torch.dtype,
    family: str,
    shape: dict[str, int],
    sizes: list[int],
    shared: int,
    drafted: list,
    on: str,
    noised: bool,
) -> tuple[TransformerBridge, mi.Task, list[mi.Cell]]:
    """The model, task and cells of an example; cells that are refused are left out."""
    model = random_zoo(family, dtype=dtype, **shape)
    task = a_task(model, sizes, shared, shape["seed"])
    if noised:  # the corrupted run is the clean one with noise on some of its tokens
        noise = Noise("embed", 0.3, seed=shared, positions="who")
        task = replace(task, corrupted=None, corrupted_roles=None, corruption=(noise,))
    other = "clean" if on == "corrupted" else "corrupted"
    there = [s for s in SITES if s == "embed" or site_layers(model, s)]
    manager, run = HookManager(model), run_of(task, other)
    with run.in_force(manager):
        source = manager.capture(run, there)
    cells = [mi.Cell([an_edit(model, draft, source) for draft in drafts]) for drafts in drafted]
    return model, task, [cell for cell in cells if not refused(model, task, cell, on)]


def refused(model: TransformerBridge, task: mi.Task, cell: mi.Cell, on: str) -> bool:
    """Whether a cell undoes its own edit, or no prompt of a source reaches a position."""
    try:
        plain_logits(model, task, [cell], on)
    except ValueError:
        return True
    try:
        resolve(model, run_of(task, on), [cell])
    except ValueError as error:
        assert "twice at the same place" in str(error)
        return True
    return False
