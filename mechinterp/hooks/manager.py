"""The hook manager: capture activations, and put edits in force while a block runs.

    manager = mi.HookManager(model)
    acts = manager.capture(prompts, ["z", "resid_post"], layers=[3, 4])
    with manager.ablate("z", layers=3, heads=[1, 5]):
        logits = model(tokens)

Every block restores the model on any exit, and raises if an edit never ran or had nowhere to
act: a plausible number from an untouched model is the classic silent error of this field.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Activations, Key, by_position
from mechinterp.edits import Add, Edit, Mean, Replace, Resample, Zero
from mechinterp.hooks.capturing import Ints, Request, checked, located
from mechinterp.hooks.editing import Action
from mechinterp.hooks.observing import look, observe
from mechinterp.hooks.running import watch
from mechinterp.hooks.taps import tap
from mechinterp.metrics import Targets, resolve_metrics
from mechinterp.models import fingerprint
from mechinterp.sites import resolve_layers
from mechinterp.tasks.positions import PositionSpec
from mechinterp.tasks.run import answer_logits
from mechinterp.tasks.task import Task


class HookManager:
    """Captures and edits the activations of one model.

    Args:
        model: The model; it and the hooks that others set on it are left as they are.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model

    def capture(
        self,
        prompts: Any,
        sites: str | Sequence[str],
        *,
        layers: Ints = None,
        heads: Ints = None,
        positions: PositionSpec | None = None,
        gradient_of: str | Callable[..., Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 64,
    ) -> Activations:
        """Run the model on ``prompts`` and return the activations asked for, and no others.

        Args:
            prompts: Strings, tokens, ``Prompts``, or data that has them. Roles of a ``Task``
                may be named in ``positions``.
            sites: One site name or several.
            layers: Layers to store; all that have the site by default.
            heads: Heads (key/value heads for ``k``, ``v``) to store; all by default.
            positions: Positions to store; all by default. Query positions on ``scores`` and
                ``pattern``.
            gradient_of: A metric's name (then ``prompts`` is a ``Task``) or a function of the
                answer logits ``[prompt, d_vocab]`` and the targets (None for plain prompts),
                giving one value per prompt. Its gradients at the sites come along.
            dtype: Storage type, ``torch.float16`` for instance; the model's by default.
            device: Where to store; the model's device by default.
            batch_size: Prompts run at once; the numbers do not depend on it.

        Returns:
            One tensor per site and layer: ``acts["z", 3]`` has the axes ``prompt``, position
            and those of the site. ``to_xarray`` names them.

        Raises:
            ValueError: Something asked for does not exist, before anything runs; or an
                activation is NaN or infinite.
        """
        request = Request(self.model, prompts, sites, layers, heads, positions)
        metric = (
            None if gradient_of is None else _metric_of(gradient_of, prompts, request.lengths)
        )
        values: dict[Key, list[Tensor]] = {key: [] for key in request.keys}
        gradients: dict[Key, list[Tensor]] = {key: [] for key in request.keys}

        def keep(tensor: Tensor, key: Key, rows: slice) -> Tensor:
            kept = checked(key, request.stored(key, tensor, rows), rows)
            return kept.to(dtype=dtype or _dtype(self.model), device=device)

        for rows in _batches(len(request.prompts), batch_size):
            told = (self.model, request.prompts, rows, request.keys)
            found: dict[Key, Tensor] = {}
            with torch.set_grad_enabled(metric is not None):
                if metric is None:
                    seen = look(*told)
                else:
                    seen, logits = observe(*told, track=True)
                    found = _gradients(metric(logits, rows), seen)
            for key, tensor in seen.items():
                values[key].append(keep(tensor.detach(), key, rows))
            for key, gradient in found.items():
                gradients[key].append(keep(gradient, key, rows))
        return Activations(
            stored={key: torch.cat(parts) for key, parts in values.items()},
            index=request.index,
            lengths=request.lengths,
            heads=request.heads,
            gradients={key: torch.cat(parts) for key, parts in gradients.items() if parts},
            roles=request.roles,
            info=self._info() | {"bos": request.prompts.bos},
        )

    def estimate(
        self,
        prompts: Any,
        sites: str | Sequence[str],
        *,
        layers: Ints = None,
        heads: Ints = None,
        positions: PositionSpec | None = None,
        gradient_of: object = None,
        dtype: torch.dtype | None = None,
    ) -> int:
        """Return the bytes that ``capture`` with these arguments would store. Runs nothing.

        Args:
            prompts: As in ``capture``, like all arguments.
            sites: As there.
            layers: As there.
            heads: As there.
            positions: As there.
            gradient_of: As there; gradients double the bytes.
            dtype: As there.

        Raises:
            ValueError: Something asked for does not exist.
        """
        request = Request(self.model, prompts, sites, layers, heads, positions)
        numbers = sum(
            request.index.numel() * request.numbers_per_position(self.model, key)
            for key in request.keys
        )
        times = 1 if gradient_of is None else 2
        return numbers * times * (dtype or _dtype(self.model)).itemsize

    def mean(
        self,
        prompts: Any,
        sites: str | Sequence[str],
        *,
        layers: Ints = None,
        heads: Ints = None,
        per_position: bool = False,
        batch_size: int = 64,
    ) -> Activations:
        """Return mean activations over a dataset, one batch in memory at a time.

        The result stores a single prompt: its only position holds the mean over all positions
        of all prompts or, with ``per_position``, each position the mean over the prompts that
        reach it. It is a source for ``Mean``.

        Args:
            prompts: As in ``capture``.
            sites: One site name or several.
            layers: Layers to store; all that have the site by default.
            heads: Heads (key/value heads for ``k``, ``v``) to store; all by default.
            per_position: One mean for each position instead of one for all.
            batch_size: Prompts run at once; the mean does not depend on it beyond rounding.

        Raises:
            ValueError: Something asked for does not exist, or an activation is NaN or infinite.
        """
        request = Request(self.model, prompts, sites, layers, heads, None)
        width = request.width if per_position else 1
        sums: dict[Key, Tensor] = {}
        counts = torch.zeros(width, dtype=torch.float64)
        for rows in _batches(len(request.prompts), batch_size):
            mask = request.prompts.mask[rows]
            counts += mask.sum(0) if per_position else mask.sum()
            with torch.no_grad():
                seen = look(self.model, request.prompts, rows, request.keys)
            for key, tensor in seen.items():
                kept = checked(key, request.stored(key, tensor, rows), rows)
                total = by_position(key[0], kept).double().sum(0)  # padding is stored as zero
                total = total if per_position else total.sum(0, keepdim=True)
                sums[key] = total + sums.get(key, 0)

        def mean(site: str, total: Tensor) -> Tensor:
            share = total / counts.to(total).reshape(-1, *[1] * (total.ndim - 1))
            return by_position(site, share[None].to(_dtype(self.model)))

        return Activations(
            stored={key: mean(key[0], total) for key, total in sums.items()},
            index=torch.arange(width)[None],
            lengths=(width,),
            heads=request.heads,
            info=self._info() | {"mean_over": len(request.prompts)},
        )

    @contextmanager
    def edit(self, *edits: Edit, data: Any = None) -> Iterator[TransformerBridge]:
        """Put edits in force while the block runs.

        Blocks nest: an inner edit sees what the outer ones made. During ``generate`` with a
        key/value cache, positions are absolute and ``"all"`` includes the generated tokens;
        values from another run are put only where that run has them.

        Args:
            *edits: Edits from ``mi.edits``.
            data: The prompts that will be run, as a ``Task`` or the like. Needed to name roles
                in positions, and for batches padded on the right without a mask.

        Returns:
            A context manager that gives the model.

        Raises:
            ValueError: An edit names what this model or the data does not have, before
                anything runs.
            HookNotFiredError: On leaving the block: an edit never ran, or selected nothing.
        """
        if not edits:
            raise ValueError("no edits were given. Pass at least one from mi.edits.")
        prompts, roles = (None, None) if data is None else located(self.model, data)
        lengths = None if prompts is None else prompts.lengths.tolist()
        with ExitStack() as stack:
            noted = stack.enter_context(watch(self.model))
            actions = [
                Action(self.model, edit, layer, noted, lengths, roles)
                for edit in edits
                for layer in resolve_layers(self.model, edit.site, edit.layers)
            ]
            for action in actions:
                stack.callback(tap(self.model, action.place, action))
            yield self.model
        for action in actions:
            action.check_it_acted()

    def patch(
        self,
        site: str,
        source: float | Tensor | Activations,
        *,
        layers: Ints = None,
        heads: Ints = None,
        positions: PositionSpec = "all",
        data: Any = None,
    ) -> AbstractContextManager[TransformerBridge]:
        """Put another run's activations, or a tensor, at a site while the block runs.

        Args:
            site: Site name, as in ``mi.sites``.
            source: What ``capture`` returned, a tensor, or one number for all.
            layers: Layers to patch; all that have the site by default.
            heads: Heads (key/value heads for ``k``, ``v``) to patch; all by default.
            positions: ``"all"``, role names (then ``data`` is needed), integers or a slice.
                Query positions on ``scores`` and ``pattern``.
            data: The prompts that will be run, as for ``edit``.

        Returns:
            A context manager that gives the model.

        Raises:
            ValueError: As for ``edit``.
            HookNotFiredError: Likewise.
        """
        edit = Replace(site, source, layers=layers, heads=heads, positions=positions)
        return self.edit(edit, data=data)

    def ablate(
        self,
        site: str,
        *,
        kind: str = "zero",
        layers: Ints = None,
        heads: Ints = None,
        positions: PositionSpec = "all",
        mean_data: Any = None,
        seed: int = 0,
        data: Any = None,
    ) -> AbstractContextManager[TransformerBridge]:
        """Take a site out while the block runs: zeros, means or another prompt's values.

        Means and resamples are computed at once, by runs over ``mean_data``.

        Args:
            site: Site name, as in ``mi.sites``.
            kind: What takes its place: ``"zero"``; its ``"mean"`` over all positions of
                ``mean_data``, or its ``"position_mean"``, over the prompts at each position;
                ``"resample"``, that of a random prompt.
            layers: Layers to take out; all that have the site by default.
            heads: Heads (key/value heads for ``k``, ``v``) to take out; all by default.
            positions: ``"all"``, role names (then ``data`` is needed), integers or a slice.
                Query positions on ``scores`` and ``pattern``.
            mean_data: Prompts or data that means and resamples draw on.
            seed: Of the resampled prompts.
            data: The prompts that will be run, as for ``edit``.

        Returns:
            A context manager that gives the model.

        Raises:
            ValueError: The kind is unknown, has no ``mean_data`` or draws on none; or as for
                ``edit``.
            HookNotFiredError: As for ``edit``.
        """
        where = {"layers": layers, "heads": heads, "positions": positions}
        if kind == "zero" and mean_data is None:
            return self.edit(Zero(site, **where), data=data)
        if kind == "zero":
            raise ValueError("kind='zero' draws on no data. Leave mean_data out.")
        if kind not in ("mean", "position_mean", "resample"):
            raise ValueError(
                f"kind={kind!r} is no ablation. Pass 'zero', 'mean', 'position_mean' or "
                "'resample'."
            )
        if mean_data is None:
            raise ValueError(
                f"kind={kind!r} needs data to draw on. Pass mean_data=, prompts or a dataset."
            )
        if kind == "resample":
            donors = self.capture(mean_data, site, layers=layers)
            return self.edit(Resample(site, donors, seed=seed, **where), data=data)
        per_position = kind == "position_mean"
        means = self.mean(mean_data, site, layers=layers, per_position=per_position)
        return self.edit(Mean(site, means, per_position=per_position, **where), data=data)

    def steer(
        self,
        site: str,
        direction: Tensor,
        *,
        layer: int | None,
        scale: float = 1.0,
        positions: PositionSpec = "all",
        data: Any = None,
    ) -> AbstractContextManager[TransformerBridge]:
        """Add a direction at a site of one layer while the block runs, ``generate`` included.

        Args:
            site: Site name, as in ``mi.sites``.
            direction: What is added, with the site's last axes: ``[d_model]`` for
                ``resid_post``.
            layer: Which layer; None for ``embed``.
            scale: How many times the direction is added.
            positions: ``"all"``, role names (then ``data`` is needed), integers or a slice.
                Query positions on ``scores`` and ``pattern``.
            data: The prompts that will be run, as for ``edit``.

        Returns:
            A context manager that gives the model.

        Raises:
            ValueError: As for ``edit``.
            HookNotFiredError: Likewise.
        """
        edit = Add(site, direction, scale=scale, layers=layer, positions=positions)
        return self.edit(edit, data=data)

    def _info(self) -> dict[str, Any]:
        """Return which model activations come from."""
        name = str(self.model.cfg.model_name)
        return {"model": name, "fingerprint": fingerprint(self.model)}


def _batches(n: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise ValueError(f"batch_size={size} runs nothing. Pass at least 1.")
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _gradients(metric: Tensor, seen: dict[Key, Tensor]) -> dict[Key, Tensor]:
    found = torch.autograd.grad(metric.sum(), list(seen.values()), allow_unused=True)
    return {  # what the metric does not depend on has no gradient: zero
        key: torch.zeros_like(seen[key]) if gradient is None else gradient
        for key, gradient in zip(seen, found, strict=True)
    }


def _dtype(model: TransformerBridge) -> torch.dtype:
    return next(model.original_model.parameters()).dtype


def _metric_of(
    metric: str | Callable[..., Tensor], data: Any, lengths: Sequence[int]
) -> Callable[[Tensor, slice], Tensor]:
    """Return what gives one value per prompt from the logits of a slice of the prompts."""
    if not isinstance(data, Task):
        if not callable(metric):
            raise TypeError(
                f"gradient_of={metric!r} needs answers, so pass a Task as the prompts; or pass "
                "a function of the answer logits [prompt, d_vocab] and the targets."
            )

        def plain(logits: Tensor, rows: slice) -> Tensor:
            return metric(answer_logits(logits, [n - 1 for n in lengths[rows]]), None)

        return plain
    (function,) = resolve_metrics(metric, data.metric).values()

    def of_task(logits: Tensor, rows: slice) -> Tensor:
        chosen = answer_logits(logits, data.answer_positions[rows])
        distractors = None if data.distractors is None else data.distractors[rows]
        return function(chosen, Targets(data.answers[rows], distractors, chosen.detach()))

    return of_task
