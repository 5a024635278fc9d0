"""In-context learning: the score counts tokens right, curves and checkpoints tell the truth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from zoo import tokenizer, tokens, zoo

import mechinterp as mi
from mechinterp.heads.icl import opening
from mechinterp.heads.training import prefix_matching

CHECKPOINTS = Path(__file__).parents[1] / "scripts" / "results" / "checkpoints"


def spoken(length: int, seed: int = 0) -> str:
    """A text of so many words that the zoo's tokenizer has."""
    words = ["the", "and", "school", "book", "Mary", "John", "gave", "went", "store"]
    rng = np.random.default_rng(seed)
    return " ".join(words[i] for i in rng.integers(len(words), size=length))


def with_tokenizer(name: str) -> TransformerBridge:
    return mi.load_model(zoo(name), tokenizer=tokenizer())


def loss_of_one(model, row: list[int], position: int) -> float:
    """The loss of one token, by a forward of the model on what comes before it alone."""
    with torch.no_grad():
        logits = model(torch.tensor([row[:position]]))[0, -1].double()
    return float(-logits.log_softmax(-1)[row[position]])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "falcon"])
def test_the_score_is_the_loss_of_the_late_token_minus_the_early_ones(name):
    model = with_tokenizer(name)
    text = mi.Text.from_strings(model, [spoken(30, 1), spoken(24, 2), spoken(9, 3)], context=25)
    result = mi.icl_score(model, text, late=20, early=5)

    long = [row for row in text.prompts.rows if len(row) > 20]
    # The BOS stands at position 0, so the 20th token of the text is at position 20.
    expected = [loss_of_one(model, row, 20) - loss_of_one(model, row, 5) for row in long]
    assert len(long) == result.data.sizes["prompt"] == 2
    assert result.score == pytest.approx(float(np.mean(expected)), abs=1e-4)
    assert result.convention.settings["start"] == 1


def test_without_a_bos_the_tokens_are_counted_from_the_first():
    model = zoo("llama")
    text = mi.Text.from_tokens(model, tokens(3, 12))
    result = mi.icl_score(model, text, late=10, early=4)
    rows = text.prompts.rows
    expected = [loss_of_one(model, row, 9) - loss_of_one(model, row, 3) for row in rows]
    assert result.convention.settings["start"] == 0
    assert result.score == pytest.approx(float(np.mean(expected)), abs=1e-4)


def test_a_start_token_is_seen_in_a_model_without_tokenizer():
    model = zoo("gpt2")
    started = torch.cat([torch.full((3, 1), 2), tokens(3, 12)], 1)
    assert opening(model, mi.Text.from_tokens(model, started)) == 1
    assert opening(model, mi.Text.from_tokens(model, tokens(3, 12))) == 0


def test_pieces_of_unlike_length_give_what_each_gives_alone():
    model = with_tokenizer("llama")
    documents = [spoken(20, 1), spoken(13, 2), spoken(16, 3)]
    together = mi.Text.from_strings(model, documents)
    scores = [
        mi.icl_score(model, mi.Text.from_strings(model, each), late=12, early=3).score
        for each in documents
    ]
    result = mi.icl_score(model, together, late=12, early=3)
    assert result.score == pytest.approx(float(np.mean(scores)), abs=1e-5)
    assert result.data.sizes["token"] == 13


def test_intervals_resample_documents_and_not_their_pieces():
    model = with_tokenizer("gpt2")
    text = mi.Text.from_strings(model, [spoken(60, 1), spoken(60, 2)], context=13)
    by_document = mi.icl_score(model, text, late=12, early=3)
    assert len(set(by_document.data["template"].values)) == 2
    low, high = by_document.interval()
    expected = mi.stats.bootstrap_interval(
        by_document.effect.sel(token=12).values, clusters=by_document.data["template"].values
    )
    assert (low, high) == tuple(map(float, expected))
    one = mi.icl_score(
        model, mi.Text.from_strings(model, spoken(60), context=13), late=12, early=3
    )
    assert np.isfinite(one.interval()).all()  # pieces, where there is one document
    assert "pieces of one document" in one.plot().figure.axes[0].texts[0].get_text()


def test_what_cannot_be_scored_says_what_is_needed():
    model = with_tokenizer("gpt2")
    text = mi.Text.from_strings(model, [spoken(20), spoken(9)])
    with pytest.raises(ValueError, match=r"0 of 2 pieces have the 500 tokens.*longest has 20"):
        mi.icl_score(model, text)
    with pytest.raises(ValueError, match="early=9 must be at least 1 and before late=4"):
        mi.icl_score(model, text, late=4, early=9)
    with pytest.raises(ValueError, match="nothing comes before the first token"):
        mi.icl_score(model, text, late=4, early=1, start=0)
    with pytest.raises(TypeError, match="takes a Text"):
        mi.icl_score(model, "some text")
    bert = with_tokenizer("bert")
    with pytest.raises(ValueError, match="sees both sides"):
        mi.icl_score(bert, mi.Text.from_strings(bert, [spoken(20)]), late=10, early=2)


