"""Every method against the known answer: what it finds, and where it is known to fail."""

import numpy as np
import pytest
import torch
import xarray as xr
from known import HARD, PLAIN, SOFT, known

import mechinterp as mi
from mechinterp.edits import Replace
from mechinterp.hooks import HookManager

VARIANTS = [PLAIN[0][1:], HARD[0][1:]]


def mean_effect(result) -> xr.DataArray:
    """The effect per place, averaged over prompts."""
    effect = result.effect
    return effect.mean("prompt") if "prompt" in effect.dims else effect


def auroc(inside: np.ndarray, sizes: np.ndarray) -> float:
    """How often something inside is larger than something outside; ties count half."""
    assert 0 < inside.sum() < inside.size
    pairs = sizes[inside][:, None] - sizes[~inside][None]
    return float(np.mean((np.sign(pairs) + 1) / 2))


def head_auroc(model: mi.KnownModel, effect: xr.DataArray) -> float:
    """How well the size of the effect tells the circuit's heads from the others."""
    return auroc(model.in_circuit, np.abs(effect.transpose("layer", "head").values))


def patched(model: mi.KnownModel, site: str = "z", n: int = 6, **options) -> xr.DataArray:
    result = mi.activation_patching(
        model.model, model.task(n), site, positions="all", **options
    )
    return mean_effect(result)


def attributed(model: mi.KnownModel, site: str = "z", **options) -> xr.DataArray:
    result = mi.attribution_patching(
        model.model, model.task(6), site, positions="all", **options
    )
    return mean_effect(result)


def edges_found(
    model: mi.KnownModel, receivers: str, **options
) -> dict[tuple[str, str], float]:
    """The pairs between which a path has an effect, with its mean."""
    result = mi.path_patching(
        model.model, model.task(4), receivers, senders="z", positions="all", **options
    )
    effect = mean_effect(result)
    if "receiver" not in effect.dims:
        effect = effect.expand_dims(receiver=[receivers])
    frame = effect.rename("effect").to_dataframe().reset_index()
    return {
        (f"{row['layer']}.{row['head']}.z", row["receiver"]): row["effect"]
        for row in frame.to_dict("records")
        if abs(row["effect"]) > 1e-9
    }


# ----------------------------------------------------------------------- activation patching


@pytest.mark.parametrize(
    "which", [each for each in PLAIN + HARD if each[0] != "backup_head"], ids=str
)
def test_patching_clean_heads_into_the_corrupted_run_finds_exactly_the_circuit(which):
    model = known(*which)
    effect = patched(model)
    assert head_auroc(model, effect) == 1.0
    for layer, head in model.decoys:
        assert float(effect.sel(layer=layer, head=head)) == 0.0


@pytest.mark.parametrize("which", HARD, ids=str)
def test_patching_corrupted_heads_into_the_clean_run_never_blames_a_decoy(which):
    model = known(*which)
    effect = patched(model, direction="noising")
    assert all(float(effect.sel(layer=i, head=j)) == 0.0 for i, j in model.decoys)


