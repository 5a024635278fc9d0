"""The catalogue of sites: what this model has, where, in what shape, proven by perturbation.

A hook that fires is not a hook that is used: on some architectures an edit of the attention
pattern changes nothing, without a word. So every entry is tried: perturb, see the logits move.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.hooks.taps import tap
from mechinterp.models import forward
from mechinterp.sites import AXES, SITES, MissingSiteError, Place, check_site_name, locate


@dataclass(frozen=True)
class SiteEntry:
    """One site on one model: where it is, its shape, and why not where it is missing.

    ``shape`` names free axes and gives the others' sizes; sizes that differ by layer are
    joined with ``/``. ``missing`` maps each layer without the site to the reason.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[str, ...]
    hook: str
    layers: tuple[int, ...]
    missing: dict[int, str]
    works: bool


@dataclass(frozen=True)
class SiteCatalogue:
    """Every site of one model, proven by perturbing it: index it by name, or print it."""

    model_name: str
    entries: tuple[SiteEntry, ...]

    @cached_property
    def _by_name(self) -> dict[str, SiteEntry]:
        return {entry.name: entry for entry in self.entries}

    def __getitem__(self, name: str) -> SiteEntry:
        check_site_name(name)
        return self._by_name[name]

    def __iter__(self) -> Iterator[SiteEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per site: name, axes, shape, hook, layers, and why not elsewhere."""
        return pd.DataFrame(
            [
                {
                    "site": e.name,
                    "works": e.works,
                    "shape": " ".join(e.shape),
                    "layers": _ranges(e.layers),
                    "hook": e.hook,
                    "why not": "; ".join(sorted(set(e.missing.values()))),
                }
                for e in self.entries
            ]
        )

    def __repr__(self) -> str:
        return f"Sites of {self.model_name}\n{self.to_frame().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(index=False, escape=True))


def _ranges(layers: Sequence[int]) -> str:
    """Return ``0..5, 7`` for 0, 1, 2, 3, 4, 5, 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs)


def sites(model: TransformerBridge) -> SiteCatalogue:
    """Return the catalogue of sites for this model, each entry proven by perturbation.

    Runs the model once for each site on rows of five tokens, one row per layer, each row
    perturbed at its own layer: a site works at a layer when that row's logits move.
    The model and its hooks are left as they were.
    """
    entries = []
    for name in SITES:
        places: list[Place] = []
        missing: dict[int, str] = {}
        for layer in [None] if name == "embed" else range(len(model.blocks)):
            try:
                places.append(locate(model, name, layer))
            except MissingSiteError as error:
                assert layer is not None
                missing[layer] = str(error)
        shapes, failures = _prove(model, places)
        missing.update({k: v for k, v in failures.items() if k is not None})
        working = [p for p in places if p.layer not in failures]
        entries.append(
            SiteEntry(
                name=name,
                axes=AXES[name],
                shape=_shape(name, [shapes[p.layer] for p in working]),
                hook=_hook_pattern(working),
                layers=tuple(p.layer for p in working if p.layer is not None),
                missing=dict(sorted(missing.items())),
                works=bool(working),
            )
        )
    return SiteCatalogue(str(model.cfg.model_name), tuple(entries))


def _shape(site: str, shapes: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    free = ("batch", "pos", "query_pos", "key_pos")
    return tuple(
        axis
        if axis in free or not shapes
        else f"{axis}=" + "/".join(map(str, sorted({shape[i] for shape in shapes})))
        for i, axis in enumerate(AXES[site])
    )


def _hook_pattern(places: Sequence[Place]) -> str:
    if not places:
        return ""
    first = places[0]
    name = first.hook.replace(f"blocks.{first.layer}.", "blocks.{layer}.")
    return f"softmax of {name}" if first.how.startswith("softmax") else name


@torch.no_grad()
def _prove(
    model: TransformerBridge, places: Sequence[Place]
) -> tuple[dict[int | None, tuple[int, ...]], dict[int | None, str]]:
    """Return each place's shape, and a reason for each place whose edits change nothing.

    Row ``i`` of one batch is perturbed at ``places[i]`` alone, so one run tries all layers.
    """
    if not places:
        return {}, {}
    generator = torch.Generator().manual_seed(0)
    low = min(4, model.cfg.d_vocab - 1)  # the first ids are often special (padding, for one)
    row = torch.randint(low, model.cfg.d_vocab, (1, 5), generator=generator)
    tokens = row.expand(len(places), -1)
    base = forward(model, tokens)
    shapes: dict[int | None, tuple[int, ...]] = {}

    def perturb(index: int, place: Place):
        def edit(own: Tensor) -> Tensor:
            shapes[place.layer] = tuple(own.shape)
            noise = torch.randn(own[index].shape, generator=generator).to(own)
            new = own.clone()
            # Masked scores hold the lowest number there is; noise on them would overflow.
            visible = own[index] > torch.finfo(own.dtype).min / 2
            scale = own[index][visible].float().std().nan_to_num(1.0) + 0.1
            new[index] = torch.where(visible, own[index] + scale.to(own) * noise, own[index])
            return new

        return edit

    removers = [tap(model, place, perturb(i, place)) for i, place in enumerate(places)]
    try:
        moved = (forward(model, tokens) - base).abs().flatten(1).amax(1)
    finally:
        for remove in removers:
            remove()
    failures: dict[int | None, str] = {}
    for i, place in enumerate(places):
        if place.layer not in shapes:
            failures[place.layer] = f"{place.site} at {place.hook} never fires on this model."
        elif not moved[i] > 0:
            failures[place.layer] = (
                f"{place.site} at {place.hook} fires, but edits there do not reach the logits."
            )
    return shapes, failures
