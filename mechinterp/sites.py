"""Sites: the places in a model that can be read and written, and where this model has them.

A site is named by the field's word (``z``, ``resid_pre``). ``locate`` turns it into a
``Place``: the hook of this model that carries it, and how an edit there reaches the residual
stream. Whether it does is not assumed: ``mechinterp.catalogue`` proves it by perturbation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models.pruned.anatomy import heads_left
from mechinterp.names import unknown

RESID = ("batch", "pos", "d_model")
AXES: dict[str, tuple[str, ...]] = {
    "embed": RESID,
    "resid_pre": RESID,
    "resid_mid": RESID,
    "resid_post": RESID,
    "attn_out": RESID,
    "mlp_out": RESID,
    "q": ("batch", "pos", "head", "d_head"),
    "k": ("batch", "pos", "kv_head", "d_head"),
    "v": ("batch", "pos", "kv_head", "d_head"),
    "scores": ("batch", "head", "query_pos", "key_pos"),
    "pattern": ("batch", "head", "query_pos", "key_pos"),
    "z": ("batch", "pos", "head", "d_head"),
    "result": ("batch", "pos", "head", "d_model"),
    "mlp_post": ("batch", "pos", "neuron"),
}
SITES = tuple(AXES)
MEANING = {
    "embed": "output of the token embedding, before positions are added",
    "resid_pre": "residual stream entering the block",
    "resid_mid": "residual stream between attention and MLP (if post-norm: its first norm)",
    "resid_post": "residual stream leaving the block",
    "attn_out": "what attention adds to the residual stream (before the norm if post-norm)",
    "mlp_out": "what the MLP adds to the residual stream (before the norm if post-norm)",
    "q": "query of each head, as projected: before any query norm and rotation",
    "k": "key of each key/value head, as projected: before any key norm and rotation",
    "v": "value of each key/value head",
    "scores": "attention before the softmax: scaled, soft-capped and masked",
    "pattern": "attention after the softmax",
    "z": "values mixed by the pattern, per head",
    "result": "each head's z @ W_O, before the output bias and any post-norm",
    "mlp_post": "MLP neurons after the activation (times the gate, where there is one)",
}


@dataclass(frozen=True)
class Site:
    """One place to read or write: a site name with optional layer, head and position.

    Raises:
        ValueError: The name is not a site; near names are suggested.
    """

    name: str
    layer: int | None = None
    head: int | None = None
    position: int | str | None = None

    def __post_init__(self) -> None:
        check_site_name(self.name)


@dataclass(frozen=True)
class Place:
    """Where one site of one layer is on one model, and how to write there.

    ``how`` says what an edit does with the tensor that passes ``hook``:

    - ``"direct"``: it is the site; the edited tensor replaces it.
    - ``"sum"``: the site is it plus the tensor at ``reads``; the change of the sum is added.
    - ``"result"``: the site is the tensor at ``reads`` times ``W_O``; the change, summed over
      heads, is added.
    - ``"softmax_in"``, ``"softmax_out"``: ``hook`` names an attention module, and the site is
      what its softmax takes or gives.
    """

    site: str
    layer: int | None
    hook: str
    how: Literal["direct", "sum", "result", "softmax_in", "softmax_out"] = "direct"
    reads: str | None = None


class MissingSiteError(ValueError):
    """This model has no such site at this layer; the message says why."""


def check_site_name(name: str) -> None:
    """Raise a ``ValueError`` that suggests near names unless ``name`` is a site."""
    if name not in AXES:
        raise ValueError(unknown("site", name, SITES))


def head_axis(site: str) -> Literal["head", "kv_head"] | None:
    """Return the name of the site's head axis, or None when it has none."""
    axes = AXES[site]
    return "head" if "head" in axes else "kv_head" if "kv_head" in axes else None


