"""How nodes are scored: a gradient times a change, and what mends the gradient's blind spots.

``atp`` takes the gradient at the base run. ``atp*`` takes the softmax again for queries and
keys, and lets the gradient skip one layer at a time. ``ig`` averages the gradient over a path
from the base run to the other one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.activations import Key
from mechinterp.causal.nodes import Graph, Nodes, Spots, change, gathered, placed, products
from mechinterp.causal.softmax_change import change_of_each_key, change_of_keys, softmax_of
from mechinterp.hooks.observing import Attached
from mechinterp.sites import key_heads, n_heads, site_layers

Scores = Float[Tensor, "step prompt unit"]
Scorer = Callable[[Key, Tensor], Scores]

SOFTMAX_AGAIN = ("q", "k", "scores")  # sites whose patches go through the softmax
STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")  # no layer's own addition
_EMBED: Key = ("embed", None)


@dataclass(frozen=True, eq=False)
class Found:
    """Scores by metric and key, both runs' logits, and the metrics that have a gradient."""

    scores: dict[str, dict[Key, Scores]]
    answers: Mapping[str, Float[Tensor, "prompt d_vocab"]]
    moved: set[str] = field(default_factory=set)

    def add(self, metric: str, key: Key, scores: Scores) -> None:
        """Add to the scores of a metric at a key."""
        mine = self.scores.setdefault(metric, {})
        mine[key] = scores if key not in mine else mine[key] + scores


def atp(nodes: Nodes) -> Found:
    """Return ``(source - base) * gradient`` at the base run.

    Source: Nanda 2023, neelnanda.io/attribution-patching; Kramár et al. 2024, arXiv:2403.00745.
    """
    source = nodes.graph(nodes.source, nodes.keys, track=False)
    base = nodes.graph(nodes.base, nodes.keys)
    found = found_in(nodes, base, source)
    score = _by_product(nodes, base.values, source.values)
    for metric, towards in pulls(nodes, base, found):
        for key, gradient in base.gradients(nodes.keys, towards).items():
            found.add(metric, key, score(key, gradient))
    return found


def atp_star(nodes: Nodes, *, grad_drop: bool) -> Found:
    """Return the scores with the softmax taken again and, by ``grad_drop``, layers dropped.

    With a layer dropped, no gradient flows through what it adds to the residual stream. The
    sizes of the scores are averaged over the other layers (over all for the residual stream
    itself, which no layer owns), so that a direct and an indirect effect do not cancel.

    Source: Kramár et al. 2024, arXiv:2403.00745, equations 6 to 11.
    """
    source = nodes.graph(nodes.source, nodes.keys, track=False)
    drops, rehearsed = Drops(), {}
    put = drops.attached(nodes) if grad_drop else []
    ends: dict[int, Key] = {layer: ("resid_post", layer) for layer in drops.layers}
    if nodes.grid.site in SOFTMAX_AGAIN:
        at = nodes.at("pattern")
        keys = [*at, *nodes.at("scores"), *ends.values()]
        rehearse = _rehearsals(nodes, source.values, rehearsed)
        base = nodes.graph(nodes.base, keys, put=put, rehearse=rehearse)
        score = _by_softmax(nodes, base.values, rehearsed)
    else:
        at = nodes.keys
        keys = [*at, *(end for end in ends.values() if end not in at)]
        base = nodes.graph(nodes.base, keys, put=put)
        score = _by_product(nodes, base.values, source.values)
    found = found_in(nodes, base, source)
    for metric, towards in pulls(nodes, base, found):
        drops.layer = None
        whole = base.gradients(keys, towards)
        for key, node in zip(at, nodes.keys, strict=True):
            plain = score(key, whole[key])
            if not grad_drop:
                found.add(metric, node, plain)
                continue
            others = drops.others(node)
            unmoved = [layer for layer in others if not _feeds(node, layer)]
            found.add(metric, node, plain.abs() * len(unmoved) / len(others))
        # All that leads from below a layer to the logits passes the residual stream behind it,
        # where dropping that layer changes nothing yet.
        for layer, end in ends.items():
            drops.layer = layer
            fed = {k: n for k, n in zip(at, nodes.keys, strict=True) if _feeds(n, layer)}
            below = base.gradients(list(fed), whole[end], at=end) if fed else {}
            for key, gradient in below.items():
                share = score(key, gradient).abs() / len(drops.others(fed[key]))
                found.add(metric, fed[key], share)
    return found


