"""The logit lens: the model's own closing on every state, in bounded memory."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conformance import pair
from known import known
from transformer_lens.model_bridge import TransformerBridge
from zoo import CLASSIFIERS, ENCODERS, HF, NAMES, hf, tokenizer, tokens, zoo

import mechinterp as mi
from mechinterp.engine.closing import Closing
from mechinterp.lens import logit_lens as module
from mechinterp.lens.readout import Final, Reading, chunk_sizes, read
from mechinterp.models import forward, load_model

model_of = cache(zoo)
READ = [name for name in NAMES if name not in CLASSIFIERS]
SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "result"]


def text_of(model: TransformerBridge, n: int = 2, length: int = 9) -> mi.Text:
    return mi.Text.from_tokens(model, tokens(n, length))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in READ]
    + [(name, torch.float64) for name in ("gpt2", "llama", "gemma2", "bert")],
    ids=str,
)
def test_the_last_entry_is_what_the_model_says(name, dtype):
    model = model_of(name) if dtype == torch.float32 else zoo(name, dtype)
    task = pair(model)
    with torch.no_grad():
        own = task.logits(model).double()
    lens = mi.logit_lens(model, task).data.isel(layer=-1, position=0)
    allowed = (1e-5 if dtype == torch.float32 else 1e-9) * float(own.abs().max())
    for target, ids in (("answer", task.answers), ("distractor", task.distractors)):
        assert ids is not None
        expected = own.gather(1, ids)[:, 0].numpy()
        assert np.abs(lens["logit"].sel(target=target).values - expected).max() <= allowed
    assert np.abs(lens["kl"].values).max() <= (1e-6 if dtype == torch.float32 else 1e-12)
    assert lens["top_id"].values.tolist() == own.argmax(-1).tolist()


FINAL_NORMS = {
    "gpt2": lambda m: (m.transformer.ln_f, m.lm_head),
    "neox": lambda m: (m.gpt_neox.final_layer_norm, m.lm_head),
    "llama": lambda m: (m.model.norm, m.lm_head),
    "qwen3": lambda m: (m.model.norm, m.lm_head),
    "phi": lambda m: (m.model.final_layernorm, m.lm_head),
    "falcon": lambda m: (m.transformer.ln_f, m.lm_head),
    "gemma2": lambda m: (m.model.norm, lambda x: 8 * torch.tanh(m.lm_head(x) / 8)),
    "opt": lambda m: (m.model.decoder.final_layer_norm, m.lm_head),
    "bert": lambda m: (lambda x: x, m.cls),
    "roberta": lambda m: (lambda x: x, m.lm_head),
}


@torch.no_grad()
def plain_logits(name: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's input would predict, by the Hugging Face modules and a plain loop."""
    plain = hf(name)
    norm, head = FINAL_NORMS[name](plain)
    states = plain(ids, output_hidden_states=True).hidden_states
    return [head(norm(states[layer])).double() for layer in range(3)]


@pytest.mark.parametrize("name", FINAL_NORMS)
def test_every_number_agrees_with_a_plain_loop_over_hugging_face_states(name):
    ids = tokens(2, 7)
    model = load_model(hf(name))
    lens = mi.logit_lens(model, mi.Text.from_tokens(model, ids), site="resid_pre", targets=5)
    with torch.no_grad():
        final = forward(model, ids).double()
    expected = plain_logits(name, ids)
    for prompt in range(2):
        for layer in range(3):
            for pos in range(7):
                here = lens.data.isel(prompt=prompt, layer=layer, position=pos)
                logits = expected[layer][prompt, pos]
                p = logits.softmax(-1)
                q = final[prompt, pos].softmax(-1)
                numbers = {
                    "entropy": -sum(float(x) * float(x.log()) for x in p),
                    "kl": sum(
                        float(a) * float((a / b).log()) for a, b in zip(q, p, strict=True)
                    ),
                    "top_prob": float(p.max()),
                }
                for key, number in numbers.items():
                    assert float(here[key]) == pytest.approx(number, rel=1e-4, abs=2e-5)
                assert float(here["logit"][0]) == pytest.approx(float(logits[5]), abs=3e-5)
                assert float(here["prob"][0]) == pytest.approx(float(p[5]), rel=1e-4)
                assert float(here["rank"][0]) == sum(
                    float(x) > float(logits[5]) for x in logits
                )
                if name not in ENCODERS and pos < 6:
                    following = int(ids[prompt, pos + 1])
                    nats = -float(p[following].log())
                    assert float(here["surprisal"]) == pytest.approx(nats, abs=3e-5)
                else:
                    assert np.isnan(here["surprisal"])