@pytest.mark.parametrize("variant", VARIANTS)
def test_patching_keys_finds_the_head_whose_keys_the_previous_token_head_moves(variant):
    model = known("induction", *variant)
    effect = patched(model, "k")
    shared = 2 if "grouped_query" in variant else 1
    moved = effect.where(effect != 0).stack(at=effect.dims).dropna("at")
    assert [tuple(at) for at in moved["at"].values] == [(1, 2 // shared)]
    assert float(moved[0]) == 10.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_of_a_redundant_pair_is_sufficient_but_noising_one_finds_neither(variant):
    model = known("redundant_pair", *variant)
    sufficient, necessary = patched(model), patched(model, direction="noising")
    for layer, head in model.circuit["previous_token"]:
        assert float(sufficient.sel(layer=layer, head=head)) == 10.0
        assert float(necessary.sel(layer=layer, head=head)) == 0.0  # the known failure
    assert head_auroc(model, necessary) < 1.0
    task = model.task(6)
    assert task.corrupted is not None
    taken = HookManager(model.model).capture(task.corrupted, "z")
    both = [Replace("z", taken, layers=i, heads=j) for i, j in model.circuit["previous_token"]]
    cells = [*(mi.Cell([edit]) for edit in both), mi.Cell(both)]
    found = mi.cell_metrics(model.model, task, cells)
    assert np.asarray(found).reshape(3, -1).tolist() == [[10.0] * 6, [10.0] * 6, [0.0] * 6]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["redundant_pair", "backup_head"])
def test_without_one_of_two_nothing_changes_and_without_both_everything(kind, variant):
    model = known(kind, *variant)
    two = (
        model.circuit["previous_token"]
        if kind == "redundant_pair"
        else model.circuit["induction"] + model.circuit["backup"]
    )
    task, manager = model.task(6), HookManager(model.model)
    base = task.logits(model.model)
    for layer, head in two:
        with manager.ablate("z", kind="zero", layers=layer, heads=head):
            assert torch.equal(task.logits(model.model), base)
    with (
        manager.ablate("z", kind="zero", layers=two[0][0], heads=two[0][1]),
        manager.ablate("z", kind="zero", layers=two[1][0], heads=two[1][1]),
    ):
        assert not bool(task.logits(model.model).any())


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_heads_never_show_the_backup_until_the_first_one_is_out(variant):
    model = known("backup_head", *variant)
    ((first, at),), ((layer, head),) = model.circuit["induction"], model.circuit["backup"]
    for direction in ("denoising", "noising"):
        effect = patched(model, direction=direction)
        assert float(effect.sel(layer=layer, head=head)) == 0.0  # the known failure
    assert float(effect.sel(layer=first, head=at)) == 0.0  # its backup steps in
    with HookManager(model.model).ablate("z", kind="zero", layers=first, heads=at):
        effect = patched(model, direction="noising")
    assert float(effect.sel(layer=layer, head=head)) == -10.0
    assert float(effect.sel(layer=first, head=at)) == 0.0


# ----------------------------------------------------------------------------- path patching


@pytest.mark.parametrize("which", HARD, ids=str)
@pytest.mark.parametrize("receivers", ["k", "q", "logits"])
def test_paths_with_an_effect_are_edges_of_the_circuit(which, receivers):
    model = known(*which)
    found = edges_found(model, receivers)
    assert set(found) <= set(model.edges)
    silent = {
        # The queries of a backup matter once the first head is silent, the keys of the
        # S-inhibition head only together with its values.
        "backup_head": {("1.2.z", "2.1.q"), ("2.1.z", "logits")},
        "ioi": {edge for edge in model.edges if edge[1].endswith(".k")},
    }.get(model.kind, set())
    kind = "logits" if receivers == "logits" else f".{receivers}"
    assert set(found) == {e for e in model.edges if e[1].endswith(kind)} - silent


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_partner_of_the_induction_head_is_found_among_heads_with_its_pattern(variant):
    model = known("induction", *variant)
    alike = {at for at, name in model.patterns.items() if name == "previous_token"}
    assert len(alike) > 1
    ((partner, key), effect), *others = edges_found(model, "k").items()
    assert (partner, key) == model.edges[0]
    assert effect == 10.0
    assert not others


@pytest.mark.parametrize("variant", VARIANTS)
def test_inhibition_needs_keys_and_values_together(variant):
    model = known("ioi", *variant)
    task = model.task(4)
    key, value = (receiver for sender, receiver in model.edges if sender == "0.1.z")
    effect = {
        name: float(
            mean_effect(
                mi.path_patching(model.model, task, receivers, senders="0.1.z", positions="all")
            ).squeeze()
        )
        for name, receivers in {"keys": key, "values": value, "both": [key, value]}.items()
    }
    assert effect == {"keys": 0.0, "values": 0.0, "both": pytest.approx(5.0, abs=1e-5)}


# ------------------------------------------------------------------------------- attribution


@pytest.mark.parametrize("which", HARD, ids=str)
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_gradients_rank_the_circuit_first_while_attention_is_soft(which, method):
    model = known(*which, SOFT)
    effect = attributed(model, method=method)
    assert head_auroc(model, effect) == 1.0
    inside = min(abs(float(effect.sel(layer=i, head=j))) for i, j in model.heads)
    outside = max(abs(float(effect.sel(layer=i, head=j))) for i, j in model.decoys)
    assert outside < 1e-6 * inside


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["induction", "redundant_pair", "backup_head", "ioi"])
def test_atp_is_blind_behind_saturated_attention(kind, variant):
    """A known failure: no gradient passes an attention pattern of exactly 0 and 1."""
    model = known(kind, *variant)
    effect = attributed(model)
    ((layer, head), *_) = (
        model.circuit.get("previous_token") or model.circuit["duplicate_token"]
    )
    assert float(effect.sel(layer=layer, head=head)) == 0.0
    assert head_auroc(model, effect) < 1.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_integrated_gradients_see_through_it_where_the_path_crosses_the_change(variant):
    found = attributed(known("induction", *variant), method="ig")
    assert head_auroc(known("induction", *variant), found) == 1.0
    # Another known failure: with two heads the change is over before the first step.
    pair = known("redundant_pair", *variant)
    assert head_auroc(pair, attributed(pair, method="ig")) < 1.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_taking_the_softmax_again_shows_saturated_keys_and_queries_at_their_exact_size(variant):
    for kind, site in (("induction", "k"), ("duplicate_token", "k"), ("ioi", "q")):
        model = known(kind, *variant)
        star = attributed(model, site, method="atp*", grad_drop=False)
        exact = patched(model, site)
        last = max(layer for layer, _ in model.heads)
        np.testing.assert_allclose(
            star.sel(layer=last).values, exact.sel(layer=last).values, atol=1e-4
        )
        assert float(np.abs(exact.sel(layer=last)).max()) >= 5.0
    blind = attributed(known("induction", *variant), "k", method="atp")
    assert not bool(blind.any())  # the known failure that AtP* mends


