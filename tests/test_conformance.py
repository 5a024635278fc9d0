"""Every public method keeps the promises of ``conformance``, which itself notices breaches."""

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import METHODS, Method, check_method, failing_pair, pair, public_methods
from transformer_lens.model_bridge import TransformerBridge
from zoo import zoo

import mechinterp as mi
from mechinterp.results import Result

model_of = cache(zoo)


def test_the_names_shown_to_editors_are_the_public_names():
    stub = Path(mi.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    names = {
        alias.asname
        for node in ast.walk(ast.parse(stub))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert names == set(mi.__all__)


def test_every_public_method_is_in_the_table():
    assert set(public_methods()) == set(METHODS), (
        "add the new method to METHODS in tests/conformance.py"
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_every_public_method_conforms(name, architecture, tmp_path):
    check_method(getattr(mi, name), METHODS[name], model_of(architecture), tmp_path)


def test_a_new_method_without_an_entry_is_noticed(monkeypatch):
    def new(model: TransformerBridge, data: Any) -> mi.PatchingResult: ...  # pyright: ignore

    monkeypatch.setattr(mi, "__all__", [*mi.__all__, "new"])
    monkeypatch.setattr(mi, "new", new, raising=False)
    assert set(public_methods()) - set(METHODS) == {"new"}


def patching(model: TransformerBridge, data: Any) -> mi.PatchingResult:
    return mi.activation_patching(model, data, "z", positions="end", layers=0)


def _leaves_a_hook(model: TransformerBridge, data: Any) -> Result:
    model.hook_dict["blocks.0.hook_out"].add_hook(lambda tensor, hook: tensor)
    return patching(model, data)


def _leaves_a_hook_when_it_raises(model: TransformerBridge, data: Any) -> Result:
    try:
        return patching(model, data)
    except Exception:
        model.hook_dict["blocks.0.hook_out"].add_hook(lambda tensor, hook: tensor)
        raise


def _changes_a_weight(model: TransformerBridge, data: Any) -> Result:
    with torch.no_grad():
        next(model.parameters()).add_(0)
    return patching(model, data)


def _draws_unseeded(model: TransformerBridge, data: Any) -> Result:
    found = patching(model, data)
    noise = torch.randn((), generator=torch.Generator().manual_seed(len(_CALLS)))
    _CALLS.append(1)
    return mi.PatchingResult(found.data + float(noise), found.convention)


def _has_an_effect_where_there_is_none(model: TransformerBridge, data: Any) -> Result:
    found = patching(model, data)
    return mi.PatchingResult(
        found.data.assign(patched=found.data["patched"] + 1), found.convention
    )


def _takes_its_data_last(model: TransformerBridge, site: str, data: Any) -> Result:
    return mi.activation_patching(model, data, site)


_CALLS: list[int] = []


@pytest.mark.filterwarnings("ignore::mechinterp.engine.SlowPathWarning")  # a hook is left
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (_leaves_a_hook, "changed the model or its hooks"),
        (_leaves_a_hook_when_it_raises, "left something behind when it raised"),
        (_changes_a_weight, "changed the model or its hooks"),
        (_draws_unseeded, "gave another result"),
        (_has_an_effect_where_there_is_none, "an idle edit had an effect"),
        (_takes_its_data_last, "not model and data"),
    ],
)
def test_a_method_that_breaks_a_promise_fails(
    broken: Callable[..., Result], says: str, tmp_path: Any
):
    broken.__name__ = "activation_patching"
    method = Method(data=pair, bad=failing_pair, idle=lambda model: pair(model, same=True))
    with pytest.raises(AssertionError, match=says):
        check_method(broken, method, zoo("gpt2"), tmp_path)
