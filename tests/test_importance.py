"""Importance of heads: six methods against plain loops, enumeration and known answers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from known import known
from zoo import hf, tokens

import mechinterp as mi
from mechinterp.heads import gates
from mechinterp.hooks import HookManager


def task(model) -> mi.Task:
    return mi.Task.from_tokens(
        model,
        clean=[tokens(1, n, seed=n)[0].tolist() for n in (6, 9, 7, 8)],
        answers=[3, 4, 5, 6],
        distractors=[7, 8, 9, 10],
    )


def text(model, lengths=(9, 5, 12)) -> mi.Text:
    return mi.Text.from_tokens(model, [tokens(1, n, seed=n)[0].tolist() for n in lengths])


def labelled(model, n: int = 5) -> mi.Labelled:
    prompts = mi.Text.from_tokens(model, tokens(n, 7, seed=3)).prompts
    return mi.Labelled("moods", prompts, torch.arange(n) % 3, ("a", "b", "c"))


# --------------------------------------------------------------------------- gradients


def gate_derivatives(family: str, rows: list[list[int]], labels=None) -> list[np.ndarray]:
    """d loss / d gate of every prompt, token, layer and head, by Hugging Face's own loss."""
    module: Any = hf(family)
    found = []
    for i, row in enumerate(rows):
        ids, leaves, handles = torch.tensor([row]), [], []
        for layer in range(3):
            leaf = torch.ones(1, len(row), 4, requires_grad=True)
            leaves.append(leaf)

            def scale(_, args, leaf=leaf):
                return (
                    (args[0].unflatten(-1, (4, 8)) * leaf[..., None]).flatten(-2),
                    *args[1:],
                )

            out = (
                module.bert.encoder.layer[layer].attention.output.dense
                if family == "bert_classifier"
                else module.model.layers[layer].self_attn.o_proj
            )
            handles.append(out.register_forward_pre_hook(scale))
        target = ids if labels is None else labels[i : i + 1]
        module(ids, labels=target).loss.backward()
        found.append(np.stack([leaf.grad[0].numpy() for leaf in leaves], axis=1))
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert_classifier"])
@pytest.mark.parametrize("unit", ["example", "token", "batch"])
def test_the_three_gradients_are_what_a_gate_on_each_head_says(family, unit):
    model = zoo.zoo(family)
    data = labelled(model) if "bert" in family else text(model)
    labels = getattr(data, "labels", None)
    each = gate_derivatives(family, data.prompts.rows, labels)
    if unit == "example":
        want = np.mean([np.abs(one.sum(0)) for one in each], axis=0)
    elif unit == "token":
        want = np.concatenate([np.abs(one) for one in each]).mean(0)  # of all tokens
    else:
        sums = np.stack([one.sum(0) for one in each])
        parts = [sums[i : i + 2] for i in range(0, len(sums), 2)]
        want = np.mean([np.abs(part.sum(0)) / len(part) for part in parts], axis=0)
    result = mi.head_importance(model, data, method="gradient", unit=unit, batch_size=2)
    got = result.data["importance"]
    got = got.mean("prompt") if "prompt" in got.dims else got
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_padding_and_batches_change_no_gradient():
    model = zoo.zoo("llama")
    whole = mi.head_importance(model, text(model), method="gradient", batch_size=3)
    small = mi.head_importance(model, text(model), method="gradient", batch_size=1)
    np.testing.assert_allclose(whole.effect, small.effect, atol=1e-7)


def test_normalised_layers_have_length_one():
    model = zoo.zoo("gpt2")
    result = mi.head_importance(model, text(model), method="gradient", normalize_layers=True)
    lengths = (result.effect.mean("prompt") ** 2).sum("head")
    np.testing.assert_allclose(lengths, 1.0)


# ---------------------------------------------------------------------------- ablation


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_ablation_is_the_fall_of_a_metric_and_the_rise_of_a_loss(family):
    model = zoo.zoo(family)
    data = task(model)
    for metric, sign in (("logit_diff", -1), ("loss", 1), ("rank", 1), ("accuracy", -1)):
        effect = mi.head_ablation(model, data, kind="mean", metric=metric).effect
        result = mi.head_importance(model, data, kind="mean", metric=metric)
        np.testing.assert_allclose(result.effect, sign * effect, atol=1e-6)


