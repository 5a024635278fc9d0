"""The engine: equal to plain hooked runs, on every architecture, site and direction."""

from functools import cache
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from zoo import CAUSAL, NAMES, tokens, zoo

import mechinterp as mi
from mechinterp.edits import Replace
from mechinterp.engine.checking import TOLERANCE
from mechinterp.engine.runs import run_of
from mechinterp.hooks import HookManager
from mechinterp.sites import AXES, SITES, head_axis, site_layers

model_of = cache(zoo)
LENGTHS = (5, 9, 7)
WHERE = ("who", "all", "end")


def a_task(model: TransformerBridge, **fields: Any) -> mi.Task:
    """Prompts of three lengths whose two runs share their first two tokens."""
    rows = {s: [tokens(1, n, seed=s + n)[0].tolist() for n in LENGTHS] for s in (1, 20)}
    for clean, corrupted in zip(rows[1], rows[20], strict=True):
        corrupted[:2] = clean[:2]
    return mi.Task.from_tokens(
        model,
        **{
            "clean": rows[1],
            "corrupted": rows[20],
            "answers": [0, 1, 2],
            "distractors": [1, 2, 0],
            "roles": {"who": [(1, 2), (4, 6), (2, 4)]},
        }
        | fields,
    )


@torch.no_grad()
def plain_logits(
    model: TransformerBridge, task: mi.Task, cells: list[mi.Cell], on: str
) -> torch.Tensor:
    """The oracle: one hooked run of the whole model per cell."""
    manager, run = HookManager(model), run_of(task, on)
    return torch.stack([run.answers(manager, *cell.edits) for cell in cells])


def assert_equal_logits(mine: torch.Tensor, plain: torch.Tensor) -> None:
    """Equal within the documented tolerance, which is relative to the largest logit."""
    share = TOLERANCE[plain.dtype]
    torch.testing.assert_close(mine, plain, rtol=0, atol=share * float(plain.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_every_site_equals_plain_runs_on_every_architecture(name):
    model = model_of(name)
    task = a_task(model)
    manager = HookManager(model)
    cells = []
    for site in SITES:
        layers = [None] * 3 if site == "embed" else site_layers(model, site)
        if not layers:
            continue
        source = manager.capture(run_of(task, "clean"), site)
        first, middle, last = ([-1], [-2], [-3]) if "key_pos" in AXES[site] else WHERE
        head = 0 if head_axis(site) else None
        cells += [
            mi.Cell(Replace(site, source, layers=layers[0], heads=head, positions=first)),
            mi.Cell(Replace(site, source, layers=layers[1], positions=middle)),
            mi.Cell(Replace(site, source, layers=layers[2], heads=head, positions=last)),
        ]
    mine = mi.cell_logits(model, task, cells, on="corrupted")
    plain = plain_logits(model, task, cells, "corrupted")
    assert_equal_logits(mine, plain)
    assert float((plain - plain[0]).abs().max()) > 0.05


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_take_the_fast_path(name):
    model = model_of(name)
    task = a_task(model)
    result = mi.activation_patching(model, task, "z", positions="who", layers=1)
    assert result.convention.settings["path"] == "fast"
