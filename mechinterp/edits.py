"""Edits: one change at one site, as plain data.

An edit says where (site, layers, heads, positions) and what (its class and fields). It hashes,
compares and goes to JSON with its tensors in safetensors beside it, so the same edit runs from
a notebook, a script and the command line. ``Apply``, a free function, is the one kind that
cannot be stored. ``HookManager.edit`` puts edits in force.

An edit's ``new`` gets the selected activations, one row per selected position, and returns
what to put there: ``[row, d]``, or ``[row, head, d]`` where the site has heads (``d`` is the
key position on ``scores`` and ``pattern``).
"""

import hashlib
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechinterp._files import written_beside
from mechinterp.activations import Activations
from mechinterp.draws import normal_at
from mechinterp.names import unknown
from mechinterp.sites import AXES, check_site_name, head_axis
from mechinterp.tasks.positions import PositionSpec

Ints = int | Sequence[int] | None
FORMAT = "mechinterp edits 1"


@dataclass(frozen=True)
class Selected:
    """Where the rows that an edit's ``new`` receives come from, as parallel index tensors.

    ``own`` and ``source`` are positions in the prompt's own coordinates, on the run that is
    edited and on the run that the edit reads from; ``heads`` are the heads or neurons.
    """

    layer: int | None
    prompt: Int[Tensor, " row"]
    own: Int[Tensor, " row"]
    source: Int[Tensor, " row"]
    heads: tuple[int, ...] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit(ABC):
    """Where an edit acts. Its class says what it does there.

    ``layers``, ``heads`` and ``neurons`` are one index, several, or None for all; ``positions``
    are as everywhere; on ``scores`` and ``pattern`` they are query positions, and
    ``key_positions`` the keys.
    """

    kind: ClassVar[str]

    site: str = field(kw_only=False)
    layers: Ints = None
    heads: Ints = None
    neurons: Ints = None
    positions: PositionSpec = "all"
    key_positions: PositionSpec = "all"

    def __post_init__(self) -> None:
        check_site_name(self.site)
        for name in ("layers", "heads", "neurons"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                object.__setattr__(self, name, tuple(int(v) for v in value))
        for name in ("positions", "key_positions"):
            value = getattr(self, name)
            if not isinstance(value, str | int | slice):
                object.__setattr__(self, name, tuple(value))
        if self.heads is not None and head_axis(self.site) is None:
            raise ValueError(f"{self.site} has no head axis. Leave heads out.")
        if self.neurons is not None and self.site != "mlp_post":
            raise ValueError(
                f"neurons are at mlp_post, not at {self.site}. "
                "Leave neurons out, or edit mlp_post."
            )
        if self.key_positions != "all" and "key_pos" not in AXES[self.site]:
            raise ValueError(f"{self.site} has no key positions. They are for scores, pattern.")

    @abstractmethod
    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return what to put in place of ``own``."""

    @property
    def reads(self) -> Activations | None:
        """The captured run that this edit takes its values from, if it does."""
        source = getattr(self, "source", None)
        return source if isinstance(source, Activations) else None

    @property
    def positional(self) -> bool:
        """Whether it puts in each position a value of its own, so that it ends with them."""
        return False

    def to_dict(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the edit as JSON values; its tensors go to ``tensors`` under their sha256.

        Raises:
            TypeError: The edit is an ``Apply``: a function cannot be stored.
        """
        tensors = {} if tensors is None else tensors
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"kind": self.kind} | {k: _encode(v, tensors) for k, v in own.items()}

    @property
    def key(self) -> str:
        """The edit's identity: equal for edits that do the same at the same place."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False, kw_only=True)
class Zero(Edit):
    """Put zeros there."""

    kind = "zero"

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return zeros."""
        return torch.zeros_like(own)


