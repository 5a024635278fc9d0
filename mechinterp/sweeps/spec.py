"""The spec of a sweep: what to run on what, as typed data from YAML, TOML or a mapping.

Lists make a grid. Files are read as plain data: a tag that would build a Python object is an
error, so is a key that does not exist. Nothing here loads a model.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mechinterp.names import unknown
from mechinterp.sweeps.spec_errors import explained

_MOST_BYTES = 1_000_000
_T = TypeVar("_T")


def _listed(given: Any) -> Any:
    return given if isinstance(given, list | tuple) else [given]


class _OneOrMany:
    """Says in the JSON schema what the validator takes: one, or a list of them."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        several = handler(core)
        return {"anyOf": [several["items"], several]}


class _OrShort:
    """Says in the JSON schema that a part can be written as a name alone."""

    def __init__(self, **short: Any) -> None:
        self.short = short

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [self.short, handler(core)]}


Many = Annotated[tuple[_T, ...], BeforeValidator(_listed), Field(min_length=1), _OneOrMany()]
Count = Annotated[int, Field(gt=0)]
Direction = Literal["denoising", "noising"]
Kind = Literal["zero", "mean", "position_mean", "resample", "corrupted"]
Variant = Literal["atp", "atp*", "ig", "eap", "eap-ig"]
Ranking = Literal["ablation", "gradient", "hard_concrete", "redundancy", "shapley", "random"]
Positions = str | int | tuple[str | int, ...]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


class _Part(BaseModel):
    """No unknown keys, no changes, no guessing of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Model(_Part):
    """Where a model comes from, and how it is read.

    Whether pickled weights or a model's own code may be read is asked on the command line and
    nowhere else: a spec is something that one is sent.
    """

    source: str = Field(
        description="embedded, smollm2-135m, a hub name, a folder, a .gguf file"
    )
    dtype: Dtype = Field("float32", description="what files are read as")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    device_map: str | None = Field(None, description="auto: spread over devices (accelerate)")


class Split(_Part):
    """How the work of one call is cut into items; part of what an item is."""

    prompts: Count | None = Field(None, description="prompts of one item; all by default")
    layers: Count | None = Field(None, description="layers of one item; all by default")


class _Method(_Part):
    split: Split | None = Field(None, description="of this method, instead of the spec's own")

    def splits(self, call: Mapping[str, Any]) -> frozenset[str]:
        """Return the ways in which a call of the grid can be cut."""
        return frozenset()

    @model_validator(mode="after")
    def _can_be_split_so(self) -> "_Method":
        asked = self.split.model_dump(exclude_none=True) if self.split else {}
        splits = frozenset[str]().union(*map(self.splits, self.grid()))
        if wrong := sorted(asked.keys() - splits):
            can = ", ".join(sorted(splits)) or "nothing"
            raise ValueError(f"cannot be split by {wrong[0]}, but by {can}")
        return self

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments of each call of the method."""
        raise NotImplementedError


class ActivationPatching(_Method):
    """``mi.activation_patching``, a call per site and direction."""

    method: Literal["activation_patching"]
    sites: Many[str] = Field(description="z, resid_pre, mlp_out, ...")
    directions: Many[Direction] = ("denoising",)
    positions: Positions = Field("each", description="each, all, a role, numbers, or a list")
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    align: Literal["exact", "last"] = "exact"
    windows: Many[Count] = (1,)

    def splits(self, call: Mapping[str, Any]) -> frozenset[str]:
        """By prompts or by layers."""
        return frozenset({"prompts", "layers"})

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield one call per site, direction and window."""
        rest = {"positions": _plain(self.positions), "align": self.align}
        rest |= {"layers": _plain(self.layers), "heads": _plain(self.heads)}
        for site in self.sites:
            for direction in self.directions:
                for window in self.windows:
                    yield {"site": site, "direction": direction, "window": window, **rest}


class AttributionPatching(_Method):
    """``mi.attribution_patching``, a call per site, direction and variant."""

    method: Literal["attribution_patching"]
    variants: Many[Variant] = ("atp",)
    sites: Many[str] | None = Field(None, description="of nodes; edges (eap) have none")
    directions: Many[Direction] = ("denoising",)
    positions: Positions = "each"
    steps: Count | None = None
    batch_size: Count = 16

    def splits(self, call: Mapping[str, Any]) -> frozenset[str]:
        """By prompts: a gradient serves all layers."""
        return frozenset({"prompts"})

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield one call per variant, site and direction."""
        for variant in self.variants:
            edges = variant.startswith("eap")
            for site in (None,) if edges else self.sites or (None,):
                for direction in self.directions:
                    told = {"method": variant, "site": site, "direction": direction}
                    told |= {"positions": _plain(self.positions)}
                    told |= {"batch_size": self.batch_size}
                    if self.steps is not None and "ig" in variant:
                        told["steps"] = self.steps
                    yield told


