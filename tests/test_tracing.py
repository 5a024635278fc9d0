"""Causal tracing: noise on the subject, windows of restored layers, loops as oracles."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from zoo import hf, tokens, zoo

import mechinterp as mi
from mechinterp.edits import Noise, Replace
from mechinterp.engine.runs import run_of, runs_of
from mechinterp.hooks import HookManager
from mechinterp.metrics import prob
from mechinterp.stats import bootstrap_interval

model_of = cache(zoo)
LENGTHS, SPANS = (8, 6, 7), [(1, 3), (2, 3), (1, 4)]


def facts(model: TransformerBridge, **fields: Any) -> mi.Task:
    """Prompts of three lengths with a subject in each."""
    rows = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
    last = [(stop - 1, stop) for _, stop in SPANS]
    return mi.Task.from_tokens(
        model,
        **{
            "clean": rows,
            "answers": [5, 6, 7],
            "roles": {"subject": SPANS, "subject_last": last},
            "templates": ("a", "b", "a"),
        }
        | fields,
    )


def noised(model: TransformerBridge, samples: int = 2, **fields: Any) -> mi.Task:
    return mi.noise_corruption(model, facts(model, **fields), samples=samples, seed=3)


# -------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert"])
def test_the_noise_is_three_standard_deviations_of_the_subjects_embeddings(name):
    model = model_of(name)
    task = mi.noise_corruption(model, facts(model))
    weight = hf(name).get_input_embeddings()
    subjects = torch.cat(
        [row[a:b] for row, (a, b) in zip(facts(model).clean.tokens, SPANS, strict=True)]
    )
    with torch.no_grad():
        std = float(weight(subjects).double().std())
    (noise,) = task.corruption
    assert noise == Noise("embed", noise.scale, seed=0, positions="subject")
    assert noise.scale == pytest.approx(3 * std, rel=1e-6)
    told = task.info["noise"]
    assert told["std"] == pytest.approx(std, rel=1e-6) and told["scale"] == noise.scale
    assert (told["multiple"], told["samples"], told["seed"]) == (3.0, 10, 0)


def test_every_prompt_comes_once_per_sample_with_its_own_noise_and_says_whose_draw_it_is():
    model = model_of("gpt2")
    task = noised(model, samples=4)
    assert len(task) == 12 and task.cases == (0, 1, 2) * 4
    assert task.templates == ("a", "b", "a") * 4
    assert task.clean.rows == facts(model).clean.rows * 4
    assert task.metric == "prob" and "12 draws of 3 prompts" in repr(task)
    answers = run_of(task, "corrupted").answers(HookManager(model))
    assert len({tuple(row) for row in answers[::3].tolist()}) == 4
    clean = run_of(task, "clean").answers(HookManager(model))
    torch.testing.assert_close(clean[:3], clean[9:], atol=1e-5, rtol=0)


def test_more_samples_begin_with_the_same_draws():
    model = model_of("gpt2")
    few, many = (
        run_of(noised(model, samples=n), "corrupted").answers(HookManager(model))
        for n in (1, 3)
    )
    torch.testing.assert_close(many[:3], few, atol=1e-5, rtol=0)


def test_corrupted_prompts_that_a_task_had_are_dropped():
    model = model_of("gpt2")
    task = noised(model, corrupted=[tokens(1, n, seed=9)[0].tolist() for n in LENGTHS])
    assert task.corrupted is None and task.corrupted_roles is None
    assert len(runs_of(task)) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"role": "subjekt"}, "unknown role 'subjekt'. Did you mean 'subject'"),
        ({"samples": 0}, "samples=0 draws no noise"),
        ({"multiple": -3.0}, "multiple=-3.0 adds no noise"),
        ({"multiple": float("nan")}, "multiple=nan adds no noise"),
    ],
)
def test_bad_recipes_are_refused_before_anything_runs(arguments, says, monkeypatch):
    model = model_of("llama")
    task = facts(model)
    monkeypatch.setattr(model.original_model, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError, match=says):
        mi.noise_corruption(model, task, **arguments)


def test_other_data_is_refused_and_a_task_without_corruption_is_told_of_noise():
    model = model_of("gpt2")
    with pytest.raises(TypeError, match="noise_corruption takes a Task as"):
        mi.noise_corruption(model, "a prompt")  # pyright: ignore
    with pytest.raises(ValueError, match=r"mi\.noise_corruption"):
        mi.activation_patching(model, facts(model), "mlp_out", positions="subject")


# ---------------------------------------------------------------------------------- the oracle

# Where Hugging Face's own modules have a block, its MLP and its attention.
PARTS = {
    "gpt2": ("transformer.h", {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attn"}),
    "llama": ("model.layers", {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".self_attn"}),
    "neox": (
        "gpt_neox.layers",
        {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attention"},
    ),
}


def rome(
    name: str, task: mi.Task, site: str, spans: list[tuple[int, int]], window: int
) -> np.ndarray:
    """Trace as ROME's script does, on the Hugging Face module: ``[prompt, layer]``."""
    module, (stack, parts) = hf(name), PARTS[name]
    blocks = list(module.get_submodule(stack).children())
    (noise,) = task.corruption
    n_layers, found = len(blocks), []
    for prompt, row in enumerate(task.clean.rows):
        ids = torch.tensor([row, row])  # the second is noised, the first is clean
        start, stop = task.roles["subject"][prompt]

        def corrupt(own, args, out, prompt=prompt, start=start, stop=stop):
            out = out.clone()
            for position in range(start, stop):
                at = torch.tensor([position])
                rows = mi.edits.Selected(None, torch.tensor([prompt]), at, at, None)
                drawn = noise.draws(rows, out.shape[-1])[0]
                out[1, position] += noise.scale * torch.from_numpy(drawn).float()
            return out

        def restore(own, args, out, prompt=prompt):
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            a, b = spans[prompt]
            hidden[1, a:b] = hidden[0, a:b]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        values = []
        for layer in range(n_layers):
            layers = range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))
            handles = [module.get_input_embeddings().register_forward_hook(corrupt)]
            for each in layers:
                part = module.get_submodule(f"{stack}.{each}{parts[site]}")
                handles.append(part.register_forward_hook(restore))
            with torch.no_grad():
                logits = module(ids).logits[1:, -1]
            for handle in handles:
                handle.remove()
            values.append(float(prob(logits, task[[prompt]].targets())))
        found.append(values)
    return np.array(found)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("site", "window"), [("resid_post", 1), ("mlp_out", 2), ("attn_out", 3)]
)
def test_tracing_equals_a_loop_over_the_hugging_face_module(name, site, window):
    model = model_of(name)
    task = noised(model)
    result = mi.activation_patching(
        model, task, site, positions=["subject_last", "end"], window=window
    )
    for position in ("subject_last", "end"):
        at = list(task.roles[position])
        mine = result.data["patched"].sel(position=position).transpose("prompt", "layer")
        np.testing.assert_allclose(
            mine.values, rome(name, task, site, at, window), atol=2e-6, rtol=1e-4
        )
    gap = result.data["clean"] - result.data["corrupted"]
    assert np.abs(gap.values).max() > 1e-3 and np.abs(result.effect.values).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "native", "bert"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@torch.no_grad()
