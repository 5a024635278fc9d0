"""Ablation of heads, MLPs and neurons: what the model loses, on every kind of data."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from known import known
from zoo import hf, tokens

import mechinterp as mi
from mechinterp import cli
from mechinterp.edits import Mean, Resample
from mechinterp.hooks import HookManager
from mechinterp.models import forward

BOOK = Path(__file__).parent / "data" / "five_children.txt"
FAMILIES = ["gpt2", "neox", "llama", "gemma2", "gemma3", "phi", "falcon_grouped", "native"]


def task(model) -> mi.Task:
    return mi.Task.from_tokens(
        model,
        clean=[tokens(1, n, seed=n)[0].tolist() for n in (6, 9, 7)],
        corrupted=[tokens(1, n, seed=n + 50)[0].tolist() for n in (6, 9, 7)],
        answers=[3, 4, 5],
        distractors=[7, 8, 9],
    )


def text(model, lengths=(9, 5, 12)) -> mi.Text:
    return mi.Text.from_tokens(model, [tokens(1, n, seed=n)[0].tolist() for n in lengths])


def labelled(model) -> mi.Labelled:
    prompts = mi.Text.from_tokens(model, tokens(5, 7, seed=3)).prompts
    return mi.Labelled("moods", prompts, torch.tensor([0, 2, 1, 1, 0]), ("a", "b", "c"))


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=tolerance)


def strings(model) -> mi.Text:
    return mi.Text.from_strings(model, [BOOK.read_text()[:600]], context=48)


# ------------------------------------------------------------------- against other ways


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_every_head_without_it_is_a_plain_run_without_it(family):
    model = zoo.zoo(family)
    data, manager = task(model), HookManager(model)
    if family == "bert":
        data = data[:1]
    result = mi.head_ablation(model, data)
    for layer, head in [(0, 0), (1, 3), (2, 1)]:
        with manager.ablate("z", layers=layer, heads=head):
            logits = data.logits(model)
        plain = mi.metrics.logit_diff(logits, data.targets())
        close(result.data["ablated"].sel(layer=layer, head=head), plain)
    close(result.data["intact"], mi.metrics.logit_diff(data.logits(model), data.targets()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_a_head_hugging_face_says_the_same(family):
    """The module itself, the head's columns of the output projection set to zero."""
    plain, model = hf(family), zoo.zoo(family)
    data = text(model)
    result = mi.head_ablation(model, data, heads=[(1, 2), [(0, 1), (2, 3)]])
    for number, heads in enumerate([[(1, 2)], [(0, 1), (2, 3)]]):
        module = hf(family)
        for layer, head in heads:
            weight = module.model.layers[layer].self_attn.o_proj.weight
            with torch.no_grad():
                weight[:, 8 * head : 8 * head + 8] = 0
        for prompt, row in enumerate(data.prompts.rows):
            ids = torch.tensor([row])
            loss = module(ids, labels=ids).loss
            close(result.data["ablated"].isel(set=number, prompt=prompt), loss.detach())
            loss = plain(ids, labels=ids).loss
            close(result.data["intact"].isel(prompt=prompt), loss.detach())


@pytest.mark.parametrize("kind", ["mean", "position_mean", "resample", "corrupted"])
def test_what_takes_a_heads_place_comes_from_the_reference(kind):
    model = zoo.zoo("llama")
    data, manager = task(model), HookManager(model)
    other = mi.Text.from_tokens(model, tokens(6, 9, seed=8))
    given = {} if kind == "corrupted" else {"reference": other, "seed": 3}
    result = mi.head_ablation(model, data, kind=kind, heads=[(1, 2)], **given)
    if kind == "corrupted":
        source = manager.capture(data.corrupted, "z")
        edit = mi.edits.Replace("z", source, layers=1, heads=2)
    elif kind == "resample":
        edit = Resample("z", manager.capture(other, "z"), layers=1, heads=2, seed=3)
    else:
        acts = manager.capture(other, "z")
        mean = acts["z", 1].mean((0, 1) if kind == "mean" else 0)  # equal lengths
        assert mean.shape[-2:] == (4, 8)
        per_position = kind == "position_mean"
        means = manager.mean(other, "z", per_position=per_position)
        close(means["z", 1].squeeze(), mean.squeeze())
        edit = Mean("z", means, layers=1, heads=2, per_position=per_position)
    with manager.edit(edit, data=data):
        logits = data.logits(model)
    close(result.data["ablated"][:, 0], mi.metrics.logit_diff(logits, data.targets()))


