"""Activation patching: its laws, and plain loops written elsewhere as oracles."""

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import patching as oracle
from transformer_lens.model_bridge import TransformerBridge
from zoo import CLASSIFIERS, NAMES, tokens, zoo

import mechinterp as mi
from mechinterp.edits import Add, Apply, Scale
from mechinterp.metrics import Targets, logit_diff
from mechinterp.sites import SITES, head_axis, site_layers

model_of = cache(zoo)


def a_task(model: TransformerBridge, *, length: int = 7, n: int = 3, **fields: Any) -> mi.Task:
    """Random prompts, two runs apart in every token."""
    answers = tokens(n, 1, seed=9) % model.cfg.d_vocab_out
    return mi.Task.from_tokens(
        model,
        **{
            "clean": tokens(n, length, seed=1),
            "corrupted": tokens(n, length, seed=2),
            "answers": answers.flatten().tolist(),
            "distractors": ((answers.flatten() + 1) % model.cfg.d_vocab_out).tolist(),
            "roles": {"first": (0, 1), "middle": (2, 4)},
        }
        | fields,
    )


def values(result: mi.PatchingResult, name: str = "patched") -> np.ndarray:
    return result.data[name].values


# ------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", NAMES)
def test_patching_a_run_with_itself_changes_nothing(name):
    model = model_of(name)
    same = a_task(model, corrupted=tokens(3, 7, seed=1))
    for site in SITES if name in ("gpt2", "gemma2", "bert") else ("resid_pre", "z", "pattern"):
        if site == "embed" or site_layers(model, site):
            result = mi.activation_patching(
                model,
                same,
                site,
                positions="middle",
                layers=None if site == "embed" else 1,
                heads=0 if head_axis(site) else None,
            )
            assert np.array_equal(result.effect.values, np.zeros_like(values(result))), site


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching_all_of_resid_pre_at_layer_0_gives_the_other_run(name, direction):
    model = model_of(name)
    result = mi.activation_patching(
        model, a_task(model), "resid_pre", positions="all", layers=0, direction=direction
    )
    other = values(result, "clean" if direction == "denoising" else "corrupted")
    np.testing.assert_allclose(values(result)[:, 0], other, atol=1e-4)
    assert np.abs(result.effect.values).max() > 0.05


@pytest.mark.parametrize("site", ["z", "pattern"])
def test_noising_is_denoising_with_the_runs_swapped(site):
    model = model_of("llama")
    task = a_task(model)
    swapped = a_task(model, clean=task.corrupted, corrupted=task.clean)
    where = {"positions": ["middle", "end"], "layers": [0, 2]}
    noised = mi.activation_patching(model, task, site, direction="noising", **where)
    denoised = mi.activation_patching(model, swapped, site, direction="denoising", **where)
    assert np.array_equal(values(noised), values(denoised))
    np.testing.assert_array_equal(noised.effect.values, denoised.effect.values)