def locate(model: TransformerBridge, site: str, layer: int | None = None) -> Place:
    """Return where ``site`` is at ``layer`` of this model (``embed`` has no layer).

    Raises:
        ValueError: Unknown site, or layer out of range.
        MissingSiteError: The architecture lacks the site at this layer.
    """
    check_site_name(site)
    if site == "embed":
        return Place("embed", None, "embed.hook_out")
    n_layers = len(model.blocks)
    if layer is None or not 0 <= layer < n_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has layers 0..{n_layers - 1}."
        )
    block: Any = model.blocks[layer]
    prefix = f"blocks.{layer}."
    if site in ("resid_pre", "resid_post"):
        return Place(site, layer, prefix + ("hook_in" if site == "resid_pre" else "hook_out"))
    if site in ("mlp_out", "mlp_post"):
        if "mlp" not in block.submodules:
            raise MissingSiteError(f"{site} does not exist: layer {layer} has no MLP.")
        if site == "mlp_out":
            return Place(site, layer, prefix + _mlp_out_hook(block))
        if "out" not in block.mlp.submodules:
            raise MissingSiteError(
                f"mlp_post does not exist: the MLP of layer {layer} "
                f"({type(block.mlp).__name__}) has no single layer of neurons. Use mlp_out."
            )
        return Place(site, layer, prefix + "mlp.out.hook_in")
    if "attn" not in block.submodules:
        raise MissingSiteError(f"{site} does not exist: layer {layer} has no attention.")
    if head_axis(site) is not None and _has_no_heads(block.attn):
        raise MissingSiteError(f"{site} does not exist: layer {layer} has no heads left.")
    if site == "resid_mid":
        return _resid_mid(block, layer)
    if site == "attn_out":
        return Place(site, layer, prefix + _attn_out_hook(block))
    if site == "result":
        return Place(
            site, layer, prefix + "attn.o.hook_out", "result", prefix + "attn.o.hook_in"
        )
    if site == "scores" and not _reconstructs_attention(block.attn):
        return Place(site, layer, prefix + "attn", "softmax_in")
    if site == "pattern" and not (
        _reconstructs_attention(block.attn) or _takes_pattern_function(block.attn)
    ):
        return Place(site, layer, prefix + "attn", "softmax_out")
    name = "hook_attn_scores" if site == "scores" else f"hook_{site}"
    return Place(site, layer, f"{prefix}attn.{name}")


def is_post_norm(block: Any) -> bool:
    """Return whether the block normalises after adding (BERT), not before each layer."""
    inner = block.original_component
    return hasattr(getattr(getattr(inner, "attention", None), "output", None), "LayerNorm") or (
        getattr(inner, "do_layer_norm_before", True) is False
    )


def reads_in_parallel(model: TransformerBridge, layer: int) -> bool:
    """Return whether the layer's MLP reads what its attention reads, not what that adds."""
    return _is_parallel(model.blocks[layer])


def _is_parallel(block: Any) -> bool:
    return "Parallel" in type(block).__name__


def _resid_mid(block: Any, layer: int) -> Place:
    prefix = f"blocks.{layer}."
    if "mlp" not in block.submodules:
        raise MissingSiteError(
            f"resid_mid does not exist: layer {layer} has no MLP, so nothing lies between. "
            "Use resid_post."
        )
    if is_post_norm(block):
        return Place("resid_mid", layer, prefix + "ln1.hook_out")
    if _is_parallel(block):
        raise MissingSiteError(
            f"resid_mid does not exist: attention and MLP of layer {layer} run in parallel "
            "and read the same residual stream. Use resid_pre or resid_post."
        )
    # transformer-lens 4.3 names the input of ln2, which the skip connection bypasses: an edit
    # there changes what the MLP reads but not the stream. What attention adds reaches both.
    return Place("resid_mid", layer, prefix + _attn_out_hook(block), "sum", prefix + "hook_in")


def _attn_out_hook(block: Any) -> str:
    if is_post_norm(block):
        return "attn.o.hook_out"
    return "ln1_post.hook_out" if "ln1_post" in block.submodules else "attn.hook_out"


def _mlp_out_hook(block: Any) -> str:
    if "ln2_post" in block.submodules:
        return "ln2_post.hook_out"
    # Without an MLP module of its own (BERT, OPT) only the second projection is called.
    return "mlp.out.hook_out" if block.mlp.name is None else "mlp.hook_out"