def ig(nodes: Nodes, *, steps: int, interpolate: str) -> Found:
    """Return the change times the gradient averaged over a path, by the midpoint rule.

    With inputs, the embeddings of all positions go from the base run's to the source's; the
    scores of ``embed`` then sum to the difference of the two runs as steps grow. With
    activations, the swept places of one layer go together; their scores sum to the effect of
    patching all of them.

    Source: Sundararajan et al. 2017, arXiv:1703.01365; inputs: Hanna et al. 2024,
    arXiv:2403.17806, where the rule is the right Riemann sum, which converges more slowly.
    """
    path = [(number + 0.5) / steps for number in range(steps)]
    inputs = interpolate == "inputs"
    more = [_EMBED] if inputs and nodes.grid.site != "embed" else []
    source = nodes.graph(nodes.source, [*nodes.keys, *more], track=False)
    base = nodes.graph(nodes.base, nodes.keys, track=False)
    found = found_in(nodes, base, source)
    score = _by_product(nodes, base.values, source.values)
    for keys in [nodes.keys] if inputs else [[key] for key in nodes.keys]:
        for share in path:
            if inputs:
                put = [(_EMBED, partial(_between, source.values[_EMBED], share))]
            else:
                put = [(keys[0], _placing(nodes, keys[0], source.values[keys[0]], share))]
            graph = nodes.graph(nodes.base, keys, put=put)
            for metric, towards in pulls(nodes, graph, found):
                for key, gradient in graph.gradients(keys, towards).items():
                    found.add(metric, key, score(key, gradient) / steps)
    return found