def test_it_agrees_with_transformer_lens():
    from transformer_lens.tools.analysis import logit_lens

    model = model_of("llama")
    ids = tokens(2, 7)
    with torch.no_grad():
        oracle = logit_lens(model, ids, positions=None, targets=[5, 9])
    ours = mi.logit_lens(model, mi.Text.from_tokens(model, ids), targets=[5, 9]).data
    labels = [f"{layer}_pre" for layer in (1, 2)] + ["final_post"]
    for layer, label in enumerate(labels):
        theirs = oracle.readout.values[oracle.labels.index(label)].numpy()
        assert np.abs(ours["logit"].isel(layer=layer).values - theirs).max() < 1e-4
        ranks = oracle.readout.target_ranks
        assert ranks is not None
        assert np.array_equal(
            ours["rank"].isel(layer=layer).values, ranks[oracle.labels.index(label)].numpy()
        )


def test_the_streams_of_neighbouring_sites_are_one():
    model = model_of("gemma3")
    text = text_of(model)
    pre = mi.logit_lens(model, text, site="resid_pre").data
    post = mi.logit_lens(model, text, site="resid_post").data
    for name in ("entropy", "kl", "rank"):
        assert np.array_equal(
            pre[name].isel(layer=slice(1, None)).values,
            post[name].isel(layer=slice(None, -1)).values,
            equal_nan=True,
        )


@pytest.mark.parametrize("name", READ)
def test_every_site_is_read_on_every_architecture(name):
    model = model_of(name)
    lacking = {"mlp_out", "resid_mid"} if name == "native_attn" else set()
    if name in ("neox", "phi", "falcon", "falcon_grouped"):
        lacking = {"resid_mid"}
    for site in SITES:
        if site in lacking:
            with pytest.raises(mi.MissingSiteError):
                mi.logit_lens(model, text_of(model, 1), site=site)
            continue
        lens = mi.logit_lens(model, text_of(model, 1, 4), site=site, positions=[-1, -2])
        assert np.isfinite(lens.data["entropy"].values).all()
        assert (lens.data["entropy"] <= np.log(97) + 1e-6).all()


@torch.no_grad()
def test_a_head_is_read_by_what_it_adds():
    model, ids = model_of("llama"), tokens(1, 6)
    seen = mi.HookManager(model).capture(ids, "result")
    norm, head = FINAL_NORMS["llama"](hf("llama"))
    lens = mi.logit_lens(model, mi.Text.from_tokens(model, ids), site="result", targets=4)
    for layer in range(3):
        logits = head(norm(seen["result", layer]))[0, :, :, 4].T
        ours = lens.data["logit"].isel(prompt=0, layer=layer, target=0).values
        assert np.abs(ours - logits.numpy()).max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_neuron_is_read_by_activation_times_output_row(name):
    model, ids = model_of(name), tokens(1, 6)
    seen = mi.HookManager(model).capture(ids, "mlp_post")
    plain: Any = hf(name)
    norm, head = FINAL_NORMS[name](plain)
    row = (
        plain.transformer.h[1].mlp.c_proj.weight[7]
        if name == "gpt2"
        else plain.model.layers[1].mlp.down_proj.weight[:, 7]
    )
    lens = mi.logit_lens(
        model,
        mi.Text.from_tokens(model, ids),
        site="mlp_post",
        layers=1,
        neurons=[7, 3],
        targets=4,
    )
    logits = head(norm(seen["mlp_post", 1][0, :, 7, None] * row))[:, 4]
    ours = lens.data["logit"].sel(neuron="1.7").isel(prompt=0, target=0).values
    assert np.abs(ours - logits.numpy()).max() < 1e-4


@pytest.mark.parametrize("site", ["result", "mlp_post"])
def test_behind_a_post_norm_the_parts_of_a_layer_still_sum(site):
    model, ids = model_of("gemma2"), tokens(2, 6)
    from mechinterp.engine.direct import head_results, neuron_results

    manager = mi.HookManager(model)
    out = "attn_out" if site == "result" else "mlp_out"
    seen = manager.capture(ids, ["z", "mlp_post", out])
    for layer in range(3):
        if site == "result":
            parts = head_results(model, layer, seen["z", layer].flatten(0, 1))
        else:
            rows = seen["mlp_post", layer].flatten(0, 1)
            parts = neuron_results(model, layer, rows, list(range(rows.shape[1])))
        torch.testing.assert_close(
            parts.sum(1), seen[out, layer].flatten(0, 1), atol=1e-5, rtol=1e-4
        )