@dataclass(frozen=True, eq=False, kw_only=True)
class Replace(Edit):
    """Put a value there: a number, a tensor, or what another run had.

    A tensor with as many axes as the site is read by prompt and position like another run
    (its prompt axis may be 1); one with fewer is broadcast against the selected activations.
    ``Activations`` are read at ``source_positions``, which default to ``positions``: the nth
    selected position takes the nth one of the source. Where a span has another length in the
    source, ``align="last"`` pairs the spans from their ends.

    A number of ``-inf`` at ``scores`` knocks attention out between the chosen queries and keys.
    """

    kind = "replace"
    source: float | Tensor | Activations = field(kw_only=False)
    source_positions: PositionSpec | None = None
    align: Literal["exact", "last"] = "exact"

    @property
    def positional(self) -> bool:
        """True unless the source is a number or is broadcast."""
        if isinstance(self.source, Tensor):
            return self.source.ndim == len(AXES[self.site])
        return isinstance(self.source, Activations)

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return the source's values at the rows."""
        source = self.source
        if not isinstance(source, Tensor | Activations):
            return torch.full_like(own, source)
        if isinstance(source, Tensor):
            if not self.positional:
                return _broadcast(source.to(own), own, self.site)
            source = Activations.of_tensor(self.site, rows.layer, source)
        found = source.rows(self.site, rows.layer, rows.prompt, rows.source, rows.heads)
        return _fit_keys(found.to(own), own, self.site)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mean(Edit):
    """Put the mean over a dataset there: per head, or per head and position.

    ``source`` are activations of the dataset. Without ``per_position`` every stored position
    of every prompt counts once; with it, each position gets the mean over the prompts that
    reach it.
    """

    kind = "mean"
    source: Activations = field(kw_only=False)
    per_position: bool = False

    @property
    def positional(self) -> bool:
        """Whether the mean is per position."""
        return self.per_position

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return the mean, once per row."""
        if self.per_position:
            return self.source.position_means(
                self.site, rows.layer, rows.source, rows.heads
            ).to(own)
        mean = self.source.mean(self.site, rows.layer, rows.heads)
        return mean.to(own).expand_as(own)


@dataclass(frozen=True, eq=False, kw_only=True)
class Resample(Edit):
    """Put there what a random prompt of a dataset has at the same position.

    Each prompt draws one donor among the source's prompts that store the positions it needs;
    the draw depends on ``seed`` and on the prompt's row alone. With ``others_only``, where the
    source are the very prompts that are run, a prompt draws itself only where no other stores
    its positions.
    """

    kind = "resample"
    source: Activations = field(kw_only=False)
    seed: int = 0
    others_only: bool = False

    @property
    def positional(self) -> bool:
        """True: a donor's value belongs to its position."""
        return True

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return the donors' values."""
        donors = torch.empty_like(rows.prompt)
        for prompt in rows.prompt.unique().tolist():
            mine = rows.prompt == prompt
            donors[mine] = self.donor(prompt, rows.source[mine].tolist())
        return self.source.rows(self.site, rows.layer, donors, rows.source, rows.heads).to(own)

    def donor(self, prompt: int, positions: Sequence[int]) -> int:
        """Return the prompt of the source that gives ``prompt`` its values.

        Raises:
            ValueError: No prompt of the source stores all the positions.
        """
        able = self.source.prompts_with(positions)
        if not able:
            raise ValueError(
                f"no prompt of the resampling data has all positions that prompt {prompt} "
                f"needs ({list(positions)}). Give longer prompts, or positions that exist in "
                "them."
            )
        if self.others_only:
            able = [each for each in able if each != prompt] or able
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + prompt)
        return able[int(torch.randint(len(able), (1,), generator=generator))]

    def donors(self, positions: Sequence[Sequence[int]]) -> Activations:
        """Return what each prompt's donor has, drawn for the positions that the prompt needs.

        Raises:
            ValueError: The source has not been computed, or has no donor.
        """
        source = self.source
        if not len(source):
            raise ValueError(
                "resampling draws on activations that are there. Capture them first: "
                "HookManager(model).capture(...)."
            )
        chosen = [self.donor(prompt, mine) for prompt, mine in enumerate(positions)]
        layers = [self.layers] if isinstance(self.layers, int) else self.layers
        kept = [k for k in source if k[0] == self.site and (not layers or k[1] in layers)]
        return Activations(
            stored={key: source[key][chosen] for key in kept or source},
            index=source.index[chosen],
            lengths=tuple(source.lengths[donor] for donor in chosen),
            heads=source.heads,
            info=source.info,
        )

    def drawn(self, given: Activations) -> Replace:
        """Return the edit as a replacement by what its donors have."""
        where = {f.name: getattr(self, f.name) for f in fields(Edit)}
        return Replace(where.pop("site"), given, **where)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Edit):
    """Multiply by a factor."""

    kind = "scale"
    factor: float = field(kw_only=False)

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return ``own`` times the factor."""
        return own * self.factor


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Edit):
    """Add ``scale`` times a direction (steering). The direction is ``[d]`` or ``[head, d]``."""

    kind = "add"
    direction: Tensor = field(kw_only=False)
    scale: float = 1.0

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return ``own`` plus the scaled direction."""
        return own + self.scale * _broadcast(self.direction.to(own), own, self.site)