class _Ablation(_Method):
    kinds: Many[Kind] = ("zero",)

    def splits(self, call: Mapping[str, Any]) -> frozenset[str]:
        """By layers; by prompts too, unless stand-ins are drawn from them."""
        return frozenset({"layers"} if call["kind"] == "resample" else {"prompts", "layers"})

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield one call per kind."""
        for kind in self.kinds:
            yield {"kind": kind}


class HeadAblation(_Ablation):
    """``mi.head_ablation`` of every head by itself, a call per kind."""

    method: Literal["head_ablation"]


class MlpAblation(_Ablation):
    """``mi.mlp_ablation`` of every layer's MLP by itself, a call per kind."""

    method: Literal["mlp_ablation"]


class PruningCurveOf(_Method):
    """``mi.pruning_curve``, a call per ranking and kind."""

    method: Literal["pruning_curve"]
    rankings: Many[Ranking] = ("gradient",)
    kinds: Many[Kind] = ("zero",)
    steps: Count = 20
    rescore: bool = True
    min_heads_per_layer: Annotated[int, Field(ge=0)] = 0
    draws: Count = 20
    options: dict[Ranking, dict[str, Any]] = Field(
        default_factory=dict, description="more for mi.head_importance, by ranking"
    )

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield one call per ranking and kind."""
        rest = {"steps": self.steps, "rescore": self.rescore, "draws": self.draws}
        rest |= {"min_heads_per_layer": self.min_heads_per_layer}
        for ranking in self.rankings:
            told = {"method": ranking, "options": dict(self.options.get(ranking, {}))}
            for kind in self.kinds:
                yield {**told, "kind": kind, **rest}


class HeadScoresOf(_Method):
    """``mi.head_scores``, on random tokens, or on the spec's data."""

    method: Literal["head_scores"]
    on: Literal["random_tokens", "data"] = "random_tokens"
    kinds: Many[str] | None = None
    n: Count = 50
    length: Count = 25
    copies: Count = 4
    nulls: Annotated[int, Field(ge=0)] = 1

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield the one call."""
        told: dict[str, Any] = {"kinds": _plain(self.kinds), "nulls": self.nulls}
        if self.on == "random_tokens":
            told |= {"n": self.n, "length": self.length, "copies": self.copies}
        yield told


class LogitLensOf(_Method):
    """``mi.logit_lens``, a call per site."""

    method: Literal["logit_lens"]
    sites: Many[str] = ("resid_post",)
    positions: Positions | None = None

    def splits(self, call: Mapping[str, Any]) -> frozenset[str]:
        """By prompts."""
        return frozenset({"prompts"})

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield one call per site."""
        for site in self.sites:
            yield {"site": site, "positions": _plain(self.positions)}


METHODS: dict[str, type[_Method]] = {
    "activation_patching": ActivationPatching,
    "attribution_patching": AttributionPatching,
    "head_ablation": HeadAblation,
    "mlp_ablation": MlpAblation,
    "pruning_curve": PruningCurveOf,
    "head_scores": HeadScoresOf,
    "logit_lens": LogitLensOf,
}


def _as_model(given: Any) -> Any:
    return {"source": given} if isinstance(given, str) else given


def _as_method(given: Any) -> Any:
    return {"method": given} if isinstance(given, str) else given


def _without_needs() -> list[str]:
    """Return the methods that a spec can name without saying more."""
    return [
        name
        for name, each in METHODS.items()
        if not any(f.is_required() for key, f in each.model_fields.items() if key != "method")
    ]


MethodSpec = Annotated[
    ActivationPatching
    | AttributionPatching
    | HeadAblation
    | MlpAblation
    | PruningCurveOf
    | HeadScoresOf
    | LogitLensOf,
    Field(discriminator="method"),
]


