"""Physical pruning: a model without some of its heads or neurons, smaller and equal.

Masking replaces what a unit gives by zeros or by its mean; both are constants, so the unit
can be taken out and the constant's share of the output kept in the output's bias:
``b_O += mean(z_h) @ W_O_h``. The pruned model is checked against the masked one before it is
returned.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.causal.parts import pair_of
from mechinterp.edits import Edit, Mean, Zero
from mechinterp.hooks import HookManager
from mechinterp.hooks.taps import attached, foreign_hooks
from mechinterp.models import fingerprint, forward, processed_weights
from mechinterp.models.pruned.anatomy import Anatomy, LayerHeads
from mechinterp.models.pruned.copying import Removal, anatomy_of, pruned_copy
from mechinterp.record import source_of
from mechinterp.tasks import as_prompts

Units = Mapping[int, Sequence[int]] | Iterable[tuple[int, int]]
Gone = dict[int, list[int]]


def prune_heads(
    model: TransformerBridge,
    heads: Units,
    *,
    fold: str = "zero",
    mean_data: Any = None,
) -> TransformerBridge:
    """Return a smaller model without these heads; the given one stays as it is.

    The weights of the queries, keys, values and outputs are cut, layer by layer, so layers
    may be left with different numbers of heads, or with none: such a layer still adds its
    output bias. A key/value head goes with the last query head that reads it; where query
    heads are left in groups of unequal size, each picks its keys and values from the cache,
    which holds every key/value head once. The pruned model's heads are numbered anew;
    ``mi.pruning_of`` knows what they were called.

    The logits are those of the model with the heads masked at ``z`` (``mi.edits.Zero`` or
    ``Mean``), within rounding.

    Args:
        model: The model, pruned already or not.
        heads: The query heads to remove, as ``(layer, head)`` pairs or ``{layer: heads}``.
        fold: ``"zero"`` as if the heads gave nothing; ``"mean"`` as if they always gave the
            mean of their ``z`` over ``mean_data``, whose share goes into the output bias
            (one is made where the architecture has none).
        mean_data: Data or prompts, for ``fold="mean"``: every position counts once.

    Raises:
        ValueError: Before any work: a head is named twice or does not exist, no head would be
            left in any layer, the arguments do not go together, the weights were processed,
            or this architecture's attention cannot be cut like this (which choices remain is
            said).
        TypeError: Something in ``heads`` is no pair of integers.
        RuntimeError: The pruned model does not give the masked model's logits.
    """
    _check_arguments(model, fold, mean_data)
    return _pruned(model, "heads", "z", checked_heads(model, heads), fold, mean_data)


def checked_heads(model: TransformerBridge, heads: Units) -> Gone:
    """Return the heads by layer, or raise as ``prune_heads`` does where they cannot go."""
    anatomy = anatomy_of(model)
    anatomy.check_heads()
    there = [anatomy.heads(layer) for layer in range(len(anatomy.blocks))]
    counts = {layer: len(each.queries) for layer, each in enumerate(there)}
    gone = _grouped(heads, "head", counts)
    if sum(map(len, gone.values())) == sum(counts.values()):
        raise ValueError(
            f"heads names all {sum(counts.values())} heads of the model, and attention in no "
            "layer is no model to study. Leave at least one head somewhere."
        )
    for layer, names in gone.items():
        _check_groups(anatomy, layer, there[layer], names)
    return gone


def prune_neurons(
    model: TransformerBridge,
    neurons: Units,
    *,
    fold: str = "zero",
    mean_data: Any = None,
) -> TransformerBridge:
    """Return a smaller model without these MLP neurons; the given one stays as it is.

    A neuron's input weights (and its gate's) and its output weights are cut. The logits are
    those of the model with the neurons masked at ``mlp_post``, within rounding.

    Args:
        model: The model, pruned already or not.
        neurons: The neurons to remove, as ``(layer, neuron)`` pairs or ``{layer: neurons}``.
        fold: ``"zero"``, or ``"mean"``: the neurons' mean over ``mean_data`` goes into the
            MLP's output bias (one is made where the architecture has none).
        mean_data: Data or prompts, for ``fold="mean"``: every position counts once.

    Raises:
        ValueError: Before any work: a neuron is named twice or does not exist, none would be
            left in a layer, the arguments do not go together, the weights were processed, or
            this architecture's MLP cannot be cut like this.
        TypeError: Something in ``neurons`` is no pair of integers.
        RuntimeError: The pruned model does not give the masked model's logits.
    """
    _check_arguments(model, fold, mean_data)
    return _pruned(
        model, "neurons", "mlp_post", checked_neurons(model, neurons), fold, mean_data
    )


def checked_neurons(model: TransformerBridge, neurons: Units) -> Gone:
    """Return the neurons by layer, or raise as ``prune_neurons`` does where they cannot go."""
    anatomy = anatomy_of(model)
    anatomy.check_neurons()
    counts = {layer: anatomy.n_neurons(layer) for layer in range(len(anatomy.blocks))}
    gone = _grouped(neurons, "neuron", counts)
    for layer, names in gone.items():
        if len(names) == counts[layer]:
            raise ValueError(
                f"neurons names all {counts[layer]} of layer {layer}. Leave at least one "
                "neuron in each layer."
            )
    return gone


def _check_arguments(model: TransformerBridge, fold: str, mean_data: Any) -> None:
    if fold not in ("zero", "mean"):
        raise ValueError(f"fold={fold!r} is no way to fold. Pass 'zero' or 'mean'.")
    if fold == "mean" and mean_data is None:
        raise ValueError("fold='mean' needs data for the means. Pass mean_data=.")
    if fold == "zero" and mean_data is not None:
        raise ValueError(
            "fold='zero' takes no means, but mean_data was given. Pass fold='mean' to fold the "
            "means over it, or leave it out."
        )
    if processed_weights(model):
        raise ValueError(
            "this bridge's weights were processed (enable_compatibility_mode folds and centres "
            "them), so there is no plain model to cut. Load the model again without processing."
        )
    if attached(model) or foreign_hooks(model):
        raise ValueError(
            "edits or hooks are in place on this model, which a smaller copy of it would lack. "
            "Prune outside their block, or remove them."
        )


def _grouped(units: Units, kind: str, counts: Mapping[int, int]) -> Gone:
    """Return the units by layer, in order; refuse those that do not exist or come twice."""
    try:
        if isinstance(units, Mapping):
            by_layer = cast(Mapping[int, Sequence[int]], units)
            named: list[Any] = [(layer, u) for layer in by_layer for u in by_layer[layer]]
        else:
            named = list(units)
    except TypeError:
        raise TypeError(
            f"{kind}s={units!r} lists none. Pass pairs, [(layer, {kind}), ...], or the {kind}s "
            f"of each layer, {{layer: [{kind}, ...]}}."
        ) from None
    pairs = [pair_of(one, kind) for one in named]
    if not pairs:
        raise ValueError(f"{kind}s is empty. Name at least one (layer, {kind}) pair.")
    gone: Gone = {}
    for layer, unit in pairs:
        if layer not in counts:
            raise ValueError(
                f"{kind} {layer, unit} does not exist: the model has layers "
                f"0..{len(counts) - 1}. Pass (layer, {kind}) pairs."
            )
        if not 0 <= unit < counts[layer]:
            has = f"{kind}s 0..{counts[layer] - 1}" if counts[layer] else f"no {kind}s left"
            raise ValueError(
                f"{kind} {layer, unit} does not exist: layer {layer} has {has}. "
                f"Pass (layer, {kind}) pairs."
            )
        if unit in gone.setdefault(layer, []):
            raise ValueError(f"{kind} {layer, unit} is named twice. Name each one once.")
        gone[layer].append(unit)
    return {layer: sorted(gone[layer]) for layer in sorted(gone)}


def _check_groups(anatomy: Anatomy, layer: int, heads: LayerHeads, gone: list[int]) -> None:
    """Refuse groups of unequal size where the runtime cannot serve them."""
    kept = [head for head in range(len(heads.queries)) if head not in gone]
    if not kept or heads.keeping(kept).group is not None or anatomy.can_index(layer):
        return
    groups = [
        [(layer, head) for head, read in enumerate(heads.reads) if read == key]
        for key in range(len(heads.keys))
    ]
    sizes = [sum(head in kept for _, head in group) for group in groups]
    raise ValueError(
        f"removing {[(layer, head) for head in gone]} leaves query heads in groups of "
        f"unequal size ({', '.join(map(str, sizes))}), which the fused projection of "
        f"{anatomy.cfg.architecture} cannot hold. Its groups are "
        f"{'; '.join(map(str, groups))}: remove whole groups, and from each of the others "
        "the same number of heads."
    )


def _pruned(
    model: TransformerBridge, kind: str, site: str, gone: Gone, fold: str, mean_data: Any
) -> TransformerBridge:
    step = {"of": fingerprint(model), "model": str(model.cfg.model_name), "fold": fold}
    where: list[dict[str, Any]] = [{"layers": layer, kind: gone[layer]} for layer in gone]
    edits: list[Edit] = [Zero(site, **each) for each in where]
    means = {}
    if fold == "mean":
        prompts = as_prompts(model, mean_data)
        what = {"kind": type(mean_data).__name__, "prompts": len(prompts)}
        step |= {"mean_over": what | source_of(model, mean_data)}
        source = HookManager(model).mean(prompts, site, layers=list(gone))
        edits = [Mean(site, source, **each) for each in where]
        for layer, names in gone.items():
            means[layer] = source.mean(site, layer)[names].reshape(len(names), -1)
    pruned = pruned_copy(model, Removal(kind, gone, step, means))
    _check_equal(model, pruned, edits)
    return pruned


@torch.no_grad()
def _check_equal(
    model: TransformerBridge, pruned: TransformerBridge, edits: Sequence[Edit]
) -> None:
    """Compare the pruned model with the masked one on a few random tokens.

    What an unknown architecture does to its heads would show in whole logits. The bounds leave
    room for rounding: on random tokens SmolLM2-135M in float32 is 8e-5 of its largest logit
    away from itself when the same tokens come in prompts of other lengths.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(12, model.cfg.n_ctx))
    tokens = torch.randint(model.cfg.d_vocab, shape, generator=generator)
    with HookManager(model).edit(*edits):
        masked = forward(model, tokens)
    gap = float((forward(pruned, tokens) - masked).abs().max())
    allowed = {torch.float64: 1e-6, torch.float32: 1e-3}.get(masked.dtype, 5e-2)
    largest = float(masked.abs().max())
    if not gap <= allowed * largest:
        raise RuntimeError(
            f"the pruned {model.cfg.architecture} differs from the masked one by {gap:.2g} in "
            f"a logit (the largest is {largest:.2g}), so it is not returned. Its layers "
            "depend on its heads in a way that this version does not know: please report it."
        )
