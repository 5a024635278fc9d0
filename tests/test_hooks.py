"""Captures are what the model computed; edits change what they name and nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo

from mechinterp.edits import Add, Apply, Project, Replace, Scale, Zero
from mechinterp.hooks import HookManager, HookNotFiredError
from mechinterp.models import forward
from mechinterp.sites import AXES, SITES, head_axis, site_layers
from mechinterp.tasks.prompts import pad

EVERY_POSITION = [s for s in SITES if "pos" in AXES[s]]


def close(a, b, rtol=1e-5):
    """DESIGN's tolerance: against the largest logit, never per element."""
    assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "bert"])
def test_a_capture_is_what_transformer_lens_caches(name):
    model, tokens = zoo.zoo(name), zoo.tokens()
    hooks = {"resid_pre": "hook_in", "resid_post": "hook_out", "mlp_post": "mlp.hook_post"}
    hooks |= {"z": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}
    acts = HookManager(model).capture(tokens, list(hooks))
    _, cache = model.run_with_cache(tokens)
    for site, hook in hooks.items():
        for layer in range(3):
            torch.testing.assert_close(acts[site, layer], cache[f"blocks.{layer}.{hook}"])


def test_only_what_was_asked_is_stored():
    manager = HookManager(zoo.zoo("llama"))
    acts = manager.capture(zoo.tokens(), ["z", "k"], layers=[2], heads=[1], positions=[0, -1])
    assert list(acts) == [("z", 2), ("k", 2)]
    assert acts["z", 2].shape == (2, 2, 1, 8)
    assert acts["k", 2].shape == (2, 2, 1, 8)
    whole = manager.capture(zoo.tokens(), ["z", "k"], layers=2)
    assert torch.equal(acts["z", 2], whole["z", 2][:, [0, 8]][:, :, [1]])
    with pytest.raises(KeyError, match=r"\('z', 1\) was not captured"):
        acts["z", 1]


@pytest.mark.parametrize("name", ["gpt2", "mistral", "opt", "roberta", "native"])
def test_prompts_of_different_lengths_store_what_each_alone_gives(name):
    model = zoo.zoo(name)
    manager, rows = HookManager(model), [r.tolist() for r in zoo.tokens(2, 9)]
    prompts = [rows[0], rows[1][:5]]
    sites = ["resid_post", "z", "pattern"]
    both = manager.capture(prompts, sites, positions="all")
    alone = manager.capture([prompts[1]], sites)
    for layer in range(3):
        torch.testing.assert_close(
            both["resid_post", layer][1, :5], alone["resid_post", layer][0]
        )
        torch.testing.assert_close(
            both["pattern", layer][1, :, :5, :5], alone["pattern", layer][0]
        )
        assert not both["z", layer][1, 5:].any()
    assert both.mask.sum(1).tolist() == [9, 5]


def test_the_number_of_prompts_run_at_once_changes_nothing():
    manager = HookManager(zoo.zoo("llama"))
    rows = [r[: 4 + i].tolist() for i, r in enumerate(zoo.tokens(5, 9))]
    once = manager.capture(rows, ["z", "resid_mid"])
    twice = manager.capture(rows, ["z", "resid_mid"], batch_size=2)
    for key in once:
        torch.testing.assert_close(twice[key], once[key])


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "falcon", "native_attn"])
def test_the_size_is_known_before_running(name, dtype):
    model = zoo.zoo(name)
    manager = HookManager(model)
    sites = [s for s in SITES if s == "embed" or site_layers(model, s)]
    choices: list[dict[str, Any]] = [{}, {"layers": [1]}, {"positions": [0, -1]}]
    for options in choices:
        asked = [s for s in sites if s != "embed" or "layers" not in options]
        acts = manager.capture(zoo.tokens(), asked, **options, dtype=dtype)
        assert manager.estimate(zoo.tokens(), asked, **options, dtype=dtype) == acts.nbytes