def test_the_order_of_layers_heads_positions_and_prompts_is_irrelevant():
    model = model_of("gpt2")
    task = a_task(model)
    usual = mi.activation_patching(
        model, task, "z", positions=["middle", "end"], layers=[0, 2], heads=[1, 3]
    )
    turned = mi.activation_patching(
        model,
        task[[2, 0, 1]],
        "z",
        positions=["end", "middle"],
        layers=[2, 0],
        heads=[3, 1],
    )
    same = turned.data["patched"].assign_coords(prompt=[2, 0, 1]).drop_vars("template")
    same = same.reindex_like(usual.data["patched"].drop_vars("template"))
    np.testing.assert_allclose(same.values, values(usual), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt", "native", "bert"])
def test_padded_equals_unpadded(name):
    model = model_of(name)
    lengths = (5, 9, 7)
    rows = {s: [tokens(1, n, seed=s + n)[0].tolist() for n in lengths] for s in (1, 2)}
    roles = {"who": [(1, 2), (4, 6), (2, 4)]}
    wholes = a_task(model, clean=rows[1], corrupted=rows[2], roles=roles)
    for site in ("z", "resid_pre", "pattern"):
        run = partial(
            mi.activation_patching,
            model,
            positions=["who", "end"],
            site=site,
            layers=1,
            heads=2 if head_axis(site) else None,
        )
        together = run(data=wholes)
        for i in range(3):
            alone = run(data=wholes[[i]])
            np.testing.assert_allclose(values(together)[i], values(alone)[0], atol=3e-5)


def test_a_corrupted_prompt_of_another_length_is_patched_by_role():
    model = model_of("llama")
    clean = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
    longer = [[5, 40, 41, 7, 8, 9, 10], [11, 50, 51, 52, 14]]
    spans = {"who": [(1, 2), (1, 3)]}, {"who": [(2, 3), (2, 4)]}
    task = mi.Task.from_tokens(
        model,
        clean=clean,
        corrupted=longer,
        answers=[3, 4],
        distractors=[4, 3],
        roles=spans[0],
        corrupted_roles=spans[1],
    )
    result = mi.activation_patching(model, task, "resid_pre", positions=["who", "end"])
    for prompt in range(2):
        clean_run = model.run_with_cache(torch.tensor(clean[prompt]))[1]
        for layer in range(3):
            hook = f"blocks.{layer}.hook_in"
            for role, ours, theirs in [
                ("who", spans[0]["who"][prompt], spans[1]["who"][prompt]),
                ("end", (-1, None), (-1, None)),
            ]:

                def put(own, hook, ours=ours, theirs=theirs, cached=clean_run[hook]):
                    own = own.clone()
                    own[:, slice(*theirs)] = cached[:, slice(*ours)]
                    return own

                with torch.no_grad():
                    logits = model.run_with_hooks(
                        torch.tensor(longer[prompt]), fwd_hooks=[(hook, put)]
                    )
                targets = task[[prompt]].targets()
                expected = float(logit_diff(logits[:, -1], targets))
                got = result.data["patched"].sel(prompt=prompt, layer=layer, position=role)
                assert float(got) == pytest.approx(expected, abs=1e-4)


def test_a_run_corrupted_by_edits_is_the_clean_one_with_those_edits_in_force():
    model = model_of("gpt2")
    noise = Add("embed", torch.randn(32, generator=torch.Generator().manual_seed(0)))
    task = a_task(model, corrupted=None, corruption=(noise,))
    with mi.HookManager(model).edit(noise):
        expected = task.logits(model)
    result = mi.activation_patching(model, task, "resid_post", positions="all")
    np.testing.assert_allclose(
        values(result, "corrupted"), logit_diff(expected, task.targets()).numpy(), atol=1e-6
    )
    # The last layer's output decides everything, so putting back the clean one restores all.
    np.testing.assert_allclose(values(result)[:, -1], values(result, "clean"), atol=1e-5)
    noised = mi.activation_patching(
        model, task, "resid_post", positions="all", direction="noising"
    )
    np.testing.assert_allclose(values(noised)[:, -1], values(noised, "corrupted"), atol=1e-5)
    assert noised.convention.settings["corruption"][0]["kind"] == "add"


def test_edits_in_force_on_the_model_apply_to_every_run():
    model = model_of("gpt2")
    task = a_task(model)
    plain = mi.activation_patching(model, task, "z", positions="all")
    with mi.HookManager(model).edit(Scale("mlp_out", 0.5)):
        inside = mi.activation_patching(model, task, "z", positions="all")
        expected = logit_diff(task.logits(model), task.targets())
    np.testing.assert_allclose(values(inside, "clean"), expected.numpy(), atol=1e-6)
    assert np.abs(values(inside) - values(plain)).max() > 0.01


# ---------------------------------------------------------------------------------- oracles

GRIDS = {
    "resid_pre": (oracle.get_act_patch_resid_pre, "each"),
    "attn_out": (oracle.get_act_patch_attn_out, "each"),
    "mlp_out": (oracle.get_act_patch_mlp_out, "each"),
    "z": (oracle.get_act_patch_attn_head_out_all_pos, "all"),
    "pattern": (oracle.get_act_patch_attn_head_pattern_all_pos, "all"),
}


@pytest.mark.parametrize("name", ["neox", "llama"])
@pytest.mark.parametrize("site", GRIDS)
def test_every_cell_equals_transformer_lens(name, site):
    model, (sweep, positions) = model_of(name), GRIDS[site]
    task = a_task(model)
    assert task.corrupted is not None
    _, cached = model.run_with_cache(task.clean.tokens)

    def metric(logits):
        return logit_diff(logits[:, -1], task.targets())

    expected: Any = sweep(model, task.corrupted.tokens, cached, metric, reduce="none")
    result = mi.activation_patching(model, task, site, positions=positions)
    assert result.data["patched"].dims[1:] == (
        ("layer", "position") if positions == "each" else ("layer", "head")
    )
    theirs = expected.values.movedim(-1, 0).numpy()
    np.testing.assert_allclose(values(result), theirs, atol=1e-5 * np.abs(theirs).max() + 1e-5)
    assert np.abs(result.effect.values).max() > 0.05


@pytest.mark.parametrize("site", ["q", "k"])
def test_heads_by_position_equal_transformer_lens(site):
    model = model_of("llama")
    task = a_task(model)
    assert task.corrupted is not None
    _, cached = model.run_with_cache(task.clean.tokens)
    name = "out" if site == "z" else site
    sweep = getattr(oracle, f"get_act_patch_attn_head_{name}_by_pos")

    def metric(logits):
        return logit_diff(logits[:, -1], task.targets())

    theirs = sweep(model, task.corrupted.tokens, cached, metric, reduce="none").values
    result = mi.activation_patching(model, task, site)
    axis = "kv_head" if site in ("k", "v") else "head"
    ours = result.data["patched"].transpose("layer", "position", axis, "prompt").values
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-5)