def test_heads_are_scored_with_others_taken_out_and_only_those_asked_for():
    model = zoo.zoo("llama")
    data = text(model)
    with HookManager(model).ablate("z", layers=0, heads=1):
        result = mi.head_importance(model, data, heads=[(1, 2), (2, 0)])
    both = mi.head_ablation(model, data, heads=[[(0, 1), (1, 2)], [(0, 1), (2, 0)], [(0, 1)]])
    want = both.data["ablated"] - both.data["ablated"].isel(set=2)
    np.testing.assert_allclose(result.effect.sel(layer=1, head=2), want[:, 0], atol=1e-5)
    np.testing.assert_allclose(result.effect.sel(layer=2, head=0), want[:, 1], atol=1e-5)
    assert sorted(result.order) == [(1, 2), (2, 0)]


def test_the_order_begins_with_the_least_important():
    model = zoo.zoo("gpt2")
    result = mi.head_importance(model, text(model))
    means = [float(result.effect.mean("prompt").sel(layer=a, head=b)) for a, b in result.order]
    assert means == sorted(means) and len(means) == 12


def test_ties_go_by_chance_and_not_layer_by_layer():
    model = zoo.zoo("gpt2")
    result = mi.head_importance(model, text(model))
    equal = replace(result, data=result.data * 0)
    other = replace(equal, convention=replace(result.convention, seed=1))
    every = [(layer, head) for layer in range(3) for head in range(4)]
    assert sorted(equal.order) == sorted(other.order) == every
    assert equal.order == equal.order != other.order != every


# ---------------------------------------------------------------------------- Shapley


def test_shapley_values_of_a_redundant_pair_are_half_of_what_the_two_are_worth():
    model = known("redundant_pair", "multi_head", "learned")
    pair, task = model.circuit["previous_token"], model.task(6)
    alone = mi.head_importance(model.model, task, method="shapley", orders=4, heads=pair)
    assert alone.effect.mean("prompt").values.flatten() == pytest.approx([5.0, 5.0])
    result = mi.head_importance(model.model, task, method="shapley", orders=4)
    mean = result.effect.mean("prompt")
    assert all(float(mean.sel(layer=a, head=b)) == 0.0 for a, b in model.decoys)
    assert float(mean.sum()) == pytest.approx(10.0, abs=1e-5)
    assert result.convention.settings["efficiency_gap"] == pytest.approx(0.0, abs=1e-5)


def test_sampled_shapley_values_meet_the_enumeration_of_all_orders():
    from itertools import permutations

    model = zoo.zoo("native")
    data, heads = task(model), [(0, 0), (0, 3), (1, 2), (2, 1)]
    sets = [[h for i, h in enumerate(heads) if mask >> i & 1] for mask in range(1, 16)]
    found = mi.head_ablation(model, data, heads=sets)
    value = {frozenset(): float(found.data["intact"].mean())}
    for one, v in zip(sets, found.data["ablated"].mean("prompt").values, strict=True):
        value[frozenset(one)] = float(v)
    orders = list(permutations(heads))
    exact = {
        head: np.mean(
            [
                value[frozenset(order[: order.index(head)])]
                - value[frozenset(order[: order.index(head) + 1])]
                for order in orders
            ]
        )
        for head in heads
    }
    result = mi.head_importance(model, data, method="shapley", heads=heads, orders=200, seed=1)
    mean, error = result.effect.mean("prompt"), result.data["error"]
    for (layer, head), want in exact.items():
        at = {"layer": layer, "head": head}
        assert abs(float(mean.sel(at)) - want) < 4 * float(error.sel(at)) + 1e-6
    total = sum(float(mean.sel({"layer": a, "head": b})) for a, b in heads)
    gap = value[frozenset()] - value[frozenset(heads)]
    assert total == pytest.approx(gap, abs=1e-5)


def test_intervals_of_shapley_values_include_the_error_of_few_orders():
    """With four orders two halves of the sampling differ by more than prompts alone say."""
    model = zoo.zoo("native")
    result = mi.head_importance(model, task(model), method="shapley", orders=4, seed=1)
    with pytest.warns(mi.FewPromptsWarning):
        table = result.statistics()
    with pytest.warns(mi.FewPromptsWarning):
        alone = mi.Result.statistics(result)
    sampling = 12.7062 * result.data["error"]  # Student's t with one degree of freedom
    for side in ("low", "high"):
        expected = np.hypot(alone[side] - alone["effect"], sampling)
        np.testing.assert_allclose(abs(table[side] - table["effect"]), expected, rtol=1e-5)
    assert "over 2 pairs of orders" in table.attrs["interval"]


# ------------------------------------------------------------------------------- gates


def test_a_gate_is_open_as_often_as_its_probability_says():
    """The definition: drawn gates that are not exactly 0."""
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for log_odds in (-2.0, 0.0, 1.5):
        own = torch.full((200_000,), log_odds)
        share = (gates.drawn(own, noise) > 0).double().mean()
        assert float(gates.open_probability(own)[0]) == pytest.approx(float(share), abs=0.005)


