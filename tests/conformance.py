"""What every public method keeps to, checked the same way for all of them.

A method is a public function that returns a ``Result``. Each one has an entry in ``METHODS``;
``test_conformance`` runs ``check_method`` on each and fails when one has no entry.
"""

import inspect
import re
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from transformer_lens.model_bridge import TransformerBridge
from zoo import tokenizer, tokens

import mechinterp as mi
from mechinterp.causal.parts import every_part
from mechinterp.models import forward
from mechinterp.results import Convention, Result


@dataclass(frozen=True)
class Method:
    """How to call a public method in the checks.

    Attributes:
        data: Makes the data that the method runs on; None for one that reads weights alone.
        arguments: What it needs beside model and data, or what makes that of the two.
        idle: Makes data on which its edits change nothing, so every effect is zero; None for
            a method that edits nothing.
        bad: Makes data on which it raises in the middle of its runs; None breaks the model's
            last block instead.
    """

    data: Callable[[TransformerBridge], Any] | None
    bad: Callable[[TransformerBridge], Any] | None = None
    idle: Callable[[TransformerBridge], Any] | None = None
    arguments: Mapping[str, Any] | Callable[..., Mapping[str, Any]] = field(
        default_factory=dict
    )

    def given(self, model: TransformerBridge, data: Any) -> Mapping[str, Any]:
        """What to call it with on this model and data."""
        return self.arguments(model, data) if callable(self.arguments) else self.arguments


def pair(model: TransformerBridge, *, same: bool = False, **fields: Any) -> mi.Task:
    """A task of four random prompts, corrupted by other random prompts or by themselves."""
    return mi.Task.from_tokens(
        model,
        clean=tokens(4, 6, seed=1),
        corrupted=tokens(4, 6, seed=1 if same else 2),
        answers=[3, 4, 5, 6],
        distractors=[7, 8, 9, 10],
        **fields,
    )


class Broken(Exception):
    """Raised by a metric in the middle of a method's runs."""


def failing_pair(model: TransformerBridge) -> mi.Task:
    """A task whose metric fails the third time that it is asked."""
    asked = []

    def metric(logits: torch.Tensor, targets: Any) -> torch.Tensor:
        asked.append(1)
        if len(asked) == 3:
            raise Broken
        return logits[:, 0]

    return pair(model, metric=metric)


def text(model: TransformerBridge) -> mi.Text:
    """Four documents of twelve tokens, some of which come again."""
    rows = [[1, 5, 9, 5, 9, 5, 2, i, 7, 3, 8, 4] for i in range(10, 14)]
    return mi.Text.from_tokens(model, rows)


def pairs(model: TransformerBridge) -> mi.Pairs:
    """Pairs of words that the zoo's tokenizer has, which the model gets here."""
    mi.load_model(model, tokenizer=tokenizer())
    rows = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo")]
    return mi.Pairs("capitals", tuple(rows))


def heads(model: TransformerBridge) -> list[tuple[int, int]]:
    """The heads that the model has; a pruned one has gaps."""
    return [part.pair for part in every_part(model, "z")]


METHODS: dict[str, Method] = {
    "activation_patching": Method(
        data=pair,
        bad=failing_pair,
        idle=lambda model: pair(model, same=True),
        arguments={"site": "z", "positions": ["end"]},
    ),
    "path_patching": Method(
        data=pair,
        bad=failing_pair,
        idle=lambda model: pair(model, same=True),
        arguments={"receivers": "2.1.q"},
    ),
    "attribution_patching": Method(
        data=pair,
        bad=failing_pair,
        idle=lambda model: pair(model, same=True),
        arguments={"site": "z", "positions": ["end"]},
    ),
    "head_ablation": Method(data=pair, bad=failing_pair),
    "mlp_ablation": Method(data=pair, bad=failing_pair),
    "neuron_ablation": Method(
        data=pair,
        bad=failing_pair,
        arguments={"neurons": [(0, 1), (1, 5), (2, 2)], "kind": "mean"},
    ),
    "head_importance": Method(
        data=pair, bad=failing_pair, arguments={"method": "gradient", "batch_size": 1}
    ),
    "pruning_curve": Method(
        data=text, arguments={"method": ["gradient", "random"], "steps": 3, "draws": 2}
    ),
    "self_repair": Method(
        data=pair,
        arguments=lambda model, _: {"heads": [heads(model)[0], heads(model)[-2:]]},
    ),
    "audit": Method(
        data=pair,
        bad=failing_pair,
        arguments=lambda model, data: {
            "result": mi.attribution_patching(model, data, "z", positions="end"),
            "k": 3,
        },
    ),
    "composition": Method(data=None),
    "head_scores": Method(
        data=text,
        arguments={"kinds": ["induction", "copying", "ov_copying"], "nulls": 1},
    ),
    "attention_patterns": Method(data=text, arguments={"prompts": 2}),
    "redundancy_atlas": Method(data=text, arguments={"queries": 20}),
    "logit_lens": Method(data=pair),
    "direct_logit_attribution": Method(data=pair),
    "icl_score": Method(
        data=text,
        arguments={"late": 10, "early": 3},
    ),
    "few_shot": Method(
        data=pairs,
        arguments={"shots": (0, 2), "content": [("Mary", "John"), ("Tom", "Anna")]},
    ),
}


