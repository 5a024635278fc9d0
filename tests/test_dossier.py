"""The induction dossier: knock-outs against plain runs, and the parts of the account."""

import numpy as np
import pytest
import torch
from zoo import zoo

import mechinterp as mi
from mechinterp.edits import Mean
from mechinterp.heads.copies import lost_prefix, second_copy
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
    assert set(table["k_partner"]) <= {"0.5", "0.6"}  # the heads that look back in layer 0
    text = dossier.summary()
    assert "first copy" in text and "random" in text and table["head"].to_list()[0] in text
    half = dossier.loss.sizes["position"] // 2
    assert (
        float(dossier.loss[:, half + 1 :].mean()) < 0.5 < float(dossier.loss[:, 1:half].mean())
    )
    folder = dossier.save(tmp_path / "dossier")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "account.txt",
        "composition.nc",
        "dossier.png",
        "heads.csv",
        "knock_out.nc",
        "paths.nc",
        "scores.nc",
    }
    assert mi.load_result(folder / "knock_out.nc").equals(dossier.knock_out)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("attention", ["multi_head", "grouped_query"])
def test_the_dossier_finds_a_circuit_that_was_written_down(attention, positions):
    known = mi.known_model("induction", attention=attention, positions=positions)
    (induction,), (previous,) = known.circuit["induction"], known.circuit["previous_token"]
    dossier = mi.induction_dossier(
        known.model, heads=[induction], n=4, length=12, n_sets=20, n_prompts=6
    )
    (row,) = dossier.to_frame().to_dict("records")
    assert row["induction"] == pytest.approx(1, abs=1e-5)
    assert row["copying"] > 0.99 and row["ov_copying"] > 0.9
    assert row["path_partner"] == f"{previous[0]}.{previous[1]}"
    assert row["k_partner"] == row["path_partner"]
    assert row["path_partner_previous"] > 0.9 and row["path_effect"] > 9
    assert row["rise"] > 1 and dossier.knock_out.p < 0.5
    assert float(np.abs(dossier.knock_out.data["random"]).max()) == 0  # decoys do nothing


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
    assert "Candidates" in repr(dossier)


def test_heads_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="head"):
        mi.induction_dossier(zoo("gpt2"), heads=[(1, 9)], n=2, length=5, n_prompts=2)


@pytest.mark.slow
def test_the_induction_heads_of_a_real_model_stand_out_from_random_sets():
    model = mi.load_model("smollm2-135m")
    heads = [(17, 4), (18, 6), (20, 6), (23, 7)]  # the best of their layers by prefix matching
    found = knock_out(model, second_copy(model, 8, 12, 0), heads, n_sets=150)
    assert found.p < 0.01
    assert float(found.data["together"].mean()) > 2 * float(found.data["random"].max())