def test_a_window_is_its_layers_patched_together_in_plain_runs(name, direction):
    model = model_of(name)
    task = noised(model)
    base, other = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
    result = mi.activation_patching(
        model, task, "mlp_out", direction=direction, positions=["subject"], window=2
    )
    reference = mi.activation_patching(
        model,
        task,
        "mlp_out",
        direction=direction,
        positions=["subject"],
        window=2,
        method="reference",
    )
    manager = HookManager(model)
    with run_of(task, other).in_force(manager):
        source = manager.capture(run_of(task, other), "mlp_out")
    for layer, layers in enumerate([[0], [0, 1], [1, 2]]):
        edit = Replace("mlp_out", source, layers=layers, positions="subject")
        logits = run_of(task, base).answers(manager, edit)
        plain = prob(logits, task.targets()).numpy()
        for found in (result, reference):
            mine = found.data["patched"].sel(layer=layer).values[:, 0]
            np.testing.assert_allclose(mine, plain, atol=2e-6, rtol=1e-4)
    assert result.convention.settings["window"] == 2


# ---------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "falcon", "native", "bert"])
def test_restoring_all_that_was_noised_gives_the_clean_run(name):
    model = model_of(name)
    task = noised(model)
    embed = mi.activation_patching(model, task, "embed", positions=["subject", "end"])
    clean = embed.data["clean"].values
    restored = embed.data["patched"].sel(position="subject").values
    np.testing.assert_allclose(restored, clean, atol=1e-6)
    untouched = embed.data["patched"].sel(position="end").values
    np.testing.assert_allclose(untouched, embed.data["corrupted"].values, atol=1e-6)
    whole = mi.activation_patching(model, task, "resid_pre", positions="all", layers=0)
    np.testing.assert_allclose(whole.data["patched"].values[:, 0], clean, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "native", "bert"])
