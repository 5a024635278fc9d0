"""Metrics against plain torch on one prompt at a time, and the laws they obey."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp import metrics
from mechinterp.metrics import METRICS, UNITS, Targets, apply_metric, resolve_metrics

D_VOCAB = 11

finite = st.floats(-20, 20, width=32)
vectors = st.lists(finite, min_size=D_VOCAB, max_size=D_VOCAB)


@st.composite
def cases(draw):
    """Logits of some prompts, with disjoint sets of answers and distractors of any sizes."""
    logits, answers, distractors = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.permutations(range(D_VOCAB)))
        cut = draw(st.integers(1, D_VOCAB - 1))
        end = draw(st.integers(cut + 1, D_VOCAB))
        logits.append(draw(vectors))
        answers.append(tokens[:cut])
        distractors.append(tokens[cut:end])
    return torch.tensor(logits), answers, distractors


def padded(sets):
    width = max(map(len, sets))
    return torch.tensor([[*each, *[-1] * (width - len(each))] for each in sets])


def oracle(name, logits, answers, distractors, reference):
    """The metric of one prompt, in plain Python."""
    probs = F.softmax(logits.double(), -1)
    mean = lambda tokens: sum(float(logits[t]) for t in tokens) / len(tokens)  # noqa: E731
    total = lambda tokens: sum(float(probs[t]) for t in tokens)  # noqa: E731
    best = max(float(logits[t]) for t in answers)
    return {
        "logit_diff": lambda: mean(answers) - mean(distractors),
        "logit": lambda: mean(answers),
        "prob": lambda: total(answers),
        "prob_diff": lambda: total(answers) - total(distractors),
        "log_prob": lambda: math.log(total(answers)),
        "loss": lambda: -math.log(total(answers)),
        "kl": lambda: float(
            F.kl_div(
                F.log_softmax(logits.double(), -1),
                F.softmax(reference.double(), -1),
                reduction="sum",
            )
        ),
        "rank": lambda: sum(
            float(x) > best or 0.5 * (float(x) == best and t not in answers)
            for t, x in enumerate(logits)
        ),
        "accuracy": lambda: float(best > max(float(logits[t]) for t in distractors)),
    }[name]()


@pytest.mark.parametrize("name", METRICS)
@given(case=cases())
@settings(max_examples=20, deadline=None)
def test_every_metric_agrees_with_plain_python_on_each_prompt_alone(name, case):
    logits, answers, distractors = case
    reference = logits.flip(1)
    value = METRICS[name](logits, Targets(padded(answers), padded(distractors), reference))
    expected = [oracle(name, *each) for each in zip(*case, reference, strict=True)]
    torch.testing.assert_close(
        value.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4
    )


def test_loss_is_torchs_cross_entropy_for_single_answers():
    logits, answers = torch.randn(5, D_VOCAB), torch.arange(5)
    expected = F.cross_entropy(logits, answers, reduction="none")
    torch.testing.assert_close(metrics.loss(logits, Targets(answers[:, None])), expected)


@given(case=cases(), shift=finite)
@settings(max_examples=20, deadline=None)
def test_adding_a_constant_to_the_logits_changes_no_metric_but_logit(case, shift):
    logits, answers, distractors = case
    targets = Targets(padded(answers), padded(distractors), logits.roll(1, 1))
    for name in set(METRICS) - {"logit", "rank", "accuracy"}:
        moved = METRICS[name](logits + shift, targets)
        torch.testing.assert_close(moved, METRICS[name](logits, targets), rtol=1e-3, atol=1e-3)


@given(case=cases())
@settings(max_examples=20, deadline=None)
def test_exchanging_answers_and_distractors_changes_the_sign_of_differences(case):
    logits, answers, distractors = case
    there = Targets(padded(answers), padded(distractors))
    back = Targets(padded(distractors), padded(answers))
    for metric in (metrics.logit_diff, metrics.prob_diff):
        torch.testing.assert_close(metric(logits, there), -metric(logits, back))


@given(case=cases())
@settings(max_examples=20, deadline=None)
def test_kl_of_a_run_with_itself_is_zero_and_never_negative(case):
    logits, answers, _ = case
    itself = metrics.kl(logits, Targets(padded(answers), reference=logits))
    other = metrics.kl(logits, Targets(padded(answers), reference=logits.flip(1)))
    assert bool((itself == 0).all()) and bool((other > -1e-5).all())


def test_kl_does_not_break_on_tokens_that_the_reference_rules_out():
    reference = torch.tensor([[0.0, -torch.inf, 0.0]])
    value = metrics.kl(torch.zeros(1, 3), Targets(torch.tensor([[0]]), reference=reference))
    torch.testing.assert_close(value, torch.tensor([math.log(3 / 2)]))


def test_accuracy_without_distractors_means_top_of_the_vocabulary():
    logits = torch.tensor([[0.0, 3.0, 2.0], [0.0, 2.0, 3.0], [1.0, 1.0, 0.0]])
    one = Targets(torch.tensor([[1], [1], [1]]))
    assert metrics.accuracy(logits, one).tolist() == [1, 0, 0]
    either = Targets(torch.tensor([[1, 2], [1, 2], [1, 0]]))
    assert metrics.accuracy(logits, either).tolist() == [1, 1, 1]


def test_a_tie_between_answer_and_distractor_is_not_right():
    targets = Targets(torch.tensor([[0]]), torch.tensor([[1]]))
    assert metrics.accuracy(torch.ones(1, 3), targets).tolist() == [0]


def test_half_precision_logits_lose_nothing_more():
    logits = torch.randn(3, 500).to(torch.bfloat16)
    targets = Targets(torch.tensor([[1], [2], [3]]))
    torch.testing.assert_close(
        metrics.log_prob(logits, targets), metrics.log_prob(logits.float(), targets)
    )


def test_gradients_reach_the_logits_through_padded_sets():
    logits = torch.randn(2, D_VOCAB, requires_grad=True)
    targets = Targets(torch.tensor([[1, 2], [3, -1]]), torch.tensor([[4, -1], [5, 6]]))
    for name in ("logit_diff", "log_prob", "prob_diff"):
        (gradient,) = torch.autograd.grad(METRICS[name](logits, targets).sum(), logits)
        assert bool(gradient.isfinite().all()) and bool((gradient != 0).any(1).all())


def test_every_metric_has_a_unit():
    assert set(UNITS) == set(METRICS)


def test_metrics_are_found_by_name_function_or_mapping():
    def mine(logits, targets):
        return logits[:, 0]

    assert resolve_metrics(None, "kl") == {"kl": metrics.kl}
    assert resolve_metrics("rank") == {"rank": metrics.rank}
    assert resolve_metrics(mine) == {"mine": mine}
    both = resolve_metrics({"a": "logit", "b": mine})
    assert both == {"a": metrics.logit, "b": mine}


def test_an_unknown_metric_suggests_a_near_one():
    with pytest.raises(ValueError, match=r"'logit_dif'\. Did you mean 'logit_diff'"):
        resolve_metrics("logit_dif")
    with pytest.raises(ValueError, match="empty mapping"):
        resolve_metrics({})
    with pytest.raises(TypeError, match="name or a function"):
        resolve_metrics({"a": 3})


def test_a_metric_of_another_shape_or_kind_is_refused():
    logits, targets = torch.zeros(2, 3), Targets(torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match=r"shape \(\) for 2 prompts"):
        apply_metric("mine", lambda logits, targets: logits.mean(), logits, targets)
    with pytest.raises(TypeError, match="returned float"):
        apply_metric("mine", lambda logits, targets: 0.5, logits, targets)


def test_nan_is_refused_and_traced_to_the_logits_or_the_metric():
    logits, targets = torch.zeros(2, 3), Targets(torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="prompts 0, 1; the cause is the metric itself"):
        apply_metric("mine", lambda logits, targets: logits[:, 0] / 0, logits, targets)
    logits[1, 2] = torch.nan
    with pytest.raises(ValueError, match="prompts 1; the cause is the model's logits"):
        apply_metric("loss", metrics.loss, logits, targets)


def test_missing_distractors_or_reference_are_named():
    targets = Targets(torch.tensor([[0]]))
    with pytest.raises(ValueError, match="has no distractors"):
        metrics.logit_diff(torch.zeros(1, 3), targets)
    with pytest.raises(ValueError, match="reference"):
        metrics.kl(torch.zeros(1, 3), targets)


def test_targets_without_an_answer_are_refused():
    with pytest.raises(ValueError, match="prompt 1 has no answers"):
        Targets(torch.tensor([[0], [-1]]))
    # With the shape checker on, it is the one that refuses.
    with pytest.raises((ValueError, TypeError), match="distractors"):
        Targets(torch.tensor([[0], [1]]), torch.tensor([[2]]))


def test_a_tie_is_no_top_rank():
    """A model that knows nothing says the same of every token: the answer is in the middle."""
    targets = Targets(torch.tensor([[3, -1], [3, 4], [2, -1]]))
    logits = torch.zeros(3, 9)
    logits[2, 2], logits[2, 5] = 1.0, 1.0
    assert metrics.rank(logits, targets).tolist() == [4.0, 3.5, 0.5]