def test_a_prompt_is_never_resampled_by_itself():
    """Every prompt of two gets the other one's values, whatever the seed."""
    model = zoo.zoo("gpt2")
    data, manager = mi.Text.from_tokens(model, tokens(2, 7)), HookManager(model)
    other = manager.capture(data.prompts[[1, 0]], "z")
    with manager.edit(mi.edits.Replace("z", other, layers=1, heads=2)):
        expected = data.loss(model).mean("position")
    for seed in range(6):
        for reference in (None, data, data.prompts):
            told = {"kind": "resample", "reference": reference, "seed": seed}
            found = mi.head_ablation(model, data, heads=[(1, 2)], **told)
            close(found.data["ablated"][:, 0], expected)


def test_a_prompt_with_no_other_to_draw_from_is_refused_or_named():
    model = zoo.zoo("gpt2")
    with pytest.raises(
        ValueError, match="takes the values of another prompt, but there is one"
    ):
        mi.head_ablation(model, text(model, [6]), kind="resample")
    rows = [*tokens(3, 7).tolist(), tokens(1, 9, seed=4)[0].tolist()]
    uneven = mi.Text.from_tokens(model, rows)
    with pytest.warns(UserWarning, match="prompt 3 is longer than all others"):
        found = mi.head_ablation(model, uneven, kind="resample")
    effect = abs(found.effect).max(("layer", "head"))
    assert effect[3] < 1e-5 < effect[:3].min()


