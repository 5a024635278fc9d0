"""The redundancy atlas: every view against plain loops, planted twins, known redundancy."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from known import HARD, PLAIN, known
from scipy.spatial.distance import jensenshannon
from zoo import random_zoo, tokens, zoo

import mechinterp as mi
from mechinterp.heads.copying import writing_weights
from mechinterp.heads.redundancy_stream import considered, sampled
from mechinterp.heads.redundancy_tree import Tree
from mechinterp.heads.subspaces import overlap
from mechinterp.hooks import HookManager
from mechinterp.sites import key_heads
from mechinterp.tasks.prompts import pad
from mechinterp.weights import head_weights

VIEWS = ("js", "cka", "cosine", "read_q", "read_k", "read_v", "write")
FAMILIES = ["gpt2", "gemma2", "falcon", "bert"]
model_of = cache(zoo)


def prompts(n: int = 5, longest: int = 14, seed: int = 3) -> mi.Prompts:
    """Random prompts of different lengths."""
    lengths = [longest - 2 * (i % 4) for i in range(n)]
    return pad([tokens(1, k, seed + i)[0].tolist() for i, k in enumerate(lengths)])


@cache
def atlas(name: str) -> mi.RedundancyAtlas:
    return mi.redundancy_atlas(model_of(name), prompts())


def one_by_one(model, given: mi.Prompts, site: str) -> list[np.ndarray]:
    """Per prompt a site of all heads, head first, from runs of single prompts."""
    found = []
    for row in given.rows:
        acts = HookManager(model).capture([row], site)
        layers = [acts[site, layer][0] for layer in range(len(model.blocks))]
        heads = [x if site == "pattern" else x.transpose(0, 1) for x in layers]
        found.append(torch.cat(heads).double().numpy())
    return found


def outputs(model, given: mi.Prompts) -> np.ndarray:
    """What every head writes, head, token (without the first of a prompt), d_model."""
    W_O = torch.cat([writing_weights(model, i) for i in range(len(model.blocks))])
    first = int(model.cfg.attention_dir == "causal")
    z = np.concatenate([z[:, first:] for z in one_by_one(model, given, "z")], 1)
    return z @ W_O.double().numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_divergence_is_scipys_averaged_over_the_sampled_queries(name):
    model, given = model_of(name), prompts()
    patterns = one_by_one(model, given, "pattern")
    where = sampled(considered(model, given), 20, seed=7).tolist()
    found = mi.redundancy_atlas(model, given, queries=20, seed=7).data["js"].values
    assert len(where) == len(set(map(tuple, where))) == 20
    for a, b in [(0, 1), (2, 9), (5, 11), (8, 3)]:
        each = [
            jensenshannon(patterns[p][a, q], patterns[p][b, q], base=2) ** 2 for p, q in where
        ]
        assert found[a, b] == pytest.approx(np.mean(each), abs=2e-6)
    assert not np.diag(found).any()


def test_the_sample_of_queries_follows_the_seed_and_never_has_the_first_position():
    there = considered(model_of("gpt2"), prompts())
    one, same, other = (sampled(there, 15, seed).tolist() for seed in (0, 0, 1))
    assert one == same != other
    assert all(position > 0 and bool(there[prompt, position]) for prompt, position in one)
    assert bool(considered(model_of("bert"), prompts())[:, 0].all())  # it sees both sides


def test_heads_that_attend_to_different_keys_are_one_bit_apart():
    model = known("induction", "multi_head", "learned")  # attention is 0 or 1
    assert [model.patterns[0, i] for i in (0, 3)] == ["previous_token", "first_token"]
    text = mi.Text.from_tokens(model.model, [[0, 5, 6, 7, 8, 9]])
    js = mi.redundancy_atlas(model.model, text).data["js"].sel(head_a="0.0", head_b="0.3")
    assert float(js) == pytest.approx(4 / 5, abs=1e-6)  # at position 1 the first is previous


@pytest.mark.parametrize("name", FAMILIES)
def test_cka_and_cosine_are_those_of_the_whole_outputs(name):
    model, given = model_of(name), prompts(8)
    Y = outputs(model, given)
    found = mi.redundancy_atlas(model, given)
    centred = Y - Y.mean(1, keepdims=True)
    for a, b in [(0, 1), (2, 9), (5, 11), (8, 3), (4, 4)]:
        cross = np.linalg.norm(centred[a].T @ centred[b]) ** 2
        own = [np.linalg.norm(centred[i].T @ centred[i]) for i in (a, b)]
        cka = float(found.data["cka"][a, b])
        assert cka == pytest.approx(cross / np.prod(own), abs=2e-5)
        lengths = [np.linalg.norm(Y[i], axis=1) for i in (a, b)]
        cosine = ((Y[a] * Y[b]).sum(1) / np.prod(lengths, axis=0)).mean()
        assert float(found.data["cosine"][a, b]) == pytest.approx(cosine, abs=2e-6)
    assert found.convention.settings["tokens"] == Y.shape[1]


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "falcon", "bert"])
def test_overlaps_are_those_of_orthonormal_bases_and_shared_weights_overlap_wholly(name):
    model, found = model_of(name), atlas(name).data
    layers = range(len(model.blocks))
    weights = [head_weights(model, i, fold_norm=True) for i in layers]
    sides = {f"read_{k.lower()}": [getattr(w, f"W_{k}") for w in weights] for k in "QKV"}
    sides["write"] = [writing_weights(model, i).mT for i in layers]
    for side, per_layer in sides.items():
        U = [np.linalg.qr(W.double().numpy())[0] for layer in per_layer for W in layer]
        for a, b in [(0, 1), (2, 9), (5, 11), (8, 3)]:
            expected = np.linalg.norm(U[a].T @ U[b]) ** 2 / U[a].shape[1]
            assert float(found[side][a, b]) == pytest.approx(expected, abs=1e-5)
    shared = found["shared_kv"].values
    assert shared.sum() == 12 * {"qwen3": 2, "gemma2": 2, "falcon": 4}.get(name, 1)
    for side in ("read_k", "read_v"):
        np.testing.assert_allclose(found[side].values[shared], 1, atol=1e-6)
        assert (found[side].values[~shared] < 0.9).all()


def test_random_subspaces_overlap_as_the_formula_says():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(120, 24, 6, generator=generator, dtype=torch.float64)
    found = overlap(drawn)
    pairs = found.overlap.numpy()[np.triu_indices(120, 1)]
    expected, spread = float(found.expected[0, 1]), float(found.spread[0, 1])
    assert expected == 6 / 24
    assert pairs.mean() == pytest.approx(expected, abs=4 * spread / np.sqrt(len(pairs)) + 2e-3)
    assert pairs.std() == pytest.approx(spread, rel=0.05)


def test_overlap_counts_the_dimensions_that_there_are():
    a, b = torch.eye(8)[:, :2], torch.eye(8)[:, 1:3]
    low = torch.cat([torch.eye(8)[:, :1], torch.eye(8)[:, :1]], 1)  # rank 1
    found = overlap(torch.stack([a, b, low, torch.zeros(8, 2)]).double())
    assert float(found.overlap[0, 1]) == pytest.approx(0.5)
    assert float(found.overlap[0, 2]) == pytest.approx(2**-0.5)
    assert float(found.expected[0, 2]) == pytest.approx(2**0.5 / 8)
    assert bool(found.overlap[3].isnan().all())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_untrained_weights_read_and_write_as_random_subspaces_do(name):
    model = random_zoo(name, n_layers=4, n_heads=4, n_kv_heads=4, window=4, seed=5)
    found = mi.redundancy_atlas(model, prompts()).data
    upper = np.triu_indices(16, 1)
    for side in ("read_q", "read_k", "read_v", "write"):
        excess = (found[side] - found[f"{side}_expected"]) / found[f"{side}_spread"]
        assert abs(excess.values[upper].mean()) < 4 / np.sqrt(len(upper[0]))
        assert excess.values[upper].std() == pytest.approx(1, abs=0.3)
    # GPT-2's norm subtracts the mean, so one dimension is never read.
    d = 31 if name == "gpt2" else 32
    assert float(found["read_q_expected"][0, 1]) == pytest.approx(8 / d)
    assert float(found["write_expected"][0, 1]) == pytest.approx(8 / 32)


def twinned():
    """A GPT-2 in which head 1.3 has the weights of head 1.0."""
    model = zoo("gpt2")
    attention: Any = model.blocks[1].attn.original_component
    c_attn, c_proj = (
        getattr(each, "original_component", each)
        for each in (attention.c_attn, attention.c_proj)
    )
    with torch.no_grad():
        for first in (0, 32, 64):  # queries, keys, values
            one, other = slice(first, first + 8), slice(first + 24, first + 32)
            c_attn.weight[:, other] = c_attn.weight[:, one].clone()
            c_attn.bias[other] = c_attn.bias[one].clone()
        c_proj.weight[24:32] = c_proj.weight[0:8].clone()
    return model


def test_planted_twins_are_found_by_every_view_and_go_first():
    found = mi.redundancy_atlas(twinned(), prompts(8))
    for view in ("redundancy", *VIEWS):
        first = found.top(1, metric=view).iloc[0]
        assert (first["head_a"], first["head_b"]) == ("1.0", "1.3"), view
        ideal = 0.0 if view == "js" else 1.0
        assert first[view] == pytest.approx(ideal, abs=1e-5)
    assert found.pruning_order()[0] == (1, 3)
    clusters = found.clusters(n=11)
    assert clusters["heads"].iloc[0] == ["1.0", "1.3"]
    assert clusters["representative"].iloc[0] == "1.0"


# ------------------------------------------------------------------- what holds by construction


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_little_memory_reads_several_times_and_changes_no_number(name, monkeypatch):
    from mechinterp.heads import redundancy_stream, redundancy_views

    model, given = model_of(name), prompts(12)
    whole = mi.redundancy_atlas(model, given)
    monkeypatch.setattr(redundancy_stream, "_ROWS", 8)
    monkeypatch.setattr(redundancy_stream, "_BUFFER", 3 * 12 * 8 * 4 * 7)
    monkeypatch.setattr(redundancy_stream, "prompts_at_once", lambda *_: 5)
    monkeypatch.setattr(redundancy_views, "_CACHED", 40)
    passes = redundancy_stream._passes
    monkeypatch.setattr(
        redundancy_stream, "_passes", lambda h, w, i, b: passes(h, w, i, 2 * 12 * 64 * i)
    )
    split = mi.redundancy_atlas(model, given)
    assert whole.convention.settings["passes"] == 1
    assert split.convention.settings["passes"] > 3
    for view in VIEWS:
        np.testing.assert_allclose(split.data[view], whole.data[view], atol=3e-6, rtol=0)


def test_memory_bounds_the_sums_and_too_little_is_said_at_once():
    model, text = model_of("gpt2"), mi.Text.from_tokens(model_of("gpt2"), tokens(4, 12))
    plenty = mi.redundancy_atlas(model, text, memory="1GB")
    assert plenty.convention.settings["passes"] == 1
    for memory in ("1KB", "40KB"):
        with pytest.raises(ValueError, match="memory= is too small"):
            mi.redundancy_atlas(model, text, memory=memory)


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_padding_changes_no_number(name):
    model, given = model_of(name), prompts()
    wider = pad([*given.rows, tokens(1, 30)[0].tolist()])
    padded = mi.Prompts(wider.tokens[:-1], wider.mask[:-1], None, "given")
    found, alone = mi.redundancy_atlas(model, padded), mi.redundancy_atlas(model, given)
    for view in VIEWS:
        np.testing.assert_allclose(found.data[view], alone.data[view], atol=3e-6, rtol=0)


def test_large_means_cost_no_digits():
    from mechinterp.heads.redundancy_views import Moments, cka

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 2, 3, generator=generator, dtype=torch.float64)
    z[:, 1] += z[:, 0]
    found = []
    for offset, dtype in ((0.0, torch.float64), (1000.0, torch.float32)):
        moments = Moments(torch.eye(3).expand(2, 3, 3), [range(2)], dtype)
        moments.add((z + offset).to(dtype)[:100])
        moments.add((z + offset).to(dtype)[100:])
        squares = moments.squares()[0].numpy()
        found.append(cka(squares, moments.constant().numpy())[0, 1])
    assert found[1] == pytest.approx(found[0], abs=1e-4)


# ------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("which", [PLAIN[2], HARD[2]], ids=str)
def test_the_redundant_pair_is_redundant_in_every_view_and_the_only_one_causally(which):
    model = known(*which)
    found = mi.redundancy_atlas(model.model, model.task(6))
    pair = " + ".join(f"{i}.{j}" for i, j in model.circuit["previous_token"])
    mean = found.interaction.mean("prompt")
    assert {name: v for name, v in zip(mean["pair"].values, mean.values, strict=True) if v} == {
        pair: -10.0  # either is enough; 0 for the induction head, which is all or nothing
    }
    a, b = pair.split(" + ")
    at = {"head_a": a, "head_b": b}
    # With grouped queries each has a partner's keys to find too, in other dimensions.
    apart = {"redundancy", "read_k"} if which[1] == "grouped_query" else set()
    for view in {"redundancy", *VIEWS} - apart:
        value = float(found.matrix(view).sel(at))
        assert value == pytest.approx(0.0 if view == "js" else 1.0, abs=1e-5), view
    assert float(found.matrix("redundancy").sel(at)) > 0.8
    alone = found.data["alone"].mean("prompt")
    assert float(alone.sel(head="1.2")) == -10.0
    order = found.pruning_order()
    assert order[-1] == (1, 2)  # what nothing replaces goes last
    top = found.top(1, metric="interaction").iloc[0]
    assert (top["head_a"], top["head_b"], top["interaction"]) == (a, b, -10.0)
    assert top["p_adjusted"] < 0.05


@pytest.mark.parametrize("which", [HARD[3]], ids=str)
def test_a_backup_is_seen_by_interaction_and_by_no_view_of_what_heads_do(which):
    model = known(*which)
    found = mi.redundancy_atlas(model.model, model.task(6))
    ((i, j),), ((k, h),) = model.circuit["induction"], model.circuit["backup"]
    top = found.top(1, metric="interaction").iloc[0]
    assert (top["head_a"], top["head_b"]) == (f"{i}.{j}", f"{k}.{h}")
    assert top["interaction"] == -10.0
    # Both rest unless something comes again, so their patterns hardly differ, as those of
    # other heads do; at rest the backup writes nothing that could be compared. Their weights
    # write to the same place, as those of decoys do.
    assert np.isnan(top["cka"]) and np.isnan(top["cosine"])
    assert (found.data["alone"].sel(head=f"{k}.{h}") == 0).all()
    place = list(found.top(100)[["head_a", "head_b"]].itertuples(index=False, name=None))
    assert place.index((f"{i}.{j}", f"{k}.{h}")) >= 5
    others = np.abs(found.interaction.mean("prompt").values)
    assert (others > 1e-6).sum() == 1


def test_heads_in_series_interact_the_other_way():
    model = known("induction", "multi_head", "learned")
    (sender,), (receiver,) = model.circuit["previous_token"], model.circuit["induction"]
    pairs = [(sender, receiver)]
    found = mi.redundancy_atlas(model.model, model.task(4), pairs=pairs)
    pair = " + ".join(f"{i}.{j}" for i, j in (sender, receiver))
    assert found.interaction.sel(pair=pair).values.tolist() == [10.0] * 4


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_interaction_is_that_of_hooked_runs(kind):
    model = model_of("qwen3")
    task = pair_task(model)
    pairs = [((0, 1), (2, 3)), ((1, 0), (1, 2))]
    found = mi.redundancy_atlas(model, task, pairs=pairs, kind=kind)
    manager = HookManager(model)
    source = manager.mean(task.clean, "z") if kind == "mean" else None

    def metric(*heads) -> np.ndarray:
        Edit = mi.edits.Zero if source is None else mi.edits.Mean
        told = () if source is None else (source,)
        edits = [Edit("z", *told, layers=i, heads=j) for i, j in heads]
        with manager.edit(*edits) if edits else nullcontext():
            logits = task.logits(model).double()
        rows = np.arange(4)  # answers are 3, 4, ..., distractors 20, 21, ...
        return (logits[rows, rows + 3] - logits[rows, rows + 20]).numpy()

    for i, (a, b) in enumerate(pairs):
        expected = metric(a, b) - metric(a) - metric(b) + metric()
        np.testing.assert_allclose(found.interaction.values[:, i], expected, atol=2e-5)


def pair_task(model, n: int = 4) -> mi.Task:
    return mi.Task.from_tokens(
        model,
        clean=tokens(n, 6, seed=1),
        corrupted=tokens(n, 6, seed=2),
        answers=list(range(3, 3 + n)),
        distractors=list(range(20, 20 + n)),
    )


def test_large_models_ablate_the_pairs_that_other_views_flag(monkeypatch):
    from mechinterp.heads import redundancy

    monkeypatch.setattr(redundancy, "SMALL", 5)
    model = model_of("gpt2")
    found = mi.redundancy_atlas(model, prompts(), task=pair_task(model), flag=2)
    measured = set(zip(found.data["of_a"].values, found.data["of_b"].values, strict=True))
    flagged = set()
    for view in ("js", "cka", "cosine", "read_q", "write"):
        flagged |= set(
            found.top(2, metric=view)[["head_a", "head_b"]].itertuples(index=False, name=None)
        )
    assert measured == flagged
    assert found.data.sizes["head"] == 12  # all alone, to know whom to keep
    assert int(found.matrix("interaction").notnull().sum()) == 2 * len(flagged)
    assert found.convention.settings["pairs"] == "flagged"


# ------------------------------------------------------------------------- clusters and orders


def distances_of(points: list[float]) -> np.ndarray:
    return np.abs(np.subtract.outer(points, points))


def test_the_order_walks_the_tree_from_the_most_similar_pair_up():
    apart = distances_of([0.0, 1.0, 10.0, 12.0, 50.0])
    # 0 and 1 merge, then 2 and 3: of two the earlier stays. Of all four, 2 is nearest to the
    # others (1 and 3 have gone, so 0 goes), and again among all five.
    assert Tree(apart).order() == [1, 3, 0, 4, 2]
    worth = np.array([1.0, 5.0, 3.0, 2.0, 4.0])
    assert Tree(apart, worth).order() == [0, 3, 2, 4, 1]
    unknown = np.array([1.0, np.nan, 3.0, 2.0, 4.0])
    assert Tree(apart, unknown).order()[0] == 1  # not both known: the earlier stays


def test_the_medoid_of_two_stands_for_a_cluster():
    apart = distances_of([0.0, 1.0, 3.0])
    ((members, stands, distance),) = Tree(apart).cut(1)
    # 0 stays of (0, 1), a tie; 2 is 3 and 2 away, 0 is 1 and 3 away: 0 is nearer to all.
    assert (members, stands, distance) == ((0, 1, 2), 0, 2.5)


def test_orders_and_clusters_hold_every_head_once_and_do_not_change():
    found = atlas("qwen3")
    assert found.pruning_order() == found.pruning_order()
    for view in ("mean", "js", "cosine", "read"):
        assert sorted(found.pruning_order(view)) == found.heads
        for n in (1, 4, 12):
            clusters = found.clusters(view, n=n)
            assert len(clusters) == n
            assert sorted(h for own in clusters["heads"] for h in own) == sorted(
                f"{i}.{j}" for i, j in found.heads
            )
            assert all(
                head in own
                for head, own in zip(clusters["representative"], clusters["heads"], strict=True)
            )
    assert len(found.clusters(threshold=0.0)) == 12
    assert len(found.clusters(threshold=99.0)) == 1
    assert list(found.clusters(n=4)["size"]) == sorted(found.clusters(n=4)["size"])[::-1]


def test_the_mean_distance_is_one_for_an_average_pair():
    found = atlas("gpt2")
    apart = found.distance().values[np.triu_indices(12, 1)]
    assert apart.mean() == pytest.approx(1.0)
    np.testing.assert_allclose(
        found.matrix("redundancy").values, 1 - found.distance().values, atol=1e-12
    )


def test_heads_without_output_are_nan_and_as_far_as_can_be():
    model = zoo("gpt2")
    with torch.no_grad():
        proj: Any = model.blocks[1].attn.o.original_component
        proj.weight[0:8] = 0
    found = mi.redundancy_atlas(model, prompts())
    for view in ("cka", "cosine", "write"):
        assert bool(found.data[view].sel(head_a="1.0").isnull().all())
        apart = found.distance(view).sel(head_a="1.0", head_b="0.0")
        assert float(apart) == 1.0
    assert sorted(found.pruning_order()) == found.heads


# ------------------------------------------------------------------------ results and bad input


def test_every_kind_of_data_is_read_and_gives_the_same_views():
    model = model_of("gpt2")
    task, given = pair_task(model), tokens(4, 6, seed=1)
    text = mi.Text.from_tokens(model, given)
    labelled = mi.Labelled("labelled", text.prompts, torch.tensor([0, 1, 0, 1]), ("no", "yes"))
    ways = [mi.redundancy_atlas(model, data) for data in (text, labelled, text.prompts)]
    ways.append(mi.redundancy_atlas(model, task, pairs="none"))
    for found in ways[1:]:
        assert found.data.identical(ways[0].data)
    one = [((0, 0), (1, 1))]
    assert "together" in mi.redundancy_atlas(model, task, pairs=one).data
    assert "together" in mi.redundancy_atlas(model, text, task=task, pairs=one).data


def test_an_atlas_with_interactions_comes_back_from_its_file_and_tabulates(tmp_path):
    model = model_of("gpt2")
    pairs = [((0, 0), (0, 1)), ((0, 1), (2, 3)), ((1, 0), (1, 1))]
    found = mi.redundancy_atlas(model, pair_task(model), pairs=pairs)
    back = mi.load_result(found.save(tmp_path / "atlas.nc"))
    assert back.equals(found)
    frame = found.to_frame()
    counts = {
        name: int(np.isfinite(np.asarray(frame[name], dtype=float)).sum())
        for name in ("interaction", "alone")
    }
    assert counts == {"interaction": 4 * 3, "alone": 4 * 12}
    with pytest.warns(mi.FewPromptsWarning):
        assert found.statistics(metric="interaction").sizes["pair"] == 3
    for view in ("js", "cosine", "interaction"):
        assert found.plot(view=view).get_title("left")
    figure = found.figure("interaction")
    figure.savefig(tmp_path / "atlas.png")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"queries": 0}, "queries=0 samples nothing"),
        ({"queries": 500}, "the prompts have 53 positions after their first"),
        ({"pairs": "al", "task": "task"}, "unknown choice of pairs 'al'. Did you mean 'all'"),
        ({"pairs": "all"}, "interaction is measured on a task, but data is Prompts"),
        ({"task": "task", "kind": "meen"}, "Did you mean 'mean'"),
        ({"task": "task", "metric": "logit_dif"}, "Did you mean 'logit_diff'"),
        ({"task": "task", "metric": {"a": "loss", "b": "prob"}}, "by one metric, but a, b"),
        ({"task": "task", "pairs": [((0, 0), (0, 9))]}, "layer 0 has heads 0..3"),
        ({"task": "task", "pairs": [((0, 0), (7, 1))]}, "layer 7"),
        ({"task": "task", "pairs": [((0, 0), (0, 0))]}, "is one head"),
        ({"task": "task", "pairs": [((0, 0), (1, 1)), ((1, 1), (0, 0))]}, "is named twice"),
        ({"task": "text", "kind": "corrupted"}, "has no corrupted run"),
        ({"task": "task", "flag": 0}, "flag=0 flags nothing"),
    ],
)
def test_wrong_arguments_are_said_before_anything_runs(arguments, says, monkeypatch):
    from mechinterp.heads import redundancy

    model = model_of("gpt2")
    monkeypatch.setattr(redundancy, "watch", lambda *_: pytest.fail("it ran"))
    words = mi.Text.from_tokens(model, tokens(2, 8))
    named = {"task": pair_task(model), "text": words}
    given: dict[str, Any] = {
        k: named.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()
    }
    with pytest.raises(ValueError) as error:
        mi.redundancy_atlas(model, prompts(), **given)
    assert says in str(error.value)


def test_a_single_head_and_prompts_of_one_token_have_no_atlas():
    alone = random_zoo("native", n_layers=1, n_heads=1, n_kv_heads=1, window=0, seed=0)
    with pytest.raises(ValueError, match="between heads, but this model has 1"):
        mi.redundancy_atlas(alone, prompts())
    with pytest.raises(ValueError, match="too short"):
        mi.redundancy_atlas(model_of("gpt2"), pad([[5], [6]]))
    with pytest.raises(TypeError, match="redundancy_atlas takes a Text"):
        mi.redundancy_atlas(model_of("gpt2"), 3)
    with pytest.raises(TypeError, match="takes a Task"):
        mi.redundancy_atlas(model_of("gpt2"), prompts(), task=prompts())


def test_views_that_are_not_there_name_near_ones():
    found = atlas("gpt2")
    with pytest.raises(ValueError, match=r"unknown view 'ckaa'. Did you mean 'cka'"):
        found.clusters("ckaa")
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        found.plot(view="cosin")
    with pytest.raises(ValueError, match="interaction is no distance"):
        found.clusters("interaction")
    with pytest.raises(ValueError, match="interaction was not measured"):
        found.top(metric="interaction")
    with pytest.raises(ValueError, match="Pass one of them"):
        found.clusters(n=2, threshold=0.1)
    with pytest.raises(ValueError, match="n=13 clusters cannot be made of 12 heads"):
        found.clusters(n=13)


def test_heads_that_a_pruned_group_left_alone_share_keys_as_the_model_says():
    whole = zoo("llama")  # four query heads on two keys
    pruned = mi.prune_heads(whole, [(0, 1)])
    assert key_heads(pruned, 0) != key_heads(pruned, 1)
    atlas = mi.redundancy_atlas(pruned, mi.Text.from_tokens(pruned, tokens(3, 9)))
    names = atlas.data["head_a"].values.tolist()
    for a in names:
        for b in names:
            one, other = ([int(n) for n in name.split(".")] for name in (a, b))
            same = one[0] == other[0] and (
                key_heads(pruned, one[0])[one[1]] == key_heads(pruned, other[0])[other[1]]
            )
            assert bool(atlas.data["shared_kv"].sel(head_a=a, head_b=b)) == same
