"""Runs: prompts with the edits that are part of them, and activations that a sweep computes.

A task has two runs, clean and corrupted; a cell is applied on top of one and may take values
from the other. Those values are described before anything runs (which run, which sites) and
computed by the sweep that needs them: `run_activations` makes the description.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Activations, Key
from mechinterp.edits import Edit, Ints
from mechinterp.hooks import HookManager
from mechinterp.hooks.running import first_row
from mechinterp.models import forward
from mechinterp.names import unknown
from mechinterp.sites import resolve_heads, resolve_layers
from mechinterp.tasks import Labelled, Prompts, Task, Text, answer_logits
from mechinterp.tasks.positions import Roles

BATCH = 64  # prompts run at once: whole logits are held for no more


@dataclass(frozen=True, eq=False)
class Run:
    """Prompts, where each is answered, and the edits that are part of the run."""

    name: str
    prompts: Prompts
    roles: Roles
    answer_positions: tuple[int, ...]
    edits: tuple[Edit, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @contextmanager
    def in_force(self, manager: HookManager, *more: Edit) -> Iterator[None]:
        """Keep the run's own edits, and ``more`` after them, in force while a block runs."""
        edits = (*self.edits, *more)
        if not edits:
            yield
            return
        with manager.edit(*edits, data=self):
            yield

    def answers(
        self, manager: HookManager, *edits: Edit, at_once: int | None = None
    ) -> Float[Tensor, "prompt d_vocab"]:
        """Return the logits at the answer positions, with ``edits`` on top of the run's own.

        One plain hooked run of the whole model, ``at_once`` prompts at a time.
        """
        pieces = self.logits(manager, *edits, at_once=at_once)
        return torch.cat(
            [answer_logits(logits, self.answer_positions[rows]) for rows, logits in pieces]
        )

    def logits(
        self, manager: HookManager, *edits: Edit, at_once: int | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "prompt pos d_out"]]]:
        """Yield the logits at every position, ``at_once`` prompts at a time, as `answers`."""
        at_once = at_once or BATCH
        with self.in_force(manager, *edits):
            for start in range(0, len(self.prompts), at_once):
                rows = slice(start, start + at_once)
                with first_row(manager.model, start):
                    logits = forward(
                        manager.model, self.prompts.tokens[rows], self.prompts.mask[rows]
                    )
                yield rows, logits

    def answer(self, model: TransformerBridge, prompt: int) -> Float[Tensor, " d_vocab"]:
        """Return one prompt's logits at its answer, under whatever edits are in force."""
        row = slice(prompt, prompt + 1)
        with first_row(model, prompt):
            logits = forward(model, self.prompts.tokens[row], self.prompts.mask[row])
        return answer_logits(logits, self.answer_positions[row])[0]


class Promised(Mapping[Key, Tensor]):
    """The tensors of a run's activations, which the sweep that uses them fills in.

    It contains every key that was asked for, and iterates over those computed by now.
    """

    def __init__(
        self, run: str, keys: Sequence[Key], tokens: Int[Tensor, "prompt pos"]
    ) -> None:
        self.run, self.tokens = run, tokens
        self.keys_asked = tuple(keys)
        self.values_found: dict[Key, Tensor] = {}

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self.keys_asked:
            raise KeyError(key)
        if key not in self.values_found:
            raise RuntimeError(
                f"{key[0]} of the {self.run} run is promised, not computed: a sweep computes "
                "it. For values now, use HookManager(model).capture(...)."
            )
        return self.values_found[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.values_found)

    def __len__(self) -> int:
        return len(self.values_found)

    def __contains__(self, key: object) -> bool:
        return key in self.keys_asked


def runs_of(data: Task | Text | Labelled) -> dict[str, Run]:
    """Return the runs by name: ``"clean"`` and (where a task has one) ``"corrupted"``.

    Text and labelled texts have the clean run alone.
    """
    if not isinstance(data, Task):
        last = tuple(n - 1 for n in data.prompts.lengths.tolist())
        return {"clean": Run("clean", data.prompts, {}, last)}
    task = data
    runs = {"clean": Run("clean", task.clean, task.roles, task.answer_positions)}
    if task.corrupted is not None:
        runs["corrupted"] = Run(
            "corrupted",
            task.corrupted,
            task.corrupted_roles or {},
            task.corrupted_answer_positions,
        )
    elif task.corruption:
        runs["corrupted"] = Run(
            "corrupted", task.clean, task.roles, task.answer_positions, task.corruption
        )
    return runs


def run_of(data: Task | Text | Labelled, name: str) -> Run:
    """Return one run of the data.

    Raises:
        ValueError: There is no run of that name.
    """
    runs = runs_of(data)
    if name == "corrupted" and name not in runs:
        raise ValueError(
            f"{data.name!r} has no corrupted run to patch from or into. Build a task with "
            "corrupted=[...] prompts, with corruption=(edits of the clean prompts), or add "
            "noise: mi.noise_corruption(model, task, role='subject')."
        )
    if name not in runs:
        raise ValueError(unknown("run", name, ("clean", "corrupted")))
    return runs[name]


def run_activations(
    model: TransformerBridge,
    task: Task,
    run: str,
    sites: str | Sequence[str],
    *,
    layers: Ints = None,
) -> Activations:
    """Return activations of one run of a task that are computed when a sweep needs them.

    They stand in edits like captured ones (``mi.edits.Replace("z", acts)``), run nothing and
    hold nothing until ``mi.cell_metrics`` or the like uses them.

    Args:
        model: Whose activations they are.
        task: The task that the sweep is of.
        run: ``"clean"`` or ``"corrupted"``.
        sites: One site name or several.
        layers: Which layers; all that have the site by default.

    Raises:
        ValueError: The run, a site or a layer does not exist.
    """
    chosen = run_of(task, run)
    names = [sites] if isinstance(sites, str) else list(sites)
    keys: list[Key] = [
        (name, layer) for name in names for layer in resolve_layers(model, name, layers)
    ]
    lengths = tuple(chosen.prompts.lengths.tolist())
    heads: dict[Key, tuple[int, ...] | None] = {}
    for key in keys:
        found = resolve_heads(model, *key, None)
        heads[key] = None if found is None else tuple(found)
    width = chosen.prompts.tokens.shape[1]
    index = torch.arange(width).expand(len(lengths), -1)
    info: dict[str, Any] = {"model": str(model.cfg.model_name), "run": run}
    return Activations(
        stored=Promised(run, keys, chosen.prompts.tokens),
        index=torch.where(index < torch.tensor(lengths)[:, None], index, -1),
        lengths=lengths,
        heads=heads,
        roles=chosen.roles,
        info=info,
    )
