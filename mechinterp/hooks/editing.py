"""Edits in force: which values an edit selects in a run, and writing what it puts there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import by_position
from mechinterp.edits import Edit, Replace, Selected
from mechinterp.hooks.running import ForwardPass, Watch
from mechinterp.sites import Place, head_axis, locate, n_neurons, resolve_heads
from mechinterp.tasks.positions import PositionSpec, Roles, position_lists

Pairs = list[tuple[list[int], list[int]]]


class HookNotFiredError(RuntimeError):
    """An edit never ran or had nowhere to act, so the result is not what was asked for."""


@dataclass(frozen=True)
class Target:
    """Where one edit acts at one layer: the place, and the heads or neurons there.

    ``units`` are those it selects, None for all; ``heads`` are what ``Selected.heads`` says.
    """

    place: Place
    units: tuple[int, ...] | None
    heads: tuple[int, ...] | None


def aim(model: TransformerBridge, edit: Edit, layer: int | None) -> Target:
    """Return where ``edit`` acts at ``layer`` of this model.

    Raises:
        ValueError: The model has no such place, head or neuron, or the run that the edit
            reads was captured without the layer.
    """
    if edit.reads is not None and (edit.site, layer) not in edit.reads:
        raise ValueError(
            f"the edit of {edit.site} at layer {layer} reads a capture that lacks it: "
            f"{edit.reads!r}. Capture that layer too, or name layers=."
        )
    units = heads = None
    if edit.site == "mlp_post":
        units = heads = _neurons(model, edit, layer)
    elif head_axis(edit.site) is not None and layer is not None:
        heads = resolve_heads(model, edit.site, layer, edit.heads)
        units = None if edit.heads is None else heads
    place = locate(model, edit.site, layer)
    return Target(place, _tuple(units), _tuple(heads))


def _tuple(listed: list[int] | None) -> tuple[int, ...] | None:
    return None if listed is None else tuple(listed)


def pair(
    edit: Edit,
    lengths: Sequence[int],
    roles: Roles | None,
    first: int = 0,
    select: Callable[[PositionSpec], list[list[int]]] | None = None,
) -> Pairs:
    """Return per prompt the positions that ``edit`` selects, and those it reads.

    ``first`` is the row of the first prompt in the data; ``select`` says otherwise which
    positions a specification means.

    Raises:
        ValueError: A position does not exist, or the two sides do not correspond.
    """
    select = select or partial(position_lists, lengths=lengths, roles=roles)
    mine = select(edit.positions)
    source = edit.reads
    spec = getattr(edit, "source_positions", None)
    if not isinstance(edit, Replace) or (source is None and spec is None):
        return [(own, own) for own in mine]
    spec = edit.positions if spec is None else spec
    if source is None:
        theirs = select(spec)
    else:
        named = roles if source.roles is None else source.roles
        listed = position_lists(spec, source.lengths, named)
        n = len(lengths)
        theirs = listed * n if len(listed) == 1 else listed[first : first + n]
        if len(theirs) != n:
            raise ValueError(
                f"the source has {len(listed)} prompts, but the model runs on {n}. Give "
                "one source prompt for each, or a single one for all."
            )
    return [
        _aligned(edit, first + row, own, other)
        for row, (own, other) in enumerate(zip(mine, theirs, strict=True))
    ]


def _aligned(
    edit: Replace, prompt: int, own: list[int], theirs: list[int]
) -> tuple[list[int], list[int]]:
    if len(own) == len(theirs):
        return own, theirs
    n = min(len(own), len(theirs))
    if edit.align == "last" and n:
        return own[-n:], theirs[-n:]
    raise ValueError(
        f"positions={edit.positions!r} selects {len(own)} positions of prompt "
        f"{prompt} but {len(theirs)} of its source, so they do not correspond. Name "
        "positions that do, or pass align='last' to pair from the end."
    )


class Action:
    """One edit at one layer, as a tap: selects, asks the edit what to put there, writes it."""

    def __init__(
        self,
        model: TransformerBridge,
        edit: Edit,
        layer: int | None,
        noted: Watch,
        lengths: Sequence[int] | None,
        roles: Roles | None,
    ) -> None:
        target = aim(model, edit, layer)
        self.edit, self.layer, self.noted = edit, layer, noted
        self.place, self.units, self.heads = target.place, target.units, target.heads
        self.roles = roles
        self.fired = self.acted = False
        self.pairs = self.key_lists = None
        if lengths is not None:  # what is wrong with the positions is known before any run
            self.pairs = self._paired(lengths, 0)
            self.key_lists = position_lists(edit.key_positions, lengths, roles)

    def __call__(self, own: Tensor) -> Tensor | None:
        """Return ``own`` with the selected values replaced, all others bit for bit."""
        self.fired = True
        run = self.noted.run
        assert run is not None
        selected = self._selected(run)
        if selected is None:
            return None
        self.acted = True
        batch_row, column, rows = selected
        site, device = self.edit.site, own.device
        view = by_position(site, own)
        where = (batch_row.to(device), column.to(device))
        picked = view[where] if self.units is None else view[where][:, self.units]
        new = self.edit.new(picked, rows)
        keys = None
        if self.edit.key_positions != "all":
            keys = self._keys(run, own.shape[-1])[batch_row].to(device)
        new = on_keys(site, picked, new, keys)
        if site == "scores":
            check_some_key_is_left(new, rows)
        out = view.clone()
        if self.units is None:
            out[where] = new.to(out)
        else:
            units = torch.tensor(self.units, device=device)
            out[where[0][:, None], where[1][:, None], units[None]] = new.to(out)
        return by_position(site, out)

    @property
    def everywhere(self) -> bool:
        """Whether it acts wherever the model runs, however long the prompts it was given."""
        return self.edit.positions == "all" and not self.edit.positional

    def check_it_acted(self) -> None:
        """Raise unless the edit ran and changed some position."""
        where = f"{type(self.edit).__name__} of {self.edit.site}"
        where += "" if self.layer is None else f" at layer {self.layer}"
        if not self.fired:
            raise HookNotFiredError(
                f"{where} never fired, so it changed nothing. Run the model inside the block; "
                "if you did, mi.sites(model) says which sites work on it."
            )
        if not self.acted:
            raise HookNotFiredError(
                f"{where} had nowhere to act: positions={self.edit.positions!r} selected "
                "nothing in any run inside the block."
            )

    def _selected(self, run: ForwardPass) -> tuple[Tensor, Tensor, Selected] | None:
        first = self.noted.first_row
        if self.everywhere:
            batch_row, column = (run.positions >= 0).nonzero(as_tuple=True)  # generated, too
            own = source = run.positions[batch_row, column]
        else:
            found = []
            for row, pair in enumerate(self._pairs(run)):
                columns = {p: c for c, p in enumerate(run.positions[row].tolist()) if p >= 0}
                found += [
                    (row, columns[p], p, s) for p, s in zip(*pair, strict=True) if p in columns
                ]
            batch_row, column, own, source = torch.tensor(found).long().reshape(-1, 4).T
        if not len(own):
            return None
        return (
            batch_row,
            column,
            Selected(self.layer, batch_row + first, own, source, self.heads),
        )

    def _pairs(self, run: ForwardPass) -> Pairs:
        """Return per row of this run the positions to edit and those to read."""
        if self.pairs is None:
            return self._paired(run.prompt_lengths, self.noted.first_row, run)
        return self._of_run(self.pairs, run)

    def _of_run(self, per_prompt: list[Any], run: ForwardPass) -> list[Any]:
        """Return the entries of the data's prompts that this run is over."""
        first, n = self.noted.first_row, len(run.lengths)
        mine = per_prompt[first : first + n]
        if len(mine) != n:
            raise ValueError(
                f"the edit was given data of {len(per_prompt)} prompts, but the model runs on "
                f"{n}. Run it on the same prompts."
            )
        return mine

    def _paired(
        self, lengths: Sequence[int], first: int, run: ForwardPass | None = None
    ) -> Pairs:
        """Return per prompt the positions to edit, and those to read from the source.

        Without data, ``run`` says how far the prompts reach by now; positions beyond are kept,
        for a generation may get there, and that an edit acted is checked when the block ends.
        """
        return pair(
            self.edit,
            lengths,
            self.roles,
            first,
            lambda spec: self._positions(spec, lengths, run),
        )

    def _positions(
        self, spec: PositionSpec, lengths: Sequence[int], run: ForwardPass | None
    ) -> list[list[int]]:
        if run is None:
            return position_lists(spec, lengths, self.roles)
        parts = [spec] if isinstance(spec, str | int | slice) else spec
        lists: list[list[int]] = [[] for _ in lengths]
        for part in parts:
            if isinstance(part, int) and part >= 0:
                found = [[part]] * len(lengths)
            elif isinstance(part, slice):
                reach = run.lengths if min(part.start or 0, part.stop or 0) >= 0 else lengths
                found = [list(range(n))[part] for n in reach]
            else:
                found = position_lists(part, lengths, self.roles)
            for have, more in zip(lists, found, strict=True):
                have += [p for p in more if p not in have]
        return lists

    def _keys(self, run: ForwardPass, width: int) -> Bool[Tensor, "row key"]:
        """Return the keys that the edit acts on, as columns of this run."""
        if self.key_lists is None:
            lists = self._positions(self.edit.key_positions, run.prompt_lengths, run)
        else:
            lists = self._of_run(self.key_lists, run)
        keys = torch.zeros(len(lists), width, dtype=torch.bool)
        for row, (listed, pad) in enumerate(zip(lists, run.left_padding, strict=True)):
            columns = [p + pad for p in listed if p + pad < width]
            keys[row, columns] = True
        return keys