def test_gates_have_the_constants_of_the_paper():
    assert (gates.TEMPERATURE, gates.LOW, gates.HIGH, gates.EPSILON) == (0.33, -0.1, 1.1, 1e-6)
    zero = torch.zeros(1)
    assert float(gates.settled(zero)) == pytest.approx(0.5)
    assert float(gates.settled(zero + 4)) == 1.0  # 0.982 * 1.2 - 0.1 is above 1
    assert float(gates.settled(zero - 4)) == 0.0
    # sigmoid(0 - 0.33 log(0.1 / 1.1)) = sigmoid(0.7913)
    assert float(gates.open_probability(zero)) == pytest.approx(0.68812, abs=1e-4)
    half = gates.drawn(zero, torch.tensor([0.5]))
    assert float(half) == pytest.approx(0.5)


def test_trained_gates_stay_open_on_the_circuit_and_close_on_decoys():
    model = known("induction", "multi_head", "learned")
    result = mi.head_importance(
        model.model, model.task(16), method="hard_concrete", penalty=0.3, steps=120
    )
    scores = result.data["importance"]
    kept = [float(scores.sel(layer=a, head=b)) for a, b in model.heads]
    gone = [float(scores.sel(layer=a, head=b)) for a, b in model.decoys]
    assert min(kept) > 0.85 and max(gone) < 0.3
    history = result.data["open"]
    assert history["step"].values[0] == 0 and history["step"].values[-1] == 120
    np.testing.assert_allclose(history.isel(step=-1), scores)
    shift = gates.TEMPERATURE * math.log(-gates.LOW / gates.HIGH)
    log_odds = torch.special.logit(torch.tensor(scores.values)).flatten() + shift
    gate = result.data["gate"].values.flatten()
    np.testing.assert_allclose(gate, gates.settled(log_odds), atol=1e-6)


@pytest.mark.parametrize("positions", [-1, [2]])
def test_gates_refuse_edits_of_particular_prompts_as_batches_are_drawn_anew(positions):
    model = zoo.zoo("gpt2")
    edit = mi.edits.Zero("resid_post", layers=0, positions=positions)
    with (
        pytest.raises(ValueError, match="particular prompts"),
        HookManager(model).edit(edit, data=text(model)),
    ):
        mi.head_importance(model, text(model), method="hard_concrete", steps=2)


def test_gates_leave_the_weights_and_their_gradients_alone():
    model = zoo.zoo("gpt2")
    before = mi.fingerprint(model)
    mi.head_importance(model, text(model), method="hard_concrete", steps=3)
    assert mi.fingerprint(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


# ----------------------------------------------------------------------- chance, atlas


def test_chance_depends_on_the_seed_alone():
    model = zoo.zoo("gpt2")
    one, two, other = (
        mi.head_importance(model, data, method="random", seed=seed)
        for data, seed in ((text(model), 1), (task(model), 1), (text(model), 2))
    )
    assert one.order == two.order != other.order
    some = mi.head_importance(model, text(model), method="random", seed=1, heads=[(2, 3)])
    assert float(some.effect[0, 0]) == float(one.effect.sel(layer=2, head=3))


def test_redundant_heads_go_first_by_the_atlas():
    model = zoo.zoo("gpt2")
    data = text(model, (30, 28))
    result = mi.head_importance(model, data, method="redundancy")
    order = mi.redundancy_atlas(model, data).pruning_order()
    places = [int(result.effect.sel(layer=layer, head=head)) for layer, head in order]
    assert places == list(range(12))


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "gradients"}, "Did you mean 'gradient'"),
        ({"unit": "examples"}, "Did you mean 'example'"),
        ({"kind": "zeros"}, "Did you mean 'zero'"),
        ({"heads": []}, "at least one"),
        ({"heads": [(0, -1), (0, 3)]}, "head 0.3 is named twice"),
        ({"method": "hard_concrete", "penalty": -1.0}, "would pay for open heads"),
        ({"heads": [(0, 9)]}, "layer 0 has heads 0..3"),
        ({"method": "shapley", "orders": 3}, "must be even"),
        ({"method": "random", "normalize_layers": True}, "gives places in an order"),
        ({"method": "shapley", "orders": 2}, "at least 4"),
        ({"metric": {"loss": "loss", "accuracy": "accuracy"}}, "by one metric"),
        ({"steps": 0}, "must be at least 1"),
        ({"method": "gradient", "metric": "rank"}, "rank moves in steps"),
    ],
)
def test_bad_arguments_are_said_at_once(arguments, says):
    model = zoo.zoo("gpt2")
    with pytest.raises(ValueError, match=says):
        mi.head_importance(model, text(model), **arguments)
