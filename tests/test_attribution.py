"""Attribution patching: exact where models are linear, elsewhere plain loops of autograd."""

from functools import cache
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native
from zoo import D_VOCAB, N_CTX, tokens, zoo

import mechinterp as mi
from mechinterp.causal.softmax_change import change_of_each_key, change_of_keys
from mechinterp.edits import Add, Replace, Scale
from mechinterp.metrics import Targets, logit_diff
from mechinterp.sites import head_axis

matplotlib.use("agg")
model_of = cache(zoo)
ALL = {
    "atp": {"method": "atp"},
    "atp*": {"method": "atp*", "grad_drop": False},
    "dropped": {"method": "atp*"},
    "inputs": {"method": "ig", "steps": 2},
    "activations": {"method": "ig", "steps": 2, "interpolate": "activations"},
}
SIGNED = [name for name in ALL if name != "dropped"]


def a_task(model: TransformerBridge, *, length: int = 6, n: int = 3, **fields: Any) -> mi.Task:
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


def scores(model: TransformerBridge, task: mi.Task, site: str, how: str = "atp", **asked: Any):
    return mi.attribution_patching(model, task, site, **(ALL[how] | asked)).effect


def exact(model: TransformerBridge, task: mi.Task, site: str, **asked: Any):
    return mi.activation_patching(model, task, site, **asked).effect


def native(n_layers: int, *, frozen: bool = False) -> TransformerBridge:
    """Attention only, no norms; with frozen patterns (no queries, no keys) it is linear."""
    fields = {"d_model": 32, "n_ctx": N_CTX, "d_head": 8, "n_heads": 4, "d_vocab": D_VOCAB}
    fields |= {"n_layers": n_layers, "attn_only": True, "normalization_type": None, "seed": 1}
    bridge = boot_native(fields | {"initializer_range": 0.3}, dtype=torch.float64)
    model = mi.load_model(bridge)
    if frozen:
        with torch.no_grad():
            for block in model.blocks:
                for part in (block.attn.q, block.attn.k):
                    for parameter in part.parameters():
                        parameter.zero_()
    return model


# ---------------------------------------------------------------------------- where it is exact

LINEAR = ["embed", "resid_pre", "resid_post", "attn_out", "v", "z", "result"]


@pytest.mark.parametrize("site", LINEAR)
def test_on_a_linear_model_every_method_is_exact(site):
    model = native(2, frozen=True)
    task = a_task(model)
    for where in ({}, {"positions": ["middle", "end"], "direction": "noising"}):
        truth = exact(model, task, site, **where)
        assert np.abs(truth.values).max() > 0.01
        for how in SIGNED:
            gap = scores(model, task, site, how, **where) - truth
            assert gap.dims == truth.dims and np.abs(gap.values).max() < 1e-9, how


@pytest.mark.parametrize("site", ["q", "k", "scores"])
@pytest.mark.parametrize("positions", ["each", ["middle", "end"], "all"])
def test_atp_star_is_exact_where_the_model_is_linear_behind_the_pattern(site, positions):
    model = native(1)
    task = a_task(model)
    truth = exact(model, task, site, positions=positions)
    assert np.abs(truth.values).max() > 0.01
    star = scores(model, task, site, "atp*", positions=positions)
    np.testing.assert_allclose(star.values, truth.values, atol=1e-9)
    plain = scores(model, task, site, positions=positions)
    assert np.abs((plain - truth).values).max() > 1e-3  # which atp is not


