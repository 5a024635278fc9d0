"""Activations: what a capture stored, labelled by site, layer, head, position and prompt.

Only what was asked for is stored: some sites, layers, heads and positions. Positions are in
each prompt's own coordinates; prompts of different lengths are padded on the right, and
``index`` says which position each slot holds. Files are safetensors and are read lazily.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechinterp._files import written_beside
from mechinterp.sites import AXES, check_site_name, head_axis
from mechinterp.tasks.positions import Roles

Key = tuple[str, int | None]
FORMAT = "mechinterp activations 1"


@dataclass(frozen=True, eq=False)
class Activations(Mapping[Key, Tensor]):
    """Captured activations: ``acts["z", 3]`` is ``[prompt, pos, head, d_head]``.

    Axes are those of ``sites.AXES`` with ``prompt`` for ``batch``; ``embed`` has layer None.
    ``index[prompt, slot]`` is the position that a slot of the position axis holds, or -1.
    ``heads`` are the heads stored per key, None where the site has none. ``gradients`` holds
    the gradient of the sum over prompts of a metric, where one was asked for. ``roles`` are
    the prompts' named spans, and ``info`` says which model and which beginning of sequence.
    """

    stored: Mapping[Key, Tensor]
    index: Int[Tensor, "prompt slot"]
    lengths: tuple[int, ...]
    heads: Mapping[Key, tuple[int, ...] | None]
    gradients: Mapping[Key, Tensor] = field(default_factory=dict)
    roles: Roles | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str | tuple[str, int | None]) -> Tensor:
        return self.stored[self._known(key)]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, key: object) -> bool:
        return key in self.stored

    def __repr__(self) -> str:
        stored = ", ".join(
            f"{site} at {len(layers)} layers" if layers != [None] else site
            for site, layers in self._layers_by_site().items()
        )
        size = f"{self.nbytes / 1e6:.1f} MB"
        return f"Activations({len(self.lengths)} prompts, {stored}, {size})"

    @property
    def nbytes(self) -> int:
        """Bytes of the stored activations and gradients."""
        return sum(t.nbytes for m in (self.stored, self.gradients) for t in m.values())

    @property
    def mask(self) -> Bool[Tensor, "prompt slot"]:
        """True where a slot holds a position of its prompt."""
        return self.index >= 0

    def rows(
        self,
        site: str,
        layer: int | None,
        prompt: Int[Tensor, " row"],
        position: Int[Tensor, " row"],
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "row ..."]:
        """Return the values at pairs of prompt and position, for the heads asked for.

        With a single stored prompt, every row reads that one.

        Args:
            site: Of the stored ones.
            layer: Of the stored ones; None for ``embed``.
            prompt: The prompt of each row.
            position: Its position, in the prompt's own coordinates.
            heads: Which heads; all by default.

        Raises:
            ValueError: A prompt, position or head is not stored.
        """
        key = self._known((site, layer))
        tensor = by_position(site, self.stored[key])
        row = self._prompt_rows(prompt)
        matches = self.index[row] == position.cpu()[:, None]
        if not bool(matches.any(1).all()):
            lacking = int((~matches.any(1)).nonzero()[0])
            raise ValueError(
                f"position {int(position[lacking])} of prompt {int(row[lacking])} is not among "
                f"the stored activations of {site}. Capture it, or edit other positions."
            )
        picked = tensor[row.to(tensor.device), matches.int().argmax(1).to(tensor.device)]
        return picked if heads is None else picked[:, self._head_slots(key, heads)]

    def has(self, prompt: Int[Tensor, " row"], position: Int[Tensor, " row"]) -> Tensor:
        """Return for each ``prompt`` and ``position`` whether it is stored: ``Bool[row]``."""
        return (self.index[self._prompt_rows(prompt)] == position.cpu()[:, None]).any(1)

    def mean(self, site: str, layer: int | None, heads: Sequence[int] | None = None) -> Tensor:
        """Return the mean over every stored position of every prompt.

        Args:
            site: Of the stored ones.
            layer: Of the stored ones; None for ``embed``.
            heads: Which heads; all by default.

        Raises:
            KeyError: The site or layer is not stored.
        """
        key = self._known((site, layer))
        tensor = by_position(site, self.stored[key])
        mean = tensor[self.mask.to(tensor.device)].double().mean(0).to(tensor.dtype)
        return mean if heads is None else mean[self._head_slots(key, heads)]

    def position_means(
        self,
        site: str,
        layer: int | None,
        position: Int[Tensor, " row"],
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "row ..."]:
        """Return, per row, the mean over the prompts that store the row's position.

        Args:
            site: Of the stored ones.
            layer: Of the stored ones; None for ``embed``.
            position: The position of each row.
            heads: Which heads; all by default.

        Raises:
            ValueError: No prompt stores one of the positions.
        """
        key = self._known((site, layer))
        tensor = by_position(site, self.stored[key])
        means = {}
        for pos in position.unique().tolist():
            here = (self.index == pos).to(tensor.device)
            if not bool(here.any()):
                raise ValueError(
                    f"no prompt of the averaged data reaches position {pos}, so {site} has no "
                    "mean there. Average longer prompts, or edit other positions."
                )
            means[pos] = tensor[here].double().mean(0).to(tensor.dtype)
        rows = torch.stack([means[pos] for pos in position.tolist()])
        return rows if heads is None else rows[:, self._head_slots(key, heads)]

    def prompts_with(self, positions: Sequence[int]) -> list[int]:
        """Return the prompts that store all of the positions."""
        wanted = torch.tensor(positions)
        stored = (self.index[:, None, :] == wanted[None, :, None]).any(2).all(1)
        return stored.nonzero().flatten().tolist()

    def to_xarray(self, site: str, *, gradients: bool = False) -> xr.DataArray:
        """Return one site as a labelled array with axes layer, prompt, position, head, ….

        With ``gradients``, the metric's gradient there. Slots without a position are NaN. Where
        prompts store different positions, the axis is ``slot`` and ``position`` is a coordinate
        over prompt and slot.
        """
        check_site_name(site)
        store = self.gradients if gradients else self.stored
        layers = self._layers_by_site().get(site)
        if layers is None:
            self._known((site, 0))
        assert layers is not None
        arrays = [self._labelled((site, layer), store[site, layer]) for layer in layers]
        if layers == [None]:
            return arrays[0]
        return xr.concat(arrays, dim="layer", join="outer").assign_coords(layer=layers)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file to ``path``: complete, or not at all."""
        header, tensors = self.to_parts()
        metadata = {"format": FORMAT, "header": json.dumps(header)}
        with written_beside(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Activations":
        """Return what ``save`` wrote to ``path``; each tensor is read when it is asked for.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is cut short, or not a file of activations.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no activation file {path}. Activations.save writes one."
            )
        try:
            with safe_open(path, framework="pt") as store:
                metadata = store.metadata() or {}
                ours = metadata.get("format") == FORMAT
                index = store.get_tensor("index") if ours else None
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is cut short or not a safetensors file ({error}). Capture again."
            ) from error
        if index is None:
            raise ValueError(
                f"{path} is a safetensors file, but not of activations: its format is "
                f"{metadata.get('format')!r}, not {FORMAT!r}."
            )
        return cls._from_header(json.loads(metadata["header"]), index, _Lazy(path))

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a JSON header and the named tensors, the two halves of a file."""
        keys = list(self.stored)
        header = {
            "keys": [list(key) for key in keys],
            "heads": [self.heads[key] and list(self.heads[key] or ()) for key in keys],
            "gradients": bool(self.gradients),
            "lengths": list(self.lengths),
            "roles": self.roles and {k: [list(s) for s in v] for k, v in self.roles.items()},
            "info": dict(self.info),
        }
        tensors = {"index": self.index}
        tensors |= {_name("value", key): self.stored[key] for key in keys}
        tensors |= {_name("gradient", key): value for key, value in self.gradients.items()}
        return header, tensors

    @classmethod
    def from_parts(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "Activations":
        """Return what ``to_parts`` took apart into ``header`` and ``tensors``."""
        return cls._from_header(header, tensors["index"], tensors)

    @classmethod
    def _from_header(
        cls, header: Mapping[str, Any], index: Tensor, tensors: Mapping[str, Tensor]
    ) -> "Activations":
        keys: list[Key] = [(site, layer) for site, layer in header["keys"]]
        heads = [None if h is None else tuple(h) for h in header["heads"]]
        roles = header["roles"]
        gradients = keys if header["gradients"] else []
        return cls(
            stored=_Named(tensors, "value", keys),
            index=index,
            lengths=tuple(header["lengths"]),
            heads=dict(zip(keys, heads, strict=True)),
            gradients=_Named(tensors, "gradient", gradients),
            roles=roles and {k: tuple((a, b) for a, b in v) for k, v in roles.items()},
            info=header["info"],
        )

    @classmethod
    def of_tensor(cls, site: str, layer: int | None, tensor: Tensor) -> "Activations":
        """Return one site-shaped tensor, every position of every prompt, as activations.

        Args:
            site: What the tensor is of.
            layer: Likewise; None for ``embed``.
            tensor: With the axes ``prompt`` and those of the site.
        """
        n, width = by_position(site, tensor).shape[:2]
        axis = head_axis(site)
        heads = None if axis is None else tuple(range(tensor.shape[AXES[site].index(axis)]))
        return cls(
            stored={(site, layer): tensor},
            index=torch.arange(width).expand(n, -1),
            lengths=(width,) * n,
            heads={(site, layer): heads},
        )

    def _known(self, key: str | tuple[str, int | None]) -> Key:
        site, layer = (key, None) if isinstance(key, str) else key
        check_site_name(site)
        if (site, layer) not in self.stored:
            there = "; ".join(f"{s} at {ls}" for s, ls in self._layers_by_site().items())
            raise KeyError(f"({site!r}, {layer}) was not captured. Captured: {there}.")
        return site, layer

    def _layers_by_site(self) -> dict[str, list[int | None]]:
        layers: dict[str, list[int | None]] = {}
        for site, layer in self.stored:
            layers.setdefault(site, []).append(layer)
        return layers

    def _prompt_rows(self, prompt: Tensor) -> Tensor:
        prompt = prompt.cpu()
        if len(self.lengths) == 1:
            return torch.zeros_like(prompt)
        if len(prompt) and int(prompt.max()) >= len(self.lengths):
            raise ValueError(
                f"the source has {len(self.lengths)} prompts, but the run has more. Give one "
                "source prompt for each, or a single one for all."
            )
        return prompt

    def _head_slots(self, key: Key, heads: Sequence[int]) -> list[int]:
        stored = self.heads[key]
        if stored is None:  # neurons: all are stored
            return list(heads)
        if lacking := sorted(set(heads) - set(stored)):
            raise ValueError(
                f"heads {lacking} of {key[0]} at layer {key[1]} are not stored, only "
                f"{list(stored)}. Capture them too."
            )
        return [stored.index(head) for head in heads]

    def _labelled(self, key: Key, tensor: Tensor) -> xr.DataArray:
        site, _ = key
        moved = by_position(site, tensor.detach().cpu().float())
        mask = self.mask.reshape(*self.mask.shape, *[1] * (moved.ndim - 2))
        array = torch.where(mask, moved, torch.nan).numpy()
        axes = ["prompt", "position", *[a for a in AXES[site] if a not in _MOVED]]
        coords: dict[str, Any] = {"prompt": np.arange(len(self.lengths))}
        axis, heads = head_axis(site), self.heads[key]
        if axis is not None and heads is not None:
            coords[axis] = list(heads)
        widest = self.index[self.mask.sum(1).argmax()]
        if bool(((self.index == widest) | ~self.mask).all()):
            coords["position"] = widest.numpy()
        else:
            axes[1] = "slot"
            coords["position"] = (("prompt", "slot"), self.index.numpy())
        return xr.DataArray(array, dims=axes, coords=coords, name=site)


_MOVED = ("batch", "pos", "query_pos")


def by_position(site: str, tensor: Tensor) -> Tensor:
    """Return the tensor with axes prompt and position first (``scores`` has heads second)."""
    return tensor.movedim(2, 1) if AXES[site][1] == "head" else tensor


def _name(kind: str, key: Key) -> str:
    site, layer = key
    return f"{kind}.{site}" if layer is None else f"{kind}.{site}.{layer}"


@dataclass(frozen=True, eq=False)
class _Named(Mapping[Key, Tensor]):
    """Tensors by site and layer, out of tensors by name."""

    tensors: Mapping[str, Tensor]
    kind: str
    keys_: Sequence[Key]

    def __getitem__(self, key: Key) -> Tensor:
        return self.tensors[_name(self.kind, key)]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)

    def __contains__(self, key: object) -> bool:
        return key in self.keys_


@dataclass(frozen=True, eq=False)
class _Lazy(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read when asked for."""

    path: Path

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as store:
            return store.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.path, framework="pt") as store:
            return iter(list(store.keys()))

    def __len__(self) -> int:
        return sum(1 for _ in self)