def reading(closing: Closing, states: torch.Tensor, budget: float) -> Reading:
    final = Final.of(closing.logits(states.flip(0)))
    targets = torch.tensor([[[5, 6], [7, -1]]]).expand(len(states), -1, -1)
    return read(closing, states, final, targets, budget)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert", "native_attn"])
def test_chunks_of_rows_and_vocabulary_change_nothing(name, monkeypatch):
    closing = Closing(model_of(name))
    states = 3 * torch.randn(36, 32, generator=torch.Generator().manual_seed(0))
    whole = reading(closing, states, 1e9)
    sizes = []
    real = Closing.logits

    def counted(self, rows, vocabulary=None):
        found = real(self, rows, vocabulary)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Closing, "logits", counted)
    for budget in (40 * 97 * 33, 40 * 32 * 40):
        sizes.clear()
        part = reading(closing, states, budget)
        assert max(sizes[1:]) <= budget / 40  # the first are the final logits
        for field in ("entropy", "kl", "top_prob", "logit", "log_prob"):
            torch.testing.assert_close(
                getattr(part, field), getattr(whole, field), atol=2e-5, rtol=1e-4
            )
        assert torch.equal(part.top_id, whole.top_id)
        assert torch.equal(part.rank, whole.rank)


def test_chunks_fit_the_budget():
    for rows in (1, 20, 1000):
        for budget in (1, 40_000, 1e6, 1e9):
            n, some = chunk_sizes(rows, 5000, budget)
            assert 1 <= n <= rows and 1 <= some <= 5000
            assert n * some * 40 <= max(budget, 40)


@torch.no_grad()
def test_a_set_of_answers_counts_as_metrics_count_it():
    model = model_of("gpt2")
    task = mi.Task.from_tokens(model, clean=tokens(3, 6), answers=[[3, 8], [4], [5, 9, 11]])
    lens = mi.logit_lens(model, task).data.isel(layer=-1, position=0, target=0)
    logits, targets = task.logits(model), task.targets()
    for name in ("logit", "prob", "rank"):
        expected = mi.metrics.METRICS[name](logits, targets).double().numpy()
        assert np.abs(lens[name].values - expected).max() < 1e-5
    loss = mi.metrics.loss(logits, targets).double().numpy()
    assert np.abs(lens["surprisal"].values - loss).max() < 1e-5


def test_padding_changes_no_number():
    model = model_of("mistral")
    long, short = tokens(1, 9)[0].tolist(), tokens(1, 5, seed=3)[0].tolist()
    both = mi.logit_lens(model, mi.Text.from_tokens(model, [long, short])).data
    alone = mi.logit_lens(model, mi.Text.from_tokens(model, [short])).data
    for name in ("entropy", "kl", "logit"):
        padded = both[name].isel(prompt=1, position=slice(0, 5)).values
        np.testing.assert_allclose(padded, alone[name].isel(prompt=0).values, atol=1e-5)
    assert both["entropy"].isel(prompt=1, position=slice(5, None)).isnull().all()
    assert (both["top_id"].isel(prompt=1, position=slice(5, None)) == -1).all()


def test_surprisal_at_the_end_is_the_models_loss():
    model = model_of("gpt2")
    text = text_of(model, 3)
    lens = mi.logit_lens(model, text, layers=2).data["surprisal"].isel(layer=0).values
    loss = text.loss(model).values
    np.testing.assert_allclose(lens[:, :-1], loss[:, 1:], atol=1e-5)


def test_edits_in_force_are_seen():
    model = model_of("gpt2")
    task = pair(model)
    plain = mi.logit_lens(model, task).data["logit"]
    with mi.HookManager(model).ablate("mlp_out", layers=1, positions="end", data=task):
        edited = mi.logit_lens(model, task).data["logit"]
    assert np.array_equal(plain.isel(layer=0), edited.isel(layer=0))
    assert not np.allclose(plain.isel(layer=1), edited.isel(layer=1))


def test_memory_changes_no_number():
    model = model_of("gemma2")
    text = text_of(model, 6)
    whole = mi.logit_lens(model, text)
    small = mi.logit_lens(model, text, memory="400KB")
    for name in ("entropy", "kl", "logit", "surprisal"):
        np.testing.assert_allclose(whole.data[name], small.data[name], atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="too small to run one prompt of 9 tokens"):
        mi.logit_lens(model, text, memory="10KB")


