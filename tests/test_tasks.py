"""Tasks: prompts, answers and roles that fit together, or a clear refusal."""

import json

import pytest
import tokenizers as tk
import torch
import transformers as tf
import zoo
from tokenizers import normalizers

from mechinterp import metrics
from mechinterp.models import forward, load_model
from mechinterp.tasks import Labelled, Task, Text, answer_logits, as_data
from mechinterp.tasks.prompts import pad

CLEAN = [
    "Mary and John went to the store , John gave a book to",
    "Anna saw Tom , Tom gave it to",
]
CORRUPTED = [
    "Mary and John went to the store , Paul gave a book to",
    "Anna saw Tom , the man gave it to",
]
ROLES = {"io": ["Mary", "Anna"], "subject": [("John", 1), ("Tom", 1)]}
CORRUPTED_ROLES = {"io": ["Mary", "Anna"], "subject": ["Paul", "the man"]}


@pytest.fixture(scope="module")
def model():
    return load_model(zoo.hf("gpt2"), tokenizer=zoo.tokenizer())


def make(model, **changes):
    given = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "answers": ["Mary", "Anna"],
        "distractors": ["John", "Tom"],
        "roles": ROLES,
        "corrupted_roles": CORRUPTED_ROLES,
        "name": "mini",
    }
    return Task.from_strings(model, **(given | changes))


def same(a, b):
    """Whether two tasks hold the same, notes apart."""
    assert a.clean.rows == b.clean.rows
    assert (a.corrupted is None) == (b.corrupted is None)
    assert a.corrupted is None or a.corrupted.rows == b.corrupted.rows
    assert a.answers.tolist() == b.answers.tolist()
    assert (a.distractors is None) == (b.distractors is None)
    assert a.distractors is None or a.distractors.tolist() == b.distractors.tolist()
    for name in (
        "name",
        "metric",
        "templates",
        "answer_positions",
        "corrupted_answer_positions",
    ):
        assert getattr(a, name) == getattr(b, name)
    assert dict(a.roles) == dict(b.roles)
    assert a.corrupted_roles == b.corrupted_roles


def corrupted(task):
    assert task.corrupted is not None and task.corrupted_roles is not None
    return task.corrupted, task.corrupted_roles


def distractors(task):
    assert task.distractors is not None
    return task.distractors


def words(model, prompts, i, span):
    return model.tokenizer.decode(prompts.rows[i][slice(*span)])


def test_roles_are_the_tokens_of_their_words_on_both_sides(model):
    task = make(model)
    assert [words(model, task.clean, i, s) for i, s in enumerate(task.roles["subject"])] == [
        "John",
        "Tom",
    ]
    assert task.roles["subject"][0][0] == 9  # the second mention, after a BOS
    prompts, roles = corrupted(task)
    assert words(model, prompts, 1, roles["subject"][1]) == "the man"


def test_a_corrupted_prompt_may_be_longer_and_both_end_at_their_own_last_token(model):
    task = make(model)
    prompts, roles = corrupted(task)
    clean, other = task.clean.lengths.tolist(), prompts.lengths.tolist()
    assert other[1] == clean[1] + 1
    assert task.roles["end"] == tuple((n - 1, n) for n in clean)
    assert roles["end"] == tuple((n - 1, n) for n in other)
    assert task.corrupted_answer_positions == tuple(n - 1 for n in other)


def test_a_task_put_together_by_hand_answers_as_far_from_each_end():
    task = Task(
        name="by hand",
        clean=pad([[5, 6, 7], [8, 9]]),
        corrupted=pad([[5, 6, 7, 8], [8, 9]]),
        answers=torch.tensor([[1], [2]]),
        answer_positions=(1, 1),
    )
    assert task.corrupted_answer_positions == (2, 1)
    assert corrupted(task)[1] == {"end": ((3, 4), (1, 2))}


def test_logits_are_those_of_each_prompt_run_alone(model):
    task = make(model)
    for side in ("clean", "corrupted"):
        alone = [forward(model, torch.tensor([row]))[0, -1] for row in getattr(task, side).rows]
        torch.testing.assert_close(
            task.logits(model, side), torch.stack(alone), rtol=0, atol=1e-4
        )


def test_answers_may_be_sets_of_words_or_ids(model):
    task = make(model, answers=[["Mary", "her"], "Anna"], distractors=[5, [6, 7]])
    assert task.answers[1].tolist()[1] == -1 and len(set(task.answers[0].tolist())) == 2
    assert distractors(task).tolist() == [[5, -1], [6, 7]]


def test_the_metric_is_logit_diff_or_log_prob_where_there_is_nothing_to_compare(model):
    assert make(model).metric == "logit_diff"
    assert make(model, distractors=None).metric == "log_prob"