@pytest.mark.parametrize("which", HARD[:3], ids=str)
def test_edge_attribution_ranks_the_edges_between_heads_first(which):
    model = known(*which, SOFT)
    for method in ("eap", "eap-ig"):
        result = mi.attribution_patching(
            model.model, model.task(4), method=method, positions="all"
        )
        frame = mean_effect(result).rename("effect").to_dataframe().reset_index().dropna()
        frame = frame[frame["sender"].str.endswith(".z")]
        pairs = zip(frame["sender"], frame["receiver"], strict=True)
        truth = np.array([pair in model.edges for pair in pairs])
        assert auroc(truth, np.abs(np.asarray(frame["effect"]))) == 1.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_audit_brings_back_the_heads_that_saturation_hides(variant):
    model = known("redundant_pair", *variant)
    task = model.task(4)
    estimate = mi.attribution_patching(model.model, task, "z", positions="all", method="atp")
    audited = mi.audit(model.model, task, estimate, k=3)
    top = {(row["layer"], row["head"]) for row in audited.top(3).to_dict("records")}
    assert top == set(model.heads)


# ------------------------------------------------------------ scores, read-outs, ablation


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefix_matching_cannot_tell_a_decoy_that_copies_nothing_but_copying_can(variant):
    model = known("induction", *variant)
    scores = mi.head_scores(
        model.model, kinds=["induction", "copying"], nulls=0, n=6, length=12, seed=1
    )
    looks = {head for head, pattern in model.patterns.items() if pattern == "induction"}
    (true,) = model.circuit["induction"]
    assert true in looks and len(looks) > 1
    for kind, high in (("induction", looks), ("copying", {true})):
        mean = scores.effect_of(kind).mean("prompt")
        for layer, head in model.patterns:
            want = 1.0 if (layer, head) in high else 0.0
            got = float(mean.sel(layer=layer, head=head))
            assert got == pytest.approx(want, abs=0.02), (kind, layer, head)


@pytest.mark.parametrize("variant", VARIANTS)
def test_k_composition_of_the_true_pair_is_the_largest_though_decoys_compose_as_much(variant):
    model = known("induction", *variant)
    k = mi.composition(model.model).data["composition"].sel(metric="K")
    ((a, b),), ((c, d),) = model.circuit["previous_token"], model.circuit["induction"]
    own = float(k.sel(sender_layer=a, sender_head=b, layer=c, head=d))
    assert own == pytest.approx(float(k.max())) and own > 0
    if "learned" in variant:  # the known failure: busy heads read what nothing useful wrote
        assert int((k > own - 1e-6).sum()) > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_direct_attribution_gives_all_to_the_last_head_of_the_circuit(variant):
    model = known("induction", *variant)
    heads = mi.direct_logit_attribution(model.model, model.task(6)).heads.mean("prompt")
    ((layer, head),) = model.circuit["induction"]
    assert float(heads.sel(layer=layer, head=head)) == pytest.approx(10.0, abs=1e-3)
    assert float(np.abs(heads).sum()) == pytest.approx(10.0, abs=1e-3)  # none for the others
    assert head_auroc(model, heads) < 1.0  # the known failure: it sees the end of the circuit


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lens_sees_the_answer_where_the_last_head_of_the_circuit_writes_it(variant):
    model = known("induction", *variant)
    task = model.task(6)
    ((layer, _),) = model.circuit["induction"]
    rank = mi.logit_lens(model.model, task).data["rank"].sel(target="answer").isel(position=0)
    assert (rank.sel(layer=layer) == 0).all()
    assert (rank.sel(layer=slice(0, layer - 1)) > 5).all()


@pytest.mark.parametrize("which", PLAIN + HARD, ids=str)
def test_without_a_head_of_the_circuit_the_answer_is_lost_unless_another_does_the_same(which):
    model = known(*which)
    effect = mean_effect(mi.head_ablation(model.model, model.task(6)))
    also = {"redundant_pair": "previous_token", "backup_head": "induction"}
    spare = {*model.circuit.get("backup", ()), *model.circuit.get(also.get(model.kind, ""), ())}
    for layer, head in model.patterns:
        changed = float(effect.sel(layer=layer, head=head)) != 0.0
        needed = (layer, head) in model.heads and (layer, head) not in spare
        assert changed == needed or (model.kind == "ioi" and needed)
    if not spare and model.kind != "ioi":
        assert head_auroc(model, effect) == 1.0