numbers = st.floats(-300, 300, width=32)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(numbers, min_size=10, max_size=10),
    st.integers(1, 5),
    st.sampled_from([0.01, 1.0, 3e3]),
)
def test_the_closed_form_of_one_key_is_the_softmax_taken_again(values, n, scale):
    own, other = torch.tensor(values, dtype=torch.float64).reshape(2, 1, 1, 1, 5) * scale
    low = torch.finfo(torch.float64).min
    masked = torch.arange(5) >= n
    own, other = own.masked_fill(masked, low), other.masked_fill(masked, low)
    gradient = torch.linspace(-1, 2, 5, dtype=torch.float64).expand(1, 1, 1, 5)
    found = change_of_each_key(own, other, gradient)
    keys = torch.eye(5, dtype=torch.bool)
    plain = [change_of_keys(own, other, gradient, keys[[j]]) for j in range(5)]
    torch.testing.assert_close(found, torch.stack(plain, -1), atol=1e-12, rtol=1e-9)
    assert bool((found[..., n:] == 0).all())


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_integrated_over_inputs_the_embedding_accounts_for_the_whole_gap(name, direction):
    model = zoo(name, torch.float64)
    task = a_task(model)
    found, rough = (
        mi.attribution_patching(
            model, task, "embed", method="ig", steps=steps, direction=direction
        )
        for steps in (24, 6)
    )
    gap = (found.data["clean"] - found.data["corrupted"]).values
    gap = gap if direction == "denoising" else -gap
    off = np.abs(found.effect.sum("position").values - gap)
    assert off.max() < 0.02 * np.abs(gap).max()
    assert off.max() < np.abs(rough.effect.sum("position").values - gap).max() / 4


@pytest.mark.parametrize(
    ("site", "positions"), [("resid_pre", "each"), ("z", ["middle", "end"]), ("k", "each")]
)
def test_integrated_over_activations_a_layer_accounts_for_patching_all_of_it(site, positions):
    model = zoo("llama", torch.float64)
    task = a_task(model)
    where = {"layers": [0, 2], "positions": positions}
    found = scores(model, task, site, "activations", steps=24, **where)
    source = mi.HookManager(model).capture(task.clean, site)
    all_of_it = "all" if positions == "each" else positions
    cells = [
        mi.Cell(Replace(site, source, layers=layer, positions=all_of_it)) for layer in (0, 2)
    ]
    nothing = mi.Cell(Scale("embed", 1.0))
    patched = mi.cell_metrics(model, task, [nothing, *cells], on="corrupted").numpy()
    truth = (patched[1:] - patched[0])[:, :, 0].T
    summed = found.sum([dim for dim in found.dims if dim not in ("prompt", "layer")])
    np.testing.assert_allclose(summed.values, truth, atol=0.01 * np.abs(truth).max())


# --------------------------------------------------------------------------------- plain loops


ADDED = {"gemma2": ("ln1_post.hook_out", "ln2_post.hook_out")}


def one_by_one(model: TransformerBridge, task: mi.Task, hook: str, layer: int, cuts: Any = ()):
    """``(clean - corrupted) * gradient``, a prompt at a time, one layer's output cut off."""
    kept: dict[str, torch.Tensor] = {}
    name = f"blocks.{layer}.{hook}"

    def see(own, hook):
        kept["here"] = own
        return own  # what a hook is given may be a view that the model does not go on with

    def detach(own, hook):
        return own.detach()

    out = []
    for prompt in range(len(task)):
        clean, corrupted = (rows.tokens[[prompt]] for rows in (task.clean, task.corrupted))  # type: ignore[union-attr]
        model.run_with_hooks(clean, fwd_hooks=[(name, see)])
        source = kept["here"].detach()
        cut: list[Any] = [(name, detach) for name in cuts]
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, see), *cut])
        value = logit_diff(logits[:, -1], task[[prompt]].targets())
        (gradient,) = torch.autograd.grad(value.sum(), kept["here"])
        out.append(((source - kept["here"].detach()) * gradient).sum(-1)[0])
    return torch.stack(out).numpy()


@pytest.mark.parametrize(
    ("name", "site", "hook"),
    [
        ("gpt2", "z", "attn.hook_z"),
        ("llama", "k", "attn.hook_k"),
        ("gemma2", "attn_out", "ln1_post.hook_out"),
        ("neox", "mlp_out", "mlp.hook_out"),
        ("llama", "pattern", "attn.hook_pattern"),
        ("bert", "resid_pre", "hook_in"),
    ],
)
def test_atp_equals_a_plain_loop_over_prompts(name, site, hook):
    model = model_of(name)
    task = a_task(model)
    order = ("prompt", "layer", head_axis(site), "position")
    if site != "pattern":
        order = (*order[:2], "position", order[2])
    ours = scores(model, task, site, batch_size=2)
    ours = ours.transpose(*[axis for axis in order if axis]).values
    for layer in range(3):
        np.testing.assert_allclose(
            ours[:, layer], one_by_one(model, task, hook, layer), atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
def test_dropping_layers_equals_cutting_them_off_one_by_one(name):
    model = model_of(name)
    task = a_task(model)
    dropped = mi.attribution_patching(model, task, "z", method="atp*")
    stream = mi.attribution_patching(model, task, "resid_pre", method="atp*")
    assert not dropped.signed and float(dropped.effect.min()) >= 0
    added = ADDED.get(name, ("attn.hook_out", "mlp.hook_out"))
    for layer in range(3):
        for found, hook in ((dropped, "attn.hook_z"), (stream, "hook_in")):
            others = [n for n in range(3) if found is stream or n != layer]
            each = [
                one_by_one(model, task, hook, layer, [f"blocks.{n}.{part}" for part in added])
                for n in others
            ]
            ours = found.effect.isel(layer=layer)
            if found is dropped:
                ours = ours.transpose("prompt", "position", "head")
            truth = np.abs(each).mean(0)
            np.testing.assert_allclose(ours.values, truth, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "falcon", "bert"])