def test_a_place_may_be_one_for_all_prompts_or_characters(model):
    task = make(
        model,
        roles={"verb": "gave", "start": (0, 4), "last": ("to", 0)},
        clean=["Mary gave it to", "John gave it to"],
        corrupted=None,
        corrupted_roles=None,
        distractors=["Tom", "Tom"],
    )
    assert task.roles["verb"] == ((2, 3), (2, 3)) and task.roles["start"] == ((1, 2), (1, 2))


def test_roles_carry_over_to_equally_long_corrupted_prompts(model):
    task = make(model)[[0]]
    again = make(
        model,
        clean=CLEAN[:1],
        corrupted=CORRUPTED[:1],
        answers=["Mary"],
        distractors=["John"],
        roles={"subject": ("John", 1)},
        corrupted_roles=None,
    )
    assert corrupted(again)[1]["subject"] == task.roles["subject"]


def test_tokens_give_the_same_task_as_the_strings_they_come_from(model):
    task = make(model)
    prompts, roles = corrupted(task)
    tokens = Task.from_tokens(
        model,
        clean=task.clean.rows,
        corrupted=prompts.rows,
        answers=["Mary", "Anna"],
        distractors=["John", "Tom"],
        roles={name: list(spans) for name, spans in task.roles.items()},
        corrupted_roles={name: list(spans) for name, spans in roles.items()},
        name="mini",
    )
    same(task, tokens)


def test_choosing_prompts_chooses_everything_that_goes_with_them(model):
    task = make(model, templates=("a", "b"), answers=[["Mary", "her"], "Anna"])[[1]]
    expected = make(
        model,
        clean=CLEAN[1:],
        corrupted=CORRUPTED[1:],
        answers=["Anna"],
        distractors=["Tom"],
        roles={"io": "Anna", "subject": ("Tom", 1)},
        corrupted_roles={"io": "Anna", "subject": "the man"},
        templates=("b",),
    )
    same(task, expected)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_task_comes_back_from_a_file_as_it_was(model, tmp_path, as_text):
    task = make(model, answers=[["Mary", "her"], 96], templates=("a", "b"), metric="prob_diff")
    task.to_jsonl(tmp_path / "task.jsonl", model if as_text else None)
    lines = (tmp_path / "task.jsonl").read_text().splitlines()
    assert isinstance(json.loads(lines[1])["clean"], str) == as_text
    same(task, Task.from_jsonl(tmp_path / "task.jsonl", model))


def test_answer_positions_and_an_overridden_bos_come_back_too(model, tmp_path):
    task = make(model, prepend_bos=False, answer_at="subject")
    assert task.answer_positions[0] == 8
    task.to_jsonl(tmp_path / "task.jsonl", model)
    same(task, Task.from_jsonl(tmp_path / "task.jsonl", model))