@pytest.mark.parametrize("name", zoo.NAMES)
def test_an_edit_changes_what_it_selects_and_no_other_bit(name):
    model, tokens = zoo.zoo(name), zoo.tokens()
    manager = HookManager(model)
    for site in SITES:
        layer = None if site == "embed" else 1
        if layer is not None and layer not in site_layers(model, site):
            continue
        head = 0 if head_axis(site) else None
        layers: dict[str, Any] = {} if layer is None else {"layers": layer}
        before = manager.capture(tokens, site, **layers)[site, layer]
        edit = Scale(site, 0.5, positions=4, heads=head, **layers)
        with manager.edit(edit):
            after = manager.capture(tokens, site, **layers)[site, layer]
        selected = torch.zeros_like(before, dtype=torch.bool)
        if "key_pos" in AXES[site]:
            selected[:, head, 4] = True
            if site == "scores":  # a masked key stays masked
                selected &= before > torch.finfo(before.dtype).min / 2
        elif head is not None:
            selected[:, 4, head] = True
        else:
            selected[:, 4] = True
        assert torch.equal(after[~selected], before[~selected]), site
        # resid_mid is written as a change of attn_out, so it is right to rounding.
        torch.testing.assert_close(after[selected], 0.5 * before[selected])


def without_head(module, name, layer, head):
    """The plain module with one head's rows of the output projection set to zero."""
    cut = slice(8 * head, 8 * head + 8)
    if name == "gpt2":
        module.transformer.h[layer].attn.c_proj.weight.data[cut] = 0
    elif name == "bert":
        module.bert.encoder.layer[layer].attention.output.dense.weight.data[:, cut] = 0
    else:
        module.model.layers[layer].self_attn.o_proj.weight.data[:, cut] = 0
    return module


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
def test_zeroing_a_head_is_removing_its_rows_from_the_output_projection(name):
    tokens, model = zoo.tokens(), zoo.zoo(name)
    expected = without_head(zoo.hf(name), name, 1, 2)(tokens).logits.detach()
    for site in ("z", "result"):
        with HookManager(model).ablate(site, layers=1, heads=2), torch.no_grad():
            close(forward(model, tokens), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert", "opt", "native"])
def test_an_edit_between_attention_and_mlp_reaches_both_of_its_readers(name):
    """Adding to resid_mid is adding to what attention writes (after any norm in between)."""
    model, tokens = zoo.zoo(name), zoo.tokens()
    direction = torch.linspace(-1, 1, 32)
    manager = HookManager(model)
    with manager.steer("resid_mid", direction, layer=1, positions=3), torch.no_grad():
        got = forward(model, tokens)
    if name == "bert":  # its resid_mid is the output of a norm: patch that instead
        handle = model.blocks[1].ln1.register_forward_hook(
            lambda m, i, o: torch.cat([o[:, :3], o[:, 3:4] + direction, o[:, 4:]], 1)
        )
        expected = forward(model, tokens).detach()
        handle.remove()
    else:
        with manager.steer("attn_out", direction, layer=1, positions=3), torch.no_grad():
            expected = forward(model, tokens)
    close(got, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "bert", "native"])
def test_knocking_attention_out_is_renormalising_without_the_keys(name):
    model, tokens = zoo.zoo(name), zoo.tokens()
    manager = HookManager(model)
    cut = {"layers": 1, "heads": 3, "positions": 5, "key_positions": [4, 5]}
    pattern = manager.capture(tokens, "pattern", layers=1)["pattern", 1].clone()
    pattern[:, 3, 5, [4, 5]] = 0
    pattern[:, 3, 5] /= pattern[:, 3, 5].sum(-1, keepdim=True)
    with manager.edit(Replace("scores", -torch.inf, **cut)), torch.no_grad():
        got = forward(model, tokens)
    with manager.patch("pattern", pattern, layers=1), torch.no_grad():
        close(got, forward(model, tokens))


def test_leaving_a_query_no_key_is_an_error():
    manager = HookManager(zoo.zoo("llama"))
    with (
        pytest.raises(ValueError, match="no key to attend to"),
        manager.edit(Replace("scores", -torch.inf, layers=0, positions=2)),
    ):
        forward(manager.model, zoo.tokens())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "bert", "native_nonorm"])
def test_patching_a_run_with_itself_changes_nothing(name):
    model, tokens = zoo.zoo(name), zoo.tokens()
    manager = HookManager(model)
    base = forward(model, tokens).detach()
    sites = [s for s in SITES if s != "embed" and site_layers(model, s)]
    acts = manager.capture(tokens, sites)
    for site in sites:
        with manager.patch(site, acts), torch.no_grad():
            close(forward(model, tokens), base)