def test_a_model_that_does_not_end_in_its_closing_is_refused(monkeypatch):
    real = Closing.logits
    monkeypatch.setattr(Closing, "logits", lambda self, *given: 1.001 * real(self, *given))
    with pytest.raises(RuntimeError, match="No lens can be trusted here"):
        mi.logit_lens(model_of("gpt2"), pair(model_of("gpt2")))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_has_no_unembedding(name):
    model = model_of(name)
    with pytest.raises(ValueError, match="has no unembedding: it answers with classes"):
        mi.logit_lens(model, text_of(model))


def test_a_bare_encoder_has_no_unembedding():
    model = load_model(hf("bert").bert)
    for call in (mi.logit_lens, mi.TunedLens.fit):
        with pytest.raises(ValueError, match="has no unembedding: it ends in a hidden state"):
            call(model, text_of(model))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"site": "resid_pots"}, "Did you mean 'resid_post'"),
        ({"site": "q"}, "cannot be read out. Use one of resid_pre"),
        ({"layers": 3}, "layer 3 does not exist: the model has layers 0..2"),
        ({"site": "result", "layers": 0, "heads": 4}, r"head \(0, 4\) does not exist"),
        ({"heads": 1}, "resid_post has no head axis"),
        ({"neurons": 1}, "resid_post has no neurons"),
        ({"site": "mlp_post"}, "mlp_post has 128 neurons a layer, too many"),
        ({"site": "mlp_post", "neurons": 128}, "neuron 128 does not exist: layer 0 has"),
        ({"positions": "subjet"}, "subjet"),
        ({"positions": 9}, "position 9 does not exist in prompt 0"),
        ({"targets": 97}, "target 97 does not exist"),
        ({"targets": "John went"}, "'John went' is 2 tokens: 'John' 'went'. Pass one"),
        ({"targets": []}, "targets is empty"),
        ({"memory": "2 apples"}, "is no size"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_runs(arguments, says, monkeypatch):
    model = load_model(hf("gpt2"), tokenizer=tokenizer())
    text = text_of(model)
    monkeypatch.setattr(module, "batches", None)
    with pytest.raises(ValueError, match=says):
        mi.logit_lens(model, text, **arguments)


def test_other_data_is_refused_by_name():
    model = model_of("gpt2")
    with pytest.raises(TypeError, match="logit_lens takes a Task or a Text"):
        mi.logit_lens(model, "Paris")


def test_one_prompt_is_drawn_as_a_grid_of_words():
    model = load_model(hf("gpt2"), tokenizer=tokenizer())
    text = mi.Text.from_strings(model, "Paris is the capital of France and Rome of Italy .")
    lens = mi.logit_lens(model, text)
    ax = lens.plot()
    words = [label.get_text() for label in ax.texts if label.get_text()]
    positions = lens.data.sizes["position"]
    assert len([w for w in words if "positions" not in w]) == 3 * positions
    assert ax.get_ylabel() == "layer"
    assert [label.get_text() for label in ax.get_xticklabels()][1] == "Paris"


def test_several_prompts_are_drawn_as_lines_per_target():
    ax = mi.logit_lens(model_of("gpt2"), pair(model_of("gpt2"))).plot()
    legend = ax.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["answer", "distractor"]
    assert ax.get_yscale() == "log" and "rank" in ax.get_ylabel()


def test_heads_and_neurons_are_drawn_and_ranked_by_name():
    model = model_of("qwen3")
    heads = mi.logit_lens(model, pair(model), site="result")
    assert list(heads.top(2).columns)[:3] == ["layer", "head", "position"]
    assert heads.plot().get_xlabel()
    neurons = mi.logit_lens(model, pair(model), site="mlp_post", layers=[0, 2], neurons=[1, 5])
    assert set(neurons.top(4)["neuron"]) == {"0.1", "0.5", "2.1", "2.5"}
    assert neurons.plot().get_title("left")


def test_every_hugging_face_family_is_tried():
    assert set(HF) - set(CLASSIFIERS) <= set(READ)


def test_states_that_say_nothing_rank_a_target_in_the_middle():
    model = known("induction", "multi_head", "learned")
    task = model.task(3)
    lens = mi.logit_lens(model.model, task, targets=[int(task.answers[0, 0])])
    assert float(lens.data["prob"].isel(layer=0).max()) == pytest.approx(1 / 32)
    ranks = lens.data["rank"].isel(layer=0).values
    assert set(ranks[np.isfinite(ranks)].tolist()) == {31 / 2}