def test_a_handwritten_file_is_read(model, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"clean": CLEAN[0], "answers": "Mary", "roles": {"io": "Mary", "s": ["John", 1]}}
    path.write_text(json.dumps(row) + "\n\n")
    task = Task.from_jsonl(path, model)
    assert task.name == "mine" and task.roles["s"] == ((9, 10),) and task.corrupted is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ('{"task": "x"}', "has no prompts"),
        ('{"clean": "Mary", ', "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"clean": "Mary", "answer": "it"}', r"line 1: unknown key 'answer'\. .*'answers'"),
        ('{"clean": "Mary"}', "clean and answers at least"),
        (
            '{"clean": "Mary", "answers": "it"}\n'
            '{"clean": "Tom", "answers": "it", "roles": {}}',
            r"line 2 has the keys \['answers', 'clean', 'roles'\]",
        ),
        (
            '{"clean": "Mary", "answers": "it", "roles": {"a": "Mary"}}\n'
            '{"clean": "Tom", "answers": "it", "roles": {}}',
            "Give every prompt the same roles",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_line(model, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        Task.from_jsonl(tmp_path / "bad.jsonl", model)


def test_what_json_lines_cannot_hold_is_not_written(model, tmp_path):
    task = make(model, metric=lambda logits, targets: logits[:, 0])
    with pytest.raises(ValueError, match="measured by a function"):
        task.to_jsonl(tmp_path / "task.jsonl", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": {"io": "Kate"}}, r"role 'io' not found: 'Kate' occurs 0 times in prompt 0"),
        ({"roles": {"io": "to"}}, r"ambiguous: 'to' occurs \d times in prompt 0.*\('to', n\)"),
        ({"roles": {"io": ("John", 2)}}, "'John' occurs 2 times"),
        ({"roles": {"io": (3, 99)}}, r"characters 3\.\.99, but prompt 0 has 53"),
        ({"roles": {"io": ["Mary"]}}, "1 places for 2 prompts"),
        ({"roles": {"all": "gave"}}, "'all' cannot be a role"),
        ({"roles": {"end": "gave"}}, "'end' is always the last token"),
        ({"corrupted_roles": None}, "9 tokens but its corrupted one has 10.*corrupted_roles="),
        ({"corrupted_roles": {"io": ["Mary", "Anna"]}}, "role 'subject' is given for one"),
        ({"corrupted": CORRUPTED[:1], "corrupted_roles": None}, "2 clean but 1 corrupted"),
        ({"answers": ["Mary"]}, "2 prompts but 1 answers"),
        ({"answers": ["Mary Tom", "Anna"]}, "answer of prompt 0.*2 tokens: 'Mary' 'Tom'"),
        ({"answers": ["Mary", "Zoe"]}, "'Zoe' is not in this tokenizer's vocabulary"),
        ({"answers": ["", "Anna"]}, "'' is no token"),
        ({"answers": [[], "Anna"]}, "prompt 0 has no answers"),
        ({"answers": [97, "Anna"]}, r"answer 97 of prompt 0 does not exist.*0\.\.96"),
        ({"distractors": ["John", ["Tom", "Anna"]]}, "same token in prompt 1"),
        ({"clean": [], "answers": []}, "there are no prompts"),
        ({"corruption": ("an edit",)}, "not both"),
        ({"answer_at": "verb"}, "unknown role 'verb'"),
        ({"answer_at": [1]}, "1 positions for 2 prompts"),
        ({"templates": ("a",)}, "2 prompts but 1 templates"),
    ],
)
def test_parts_that_do_not_fit_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        make(model, **changes)


def test_first_token_lets_a_word_stand_for_many_and_drops_what_collides(model):
    task = make(model, answers=["Mary Tom", "Tom Anna"], first_token=True)
    assert len(task) == 1 and words(model, task.clean, 0, (1, 2)) == "Mary"
    assert task.info["dropped"] == {"answer and distractor begin alike": 1}
    assert "dropped 1: answer and distractor begin alike" in repr(task)
    with pytest.raises(ValueError, match="in every prompt"):
        make(model, answers=["John Mary", "Tom Anna"], first_token=True)


def test_filter_keeps_what_a_plain_loop_finds_right_and_says_how_many(model):
    names = ["Mary", "John", "Tom", "Anna", "Paul", "Kate"]
    pairs = [(a, b) for a in names for b in names if a != b]
    task = Task.from_strings(
        model,
        clean=[f"{a} gave it to" for a, _ in pairs],
        answers=[a for a, _ in pairs],
        distractors=[b for _, b in pairs],
    )
    right = [
        i
        for i, (row, a, b) in enumerate(
            zip(task.clean.rows, task.answers[:, 0], distractors(task)[:, 0], strict=True)
        )
        if (logits := forward(model, torch.tensor([row]))[0, -1])[a] > logits[b]
    ]
    kept = task.filter(model)
    assert 0 < len(kept) < len(task)
    same(kept, task[right])
    assert kept.info["filtered"] == {"kept": len(right), "of": 30}
    assert f"kept {len(right)} of 30" in repr(kept)
    wrong = task[[i for i in range(30) if i not in right]]
    with pytest.raises(ValueError, match="gets none of the"):
        wrong.filter(model)


def test_show_prints_tokens_with_roles_answers_and_distractors(model, capsys):
    make(model).show(1)
    shown = capsys.readouterr().out
    assert "<bos>|[io: Mary]|and|John|went" in shown and "[subject: Paul]" in shown
    assert "answer 'Mary'   distractor 'John'" in shown and "and 1 more prompts" in shown


def test_show_works_without_a_tokenizer(capsys):
    task = Task.from_tokens(
        zoo.zoo("gpt2"), clean=[[5, 6, 7]], answers=[8], roles={"a": (1, 2)}
    )
    task.show()
    assert "5|[a: 6]|[end: 7]" in capsys.readouterr().out


def metaspace():
    """A tokenizer that marks the beginning of every text, as the Llama 2 family does."""
    pieces = ["▁", "▁Mary", "▁gave", "▁to", "<unk>"]
    core = tk.Tokenizer(
        tk.models.Unigram([(piece, -1.0) for piece in pieces], unk_id=len(pieces) - 1)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_an_answer_counts_as_what_it_adds_to_its_prompt():
    model = load_model(zoo.hf("gpt2"), tokenizer=metaspace())
    alone = model.tokenizer(" Mary", add_special_tokens=False)["input_ids"]
    assert len(alone) == 2
    task = Task.from_strings(model, clean=["Mary gave to"], answers=[" Mary"])
    assert task.answers.tolist() == [model.tokenizer.convert_tokens_to_ids(["▁Mary"])]


def masked(name):
    tokenizer = zoo.tokenizer()
    tokenizer.mask_token = "w90"
    return load_model(zoo.hf(name), tokenizer=tokenizer)


def test_a_masked_language_model_answers_at_its_mask():
    model = masked("bert")
    task = Task.from_strings(
        model,
        clean=["Mary w90 to the park"],
        corrupted=["the man w90 to the park"],
        answers=["went"],
        distractors=["gave"],
    )
    assert task.answer_positions == (2,) and task.corrupted_answer_positions == (3,)
    with pytest.raises(ValueError, match="prompt 0 has 0 mask tokens"):
        Task.from_strings(model, clean=["Mary went"], answers=["to"])


def test_a_classifiers_only_answer_is_read_wherever_it_is_asked():
    logits = torch.randn(3, 1, 4)
    assert torch.equal(answer_logits(logits, [5, 0, 2]), logits[:, 0])


def test_text_covers_every_token_once_within_the_context(model):
    documents = ["the man saw the woman near the park", "who said that ?"]
    text = Text.from_strings(model, documents, context=5)
    assert text.documents == (0, 0, 1) and int(text.prompts.lengths.max()) <= 5
    assert all(row[0] == 1 for row in text.prompts.rows)
    whole = Text.from_strings(model, documents)
    pieces = [row[1:] for row in text.prompts.rows]
    assert [pieces[0] + pieces[1], pieces[2]] == [row[1:] for row in whole.prompts.rows]


@torch.no_grad()
def test_text_loss_is_the_cross_entropy_of_each_token_alone(model):
    text = Text.from_strings(model, ["the man saw the woman", "who said ?"])
    loss = text.loss(model, batch_size=1)
    assert loss.dims == ("prompt", "position") and loss.attrs["units"] == "nats"
    for i, row in enumerate(text.prompts.rows):
        logits = forward(model, torch.tensor([row]))[0]
        for pos in range(1, len(row)):
            expected = torch.nn.functional.cross_entropy(
                logits[pos - 1], torch.tensor(row[pos])
            )
            assert float(loss[i, pos]) == pytest.approx(float(expected), abs=1e-4)
        assert loss[i].isnull().sum() == loss.sizes["position"] - len(row) + 1
    torch.testing.assert_close(
        torch.tensor(text.loss(model).values), torch.tensor(loss.values), equal_nan=True
    )


def test_text_that_cannot_be_read_is_refused(model):
    with pytest.raises(ValueError, match="document 1 is empty"):
        Text.from_strings(model, ["the man", ""])
    with pytest.raises(ValueError, match="context=65 does not fit"):
        Text.from_strings(model, ["the man"], context=65)
    with pytest.raises(ValueError, match="context=1 does not fit"):
        Text.from_strings(model, ["the man"], context=1)
    with pytest.raises(ValueError, match="sees both sides"):
        Text.from_tokens(zoo.zoo("bert"), [[5, 6]]).loss(zoo.zoo("bert"))


def test_labelled_texts_score_a_classifier():
    model = load_model(zoo.hf("bert_classifier"), tokenizer=zoo.tokenizer())
    data = Labelled.from_strings(model, ["the man", "a ball", "it is"], ["b", "a", "c"])
    assert data.classes == ("a", "b", "c") and data.labels.tolist() == [1, 0, 2]
    logits = answer_logits(forward(model, data.prompts.tokens, data.prompts.mask), [0] * 3)
    best = logits.argmax(-1) == data.labels
    assert metrics.accuracy(logits, data.targets()).bool().tolist() == best.tolist()
    assert data[[1]].labels.tolist() == [0] and "1 a, 1 b, 1 c" in repr(data)


def test_labels_that_are_no_class_are_refused(model):
    with pytest.raises(ValueError, match=r"unknown class 'c'\. "):
        Labelled.from_strings(model, ["the man"], ["c"], classes=["a", "b"])
    with pytest.raises(ValueError, match="labels run from 2 to 2, but there are 2 classes"):
        Labelled.from_strings(model, ["the man"], [2], classes=["a", "b"])
    with pytest.raises(ValueError, match="1 texts but 2 labels"):
        Labelled.from_strings(model, ["the man"], [0, 1])


def test_a_method_says_which_data_it_takes(model):
    task = make(model)
    assert as_data(task, (Task, Text), "patching") is task
    with pytest.raises(TypeError, match=r"patching takes a Task or a Text as data, not a list"):
        as_data(CLEAN, (Task, Text), "patching")