@dataclass(frozen=True, eq=False, kw_only=True)
class Noise(Edit):
    """Add Gaussian noise of standard deviation ``scale``, in the unit of the activations.

    Each component has a draw of its own, which depends on ``seed``, the site and layer, the
    prompt's row in the data, the position, the head and the component, and on nothing else:
    not on batches, padding, the device or the dtype (beyond rounding), nor on other prompts.
    So prompts of the same tokens differ, and choosing other prompts of a task draws anew.
    """

    kind = "noise"
    scale: float = field(kw_only=False)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(
                f"scale={self.scale} is no standard deviation of noise. Pass 0 or more."
            )
        if "key_pos" in AXES[self.site]:
            raise ValueError(
                f"noise is drawn per component, and {self.site} has keys instead. Add it at "
                "q or k, of which the scores are made."
            )

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return ``own`` plus the noise."""
        noise = torch.from_numpy(self.scale * self.draws(rows, own.shape[-1]))
        return own + noise.to(own.dtype).to(own.device)  # not every device has float64

    def draws(self, rows: Selected, size: int) -> Float[np.ndarray, "row ..."]:
        """Return the rows' standard normal numbers, for ``size`` components or the neurons."""
        where: list[Any] = [
            zlib.crc32(self.site.encode()),
            -1 if rows.layer is None else rows.layer,
        ]
        where += [index.cpu().numpy()[:, None] for index in (rows.prompt, rows.own)]
        components = np.arange(size)
        if head_axis(self.site) is not None:
            assert rows.heads is not None
            where = [at[..., None] if isinstance(at, np.ndarray) else at for at in where]
            where.append(np.array(rows.heads)[:, None])
        elif rows.heads is not None:  # neurons
            components = np.array(rows.heads)
        return normal_at(self.seed, *where, components)