class Drops:
    """Lets no gradient through what ``layer`` adds to the residual stream.

    ``layers`` are those that add anything.
    """

    def __init__(self) -> None:
        self.layer: int | None = None
        self.layers: list[int] = []

    def attached(self, nodes: Nodes) -> list[tuple[Key, Callable[[Tensor], Tensor]]]:
        """Return what has to be attached for it."""
        added: list[tuple[str, int]] = [
            (site, layer)
            for site in ("attn_out", "mlp_out")
            for layer in site_layers(nodes.manager.model, site)
        ]
        self.layers = sorted({layer for _, layer in added})
        return [(key, partial(self._see, key[1])) for key in added]

    def others(self, key: Key) -> list[int]:
        """Return the layers that the scores at a key are averaged over."""
        return [d for d in self.layers if key[0] in STREAM or d != key[1]]

    def _see(self, layer: int, own: Tensor) -> Tensor:
        out = own.clone()
        if out.requires_grad:
            out.register_hook(partial(self._through, layer))
        return out

    def _through(self, layer: int, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if layer == self.layer else gradient


def _feeds(node: Key, layer: int) -> bool:
    """Whether what a layer adds to the residual stream depends on a node of no such layer."""
    site, own = node
    return own is None or layer > own or (layer == own and site in ("resid_pre", "resid_mid"))


def found_in(nodes: Nodes, base: Graph, source: Graph) -> Found:
    """Return what holds no scores yet, with both runs' logits."""
    answers = {nodes.grid.base: base.answers.detach(), nodes.grid.source: source.answers}
    return Found({}, answers)


def pulls(nodes: Nodes, graph: Graph, found: Found) -> Iterator[tuple[str, Tensor]]:
    """Yield each metric and its gradient with respect to the logits."""
    targets = nodes.targets(found.answers["clean"])
    for metric in nodes.metrics:
        towards = nodes.towards(metric, graph.answers, targets)
        if bool((towards != 0).any()):
            found.moved.add(metric)
        yield metric, towards


def _by_product(
    nodes: Nodes, base: Mapping[Key, Tensor], source: Mapping[Key, Tensor]
) -> Scorer:
    return partial(_product, nodes, {k: base[k].detach() for k in nodes.keys}, source)


def _product(
    nodes: Nodes,
    base: Mapping[Key, Tensor],
    source: Mapping[Key, Tensor],
    key: Key,
    gradient: Tensor,
) -> Scores:
    site, spots = key[0], nodes.spots.to(gradient.device)
    own = gathered(site, base[key], spots.own)
    moved = change(site, own, gathered(site, source[key], spots.source))
    return products(site, moved, gathered(site, gradient, spots.own), spots.shown)


def _between(other: Tensor, share: float, own: Tensor) -> Tensor:
    return own + share * (other.to(own) - own)


def _placing(nodes: Nodes, key: Key, other: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    spots = nodes.spots.to(other.device)
    return partial(placed, key[0], other, spots, nodes.units(key[1]), share)


def _rehearsals(
    nodes: Nodes, source: Mapping[Key, Tensor], seen: dict[Key, Tensor]
) -> dict[int, Attached]:
    """Put the source's values into each layer alone, and keep the scores that come of it."""
    return {
        layer: [
            (key, _placing(nodes, key, source[key], 1.0)),
            (("scores", layer), partial(_keep, seen, ("scores", layer))),
        ]
        for key in nodes.keys
        if (layer := key[1]) is not None
    }


def _keep(seen: dict[Key, Tensor], key: Key, own: Tensor) -> None:
    seen[key] = own


def _by_softmax(
    nodes: Nodes, base: Mapping[Key, Tensor], rehearsed: Mapping[Key, Tensor]
) -> Scorer:
    """Return what scores queries, keys or scores by the gradient at the pattern.

    Raises:
        ValueError: A layer's pattern is not the softmax of its scores.
    """
    real = torch.arange(nodes.base.prompts.tokens.shape[1])[None, :]
    real = real < nodes.base.prompts.lengths[nodes.rows][:, None]
    for key in nodes.at("scores"):
        own, pattern = base[key].detach(), base["pattern", key[1]].detach()
        queries = real.to(own.device)[:, None, :, None]
        gap = (softmax_of(own) - pattern.double()).masked_fill(~queries, 0).abs().max()
        if float(gap) > 1e-2:
            raise ValueError(
                f"the pattern of layer {key[1]} is not the softmax of its scores (they differ "
                f"by {float(gap):.2g}), so the softmax cannot be taken again: an edit of the "
                "pattern is in force, or the attention has a sink. Use method='atp' or 'ig'."
            )
    return partial(_softmaxed, nodes, base, rehearsed, real)


def _softmaxed(
    nodes: Nodes,
    base: Mapping[Key, Tensor],
    rehearsed: Mapping[Key, Tensor],
    real: Bool[Tensor, "prompt pos"],
    key: Key,
    gradient: Tensor,
) -> Scores:
    own, other = base["scores", key[1]].detach(), rehearsed["scores", key[1]]
    spots = nodes.spots.to(own.device)
    if nodes.grid.site != "k":  # a query has its row of the pattern to itself
        moved = softmax_of(other) - softmax_of(own)
        there = gathered("pattern", moved, spots.own)
        return products("pattern", there, gathered("pattern", gradient, spots.own), spots.shown)
    gradient = gradient.masked_fill(~real.to(own.device)[:, None, :, None], 0)
    if spots.own.shape[2] == 1:
        each = change_of_each_key(own, other, gradient).movedim(1, 2)  # prompt, key, head
        prompt = torch.arange(len(each), device=each.device)[None, :]
        found = each[prompt, spots.own[:, :, 0]].masked_fill(~spots.shown, 0)
    else:
        found = torch.stack(
            [
                change_of_keys(own, other, gradient, mask)
                for mask in _keys_of_steps(spots, own.shape[-1])
            ]
        )
    assert key[1] is not None
    model = nodes.manager.model
    read = torch.tensor(key_heads(model, key[1]), device=found.device)
    each = found.new_zeros(*found.shape[:2], n_heads(model, "k", key[1]))
    return each.index_add(2, read, found)


def _keys_of_steps(spots: Spots, width: int) -> Iterator[Bool[Tensor, "prompt pos"]]:
    for own in spots.own:
        columns = torch.nn.functional.one_hot(own + 1, width + 1).bool().any(1)
        yield columns[:, 1:]