def test_queries_and_keys_equal_patching_them_and_reading_the_pattern(name):
    model = zoo(name, torch.float64)
    task = a_task(model, n=2)
    manager = mi.HookManager(model)
    clean = manager.capture(task.clean, ["q", "k"])
    swapped = a_task(model, n=2, clean=task.corrupted, corrupted=task.clean)
    base = manager.capture(swapped, "pattern", gradient_of="logit_diff")
    for site, spot in (("q", 3), ("k", 1), ("k", "middle")):
        ours = scores(model, task, site, "atp*", positions=[spot], layers=1)
        heads = ours.sizes[head_axis(site) or ""]
        for head in range(heads):
            edit = Replace(site, clean, layers=1, heads=head, positions=spot)
            with manager.edit(edit, data=swapped):
                moved = manager.capture(swapped, "pattern")["pattern", 1] - base["pattern", 1]
            truth = (moved * base.gradients["pattern", 1]).sum((1, 2, 3))
            found = ours.isel(layer=0, position=0).values[:, head]
            # Some families take the softmax in float32 whatever the model's dtype.
            np.testing.assert_allclose(found, truth.numpy(), atol=1e-7)


# ---------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("how", ALL)
def test_the_number_of_prompts_run_at_once_changes_nothing(how):
    model = zoo("llama", torch.float64)
    task = a_task(model, n=5)
    site = "k" if "atp" in how or how == "dropped" else "z"
    whole = scores(model, task, site, how, batch_size=5, positions=["middle", "end"])
    some = scores(model, task, site, how, batch_size=2, positions=["middle", "end"])
    np.testing.assert_allclose(some.values, whole.values, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "how"),
    [("gpt2", "atp"), *(("gemma3", how) for how in ALL), ("bert", "atp*"), ("bert", "inputs")],
)
def test_padded_equals_unpadded(name, how):
    model = zoo(name, torch.float64)
    lengths = (5, 9, 7)
    rows = {s: [tokens(1, n, seed=s + n)[0].tolist() for n in lengths] for s in (1, 2)}
    roles = {"who": [(1, 2), (4, 6), (2, 4)]}
    wholes = a_task(model, clean=rows[1], corrupted=rows[2], roles=roles)
    where = {"positions": ["who", "end"], "layers": [0, 2]}
    for site in ("q", "k"):
        together = scores(model, wholes, site, how, **where).values
        for i in (0, 2):
            alone = scores(model, wholes[[i]], site, how, **where).values
            np.testing.assert_allclose(together[i], alone[0], atol=1e-6)


