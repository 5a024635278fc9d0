"""Self-repair: the effect of an ablation, split without rest."""

import numpy as np
import pytest
import torch
import zoo
from known import known
from zoo import tokens

import mechinterp as mi
from mechinterp.hooks import HookManager

FAMILIES = [
    "gpt2",
    "neox",
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "opt",
    "falcon",
    "native",
]
HEADS = [(0, 1), (1, 2), [(0, 0), (1, 3)], (2, 0)]


def task(model, **fields) -> mi.Task:
    return mi.Task.from_tokens(
        model,
        clean=[tokens(1, n, seed=n)[0].tolist() for n in (6, 9, 7, 8)],
        corrupted=[tokens(1, n, seed=n + 50)[0].tolist() for n in (6, 9, 7, 8)],
        answers=[3, 4, 5, 6],
        distractors=[7, 8, 9, 10],
        **fields,
    )


def before_cap(model):
    """The logit difference before a soft-cap: what comes out is cap * tanh(logit / cap)."""
    config = getattr(mi.unwrap(model), "config", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def logit_diff(logits, targets):
        return mi.metrics.logit_diff(
            logits if cap is None else cap * (logits.double() / cap).atanh(), targets
        )

    return logit_diff


@pytest.mark.parametrize("kind", ["zero", "mean", "corrupted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_direct_effect_changes_and_rescaling_add_up_to_the_total(family, kind):
    model = zoo.zoo(family)
    data = task(model)
    result = mi.self_repair(model, data, HEADS, kind=kind)
    parts = result.data
    sums = parts["direct"] + parts["change"].sum("component") + parts["rescaling"]
    capped = result.convention.settings["attributed"] != "logits"
    np.testing.assert_allclose(sums, parts["total"], atol=2e-5)
    ablated = mi.head_ablation(model, data, heads=HEADS, kind=kind, metric=before_cap(model))
    np.testing.assert_allclose(parts["total"], ablated.effect, atol=2e-5)
    assert capped == (family == "gemma2")


def test_each_part_is_what_a_plain_loop_makes_of_it():
    """GPT-2: read the last residual stream and every write, and scale by LayerNorm by hand."""
    model = zoo.zoo("gpt2")
    data = task(model)
    result = mi.self_repair(model, data, [(0, 1)]).data
    manager, layers = HookManager(model), range(3)
    runs = [manager.capture(data.clean, ["resid_post", "z", "mlp_out"])]
    with manager.ablate("z", layers=0, heads=1):
        runs.append(manager.capture(data.clean, ["resid_post", "z", "mlp_out"]))
    norm = model.ln_final.original_component
    W_U = (
        model.unembed.weight.detach().T
        if model.unembed.weight.shape[0] != 32
        else (model.unembed.weight.detach())
    )
    wrong = data.distractors
    assert wrong is not None
    for prompt, end in enumerate(data.answer_positions):

        def aim(run, prompt=prompt, end=end):
            stream = run["resid_post", 2][prompt, end]
            scale = (stream.var(correction=0) + norm.eps).sqrt()
            u = W_U[:, data.answers[prompt, 0]] - W_U[:, wrong[prompt, 0]]
            weighted = u * norm.weight.detach()
            return (weighted - weighted.mean()) / scale

        intact, ablated = runs
        gone = intact["z", 0][prompt, end, 1] @ model.blocks[0].attn.W_O[1].detach()
        direct = -(gone @ aim(intact))
        assert float(result["direct"][prompt, 0]) == pytest.approx(float(direct), abs=1e-5)
        for layer in layers:
            change = ablated["mlp_out", layer] - intact["mlp_out", layer]
            want = float(change[prompt, end] @ aim(intact))
            got = result["change"].sel(component=f"{layer}.mlp")[prompt, 0]
            assert float(got) == pytest.approx(want, abs=1e-5)
        stream = ablated["resid_post", 2][prompt, end]
        rescaled = float(stream @ aim(ablated) - stream @ aim(intact))
        assert float(result["rescaling"][prompt, 0]) == pytest.approx(rescaled, abs=1e-5)


def test_nothing_before_the_head_changes():
    model = zoo.zoo("llama")
    change = mi.self_repair(model, task(model), [(1, 2)]).data["change"]
    before = [c for c in change["component"].values if c.startswith(("0.", "embed"))]
    assert np.abs(change.sel(component=before).values).max() < 1e-12
    assert np.isnan(change.sel(component="1.2")).all()
    assert np.abs(change.sel(component="2.mlp").values).max() > 1e-4


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_backup_head_is_named(positions):
    model = known("backup_head", "multi_head", positions)
    ((layer, head),), ((_, backup),) = model.circuit["induction"], model.circuit["backup"]
    result = mi.self_repair(model.model, model.task(12), [(layer, head)])
    assert float(np.abs(result.data["total"]).max()) == 0.0
    found = result.compensators()
    at = f"{model.circuit['backup'][0][0]}.{backup}"
    assert found["component"].tolist() == [at]
    direct = float(result.data["direct"].mean())
    assert found["change"].tolist()[0] == pytest.approx(-direct, abs=1e-3) and direct < -1
    assert float(result.repair.mean()) == pytest.approx(-direct, abs=1e-3)


def test_a_head_without_direct_effect_has_no_compensators():
    model = known("redundant_pair", "multi_head", "learned")
    result = mi.self_repair(model.model, model.task(12), [model.circuit["previous_token"][0]])
    assert result.compensators().empty


def test_the_picture_is_of_the_set_that_was_asked_for():
    model = zoo.zoo("gpt2")
    result = mi.self_repair(model, task(model), HEADS)
    labels = [t.get_text() for t in result.plot(of="1.2").get_yticklabels()]
    assert labels[0] == "without 1.2" and labels[-1] == "total"
    with pytest.raises(ValueError, match=r"'9\.9' was not taken out"):
        result.plot(of="9.9")


def test_what_cannot_be_split_is_refused():
    model = zoo.zoo("bert")
    data = mi.Task.from_tokens(model, clean=tokens(2, 6), answers=[3, 4])
    with pytest.raises(ValueError, match="normalises the residual stream after every layer"):
        mi.self_repair(model, data, [(0, 1)])
    causal = zoo.zoo("gpt2")
    with pytest.raises(TypeError, match="takes a Task"):
        mi.self_repair(causal, mi.Text.from_tokens(causal, tokens(2, 6)), [(0, 1)])
    with pytest.raises(ValueError, match="one prompt says nothing"):
        mi.self_repair(causal, task(causal)[:1], [(0, 1)]).compensators()
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        mi.self_repair(causal, task(causal), [(7, 1)])


def test_a_model_in_half_precision_adds_up_too():
    model = zoo.zoo("llama", torch.bfloat16)
    parts = mi.self_repair(model, task(model), [(0, 1)]).data
    sums = parts["direct"] + parts["change"].sum("component") + parts["rescaling"]
    assert float(np.abs(sums - parts["total"]).max()) < 0.1