def test_patching_the_first_residual_stream_gives_the_other_run():
    model, (clean, other) = zoo.zoo("gemma2"), (zoo.tokens(), zoo.tokens(seed=1))
    acts = HookManager(model).capture(other, "resid_pre", layers=0)
    with HookManager(model).patch("resid_pre", acts, layers=0), torch.no_grad():
        close(forward(model, clean), forward(model, other))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_resid_mid_is_what_the_edit_says_but_for_its_last_bit(name):
    """It is written as a change of attn_out, whose rounding a later norm would enlarge."""
    model, tokens = zoo.zoo(name), zoo.tokens(8, 12)
    manager, seen = HookManager(model), []
    for layer in range(model.cfg.n_layers):
        source = manager.capture(zoo.tokens(8, 12, seed=5), "resid_mid", layers=layer)
        loud = Scale("attn_out", 30.0, layers=layer)
        for edit in (
            Zero("resid_mid", layers=layer),
            Replace("resid_mid", source, layers=layer),
        ):
            reached = model.blocks[layer].ln2.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0])
            )
            with manager.edit(loud, edit), torch.no_grad():
                forward(model, tokens)
            reached.remove()
        zeroed, placed = seen[-2:]
        assert not zeroed.any()
        wanted = source["resid_mid", layer]
        last_bit = torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        torch.testing.assert_close(placed, wanted, rtol=0, atol=last_bit)


def test_edits_run_in_the_order_of_the_data_flow_however_they_nest():
    model, tokens = zoo.zoo("llama"), zoo.tokens()
    manager, first = HookManager(model), Zero("resid_mid", layers=1)
    second = Add("attn_out", torch.ones(32), layers=1)
    with manager.edit(first), manager.edit(second):
        inner = manager.capture(tokens, ["resid_mid", "attn_out"], layers=1)
    assert inner["resid_mid", 1].abs().max() == 0
    with manager.edit(second), manager.edit(first):
        outer = manager.capture(tokens, ["resid_mid", "attn_out"], layers=1)
    for key in inner:
        torch.testing.assert_close(inner[key], outer[key])


def test_an_inner_edit_sees_what_the_outer_one_made():
    manager, tokens = HookManager(zoo.zoo("gpt2")), zoo.tokens()
    with manager.edit(Replace("z", 3.0, layers=0)), manager.edit(Scale("z", 2.0, layers=0)):
        assert (manager.capture(tokens, "z", layers=0)["z", 0] == 6).all()
    with (
        manager.edit(Zero("result", layers=0, heads=1)),
        manager.edit(Add("result", torch.ones(32), layers=0, heads=1)),
    ):
        result = manager.capture(tokens, "result", layers=0)["result", 0]
    assert (result[:, :, 1] == 1).all()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_restored_when_the_block_raises_and_foreign_hooks_stay(error):
    model, tokens = zoo.zoo("bert"), zoo.tokens()
    seen = []
    model.add_hook("blocks.0.hook_out", lambda x, hook: seen.append(x.shape))
    base = forward(model, tokens).detach()
    manager = HookManager(model)
    edits = [Zero(site, layers=1) for site in ("z", "scores", "pattern", "result", "resid_mid")]
    with pytest.raises(error), manager.edit(*edits[:1], *edits[3:]):
        forward(model, tokens)
        raise error
    assert torch.equal(forward(model, tokens), base)
    assert len(seen) == 3
    model.reset_hooks()


def test_an_error_inside_attention_does_not_leave_the_softmax_watched():
    manager, tokens = HookManager(zoo.zoo("bert")), zoo.tokens()
    base = forward(manager.model, tokens)

    def fail(own):
        raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        manager.edit(Apply("scores", fail, layers=1)),
    ):
        forward(manager.model, tokens)
    assert torch.equal(forward(manager.model, tokens), base)
    assert torch.overrides._get_current_function_mode() is None


def test_resetting_all_hooks_inside_a_block_is_survived():
    manager = HookManager(zoo.zoo("gpt2"))
    with pytest.raises(HookNotFiredError), manager.ablate("z", layers=0):
        manager.model.reset_hooks()
        forward(manager.model, zoo.tokens())
    with manager.ablate("z", layers=0):
        forward(manager.model, zoo.tokens())