def test_prompts_of_unequal_lengths_are_paired_by_role():
    model = zoo("llama", torch.float64)
    fields: dict[str, Any] = {"answers": [3], "distractors": [4]}
    task = mi.Task.from_tokens(
        model,
        clean=[[5, 6, 7, 8, 9]],
        corrupted=[[5, 40, 41, 7, 8, 9]],
        roles={"who": (1, 2)},
        corrupted_roles={"who": (2, 3)},
        **fields,
    )
    where = {"positions": ["who", "end"], "layers": 1}
    base = mi.Task.from_tokens(model, clean=[[5, 40, 41, 7, 8, 9]], **fields)
    manager = mi.HookManager(model)
    clean = manager.capture(task.clean, "z")["z", 1]
    corrupted = manager.capture(base, "z", gradient_of="logit_diff")
    for n, (own, theirs) in enumerate([(2, 1), (5, 4)]):
        moved = clean[:, theirs] - corrupted["z", 1][:, own]
        truth = (moved * corrupted.gradients["z", 1][:, own]).sum(-1)
        found = scores(model, task, "z", **where).isel(layer=0, position=n).values
        np.testing.assert_allclose(found, truth.numpy(), atol=1e-10)
    for how in ("dropped", "activations"):
        for site in ("z", "q", "k"):
            assert np.isfinite(scores(model, task, site, how, **where).values).all()
    with pytest.raises(ValueError, match=r"6 and 5 tokens.*interpolate='activations'"):
        scores(model, task, "z", "inputs", **where)


def test_edits_in_force_and_corruption_by_edits_are_part_of_the_runs():
    model = native(2, frozen=True)
    noise = Add("embed", torch.randn(32, generator=torch.Generator().manual_seed(0)))
    for corruption in (noise, Scale("z", 0.5, positions="end")):
        task = a_task(model, corrupted=None, corruption=(corruption,))
        with mi.HookManager(model).edit(Scale("z", 2.0, layers=0, positions=3), data=task):
            truth = exact(model, task, "resid_post", positions=["middle", "end"])
            for how in ("atp", "atp*", "activations"):
                found = scores(
                    model, task, "resid_post", how, positions=["middle", "end"], batch_size=2
                )
                np.testing.assert_allclose(found.values, truth.values, atol=1e-9)
        assert np.abs(truth.values).max() > 1e-3
    with pytest.raises(ValueError, match="differ by an edit of z, not in their inputs"):
        scores(model, task, "resid_post", "inputs")


def test_several_metrics_have_their_own_axis_and_baselines():
    model = model_of("gpt2")
    task = a_task(model)
    both = mi.attribution_patching(model, task, "z", metric={"a": "prob", "b": "kl"})
    one = mi.attribution_patching(model, task, "z", metric="kl")
    true = mi.activation_patching(model, task, "z", metric={"a": "prob", "b": "kl"})
    assert both.effect.dims == true.effect.dims
    np.testing.assert_array_equal(both.effect.sel(metric="b").values, one.effect.values)
    for run in ("clean", "corrupted"):
        np.testing.assert_allclose(both.data[run], true.data[run], atol=1e-6)


def test_a_result_says_how_it_was_made_draws_itself_and_survives_a_file(tmp_path):
    model = model_of("llama")
    task = a_task(model)
    found = mi.attribution_patching(
        model, task, "k", method="ig", steps=3, direction="noising", positions=["first", -1]
    )
    made = found.convention
    assert (made.method, made.site, made.direction) == ("attribution_patching", "k", "noising")
    told = {"variant": "ig", "steps": 3, "interpolate": "inputs", "rule": "midpoint"}
    assert told.items() <= made.settings.items() and found.signed
    assert mi.load_result(found.save(tmp_path / "k.nc")).equals(found)
    assert found.data["position"].values.tolist() == ["first", "-1"]
    assert len(found.top(4)) == 4
    star = mi.attribution_patching(model, task, "q", method="atp*")
    assert star.convention.settings["grad_drop"] and not star.signed
    assert "expanded_at" in star.convention.settings
    ax = star.plot()
    mesh: Any = ax.collections[0]
    assert mesh.get_clim()[0] == 0 and "sizes, 0 or more" in ax.texts[0].get_text()
    label = ax.figure.axes[-1].get_ylabel()
    assert label == "size of the effect on logit_diff by atp* (nats of log-odds)"
    line = mi.attribution_patching(model, task, "resid_pre", positions="all").plot()
    assert line.get_title(loc="left").startswith("resid_pre · denoising")
    each = mi.attribution_patching(model, task, "resid_pre", positions="each")
    part = each.plot(start=1, stop=3)
    assert len(part.get_xticklabels()) == 2 < each.data.sizes["position"]
    with pytest.raises(ValueError, match="no position lies between start=40"):
        each.plot(start=40)