def test_a_reference_that_is_not_named_is_the_data_itself():
    model = zoo.zoo("gpt2")
    data = task(model)
    own = mi.head_ablation(model, data, kind="mean")
    named = mi.head_ablation(model, data, kind="mean", reference=data.clean)
    close(own.data["ablated"], named.data["ablated"], 0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
def test_mlps_and_neurons_are_taken_out_alike(family):
    model = zoo.zoo(family)
    data, manager = text(model), HookManager(model)
    mlps = mi.mlp_ablation(model, data, mlps=[1, [0, 2]])
    neurons = mi.neuron_ablation(model, data, neurons=[(1, 5), [(0, 3), (0, 9), (2, 1)]])
    for result, number, edits in [
        (mlps, 0, [mi.edits.Zero("mlp_out", layers=1)]),
        (mlps, 1, [mi.edits.Zero("mlp_out", layers=i) for i in (0, 2)]),
        (neurons, 0, [mi.edits.Zero("mlp_post", layers=1, neurons=5)]),
        (
            neurons,
            1,
            [
                mi.edits.Zero("mlp_post", layers=0, neurons=[3, 9]),
                mi.edits.Zero("mlp_post", layers=2, neurons=1),
            ],
        ),
    ]:
        with manager.edit(*edits):
            loss = data.loss(model).mean("position")
        close(result.data["ablated"].isel(set=number), loss)
    assert neurons.data["set"].values.tolist() == ["1.5", "0.3 + 0.9 + 2.1"]


@pytest.mark.parametrize("family", zoo.CLASSIFIERS)
def test_classifiers_are_measured_by_their_classes(family):
    model = zoo.zoo(family)
    data = labelled(model)
    result = mi.head_ablation(model, data, metric={"loss": "loss", "accuracy": "accuracy"})
    with HookManager(model).ablate("z", layers=1, heads=2):
        logits = forward(model, data.prompts.tokens, data.prompts.mask)[:, 0]
    nats = torch.nn.functional.cross_entropy(logits, data.labels, reduction="none")
    one = result.data["ablated"].sel(layer=1, head=2)
    close(one.sel(metric="loss"), nats.detach())
    close(one.sel(metric="accuracy"), (logits.argmax(1) == data.labels).float())


# ---------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("family", FAMILIES)
def test_text_padded_beside_longer_text_gives_the_numbers_of_the_text_alone(family):
    model = zoo.zoo(family)
    together = mi.head_ablation(model, text(model)).data["ablated"]
    for prompt, length in enumerate((9, 5, 12)):
        alone = mi.head_ablation(model, text(model, (length,))).data["ablated"]
        close(together[prompt], alone[0])


def test_the_order_within_a_set_does_not_matter_and_layers_are_sets_of_heads():
    model = zoo.zoo("neox")
    data = text(model)
    sets = [[(0, 1), (2, 3)], [(1, i) for i in range(4)]]
    forth = mi.head_ablation(model, data, heads=sets)
    back = mi.head_ablation(model, data, heads=[one[::-1] for one in sets])
    assert forth.data["ablated"].equals(back.data["ablated"])
    layers = mi.head_ablation(model, data, heads="layers")
    assert layers.data["set"].values.tolist() == ["layer 0", "layer 1", "layer 2"]
    close(layers.data["ablated"].sel(set="layer 1"), forth.data["ablated"][:, 1])


def test_pairs_are_every_two_heads():
    model = zoo.zoo("gpt2")
    pairs = mi.head_ablation(model, task(model), heads="pairs").data["ablated"]
    assert pairs.sizes["set"] == 12 * 11 // 2
    one = mi.head_ablation(model, task(model), heads=[[(2, 1), (0, 3)]]).data["ablated"]
    close(pairs.sel(set="0.3 + 2.1"), one[:, 0])


def test_values_of_a_head_equal_to_its_mean_lose_nothing():
    """Tokens all the same, at positions that a rotary model without masks cannot tell apart."""
    model = zoo.zoo("llama")
    data = mi.Text.from_tokens(model, [[5] * 6, [5] * 6])
    result = mi.head_ablation(model, data, kind="mean")
    close(result.effect, np.zeros(result.effect.shape), 1e-5)


def test_a_split_by_memory_changes_nothing_but_rounding():
    model = zoo.zoo("llama")
    data = text(model, (30, 28, 25, 31))
    whole, small = (mi.head_ablation(model, data, memory=m) for m in ("2GB", "54MB"))
    close(whole.data["ablated"], small.data["ablated"], 1e-5)
    assert mi.plan(model, data, mi.ablation_cells(model, data), memory="54MB").passes > 1


def test_a_hook_of_somebody_else_runs_every_cell_in_full_to_the_same_numbers():
    model = zoo.zoo("llama")
    data = text(model)
    fast = mi.head_ablation(model, data, heads=[(1, 2)])
    model.add_hook("blocks.0.hook_out", lambda tensor, hook: tensor)
    with pytest.warns(mi.SlowPathWarning):
        full = mi.head_ablation(model, data, heads=[(1, 2)])
    model.reset_hooks()
    close(full.data["ablated"], fast.data["ablated"])
    assert full.convention.settings["path"] == "full"


# ------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("kind", ["redundant_pair", "backup_head"])
def test_one_of_two_that_do_the_same_is_missed_only_with_the_other(kind):
    model = known(kind, "grouped_query", "rotary")
    found = mi.head_ablation(model.model, model.task(6), heads="pairs").effect.mean("prompt")
    roles = model.circuit
    two = (
        roles["previous_token"]
        if kind == "redundant_pair"
        else (*roles["induction"], *roles["backup"])
    )
    alone = mi.head_ablation(model.model, model.task(6)).effect.mean("prompt")
    for layer, head in two:
        assert float(alone.sel(layer=layer, head=head)) == 0.0
    label = " + ".join(f"{layer}.{head}" for layer, head in sorted(two))
    assert float(found.sel(set=label)) == -10.0


# ------------------------------------------------------------------------------ statistics


def test_pieces_of_a_document_can_be_resampled_together():
    model = zoo.zoo("gpt2")
    prompts = mi.Text.from_tokens(model, tokens(6, 8, seed=1)).prompts
    data = mi.Text("two", prompts, (0, 0, 0, 1, 1, 1), 8)
    result = mi.head_ablation(model, data)
    with pytest.warns(mi.FewPromptsWarning):
        by = result.statistics(by="template")
    assert by.attrs["by"] == "template" and by["low"].shape == (3, 4)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"heads": [(3, 0)]}, "layer 3 does not exist"),
        ({"heads": [(0, 4)]}, "layer 0 has heads 0..3"),
        ({"heads": [[(0, 1), (0, 1)]]}, "named twice in a set"),
        ({"heads": [(0, 1), (0, 1)]}, "asked for twice"),
        ({"heads": []}, "no heads to take out"),
        ({"heads": [[]]}, "a set is empty"),
        ({"heads": "pair"}, "Did you mean 'pairs'"),
        ({"kind": "means"}, "Did you mean 'mean'"),
        ({"kind": "zero", "reference": [[1, 2]]}, "draws on no reference"),
        ({"kind": "corrupted"}, "no corrupted run"),
        ({"metric": "logit_diff"}, "no distractors"),
        ({"metric": "kl"}, "not kept for running text"),
        ({"metric": lambda logits, _: logits.softmax(0)[:, 0]}, "token by token"),
    ],
)
def test_bad_arguments_on_text_are_said_before_the_model_runs(arguments, says, monkeypatch):
    model = zoo.zoo("gpt2")
    data = text(model)
    monkeypatch.setattr("mechinterp.models.run.answers_once", _never)
    with pytest.raises(ValueError, match=says):
        mi.head_ablation(model, data, **arguments)


@pytest.mark.parametrize("named", [[(0, 1.5)], [(0, 1, 2)], [[0, 1, 2]], [["0.1"]], [3]])
def test_what_is_no_pair_of_integers_is_said(named):
    model = zoo.zoo("gpt2")
    with pytest.raises(TypeError, match=r"pair \(layer, head\)"):
        mi.head_ablation(model, text(model), heads=named)


def test_pairs_need_two_heads():
    model = zoo.zoo("gpt2")
    every = [(layer, head) for layer in range(3) for head in range(4)]
    smaller = mi.prune_heads(model, every[1:])
    with pytest.raises(ValueError, match="takes two heads, but this model has 1"):
        mi.head_ablation(smaller, text(smaller), heads="pairs")
    with pytest.raises(ValueError, match="that is one MLP"):
        mi.mlp_ablation(model, text(model), mlps="layers")