def _reconstructs_attention(attn: Any) -> bool:
    """Whether the bridge computes the attention itself, so its inner hooks are live."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    return type(attn).forward is not AttentionBridge.forward


def _takes_pattern_function(attn: Any) -> bool:
    return bool(getattr(attn.original_component, "accepts_pattern_fn", False))


def site_layers(model: TransformerBridge, site: str) -> list[int]:
    """Return the layers at which the architecture has ``site`` (``[]`` for ``embed``)."""
    check_site_name(site)
    if site == "embed":
        return []
    found = []
    for layer in range(len(model.blocks)):
        try:
            locate(model, site, layer)
        except MissingSiteError:
            continue
        found.append(layer)
    return found


def resolve_layers(
    model: TransformerBridge, site: str, layers: int | Sequence[int] | None = None
) -> list[int | None]:
    """Return the layers to act on: those asked for, or all that have the site.

    Negative layers count from the end; ``embed`` gives ``[None]``.

    Raises:
        ValueError: A layer is out of range, or named twice.
        MissingSiteError: A layer lacks the site, or no layer has it.
    """
    if site == "embed":
        if layers is not None:
            raise ValueError("embed has no layers. Leave layers out.")
        return [None]
    if layers is None:
        found = site_layers(model, site)
        if not found:
            locate(model, site, 0)  # raises the reason
        return list(found)
    n_layers = len(model.blocks)
    asked = [layers] if isinstance(layers, int) else list(layers)
    if not asked:
        raise ValueError("layers is empty. Name at least one layer, or leave it out for all.")
    for layer in asked:
        if not -n_layers <= layer < n_layers:
            raise ValueError(
                f"layer {layer} does not exist: the model has layers 0..{n_layers - 1}."
            )
    resolved = [layer % n_layers for layer in asked]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"layers {asked} names a layer twice. Name each once.")
    for layer in resolved:
        locate(model, site, layer)
    return list(resolved)


def n_heads(model: TransformerBridge, site: str, layer: int) -> int:
    """Return how many heads ``site`` has at ``layer``: key/value heads for ``k`` and ``v``.

    Read off the layer's own weights, since layers of pruned and hybrid models differ.
    """
    attn, cfg = model.blocks[layer].attn, model.cfg
    if _has_no_heads(attn):
        return 0
    projection = attn.k if head_axis(site) == "kv_head" else attn.o
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise MissingSiteError(
            f"{site} has no heads at layer {layer}: its attention "
            f"({type(attn).__name__}) has no projection to count them by."
        )
    return weight.numel() // (cfg.d_model * cfg.d_head)


def key_heads(model: TransformerBridge, layer: int) -> list[int]:
    """Return for each query head of ``layer`` the key/value head that it reads."""
    pruned = heads_left(model.blocks[layer].attn.original_component)
    if pruned is not None:
        return list(pruned.reads)
    queries, keys = n_heads(model, "q", layer), n_heads(model, "k", layer)
    return [head // (queries // keys) for head in range(queries)]


def is_headless(model: TransformerBridge, layer: int) -> bool:
    """Return whether all heads of the layer were pruned, so that its bias alone is left."""
    return _has_no_heads(getattr(model.blocks[layer], "attn", None))


def _has_no_heads(attn: Any) -> bool:
    pruned = heads_left(getattr(attn, "original_component", None))
    return pruned is not None and not pruned.queries


def n_neurons(model: TransformerBridge, layer: int | None) -> int:
    """Return how many neurons the MLP of ``layer`` has."""
    return model.blocks[layer].mlp.out.weight.numel() // model.cfg.d_model


def resolve_heads(
    model: TransformerBridge, site: str, layer: int | None, heads: int | Sequence[int] | None
) -> list[int] | None:
    """Return the heads to act on at ``layer``, or None when the site has no head axis.

    Raises:
        ValueError: The site has no heads, or one asked for is out of range or named twice.
    """
    axis = head_axis(site)
    if axis is None or layer is None:
        if heads is not None:
            raise ValueError(f"{site} has no head axis. Leave heads out.")
        return None
    count = n_heads(model, site, layer)
    if heads is None:
        return list(range(count))
    asked = [heads] if isinstance(heads, int) else list(heads)
    if not asked:
        raise ValueError("heads is empty. Name at least one head, or leave it out for all.")
    for head in asked:
        if not -count <= head < count:
            kind = "key/value heads" if axis == "kv_head" else "heads"
            raise ValueError(
                f"head ({layer}, {head}) does not exist: layer {layer} has {kind} "
                f"0..{count - 1}."
            )
    resolved = [head % count for head in asked]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"heads {asked} names a head twice. Name each once.")
    return resolved