@pytest.mark.parametrize("how", ALL)
def test_the_model_is_as_it_was_after_success_and_failure(how):
    model = zoo("llama")  # has no dropout
    task = a_task(model)
    model.train()
    frozen = next(model.original_model.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.clone()) for p in model.original_model.parameters()]
    logits = task.logits(model)
    with torch.inference_mode():
        inside = scores(model, task, "q", how)
    np.testing.assert_allclose(scores(model, task, "q", how).values, inside.values, atol=1e-6)
    with pytest.raises(RuntimeError, match="on purpose"):
        scores(model, task, "q", how, metric=_fails_on_the_model())
    assert torch.equal(task.logits(model), logits) and not frozen.requires_grad
    assert model.training and all(m.training for m in model.original_model.modules())
    for parameter, (required, value) in zip(
        model.original_model.parameters(), before, strict=True
    ):
        assert parameter.grad is None and parameter.requires_grad == required
        assert torch.equal(parameter, value)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    assert not any("forward" in block.__dict__ for block in model.blocks)


def _fails_on_the_model():
    """A metric that works on the two trials before the run, and no more."""
    calls = []

    def metric(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("on purpose")
        return logits[:, 0]

    return metric


# ----------------------------------------------------------------------------------- bad input


def _mixed(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    return logits[:, 0] - logits[:, 0].mean()


def _cut_off(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    return logits.detach()[:, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"site": None}, "needs to know where they are. Pass a site, 'z'"),
        ({"site": "resid_prew"}, "unknown site 'resid_prew'"),
        ({"method": "atp**"}, "unknown method 'atp\\*\\*'"),
        ({"interpolate": "input"}, "unknown interpolate 'input'. Did you mean 'inputs'"),
        ({"steps": 0}, "steps=0 runs nothing"),
        ({"batch_size": 0}, "batch_size=0 runs nothing"),
        ({"steps": 9}, r"'atp' has no steps=9: it would change nothing.*method='ig'"),
        (
            {"method": "atp*", "interpolate": "activations"},
            r"'atp\*' has no interpolate='activations'",
        ),
        ({"method": "eap", "site": None, "steps": 2}, r"'eap' has no steps=2.*method='eap-ig'"),
        ({"method": "ig", "grad_drop": False}, r"'ig' has no grad_drop=False.*method='atp\*'"),
        ({"direction": "denoise"}, "unknown direction"),
        ({"positions": "midle"}, "unknown role 'midle'"),
        ({"heads": 4}, r"head \(0, 4\) does not exist"),
        ({"metric": "accuracy"}, "metric 'accuracy' has no gradient"),
        ({"metric": _cut_off}, "metric '_cut_off' has no gradient.*detaches them"),
        ({"metric": _mixed}, "'_mixed' looks at several prompts together"),
        ({"metric": "kl", "direction": "noising"}, "kl.*is at its minimum"),
        (
            {"method": "ig", "interpolate": "activations", "positions": ["middle", "all"]},
            None,
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(arguments, says, monkeypatch):
    model = model_of("llama")
    task = a_task(model)
    if says is None:  # overlapping steps of the same pairing are fine
        assert mi.attribution_patching(model, task, **({"site": "z"} | arguments))
        return
    monkeypatch.setattr(model.original_model, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError, match=says):
        mi.attribution_patching(model, task, **({"site": "z"} | arguments))


def test_missing_sites_runs_layers_and_gradients_are_refused():
    model = model_of("neox")
    with pytest.raises(mi.MissingSiteError, match="in parallel"):
        scores(model, a_task(model), "resid_mid")
    with pytest.raises(ValueError, match="has no corrupted run"):
        scores(model, a_task(model, corrupted=None), "z")
    with pytest.raises(TypeError, match="attribution_patching takes a Task"):
        mi.attribution_patching(model, "a prompt", "z")
    with pytest.raises(ValueError, match="'_flat' is zero on every prompt"):
        scores(model, a_task(model), "z", metric=_flat)
    alone = native(1)
    with pytest.raises(ValueError, match=r"a single layer.*grad_drop=False"):
        scores(alone, a_task(alone), "z", "dropped")
    with (
        mi.HookManager(model).edit(Scale("pattern", 0.5)),
        pytest.raises(ValueError, match="not the softmax of its scores"),
    ):
        scores(model, a_task(model), "k", "atp*")


def _flat(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    return (logits[:, 0] * 1e-9).clamp(min=1.0)