def test_an_edit_that_never_ran_is_an_error():
    manager = HookManager(zoo.zoo("gpt2"))
    with (
        pytest.raises(HookNotFiredError, match="Zero of z at layer 2 never fired"),
        manager.ablate("z", layers=2),
    ):
        pass


def test_an_edit_with_nowhere_to_act_is_an_error():
    manager = HookManager(zoo.zoo("gpt2"))
    with (
        pytest.raises(HookNotFiredError, match="nowhere to act: positions=30"),
        manager.ablate("z", layers=0, positions=30),
    ):
        forward(manager.model, zoo.tokens())


def test_a_position_beyond_the_data_is_an_error_before_anything_runs():
    manager = HookManager(zoo.zoo("gpt2"))
    with (
        pytest.raises(ValueError, match="30"),
        manager.ablate("z", layers=0, positions=30, data=zoo.tokens()),
    ):
        pytest.fail("the block must not start")


def with_roles(rows, **roles):
    """Data with prompts and roles, as a Task has them."""
    return SimpleNamespace(clean=pad(rows), roles=roles)


def test_roles_lie_elsewhere_in_each_prompt():
    model = zoo.zoo("llama")
    rows = [r[: 6 + i].tolist() for i, r in enumerate(zoo.tokens(3))]
    data = with_roles(rows, subject=((1, 3), (2, 4), (5, 7)))
    manager = HookManager(model)
    before = manager.capture(data, "resid_post", layers=1)
    edit = Zero("resid_post", layers=1, positions="subject")
    with manager.edit(edit, data=data):
        after = manager.capture(data, "resid_post", layers=1, batch_size=2)
    changed = (after["resid_post", 1] != before["resid_post", 1]).any(-1)
    spans = [p.nonzero().flatten().tolist() for p in changed]
    assert spans == [[1, 2], [2, 3], [5, 6]]


def test_a_role_without_data_asks_for_the_data():
    manager = HookManager(zoo.zoo("llama"))
    with (
        pytest.raises(ValueError, match="'subject'"),
        manager.ablate("z", layers=0, positions="subject"),
    ):
        forward(manager.model, zoo.tokens())


def test_a_span_of_another_length_needs_to_be_aligned():
    manager = HookManager(zoo.zoo("llama"))
    short = with_roles([zoo.tokens(1)[0].tolist()], subject=((1, 3),))
    long = with_roles([zoo.tokens(1, seed=1)[0].tolist()], subject=((2, 5),))
    source = manager.capture(long, "resid_pre", layers=0)
    place = {"layers": 0, "positions": "subject"}
    with (
        pytest.raises(ValueError, match="align='last'"),
        manager.edit(Replace("resid_pre", source, **place), data=short),
    ):
        pytest.fail("the block must not start")
    with manager.edit(Replace("resid_pre", source, align="last", **place), data=short):
        got = manager.capture(short, "resid_pre", layers=0)["resid_pre", 0]
    assert torch.equal(got[0, 1:3], source["resid_pre", 0][0, 3:5])