def public_methods() -> dict[str, Callable[..., Result]]:
    """Every public function whose annotation says that it returns a ``Result``."""
    found = {}
    for name in mi.__all__:
        candidate = getattr(mi, name)
        if inspect.isfunction(candidate) and name != "load_result":
            returned = typing.get_type_hints(candidate).get("return")
            parts = typing.get_args(returned) or (returned,)
            several = "models" in inspect.signature(candidate).parameters  # has its own tests
            if not several and any(
                isinstance(part, type) and issubclass(part, Result) for part in parts
            ):
                found[name] = candidate
    return found


def check_method(
    function: Callable[..., Result], method: Method, model: TransformerBridge, folder: Path
) -> None:
    """Fail unless ``function`` keeps to what every method of the package promises."""
    if method.data is not None:
        _takes_model_then_data(function)
    seed = {"seed": 1} if "seed" in inspect.signature(function).parameters else {}

    def call(data: Any) -> Result:
        given = () if method.data is None else (data,)
        return function(model, *given, **method.given(model, data), **seed)

    data = None if method.data is None else method.data(model)
    forward(
        model, tokens(1, 4)
    )  # the first run of a model installs what transformers keeps on it
    before = _state(model)
    result = call(data)
    assert _state(model) == before, "the method changed the model or its hooks"
    if method.data is not None:
        _leaves_the_model_when_it_raises(call, method, model)
    assert call(data).equals(result), "the same call gave another result"
    _is_labelled(result)
    _records_its_convention(result, function.__name__, model)
    path = result.save(folder / "result.nc")
    assert type(result).load(path).equals(result), "a saved result came back changed"
    assert mi.load_result(path).equals(result), "load_result gave another value"
    _draws_and_tabulates(result)
    _shows_itself(result, folder)
    if method.idle is not None:
        effect = call(method.idle(model)).effect
        if mi.pruning_of(model).heads:  # where a layer lacks a head that another has
            effect = effect.fillna(0)
        assert bool((effect == 0).all()), "an idle edit had an effect"


def _takes_model_then_data(function: Callable[..., Result]) -> None:
    names = list(inspect.signature(function).parameters)
    assert names[:2] == ["model", "data"], f"takes {names[:2]} first, not model and data"


def _leaves_the_model_when_it_raises(
    call: Callable[[Any], Result], method: Method, model: TransformerBridge
) -> None:
    def fail(*_: Any) -> None:
        raise Broken

    last: Any = model.blocks[-1]
    handle = None if method.bad else last.register_forward_pre_hook(fail)
    before = _state(model)
    try:
        make = method.bad or method.data
        assert make is not None
        call(make(model))
    except Broken:
        assert _state(model) == before, "the method left something behind when it raised"
    else:
        raise AssertionError("what was meant to break the method did not")
    finally:
        if handle is not None:
            handle.remove()


def _is_labelled(result: Result) -> None:
    assert isinstance(result, Result)
    for name, array in result.data.data_vars.items():
        unlabelled = [dim for dim in array.dims if dim not in result.data.coords]
        assert not unlabelled, f"{name} has axes without labels: {unlabelled}"


def _records_its_convention(result: Result, name: str, model: TransformerBridge) -> None:
    made = result.convention
    assert isinstance(made, Convention)
    assert made.method == name
    assert made.fingerprint == mi.fingerprint(model)
    assert made.dtype == str(next(model.parameters()).dtype).removeprefix("torch.")
    assert made.model and made.data and made.bos and made.versions["transformer-lens"]


def _draws_and_tabulates(result: Result) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = result.plot()
    assert isinstance(ax, Axes) and ax.get_xlabel() and ax.get_ylabel() and ax.get_title("left")
    given = mi_axes()
    assert result.plot(given) is given
    frame = result.to_frame()
    assert len(frame) >= max(array.size for array in result.data.data_vars.values())
    assert set(map(str, result.data.dims)) <= set(frame.columns)
    top = result.top(3)
    assert len(top) == min(3, result.effect.size)
    ranked = top["effect" if "effect" in top.columns else next(iter(result.convention.metrics))]
    assert list(ranked.abs()) == sorted(ranked.abs(), reverse=True)


def _shows_itself(result: Result, folder: Path) -> None:
    shown = result._repr_html_()
    assert "<img" in shown and "<table" in shown, "a notebook shows no picture or no numbers"
    html = mi.report(result, folder / "result.html").read_text(encoding="utf-8")
    kinds = set(re.findall(r'"kind": ?"(\w+)"', html))
    assert "table" in kinds and len(kinds) > 1, f"the report has nothing to look at: {kinds}"
    assert "Cannot be drawn" not in html


def mi_axes() -> Axes:
    """Axes that a user might hand in."""
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def _state(model: TransformerBridge) -> tuple[Any, ...]:
    """All that a method must leave alone: weights, modes, gradients, hooks, random state."""
    hooks = {
        name: (len(point.fwd_hooks), len(point.bwd_hooks))
        for name, point in model.hook_dict.items()
    }
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    parameters = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
    flags = (torch.is_grad_enabled(), torch.get_rng_state().sum().item())
    return hooks, modules, parameters, flags, mi.fingerprint(model), sorted(vars(model))