def test_prefix_matching_agrees_with_a_plain_loop_over_a_hugging_face_model():
    from zoo import hf

    module = hf("llama")
    model = zoo("llama")
    model.cfg.n_ctx = 128  # rotary positions have no table to outgrow
    found = prefix_matching(model, [1], n=2, seed=5)

    generator = torch.Generator().manual_seed(5)
    ordinary = [token for token in range(97) if token != 1]
    scores = []
    for _ in range(2):
        drawn = [ordinary[i] for i in torch.randperm(96, generator=generator)[:25]]
        row = [1, *drawn * 4]
        with torch.no_grad():
            attentions = module(torch.tensor([row]), output_attentions=True).attentions
        for query in range(26, 101):
            earlier = [k for k in range(1, query) if row[k] == row[query]]
            scores.append(
                torch.stack(
                    [a[0, :, query, [k + 1 for k in earlier]].sum(-1) for a in attentions]
                )
            )
    expected = torch.stack(scores).mean(0)
    torch.testing.assert_close(torch.tensor(found).float(), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def curve() -> mi.TrainingCurve:
    import json

    model = mi.load_model(CHECKPOINTS / "step-00000")
    documents = json.loads((CHECKPOINTS / "held_out.json").read_text())[:64]
    text = mi.Text.from_tokens(model, documents, name="held-out documents")
    return mi.training_curve(CHECKPOINTS, text, late=120, early=10, n_draws=4)


def test_induction_and_in_context_learning_appear_together_over_training(curve):
    means = curve.means()
    assert len(means["step"]) == 12
    before, after = means.sel(step=[0, 100, 200, 300]), means.sel(step=[600, 800, 1200])
    assert float(before["induction"].max()) < 0.1
    assert float(after["induction"].min()) > 0.5
    assert float(after["icl"].max()) < float(before["icl"].min()) - 0.5
    assert float(after["loss"].max()) < float(before["loss"].min()) - 0.5
    assert curve.best[0] == 1  # the second layer: induction needs a head before it


def test_a_checkpoint_on_the_curve_has_the_score_that_it_has_alone(curve, tmp_path):
    import json

    model = mi.load_model(CHECKPOINTS / "step-00600")
    documents = json.loads((CHECKPOINTS / "held_out.json").read_text())[:64]
    text = mi.Text.from_tokens(model, documents)
    alone = mi.icl_score(model, text, late=120, early=10)
    assert float(curve.means()["icl"].sel(step=600)) == pytest.approx(alone.score)
    assert curve.convention.settings["checkpoints"]["600"] == mi.fingerprint(model)
    again = mi.training_curve({600: model}, text, late=120, early=10, n_draws=4)
    np.testing.assert_allclose(
        again.data["induction"].sel(step=600), curve.data["induction"].sel(step=600)
    )
    assert mi.load_result(curve.save(tmp_path / "curve.nc")).equals(curve)


def test_the_figure_of_training_has_three_panels(curve):
    labels = [ax.get_ylabel() for ax in curve.figure().axes]
    assert labels == ["prefix matching", "in-context score (nats)", "loss (nats)"]
    assert list(curve.top(1)["layer"]) == [1]


def test_checkpoints_that_are_not_there_are_missed_at_once(tmp_path):
    model = zoo("gpt2")
    text = mi.Text.from_tokens(model, tokens(2, 12))
    with pytest.raises(ValueError, match="there are no checkpoints"):
        mi.training_curve(tmp_path, text)
    with pytest.raises(FileNotFoundError, match="no folder"):
        mi.training_curve(tmp_path / "nowhere", text)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"early": 60, "late": 20}, "before late=20"),
        ({"n_draws": 0}, "n_draws=0 must be at least 1"),
        ({"late": 400}, "0 of 2 pieces have the 400 tokens"),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_refused_before_a_model_runs(asked, says, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr("mechinterp.heads.training.prefix_matching", refuse)
    model = zoo("gpt2")
    text = mi.Text.from_tokens(model, tokens(2, 24))
    with pytest.raises(ValueError, match=says):
        mi.training_curve({0: model}, text, **{"late": 20, "early": 4, "start": 0} | asked)


def test_checkpoints_of_other_shapes_or_vocabularies_are_named():
    other = zoo("gpt2")
    model = mi.load_model(CHECKPOINTS / "step-00000")
    text = mi.Text.from_tokens(model, [list(range(5, 29))] * 2)
    with pytest.raises(ValueError, match="the checkpoint of step 7 has other layers, heads or"):
        mi.training_curve({0: model, 7: other}, text, late=20, early=4, n_draws=1)
    large = mi.Text.from_tokens(other, [list(range(70, 94))] * 2)
    with pytest.raises(ValueError, match="tokens that this vocabulary of 64 has not"):
        mi.training_curve({0: model}, large, late=20, early=4, n_draws=1)


def test_no_special_token_is_among_the_random_ones_of_prefix_matching(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mechinterp.heads.training.watched",
        lambda model, prompts, kinds: (
            seen.append(prompts) or {"induction": np.zeros((1, 3, 4))}
        ),
    )
    model = with_tokenizer("llama")
    model.cfg.n_ctx = 128
    special = set(model.tokenizer.all_special_ids)
    prefix_matching(model, [20], n=40, seed=0)
    (prompts,) = seen
    assert {row[0] for row in prompts.rows} == {20}
    drawn = {token for row in prompts.rows for token in row[1:]}
    assert len(special) > 1 and not drawn & {*special, 20}