def test_positions_from_the_end_are_each_prompts_own_when_padded():
    model = zoo.zoo("mistral")
    rows = [r[: 5 + 2 * i].tolist() for i, r in enumerate(zoo.tokens(2))]
    prompts, manager = pad(rows), HookManager(model)
    with manager.ablate("z", layers=1, positions=-1), torch.no_grad():
        both = forward(model, prompts.tokens, prompts.mask)
        for row, ids in enumerate(rows):
            alone = forward(model, torch.tensor([ids]))
            close(both[row, : len(ids)], alone[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2", "neox"])
@pytest.mark.parametrize("positions", ["all", 2, -1, slice(4, None), 7])
def test_generating_with_the_cache_edits_the_same_positions_as_without(name, positions):
    """Positions are absolute, and a slice or "all" goes on into the generated tokens."""
    model = zoo.zoo(name)
    tokens, manager = zoo.tokens(2, 6), HookManager(model)
    options = {"do_sample": False, "max_new_tokens": 4, "verbose": False, "stop_at_eos": False}
    edit = Add(
        "resid_mid" if name != "neox" else "attn_out",
        torch.ones(32),
        layers=1,
        scale=3.0,
        positions=positions,
    )
    with manager.edit(edit):
        cached = model.generate(tokens, **options)
    whole = tokens
    for _ in range(4):  # a plain loop over full runs, the positions worked out by hand
        own = range(whole.shape[1])
        chosen = (
            [5]
            if positions == -1
            else own
            if positions == "all"
            else (
                list(own)[positions]
                if isinstance(positions, slice)
                else [p for p in own if p == positions]
            )
        )
        if chosen:
            with (
                manager.edit(
                    Add(edit.site, edit.direction, layers=1, scale=3.0, positions=list(chosen))
                ),
                torch.no_grad(),
            ):
                logits = forward(model, whole)
        else:
            with torch.no_grad():
                logits = forward(model, whole)
        whole = torch.cat([whole, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert isinstance(cached, torch.Tensor) and torch.equal(cached, whole)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "neox", "native", "bert"])
def test_gradients_are_those_of_a_small_change(name):
    model = zoo.zoo(name, torch.float64)
    manager, tokens = HookManager(model), zoo.tokens(2, 6)
    logit = lambda logits, targets: logits[:, 5]  # noqa: E731
    for site in SITES:
        if site != "embed" and 1 not in site_layers(model, site):
            continue
        layers: dict[str, Any] = {} if site == "embed" else {"layers": 1}
        acts = manager.capture(tokens, site, gradient_of=logit, **layers)
        (key,) = acts
        gradient, value = acts.gradients[key], acts[key]
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        # Softmaxes work in float32 whatever the weights', so not tinier; OPT's ReLU has kinks.
        step = (1e-4 if name == "opt" else 1e-3) * torch.where(
            value > -1e9, noise.double(), 0.0
        )
        outs = []
        for sign in (1, -1):
            with manager.patch(site, value + sign * step, **layers), torch.no_grad():
                outs.append(forward(model, tokens)[:, -1, 5].sum())
        measured = (outs[0] - outs[1]) / 2
        torch.testing.assert_close((gradient * step).sum(), measured, rtol=2e-3, atol=1e-7)


def test_gradients_need_neither_weights_that_require_them_nor_leave_any():
    model = zoo.zoo("llama")
    model.original_model.requires_grad_(False)
    acts = HookManager(model).capture(
        zoo.tokens(), "z", gradient_of=lambda logits, _: logits.logsumexp(-1)
    )
    assert all(g.abs().sum() > 0 for g in acts.gradients.values())
    assert all(p.grad is None for p in model.parameters())


def test_means_stream_over_the_data_and_padding_does_not_count():
    model = zoo.zoo("llama")
    manager = HookManager(model)
    rows = [r[: 4 + i].tolist() for i, r in enumerate(zoo.tokens(5))]
    acts = manager.capture(rows, "z", layers=1)
    flat = torch.cat([acts["z", 1][i, :n] for i, n in enumerate(acts.lengths)])
    mean = manager.mean(rows, "z", layers=1, batch_size=2)
    torch.testing.assert_close(mean["z", 1][0, 0], flat.mean(0))
    torch.testing.assert_close(acts.mean("z", 1), flat.mean(0))
    each = manager.mean(rows, "z", layers=1, per_position=True, batch_size=2)
    torch.testing.assert_close(each["z", 1][0, 6], acts["z", 1][3:, 6].mean(0))


@pytest.mark.parametrize("kind", ["mean", "position_mean", "resample"])
def test_ablations_put_there_what_they_say(kind):
    model, tokens, data = zoo.zoo("gemma2"), zoo.tokens(2, 5), zoo.tokens(7, 9, seed=3)
    manager = HookManager(model)
    donors = manager.capture(data, "z", layers=1)["z", 1]
    with manager.ablate("z", kind=kind, layers=1, heads=[0, 2], mean_data=data):
        got = manager.capture(tokens, "z", layers=1)["z", 1]
    before = manager.capture(tokens, "z", layers=1)["z", 1]
    assert torch.equal(got[:, :, [1, 3]], before[:, :, [1, 3]])
    got = got[:, :, [0, 2]]
    if kind == "mean":
        torch.testing.assert_close(got, donors.mean((0, 1))[[0, 2]].expand_as(got))
    elif kind == "position_mean":
        torch.testing.assert_close(got, donors.mean(0)[:5, [0, 2]].expand_as(got))
    else:
        for row in got:
            assert any(torch.equal(row, donor[:5, [0, 2]]) for donor in donors)


def test_ablating_with_data_needs_the_data():
    with pytest.raises(ValueError, match="mean_data="):
        HookManager(zoo.zoo("gpt2")).ablate("z", kind="mean", layers=0)
    with pytest.raises(ValueError, match="Leave mean_data out"):
        HookManager(zoo.zoo("gpt2")).ablate("z", layers=0, mean_data=zoo.tokens())
    with pytest.raises(ValueError, match="is no ablation"):
        HookManager(zoo.zoo("gpt2")).ablate("z", kind="median", layers=0)


def test_projecting_takes_a_direction_out():
    manager, direction = HookManager(zoo.zoo("phi")), torch.linspace(-1, 2, 32)
    with manager.edit(Project("resid_post", direction, layers=1)):
        left = manager.capture(zoo.tokens(), "resid_post", layers=1)["resid_post", 1]
    assert (left @ direction).abs().max() < 1e-4


def test_neurons_are_edited_one_by_one():
    manager = HookManager(zoo.zoo("qwen2"))
    before = manager.capture(zoo.tokens(), "mlp_post", layers=1)["mlp_post", 1]
    with manager.edit(Zero("mlp_post", layers=1, neurons=[3, -1])):
        after = manager.capture(zoo.tokens(), "mlp_post", layers=1)["mlp_post", 1]
    changed = (after != before).any(0).any(0).nonzero().flatten().tolist()
    assert changed == [3, 63]
    with (
        pytest.raises(
            ValueError, match=r"neuron 64 does not exist: layer 1 has neurons 0\.\.63"
        ),
        manager.edit(Zero("mlp_post", layers=1, neurons=64)),
    ):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Zero("resid_pre", heads=1), "has no head axis"),
        (lambda: Zero("z", neurons=1), "neurons are at mlp_post"),
        (lambda: Zero("z", key_positions=1), "no key positions"),
        (lambda: Zero("zz"), "unknown site 'zz'"),
        (lambda: Project("z", torch.zeros(8)), "not zero"),
    ],
)
def test_an_impossible_edit_says_so_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_direction_of_the_wrong_size_says_what_fits():
    manager = HookManager(zoo.zoo("gpt2"))
    with (
        pytest.raises(ValueError, match=r"shape \[7\] does not fit z"),
        manager.steer("z", torch.ones(7), layer=0),
    ):
        forward(manager.model, zoo.tokens())