def _never(*_):
    raise AssertionError("the model ran")


def test_data_that_the_model_does_not_answer_is_refused():
    encoder, causal = zoo.zoo("bert"), zoo.zoo("gpt2")
    with pytest.raises(ValueError, match="sees both sides"):
        mi.head_ablation(encoder, text(encoder))
    with pytest.raises(ValueError, match="Load a sequence classifier"):
        mi.head_ablation(causal, labelled(causal))
    classifier = zoo.zoo("bert_classifier")
    two = mi.Labelled("two", labelled(classifier).prompts, torch.zeros(5).long(), ("a", "b"))
    with pytest.raises(ValueError, match=r"has 2 classes \(a, b\), but .* tells 3 apart"):
        mi.head_ablation(classifier, two)
    with pytest.raises(ValueError, match="piece 1 of the text is one token"):
        mi.head_ablation(causal, text(causal, (5, 1)))
    with pytest.raises(TypeError, match="a Task or a Text or a Labelled"):
        mi.head_ablation(causal, ["some words"])


# ----------------------------------------------------------------------- the command line


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return int(exit_.value.code or 0)


def test_ablate_prints_a_table_and_saves_result_and_figure(tmp_path, capsys):
    out = tmp_path / "heads.nc"
    assert run("ablate", "embedded", "induction", "--n", "6", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "zero-ablation of heads, induction: 6 prompts" in said and "intact" in said
    assert isinstance(mi.load_result(out), mi.AblationResult)
    assert out.with_suffix(".png").stat().st_size > 5000


def test_ablate_reads_text_sets_and_a_reference(capsys):
    asked = ("--only", "1.1+3.2,0.3", "--kind", "mean", "--reference", "induction")
    assert run("ablate", "embedded", str(BOOK), "--context", "32", "--n", "3", *asked) == 0
    said = capsys.readouterr().out
    assert "1.1 + 3.2" in said and "nats" in said


def test_ablate_splits_self_repair(capsys):
    assert run("ablate", "embedded", "induction", "--n", "6", "--only", "0.3", "--repair") == 0
    said = capsys.readouterr().out
    assert "rescaling" in said and "work against the loss" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("induction", "--parts", "neuron"), "Did you mean 'neurons'"),
        (("induction", "--only", "3,4"), "is no layer and number"),
        (("induction", "--only", "9.1"), "layer 9 does not exist"),
        (("nowhere.txt",), "there is no file nowhere.txt"),
        (("induction", "--repair", "--parts", "mlps"), "Leave the rest out"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, says, capsys):
    assert run("ablate", "embedded", *arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_labelled_texts_come_from_json_lines(tmp_path):
    model = mi.load_model(zoo.zoo("bert_classifier"), tokenizer=zoo.tokenizer())
    path = tmp_path / "moods.jsonl"
    path.write_text('{"text": "Mary", "label": 2}\n\n{"text": "John", "label": 0}\n')
    assert mi.Labelled.in_jsonl(path)
    data = mi.Labelled.from_jsonl(path, model)
    assert data.name == "moods" and data.labels.tolist() == [2, 0]
    path.write_text('{"text": "Mary", "label": 2}\n{"text": "John"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*moods\.jsonl"):
        mi.Labelled.from_jsonl(path, model)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_screening_ablates_the_top_heads_exactly_and_the_others_nearly(kind):
    model = mi.load_model("embedded")
    data = strings(model)
    exact = mi.head_ablation(model, data, kind=kind)
    found = mi.head_ablation(model, data, kind=kind, screen="bfloat16")
    marked = found.data["exact"]
    assert marked.dims == ("layer", "head") and int(marked.sum()) == 20
    there, mine, theirs = marked.values, found.effect.values, exact.effect.values
    close(mine[:, there], theirs[:, there])
    close(mine, theirs, 0.05)
    assert np.abs(mine - theirs)[:, ~there].max() > 1e-5
    assert there.reshape(-1)[np.argsort(np.abs(theirs.mean(0)), axis=None)[-8:]].all()
    assert found.convention.settings["screen"] == "bfloat16"


def test_a_screen_that_does_not_exist_is_refused_before_anything_runs():
    model = zoo.zoo("gpt2")
    with pytest.raises(ValueError, match="bfloat16"):
        mi.head_ablation(model, task(model), screen="int4")


def test_heads_may_be_numpy_integers_as_ranked_tables_give_them():
    model = zoo.zoo("gpt2")
    pairs = [tuple(pair) for pair in np.array([[0, 1], [2, 3]])]
    found = mi.head_ablation(model, task(model), heads=pairs)
    assert found.data["set"].values.tolist() == ["0.1", "2.3"]