# ------------------------------------------------------------------------------ the result


def test_recovered_and_destroyed_are_the_shares_of_the_mean_gap():
    model = model_of("gpt2")
    task = a_task(model, n=12)
    for direction, share in [("denoising", "recovered"), ("noising", "destroyed")]:
        result = mi.activation_patching(
            model, task, "resid_pre", positions="all", direction=direction, metric="prob"
        )
        means = {
            name: values(result, name).mean(0) for name in ("patched", "clean", "corrupted")
        }
        before = means["corrupted" if share == "recovered" else "clean"]
        gap = means["clean"] - means["corrupted"]
        expected = (means["patched"] - before) / gap * (1 if share == "recovered" else -1)
        found = result._share()
        if not bool(found.isnull().all()):
            np.testing.assert_allclose(found.values, expected, rtol=1e-9)
            np.testing.assert_allclose(found.values[0], 1.0, atol=1e-3)


def test_the_number_of_prompts_run_at_once_changes_nothing(monkeypatch):
    model = zoo("llama")
    task = a_task(model, n=5, corrupted=None, corruption=(Scale("z", 0.5, positions="end"),))
    once = mi.activation_patching(model, task, "z", layers=1, positions=["end"])
    monkeypatch.setattr("mechinterp.engine.runs.BATCH", 2)
    some = mi.activation_patching(model, task, "z", layers=1, positions=["end"])
    np.testing.assert_allclose(values(some), values(once), rtol=1e-4, atol=1e-5)