class Spec(_Part):
    """A sweep: models x data x prompt counts x seeds x metrics x methods."""

    name: str = Field("sweep", description="what the run is called")
    models: Many[Annotated[Model, BeforeValidator(_as_model), _OrShort(type="string")]]
    tasks: Many[str] | None = Field(
        None, description="built-in tasks, .jsonl files, or able: those the model can do"
    )
    texts: Many[str] | None = Field(None, description=".txt files, .jsonl of labelled texts")
    least_accuracy: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="how often a model must be right to be able to do a task"
    )
    prompts: Many[Count] | None = Field(
        None, description="prompts of each task; at most so many where tasks are able"
    )
    context: Count | None = Field(None, description="tokens of a piece of text")
    seeds: Many[int] = Field((0,), description="which prompts are drawn, and what else is")
    metrics: Many[str] | None = Field(None, description="the data's own by default")
    methods: Many[
        Annotated[MethodSpec, BeforeValidator(_as_method), _OrShort(enum=_without_needs())]
    ]
    split: Split = Field(
        Split(prompts=None, layers=None), description="how calls are cut into items"
    )
    memory: str = Field("1GB", description="what a call may take beside the model")
    export: str | None = Field(
        None, description="table of all numbers, a .csv or .parquet in the run's folder"
    )

    @property
    def model_names(self) -> list[str]:
        """What tables call each of the models: the end of its source, where that is enough."""
        sources = [model.source for model in self.models]
        return [_short(source, sources) for source in sources]

    def data_name(self, name: str) -> str:
        """Return what tables call a task or text: the file's name, where that is enough."""
        return _short(name, [*(self.tasks or ()), *(self.texts or ())])

    @field_validator("export")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        if path is None:
            return None
        posix, windows = PurePosixPath(path), PureWindowsPath(path)
        away = posix.is_absolute() or windows.drive or windows.root or "~" in path
        if away or ".." in (*posix.parts, *windows.parts):
            raise ValueError(f"{path!r} leaves the run's folder. Give a name inside it")
        if posix.suffix not in (".csv", ".parquet"):
            raise ValueError(f"{path!r} must end in .csv or .parquet")
        return path

    @model_validator(mode="after")
    def _has_data(self) -> "Spec":
        without = all(isinstance(m, HeadScoresOf) and m.on != "data" for m in self.methods)
        if not (self.tasks or self.texts or without):
            raise ValueError("names no data. Give tasks: or texts:")
        return self


def read_spec(given: "Spec | Mapping[str, Any] | str | PathLike[str]") -> Spec:
    """Return the spec in a mapping or in a YAML or TOML file.

    Paths in a file that begin with ``./`` or ``../`` are meant from the file's own folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML or TOML, wants a Python object built, names a key that does
            not exist (the message names the nearest that does), or a value does not fit.
    """
    if isinstance(given, Spec):
        return given
    if isinstance(given, Mapping):
        return _validated(given, "the spec")
    path = Path(given).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = [name for name in beside if name.endswith((".yaml", ".yml", ".toml"))]
        raise FileNotFoundError(unknown("spec file", path.name, near[:20]))
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has over a megabyte, which no spec has. Name another file.")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        try:
            found: Any = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}.") from error
    elif path.suffix in (".yaml", ".yml"):
        found = _yaml(text, path)
    else:
        raise ValueError(f"{path} is no spec: give it the ending .yaml, .yml or .toml.")
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no keys. `mechinterp init` writes one to start from.")
    return _validated(_from_here(dict(found), path.absolute().parent), str(path))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a spec, for editors that complete and check YAML."""
    schema = Spec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _validated(found: Mapping[str, Any], where: str) -> Spec:
    try:
        return Spec.model_validate(dict(found))
    except ValidationError as error:
        raise ValueError(explained(error, where, Spec, METHODS)) from None


class _Unique(yaml.SafeLoader):
    """YAML as plain data, in which a key stands once."""


def _mapping(loader: _Unique, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=deep) for key, _ in node.value]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise yaml.constructor.ConstructorError(
            None, None, f"the key {twice[0]!r} stands there twice", node.start_mark
        )
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Unique.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _yaml(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, Loader=_Unique)  # a SafeLoader: builds no Python objects
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        if "yaml.org,2002:python" in said:
            raise ValueError(
                f"{path} asks for a Python object to be built, which a spec cannot: {said}. "
                "Write plain names, numbers and lists."
            ) from error
        raise ValueError(f"{path} is not YAML: {said}.") from error


def _from_here(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the spec with its relative paths made absolute."""

    def placed(name: Any) -> Any:
        relative = isinstance(name, str) and name.startswith(("./", "../"))
        return str((folder / name).resolve()) if relative else name

    for key in ("tasks", "texts", "models"):
        if found.get(key) is not None:
            given = found[key]
            many = [
                {**each, "source": placed(each.get("source"))}
                if isinstance(each, Mapping)
                else placed(each)
                for each in _listed(given)
            ]
            found[key] = many
    return found


def _short(name: str, every: Iterable[str]) -> str:
    """Return the last part of a path, or the whole where another ends in the same."""

    def last(path: str) -> str:
        return PureWindowsPath(path).name or path  # parts at slashes of both kinds

    return name if any(last(o) == last(name) and o != name for o in every) else last(name)


def _plain(given: Any) -> Any:
    return list(given) if isinstance(given, tuple) else given
