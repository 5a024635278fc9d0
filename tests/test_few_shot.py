"""Few-shot prompts show what they say, and their answers are scored as one by one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import tokenizer, zoo

import mechinterp as mi
from mechinterp.heads import few_shot
from mechinterp.heads.examples import drawn_examples
from mechinterp.tasks import run
from mechinterp.tasks.pairs import few_shot_text, tokenise_answered

CAPITALS = mi.Pairs(
    "capitals",
    (
        ("France", "Paris"),
        ("Italy", "Rome"),
        ("Spain", "Madrid"),
        ("Japan", "Tokyo school"),
        ("Mary", "John Tom"),
        ("Anna", "Paul"),
    ),
)
OTHER = mi.Pairs(
    "other", (("man", "men"), ("woman", "women"), ("book", "ball"), ("key", "keys"))
)


def with_tokenizer(name: str):
    return mi.load_model(zoo(name), tokenizer=tokenizer())


@given(st.integers(0, 5), st.integers(2, 5), st.integers(0, 99))
def test_shuffled_labels_are_the_same_words_in_other_places(query, shots, seed):
    true = drawn_examples(query, CAPITALS, shots, "true", None, seed)
    shuffled = drawn_examples(query, CAPITALS, shots, "shuffled_labels", None, seed)
    assert [row[0] for row in shuffled] == [row[0] for row in true]
    assert sorted(row[1] for row in shuffled) == sorted(row[1] for row in true)
    assert all(a[1] != b[1] for a, b in zip(true, shuffled, strict=True))
    assert CAPITALS[query][0] not in [row[0] for row in true]


@given(st.integers(0, 5), st.integers(0, 4), st.integers(0, 99))
def test_more_examples_begin_with_those_of_fewer(query, shots, seed):
    fewer = drawn_examples(query, CAPITALS, shots, "true", None, seed)
    more = drawn_examples(query, CAPITALS, shots + 1, "true", None, seed)
    assert more[:shots] == fewer


def test_one_example_gets_the_label_of_another_pair():
    for query in range(6):
        ((question, label),) = drawn_examples(query, CAPITALS, 1, "shuffled_labels", None, 0)
        assert (question, label) not in CAPITALS.words
        assert label != CAPITALS[query][1]


def test_new_content_keeps_the_format_and_none_of_the_words():
    prompt, answer = few_shot_text(
        drawn_examples(0, CAPITALS, 3, "new_content", OTHER, 0), CAPITALS[0]
    )
    assert prompt.count("Q: ") == 4 and prompt.count("\nA:") == 4 and prompt.endswith("\nA:")
    assert answer == " Paris"
    words = {word for row in CAPITALS[1:] for word in row}
    assert not [word for word in words if word in prompt]


def test_a_prompt_is_the_format_of_todd_et_al():
    prompt, answer = few_shot_text([("big", "small"), ("hot", "cold")], ("up", "down"))
    assert prompt == "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: up\nA:"
    assert answer == " down"


def test_an_answer_is_tokenised_as_the_continuation_of_its_prompt():
    model = mi.load_model()
    texts = [few_shot_text([("one", "two")], ("three", "four")), ("Q: a\nA:", " very long")]
    answered = tokenise_answered(model, texts)
    read = model.tokenizer
    for (prompt, answer), asked, tokens in zip(
        texts, answered.asked.rows, answered.answers, strict=True
    ):
        assert read.decode(asked[1:]) == prompt
        assert read.decode(tokens) == answer


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_batched_scores_are_those_of_a_loop_over_single_prompts(name):
    model = with_tokenizer(name)
    result = mi.few_shot(model, CAPITALS, shots=(0, 1, 3), content=OTHER, seed=3, batch_size=4)
    value = result.data["value"]
    for condition in ("true", "shuffled_labels", "new_content"):
        for shots in (0, 1, 3):
            for query in range(6):
                examples = drawn_examples(query, CAPITALS, shots, condition, OTHER, 3)
                prompt, answer = few_shot_text(examples, CAPITALS[query])
                row = [1, *tokenizer()(prompt)["input_ids"]]
                told, total, right = tokenizer()(answer)["input_ids"], 0.0, []
                for token in told:
                    with torch.no_grad():
                        logits = model(torch.tensor([row]))[0, -1].double()
                    total += float(logits.log_softmax(-1)[token])
                    right.append(int(logits.argmax()) == token)
                    row.append(token)
                cell = value.sel(condition=condition, shots=shots, prompt=query)
                assert float(cell.sel(metric="log_prob")) == pytest.approx(total, abs=1e-4)
                assert bool(cell.sel(metric="exact")) == all(right)
                assert bool(cell.sel(metric="first_token")) == right[0]


def test_true_examples_help_the_embedded_model_more_than_other_words():
    """It has induction, and the answers are copies of the questions."""
    model = mi.load_model()
    words = ["garden", "river", "window", "castle", "letter", "winter"]
    same = mi.Pairs("same", tuple((word, word) for word in words))
    result = mi.few_shot(model, same, shots=(0, 4), conditions=("true", "new_content"))
    gain = result.effect.sel(metric="log_prob", shots=4).mean("prompt")
    assert float(gain.sel(condition="true")) > float(gain.sel(condition="new_content"))


def test_packaged_pairs_are_those_of_the_shared_folder_and_may_be_shipped():
    names = mi.pair_names()
    assert "country-capital" in names and len(mi.load_pairs("country-capital")) == 197
    assert not {"antonym", "synonym", "english-french"} & set(names)
    folder = Path(mi.__file__).parent / "data" / "function_vectors"
    assert "Eric Todd" in (folder / "LICENSE").read_text(encoding="utf-8")
    rows = json.loads((folder / "country-capital.json").read_text(encoding="utf-8"))
    assert ("Afghanistan", "Kabul") in mi.load_pairs("country-capital").words
    assert len(rows) == 197


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"data": "country-captial"}, "Did you mean 'country-capital'"),
        ({"conditions": ["lies"]}, "unknown condition 'lies'"),
        ({"shots": ()}, "at least one number"),
        ({"shots": (6,)}, "need 7 pairs of different inputs"),
        ({"template": "{output} {input}"}, "must have {input} and, after it, {output}"),
        ({"n": 0}, "asks no query"),
        ({"content": [("a", "b")], "shots": (3,)}, "content has 1 pairs"),
    ],
)
def test_bad_arguments_are_named(given_, says):
    model = with_tokenizer("gpt2")
    arguments = {"data": CAPITALS} | given_
    with pytest.raises(ValueError, match=says):
        mi.few_shot(model, **arguments)


def test_data_that_are_no_pairs_are_refused_and_so_are_models_that_cannot_answer():
    model = with_tokenizer("gpt2")
    with pytest.raises(TypeError, match="takes pairs of words"):
        mi.few_shot(model, 3)
    with pytest.raises(ValueError, match="has an empty side"):
        mi.Pairs("bad", (("a", " "),))
    with pytest.raises(ValueError, match="context holds 64"):
        mi.few_shot(model, [(f"{'the ' * 9}w{i}", "and") for i in range(60, 70)], shots=(8,))
    with pytest.raises(ValueError, match="sees both sides"):
        mi.few_shot(with_tokenizer("bert"), CAPITALS)
    with pytest.raises(ValueError, match="no tokenizer"):
        mi.few_shot(zoo("llama"), CAPITALS, shots=(0,), content=OTHER)


def test_accuracy_is_the_share_of_whole_answers_and_is_drawn():
    result = mi.few_shot(with_tokenizer("gpt2"), CAPITALS, shots=(0, 2), content=OTHER)
    np.testing.assert_allclose(
        result.accuracy, result.data["value"].sel(metric="exact").mean("prompt")
    )
    assert result.plot(metric="log_prob").get_ylabel() == "log-probability of the answer (nats)"


def test_few_prompts_run_at_once_where_their_logits_would_be_large(monkeypatch):
    """Scores do not depend on it; no run holds more logits than allowed."""
    model = with_tokenizer("gpt2")
    whole = mi.few_shot(model, CAPITALS, shots=(0, 2), n=3)
    seen = []
    forward = few_shot.forward
    monkeypatch.setattr(run, "_LOGITS", 70 * model.cfg.d_vocab)
    monkeypatch.setattr(
        few_shot, "forward", lambda m, t, mask: seen.append(t.numel()) or forward(m, t, mask)
    )
    again = mi.few_shot(model, CAPITALS, shots=(0, 2), n=3)
    assert 0 < max(seen) <= 70
    np.testing.assert_allclose(whole.data["value"], again.data["value"], atol=1e-4)