def test_several_metrics_come_from_one_pass_on_their_own_axis(monkeypatch):
    model = model_of("gpt2")
    task = a_task(model)
    runs = []
    plain = model.original_model.forward
    monkeypatch.setattr(
        model.original_model, "forward", lambda *a, **k: runs.append(1) or plain(*a, **k)
    )
    single = mi.activation_patching(model, task, "mlp_out", positions="all", metric="prob")
    runs.clear()
    mi.activation_patching(model, task, "mlp_out", positions="all", metric="prob")
    n_single = len(runs)
    runs.clear()
    both = mi.activation_patching(
        model,
        task,
        "mlp_out",
        positions="all",
        metric={"prob": "prob", "twice": lambda x, t: 2 * logit_diff(x, t), "kl": "kl"},
    )
    assert len(runs) <= n_single + 1  # the whole logits of the clean run, for kl
    assert both.data["patched"].dims == ("prompt", "layer", "metric")
    np.testing.assert_array_equal(both.data["patched"].sel(metric="prob"), values(single))
    assert both.convention.metrics == {"prob": "probability", "twice": "", "kl": "nats"}
    np.testing.assert_allclose(both.data["clean"].sel(metric="kl"), 0, atol=1e-6)


def test_a_result_says_how_it_was_made_and_survives_a_file(tmp_path):
    model = model_of("llama")
    task = a_task(model)
    result = mi.activation_patching(
        model, task, "k", positions=["first", -1], direction="noising", heads=1, align="last"
    )
    made = result.convention
    assert (made.method, made.site, made.direction) == ("activation_patching", "k", "noising")
    assert made.positions == ["first", -1] and made.settings["align"] == "last"
    assert made.fingerprint == mi.fingerprint(model) and made.bos == "given"
    assert made.metrics == {"logit_diff": "nats of log-odds"} and made.versions["torch"]
    assert dict(result.data["patched"].sizes) == {
        "prompt": 3,
        "layer": 3,
        "kv_head": 1,
        "position": 2,
    }
    assert result.data["position"].values.tolist() == ["first", "-1"]
    assert mi.load_result(result.save(tmp_path / "k.nc")).equals(result)
    assert len(result.to_frame()) == 3 * 3 * 1 * 2


def test_the_embedding_has_no_layer_axis_and_neurons_are_patched_together():
    model = model_of("gpt2")
    task = a_task(model)
    embed = mi.activation_patching(model, task, "embed")
    assert embed.data["patched"].dims == ("prompt", "position")
    neurons = mi.activation_patching(model, task, "mlp_post", positions=slice(2, 4))
    assert neurons.data["patched"].dims == ("prompt", "layer", "position")
    assert neurons.data["position"].values.tolist() == [2, 3]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_patched_like_any_other_model(name):
    model = model_of(name)
    task = a_task(model, answers=[0, 1, 2], distractors=[1, 2, 0])
    result = mi.activation_patching(model, task, "z", positions="all")
    assert np.abs(result.effect.values).max() > 1e-3


def test_double_precision_is_kept():
    model = zoo("gpt2", torch.float64)
    result = mi.activation_patching(
        model, a_task(model), "resid_pre", positions="all", layers=0
    )
    np.testing.assert_allclose(values(result)[:, 0], values(result, "clean"), atol=1e-12)
    assert result.convention.dtype == "float64"