def test_a_window_of_all_layers_at_all_positions_gives_the_clean_run(name):
    model = model_of(name)
    task = noised(model)
    for direction, other in [("denoising", "clean"), ("noising", "corrupted")]:
        result = mi.activation_patching(
            model, task, "resid_pre", positions="all", window=3, direction=direction, layers=1
        )
        values = result.data["patched"].values[:, 0]
        np.testing.assert_allclose(values, result.data[other].values, atol=1e-6)


def test_a_window_of_one_is_no_window():
    model = model_of("llama")
    task = noised(model)
    one = mi.activation_patching(model, task, "mlp_out", positions=["subject"], window=1)
    none = mi.activation_patching(model, task, "mlp_out", positions=["subject"])
    assert one.data.identical(none.data)


@pytest.mark.parametrize(
    ("site", "window", "says"),
    [
        ("mlp_out", 0, "window=0 is no number of layers to patch together: pass 1 to 3"),
        ("mlp_out", -1, "window=-1"),
        ("mlp_out", 4, "window=4 is no number of layers to patch together: pass 1 to 3"),
        ("embed", 2, "window=2 is no number of layers to patch together: pass 1 to 1 at embed"),
    ],
)
def test_windows_that_do_not_exist_are_refused_before_anything_runs(
    site, window, says, monkeypatch
):
    model = model_of("llama")
    task = noised(model)
    monkeypatch.setattr(model.original_model, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError, match=says):
        mi.activation_patching(model, task, site, positions=["subject"], window=window)


# ------------------------------------------------------------------------ draws are no prompts


def test_intervals_resample_prompts_and_not_draws():
    model = model_of("gpt2")
    task = noised(model, samples=5)
    result = mi.activation_patching(model, task, "mlp_out", positions=["subject", "end"])
    assert result.data["case"].values.tolist() == [0, 1, 2] * 5
    top = result.top(1).iloc[0]
    cell = result.effect.sel(layer=top["layer"], position=top["position"]).values
    by_prompt = cell.reshape(5, 3).mean(0)
    low, high = bootstrap_interval(by_prompt)
    assert (top["low"], top["high"]) == pytest.approx((float(low), float(high)))
    assert top["effect"] == pytest.approx(by_prompt.mean())
    assert "15 draws of 3 prompts" in result.plot().get_title(loc="left")


def test_the_gap_of_one_prompt_is_unknown_however_many_draws():
    model = model_of("gpt2")
    one = mi.noise_corruption(model, facts(model)[[1]], samples=8)
    result = mi.activation_patching(model, one, "mlp_out", positions=["subject"])
    alone = mi.activation_patching(
        model, mi.noise_corruption(model, facts(model)[[1]], samples=1), "mlp_out",
        positions=["subject"],
    )  # fmt: skip
    assert result._gap().isnull().item() == alone._gap().isnull().item()
    assert result.top(1)[["low", "high"]].isna().to_numpy().all()


def test_prompts_that_are_no_draws_have_no_cases():
    model = model_of("gpt2")
    task = facts(model, corrupted=[tokens(1, n, seed=9)[0].tolist() for n in LENGTHS])
    result = mi.activation_patching(model, task, "mlp_out", positions=["subject"])
    assert task.cases == (0, 1, 2) and "case" not in result.data.coords


def test_cases_follow_their_prompts_into_parts_of_a_task_and_into_files(tmp_path):
    model = model_of("gpt2")
    task = facts(model, cases=(4, 4, 9))
    assert task[[2, 0]].cases == (9, 4)
    task.to_jsonl(tmp_path / "facts.jsonl")
    assert mi.Task.from_jsonl(tmp_path / "facts.jsonl", model).cases == (4, 4, 9)
    facts(model).to_jsonl(tmp_path / "plain.jsonl")
    assert '"case"' not in (tmp_path / "plain.jsonl").read_text()
    with pytest.raises(ValueError, match="3 prompts but 2 cases"):
        facts(model, cases=(0, 1))


def test_a_traced_result_survives_a_file(tmp_path):
    model = model_of("gpt2")
    result = mi.activation_patching(model, noised(model), "mlp_out", positions=["subject"])
    assert mi.load_result(result.save(tmp_path / "trace.nc")).equals(result)
    (corruption,) = result.convention.settings["corruption"]
    assert corruption["kind"] == "noise" and result.convention.metrics == {
        "prob": "probability"
    }