@dataclass(frozen=True, eq=False, kw_only=True)
class Project(Edit):
    """Take a direction out: subtract the component along it. The direction is ``[d]``."""

    kind = "project"
    direction: Tensor = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction.ndim != 1 or not float(self.direction.norm()) > 0:
            raise ValueError(
                "the direction to project out must be one vector [d], not zero. "
                "Pass one, such as a difference of means."
            )

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return ``own`` without its component along the direction."""
        unit = self.direction.to(own)
        unit = unit / unit.norm()
        _broadcast(unit, own, self.site)
        return own - (own @ unit)[..., None] * unit


@dataclass(frozen=True, eq=False, kw_only=True)
class Apply(Edit):
    """Apply a function to the selected activations. The one kind that cannot be stored.

    ``function`` takes and returns ``[row, d]`` or ``[row, head, d]``; ``name`` stands for it in
    records and comparisons, so give different functions different names.
    """

    kind = "apply"
    function: Callable[[Tensor], Tensor] = field(kw_only=False)
    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            object.__setattr__(self, "name", getattr(self.function, "__name__", "function"))

    def new(self, own: Float[Tensor, "row ..."], rows: Selected) -> Float[Tensor, "row ..."]:
        """Return the function's value, checked to have the shape it was given."""
        out = self.function(own)
        if not isinstance(out, Tensor) or out.shape != own.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the function {self.name!r} returned {got}; it must return a tensor of the "
                f"shape it was given, {tuple(own.shape)}."
            )
        return out

    def to_dict(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Raise a ``TypeError``: a function cannot be stored."""
        raise TypeError(
            f"the edit applies the function {self.name!r}, and a function cannot be stored. "
            "Use one of the other kinds: Replace, Zero, Mean, Resample, Scale, Add, Noise, "
            "Project."
        )

    @property
    def key(self) -> str:
        """The edit's identity within this process."""
        own = {f.name: repr(getattr(self, f.name)) for f in fields(self)}
        return json.dumps({"kind": self.kind} | own, sort_keys=True)


KINDS: dict[str, type[Edit]] = {
    cls.kind: cls for cls in (Zero, Replace, Mean, Resample, Scale, Add, Noise, Project, Apply)
}


def save_edits(edits: Sequence[Edit], path: str | Path) -> None:
    """Write edits as JSON to ``path``, their tensors to ``path`` with suffix safetensors.

    Raises:
        TypeError: One of them is an ``Apply``; nothing is written.
        ValueError: ``path`` ends in safetensors itself.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is where the tensors go. Give the JSON file another suffix.")
    tensors: dict[str, Tensor] = {}
    listed = [edit.to_dict(tensors) for edit in edits]
    document = {"format": FORMAT, "edits": listed}
    with ExitStack() as both:  # both files are whole before either takes its place
        text = both.enter_context(written_beside(path))
        text.write_text(json.dumps(document, indent=1), encoding="utf-8")
        if tensors:
            store = both.enter_context(written_beside(path.with_suffix(".safetensors")))
            save_file({k: v.contiguous() for k, v in tensors.items()}, store)


def load_edits(path: str | Path) -> list[Edit]:
    """Return the edits that ``save_edits`` wrote.

    Raises:
        ValueError: The file is not an edits file, or a tensor is missing or was changed.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an edits file: {error!r}.") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, not {FORMAT!r}.")
    tensors: dict[str, Tensor] = {}
    beside = path.with_suffix(".safetensors")
    if beside.exists():
        try:
            with safe_open(beside, framework="pt") as store:
                tensors = {name: store.get_tensor(name) for name in store.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{beside} is cut short or not safetensors: {error}.") from error
        for name, tensor in tensors.items():
            if _sha256(tensor) != name:
                raise ValueError(
                    f"{beside} was changed: tensor {name[:12]}… has another hash. "
                    "Save the edits again."
                )
    try:
        return [edit_from_dict(each, tensors) for each in document["edits"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds something else than edits: {error!r}.") from error


def edit_from_dict(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    """Return the edit that ``Edit.to_dict`` described.

    Raises:
        ValueError: Unknown kind, or a tensor that ``tensors`` lacks.
    """
    own = dict(values)
    kind = own.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(unknown("kind of edit", kind, KINDS))
    return KINDS[kind](**{k: _decode(v, tensors) for k, v in own.items()})


def _broadcast(tensor: Tensor, own: Tensor, site: str) -> Tensor:
    try:
        return torch.broadcast_to(tensor, own.shape)
    except RuntimeError:
        raise ValueError(
            f"a tensor of shape {list(tensor.shape)} does not fit {site}: the selected "
            f"activations are {list(own.shape)} [row, …]. Pass [{own.shape[-1]}]"
            + (f" or {list(own.shape[1:])}." if own.ndim > 2 else ".")
        ) from None


def _fit_keys(found: Tensor, own: Tensor, site: str) -> Tensor:
    """Return attention over as many keys as ``own`` has; only padding is added or cut."""
    if "key_pos" not in AXES[site] or found.shape[-1] == own.shape[-1]:
        return found
    empty = 0.0 if site == "pattern" else torch.finfo(own.dtype).min
    width = own.shape[-1]
    if bool((found[..., width:] > max(empty, torch.finfo(own.dtype).min / 2)).any()):
        raise ValueError(
            f"the source's {site} reaches {found.shape[-1]} keys, but the run has {width}. "
            "Patch prompts of one length."
        )
    return torch.nn.functional.pad(found, (0, width - found.shape[-1]), value=empty)


def _sha256(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    head = f"{data.dtype} {list(data.shape)} ".encode()
    return hashlib.sha256(head + data.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _store(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    name = _sha256(tensor)
    tensors[name] = tensor.detach().cpu()
    return name


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": _store(value, tensors)}
    if isinstance(value, Activations):
        header, own = value.to_parts()
        return {
            "activations": header,
            "tensors": {k: _store(v, tensors) for k, v in own.items()},
        }
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, float) and not torch.isfinite(torch.tensor(value)):
        return {"float": str(value)}  # JSON has no infinity
    return [_encode(each, tensors) for each in value] if isinstance(value, tuple) else value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    def stored(name: str) -> Tensor:
        if name not in tensors:
            raise ValueError(
                f"the tensor {name[:12]}… of an edit is missing from its file. "
                "Save the edits again."
            )
        return tensors[name]

    if isinstance(value, list):
        return [_decode(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return stored(value["tensor"])
    if "activations" in value:
        own = {k: stored(name) for k, name in value["tensors"].items()}
        return Activations.from_parts(value["activations"], own)
    if "slice" in value:
        return slice(*value["slice"])
    return float(value["float"])