# ------------------------------------------------------------- errors, before anything runs


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"site": "resid_prew"}, r"unknown site 'resid_prew'.*'resid_pre'"),
        ({"layers": 3}, r"layer 3 does not exist: the model has layers 0\.\.2"),
        ({"heads": 4}, r"head \(0, 4\) does not exist: layer 0 has heads 0\.\.3"),
        ({"site": "k", "heads": 2}, r"layer 0 has key/value heads 0\.\.1"),
        ({"site": "mlp_out", "heads": 0}, "mlp_out has no head axis"),
        ({"positions": "midle"}, r"unknown role 'midle'. Did you mean 'middle'"),
        ({"positions": 9}, "position 9 does not exist in prompt 0, which has 7 tokens"),
        ({"positions": []}, "positions is empty"),
        ({"metric": "logitdiff"}, r"unknown metric 'logitdiff'. Did you mean 'logit_diff'"),
        ({"metric": {}}, "empty mapping"),
        ({"direction": "denoise"}, r"unknown direction 'denoise'. Did you mean 'denoising'"),
        ({"align": "first"}, "unknown align 'first'"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_runs(arguments, says, monkeypatch):
    model = model_of("llama")
    task = a_task(model)
    monkeypatch.setattr(model.original_model, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError, match=says):
        mi.activation_patching(model, task, **{"site": "z", **arguments})


def test_a_site_that_the_architecture_lacks_is_refused():
    model = model_of("neox")
    with pytest.raises(mi.MissingSiteError, match="in parallel"):
        mi.activation_patching(model, a_task(model), "resid_mid")


def test_other_kinds_of_data_are_refused():
    with pytest.raises(TypeError, match="activation_patching takes a Task as data, not a str"):
        mi.activation_patching(model_of("gpt2"), "a prompt", "z")  # pyright: ignore


def test_a_task_without_a_corrupted_run_is_refused():
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="has no corrupted run"):
        mi.activation_patching(model, a_task(model, corrupted=None), "z")


def unequal(model: TransformerBridge, corrupted_who: tuple[int, int] = (2, 3)) -> mi.Task:
    return mi.Task.from_tokens(
        model,
        clean=[[5, 6, 7, 8]],
        corrupted=[[5, 40, 6, 7, 8]],
        answers=[3],
        distractors=[4],
        roles={"who": (1, 2)},
        corrupted_roles={"who": corrupted_who},
    )


@pytest.mark.parametrize("positions", ["each", "all", 1, slice(0, 2), ["who", 0]])
def test_positions_that_do_not_correspond_are_refused(positions):
    model = model_of("gpt2")
    says = r"clean has 4 tokens but corrupted has 5.*positions=\['end', 'who'\]"
    with pytest.raises(ValueError, match=says):
        mi.activation_patching(model, unequal(model), "z", positions=positions)


def test_patterns_of_unequal_prompts_are_refused():
    model = model_of("gpt2")
    with pytest.raises(ValueError, match="pattern has keys, which roles cannot align"):
        mi.activation_patching(model, unequal(model), "pattern", positions="who")


def test_each_on_prompts_of_different_lengths_lists_the_roles():
    model = model_of("gpt2")
    rows = [[5, 6, 7, 8], [5, 6, 7]]
    task = a_task(model, n=2, clean=rows, corrupted=rows, roles={"who": (1, 2)})
    with pytest.raises(ValueError, match=r"positions=\['end', 'who'\]"):
        mi.activation_patching(model, task, "z")


def test_a_span_of_another_length_needs_align_last():
    model = model_of("gpt2")
    task = unequal(model, corrupted_who=(1, 3))
    with pytest.raises(
        ValueError, match=r"'who' is 1 tokens in clean prompt 0 but 2.*align='last'"
    ):
        mi.activation_patching(model, task, "z", positions="who")
    last = mi.activation_patching(model, task, "z", positions="who", align="last")
    exact = mi.activation_patching(model, unequal(model), "z", positions="who")
    np.testing.assert_array_equal(values(last), values(exact))


def test_nan_in_activations_is_an_error_that_names_the_place():
    model = model_of("gpt2")

    def broken(own: torch.Tensor) -> torch.Tensor:
        return own * torch.nan

    with (
        mi.HookManager(model).edit(Apply("mlp_out", broken, layers=1)),
        pytest.raises(ValueError, match="NaN or infinite"),
    ):
        mi.activation_patching(model, a_task(model), "z", positions="all")


def test_the_model_is_as_it_was_after_success_and_failure():
    model = model_of("gpt2")
    task = a_task(model)
    before = task.logits(model)
    mi.activation_patching(model, task, "pattern", positions="all")
    with pytest.raises(RuntimeError, match="on purpose"):
        mi.activation_patching(model, task, "z", metric=_fail)
    assert torch.equal(task.logits(model), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def _fail(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    raise RuntimeError("on purpose")
