"""The induction dossier: knock-outs against plain runs, and the parts of the account."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from zoo import zoo

import mechinterp as mi
from mechinterp.edits import Mean
from mechinterp.heads.copies import lost_prefix, second_copy
from mechinterp.heads.dossier_table import VERDICTS
from mechinterp.heads.knockout import knock_out
from mechinterp.hooks import HookManager
from mechinterp.metrics import loss


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "neox", "gemma2"])
def test_a_knock_out_is_that_of_plain_hooked_runs(name):
    model = zoo(name)
    task = second_copy(model, 5, 8, 0)
    heads = [(0, 1), (2, 3)]
    found = knock_out(model, task, heads, n_sets=6)
    manager = HookManager(model)
    means = manager.mean(task.clean, "z")

    def plainly(out: list[tuple[int, int]]) -> np.ndarray:
        edits = [Mean("z", means, layers=layer, heads=head) for layer, head in out]
        with torch.no_grad():
            intact = loss(task.logits(model), task.targets())
            with manager.edit(*edits):
                return (loss(task.logits(model), task.targets()) - intact).double().numpy()

    for i, head in enumerate(heads):
        np.testing.assert_allclose(found.data["alone"].values[:, i], plainly([head]), atol=2e-4)
    np.testing.assert_allclose(found.data["together"].values, plainly(heads), atol=2e-4)
    names = found.data["set"].values
    assert len(set(names)) == len(names)
    for name, rise in zip(names, found.data["random"].values, strict=True):
        pair = [tuple(map(int, each.split("."))) for each in str(name).split()]
        assert [layer for layer, _ in pair] == [0, 2] and not set(pair) & set(heads)
        assert rise == pytest.approx(plainly([(a, b) for a, b in pair]).mean(), abs=2e-4)


def test_the_p_value_counts_random_sets_that_do_as_much():
    found = knock_out(zoo("gpt2"), second_copy(zoo("gpt2"), 4, 8, 1), [(1, 0)], n_sets=50)
    random, own = found.data["random"].values, float(found.data["together"].mean())
    assert len(random) == 3  # the other heads of the layer
    assert found.p == (1 + (random >= own).sum()) / 4


def test_as_many_different_sets_as_asked_or_all_there_are():
    model, task = zoo("gpt2"), second_copy(zoo("gpt2"), 3, 8, 1)
    heads = [(0, 0), (1, 0), (2, 0)]  # 27 sets
    for asked, there in ((5, 5), (13, 13), (26, 26), (27, 27), (40, 27)):
        found = knock_out(model, task, heads, n_sets=asked)
        assert len(set(found.data["set"].values)) == found.data.sizes["set"] == there
        told = found.convention.settings
        assert told["sets_asked"] == asked and told["sets_possible"] == 27
        assert told["sets_different"] == there
        assert found.smallest_p == 1 / (1 + there) <= found.p


def test_the_second_copy_is_answered_by_what_came_next_the_first_time():
    model = zoo("gpt2")
    task = second_copy(model, 7, 9, 3)
    lengths = task.clean.lengths.tolist()
    assert len(set(lengths)) > 3
    answers = task.answers
    assert answers is not None
    for row, n, answer in zip(task.clean.tokens.tolist(), lengths, answers, strict=True):
        assert row[n - 1] in row[: n - 1]
        assert row[row.index(row[n - 1]) + 1] == int(answer[0])


def test_a_lost_prefix_takes_away_where_to_look_and_nothing_else():
    task = lost_prefix(zoo("gpt2"), 5, 8, 0)
    assert task.corrupted is not None and task.answers is not None
    for clean, other, answer in zip(
        task.clean.tokens.tolist(), task.corrupted.tokens.tolist(), task.answers, strict=True
    ):
        (place,) = [i for i in range(len(clean)) if clean[i] != other[i]]
        assert clean[place] == clean[-1] == other[-1] and other[place] not in clean
        assert clean[place + 1] == other[place + 1] == int(answer[0])


def test_the_dossier_of_the_embedded_model_names_its_circuit(tmp_path):
    model = mi.load_model("embedded")
    dossier = mi.induction_dossier(model, n=10, n_sets=30, n_prompts=6)
    table = dossier.to_frame()
    assert set(table["head"]) <= {"1.0", "1.2", "1.3", "1.4", "1.5", "1.6", "1.7"}
    assert bool((table["induction"] > 0.1).all()) and bool((table["rise"] > 0).all())
    assert set(table["matches"]) == set(table["copies"]) == {"yes"}
    assert dossier.settings["chosen"] == "matching" and len(dossier.matching) == 7
    assert set(table["k_partner"]) <= {"0.5", "0.6"}  # the heads that look back in layer 0
    text = dossier.summary()
    assert "first copy" in text and "random" in text and table["head"].to_list()[0] in text
    half = dossier.loss.sizes["position"] // 2
    assert (
        float(dossier.loss[:, half + 1 :].mean()) < 0.5 < float(dossier.loss[:, 1:half].mean())
    )
    folder = dossier.save(tmp_path / "dossier")
    assert "no p below 0.062" in text and "cannot be told" in text  # 15 sets exist
    assert "Of the 6 heads in those sets 5 match prefixes themselves" in text
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "account.txt",
        "composition.nc",
        "dossier.json",
        "dossier.png",
        "heads.csv",
        "knock_out.nc",
        "loss.nc",
        "paths.nc",
        "scores.nc",
    }
    again = mi.InductionDossier.load(folder)
    assert again.summary() == text and again.to_frame().equals(table)
    assert again.loss.identical(dossier.loss) and again.settings == dossier.settings
    parts = ("scores", "composition", "knock_out", "paths")
    assert all(getattr(again, part).equals(getattr(dossier, part)) for part in parts)
    assert pixels(again) == pixels(dossier)


def pixels(dossier: mi.InductionDossier) -> bytes:
    drawn = BytesIO()
    dossier.figure().savefig(drawn, format="raw", dpi=40)
    return drawn.getvalue()


def test_a_folder_without_a_dossier_is_said_to_have_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no dossier"):
        mi.InductionDossier.load(tmp_path)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("attention", ["multi_head", "grouped_query"])
def test_the_dossier_finds_a_circuit_that_was_written_down(attention, positions):
    known = mi.known_model("induction", attention=attention, positions=positions)
    (induction,), (previous,) = known.circuit["induction"], known.circuit["previous_token"]
    dossier = mi.induction_dossier(known.model, n=4, length=12, n_sets=20, n_prompts=6)
    assert dossier.candidates == (
        induction,
    )  # and not the decoy, which matches without copying
    assert set(dossier.matching) > {induction}
    (row,) = dossier.to_frame().to_dict("records")
    assert {row[step] for step in VERDICTS} == {"yes"}
    assert row["induction"] == pytest.approx(1, abs=1e-5)
    assert row["copying"] > 0.99 and row["ov_copying"] > 0.9
    assert row["path_partner"] == f"{previous[0]}.{previous[1]}"
    assert row["k_partner"] == row["path_partner"] and row["path_k_rank"] == 1
    assert row["path_k_composition"] == row["k_composition"]
    assert row["path_low"] > 9 and row["path_p"] < 0.05
    assert row["path_partner_previous"] > 0.9 and row["path_effect"] > 9
    assert row["rise"] > 1 and "cannot be told" in dossier.summary()
    assert float(np.abs(dossier.knock_out.data["random"]).max()) == 0  # decoys do nothing


def test_a_decoy_that_matches_prefixes_has_no_other_step():
    known = mi.known_model("induction")
    dossier = mi.induction_dossier(
        known.model, heads=[(1, -4)], n=4, length=12, n_sets=3, n_prompts=6
    )
    (row,) = dossier.to_frame().to_dict("records")
    assert row["head"] == "1.0" and dossier.settings["chosen"] == "given"
    assert row["matches"] == "yes"
    assert [row[step] for step in ("copies", "path", "from_previous", "needed")] == ["no"] * 4
    assert row["path_partner"] == "none"


def test_an_untrained_model_has_no_induction_heads_and_the_account_says_so():
    model = mi.random_init(mi.known_model("induction").model, 7)
    dossier = mi.induction_dossier(model, n=4, length=12, n_sets=20, n_prompts=6)
    assert dossier.settings["chosen"] == "nearest" and not dossier.matching
    table = dossier.to_frame()
    assert set(table["matches"]) == set(table["needed"]) == {"no"}
    assert "No head of this model matches prefixes" in dossier.summary()
    assert "Nearest to it: " in dossier.summary()


def test_too_few_prompts_are_said_to_tell_nothing():
    model = mi.known_model("induction").model
    dossier = mi.induction_dossier(model, n=4, length=12, n_sets=3, n_prompts=3)
    (row,) = dossier.to_frame().to_dict("records")
    assert [row[step] for step in ("path", "from_previous", "needed")] == ["unknown"] * 3


def test_partners_that_disagree_are_named():
    model = mi.known_model("induction").model
    dossier = mi.induction_dossier(model, n=4, length=12, n_sets=3, n_prompts=6)
    strengths = dossier.composition.data["composition"].copy()
    strengths.loc[{"metric": "K", "sender_layer": 0, "sender_head": 3, "layer": 1}] = 9
    data = dossier.composition.data.assign(composition=strengths)
    other = replace(dossier, composition=replace(dossier.composition, data=data))
    said = "name different partners for 1.2 (path 0.1, rank 2 by weights; weights 0.3)"
    assert said in other.summary() and "different partners" not in dossier.summary()


def test_the_in_context_score_comes_along_where_there_is_text(tmp_path):
    model = zoo("llama")
    text = mi.Text.from_tokens(model, [list(range(5, 25)), list(range(30, 50))])
    dossier = mi.induction_dossier(
        model, n=3, length=8, n_sets=4, n_prompts=3, k=1, text=text, late=18, early=4
    )
    assert dossier.icl is not None
    assert f"{dossier.icl.score:+.2f} nats at token 18" in dossier.summary()
    assert (dossier.save(tmp_path / "with text") / "icl.nc").is_file()


@pytest.mark.parametrize("name", ["llama", "native_attn"])
def test_a_model_without_induction_has_a_dossier_too(name):
    model = zoo(name)
    dossier = mi.induction_dossier(model, n=4, length=8, n_sets=5, n_prompts=4, k=2)
    assert len(dossier.to_frame()) >= 1
    assert "No head of this model matches prefixes" in repr(dossier)


def test_a_model_in_half_precision_has_a_dossier():
    model = zoo("llama", torch.bfloat16)
    dossier = mi.induction_dossier(model, n=3, length=8, n_sets=4, n_prompts=6, k=1)
    assert np.isfinite(dossier.knock_out.data["random"]).all()
    assert dossier.figure().axes


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"heads": [(1, 9)]}, r"head \(1, 9\) does not exist"),
        ({"heads": []}, "there are no heads"),
        ({"heads": [(1, 0), (1, -4)]}, r"head \(1, 0\) is named twice"),
        ({"heads": [(1, 0), (1, 1), (1, 2)]}, "only 1 others to match them"),
        ({"k": 0}, "k=0 leaves no candidate"),
        ({"n": 0}, "n=0 leaves no random tokens"),
        ({"n_sets": 0}, "n_sets=0 leaves nothing to compare with"),
        ({"n_prompts": 1}, "n_prompts=1 leaves no intervals"),
        ({"nulls": 0}, "nulls=0 leaves no untrained"),
        ({"length": 1}, "length=1 leaves too few"),
        ({"length": 2}, "length=2 leaves too few"),
        ({"length": 20}, "context"),
        ({"least": 1.5}, "no share of attention"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(asked, says, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model ran")

    for name in ("head_scores", "icl_score", "knock_out", "path_patching"):
        monkeypatch.setattr(f"mechinterp.heads.dossier.{name}", refuse)
    with pytest.raises(ValueError, match=says):
        mi.induction_dossier(zoo("gpt2"), **{"n": 2, "length": 5, "n_prompts": 2} | asked)


def test_the_shortest_dossier_there_is():
    dossier = mi.induction_dossier(
        zoo("gpt2"), heads=[(0, -1), (-1, 0)], n=2, length=3, n_sets=2, n_prompts=2
    )
    assert dossier.candidates == ((0, 3), (2, 0))
    assert list(dossier.to_frame()["path_partner"]) == ["none", "none"]


def test_text_that_is_too_short_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.delattr("mechinterp.heads.dossier.head_scores")
    model = zoo("gpt2")
    text = mi.Text.from_tokens(model, [list(range(5, 25))])
    with pytest.raises(ValueError, match="0 of 1 pieces have the 500 tokens"):
        mi.induction_dossier(model, n=2, length=5, text=text)


def test_a_model_that_sees_both_sides_is_refused():
    with pytest.raises(ValueError, match="sees both"):
        mi.induction_dossier(zoo("bert"), n=2, length=5)


@pytest.mark.slow
def test_the_induction_heads_of_a_real_model_stand_out_from_random_sets():
    model = mi.load_model("smollm2-135m")
    heads = [(17, 4), (18, 6), (20, 6), (23, 7)]  # the best of their layers by prefix matching
    found = knock_out(model, second_copy(model, 8, 12, 0), heads, n_sets=150)
    assert found.p < 0.01
    assert float(found.data["together"].mean()) > 2 * float(found.data["random"].max())