def _neurons(model: TransformerBridge, edit: Edit, layer: int | None) -> list[int] | None:
    if edit.neurons is None:
        return None
    count = n_neurons(model, layer)
    asked = [edit.neurons] if isinstance(edit.neurons, int) else list(edit.neurons)
    for neuron in asked:
        if not -count <= neuron < count:
            raise ValueError(
                f"neuron {neuron} does not exist: layer {layer} has neurons 0..{count - 1}."
            )
    return [neuron % count for neuron in asked]


def on_keys(
    site: str,
    own: Float[Tensor, "row ..."],
    new: Float[Tensor, "row ..."],
    keys: Bool[Tensor, "row key"] | None,
) -> Float[Tensor, "row ..."]:
    """Return ``new`` at the chosen keys and ``own`` at the others.

    A key that is masked stays so: no edit of ``scores`` makes a query see the future.
    """
    if keys is not None:
        new = torch.where(keys[:, None, :], new, own)
    if site == "scores":
        new = torch.where(own > torch.finfo(own.dtype).min / 2, new, own)
    return new


def check_some_key_is_left(new: Float[Tensor, "row head key"], rows: Selected) -> None:
    """Without one visible key a softmax would spread over masked positions, silently wrong."""
    blind = (new <= torch.finfo(new.dtype).min / 2).all(-1).flatten(1).any(1).cpu()
    if bool(blind.any()):
        row = int(blind.nonzero()[0])
        raise ValueError(
            f"the edit of scores leaves the query at position {int(rows.own[row])} of prompt "
            f"{int(rows.prompt[row])} no key to attend to at layer {rows.layer}. "
            "Leave at least one, or zero its z instead."
        )