def test_a_source_that_lacks_the_layer_is_an_error_before_anything_runs():
    manager = HookManager(zoo.zoo("gpt2"))
    source = manager.capture(zoo.tokens(), "z", layers=0)
    with pytest.raises(ValueError, match="lacks it"), manager.patch("z", source, layers=1):
        pytest.fail("the block must not start")


def test_damaged_weights_are_noticed():
    model = zoo.zoo("gpt2")
    model.blocks[1].mlp.out.original_component.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="mlp_out at layer 1 is NaN or infinite on prompt 0"):
        HookManager(model).capture(zoo.tokens(), "mlp_out")


def test_nothing_asked_for_is_an_error():
    manager = HookManager(zoo.zoo("gpt2"))
    with pytest.raises(ValueError, match="no sites"):
        manager.capture(zoo.tokens(), [])
    with pytest.raises(ValueError, match="no edits"), manager.edit():
        pass


def test_capturing_and_averaging_compute_no_logits(monkeypatch):
    """With a vocabulary of 256,000 they would be larger than all the rest."""
    model = zoo.zoo("gpt2")
    unembed = model.unembed.original_component
    monkeypatch.setattr(unembed, "forward", lambda *_: pytest.fail("logits were computed"))
    manager = HookManager(model)
    for site in ("embed", "pattern", "resid_post"):
        manager.capture(zoo.tokens(2, 5), site)
        manager.mean(zoo.tokens(2, 5), site)
    with pytest.raises(pytest.fail.Exception, match="logits were"):
        manager.capture(zoo.tokens(2, 5), "z", gradient_of=lambda logits, _: logits.sum(-1))
