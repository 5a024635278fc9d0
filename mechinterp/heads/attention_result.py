"""Attention patterns as a result: one head, or many beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechinterp import plotting
from mechinterp.nulls import Head
from mechinterp.results import Result

WHOLE = 255  # all of a query's attention
_MOST_PANELS = 16


@dataclass(frozen=True, eq=False)
class AttentionPatterns(Result):
    """Where some heads look on some prompts.

    ``data["pattern"]`` has the axes ``prompt``, ``head`` (as ``layer.head``), ``query_pos`` and
    ``key_pos``, in 255ths of a query's attention; 0 past the end of a shorter prompt.
    ``data["length"]`` is how many tokens a prompt has, ``token`` what they are, ``sharpness``
    what heads are ranked by.
    """

    @property
    def effect(self) -> xr.DataArray:
        """The sharpness of every head on every prompt: 0 rests, 1 looks at one token each."""
        return self.data["sharpness"].rename("effect")

    @property
    def signed(self) -> bool:
        """Shares of attention are 0 or more."""
        return False

    @property
    def heads(self) -> list[Head]:
        """The heads that were kept, as pairs (layer, head)."""
        pairs = (label.split(".") for label in self.data["head"].values.tolist())
        return [(int(layer), int(head)) for layer, head in pairs]

    def pattern(self, head: Head, prompt: int | None = None) -> xr.DataArray:
        """Return one head's attention, 0 to 1, on one prompt (default: the first kept).

        Raises:
            ValueError: The head or the prompt was not kept.
        """
        prompt = self._prompt(prompt)
        if tuple(head) not in self.heads:
            shown = ", ".join(self.data["head"].values.tolist()[:8])
            raise ValueError(
                f"head {head[0]}.{head[1]} was not kept, only {shown}. Ask for it by heads=."
            )
        n = int(self.data["length"].sel(prompt=prompt))
        own = self.data["pattern"].sel(prompt=prompt, head=f"{head[0]}.{head[1]}")
        return own.isel(query_pos=slice(n), key_pos=slice(n)).astype(np.float32) / WHOLE

    def tokens(self, prompt: int | None = None) -> list[str]:
        """Return a prompt's tokens (default: those of the first kept)."""
        prompt = self._prompt(prompt)
        n = int(self.data["length"].sel(prompt=prompt))
        return self.data["token"].sel(prompt=prompt).values[:n].tolist()

    def plot(
        self,
        ax: Axes | None = None,
        *,
        head: Head | None = None,
        prompt: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Axes:
        """Draw one head's attention, queries downwards and keys to the right.

        Args:
            ax: Where to draw; a new figure by default.
            head: Pair (layer, head); the first kept by default.
            prompt: Which prompt; the first kept by default.
            start: The first position shown, of queries and keys.
            stop: The position after the last one shown; the end by default.

        Raises:
            ValueError: The head or prompt was not kept, or no position is shown.
        """
        head = self.heads[0] if head is None else head
        return self._panel(head, prompt, start, stop, ax, colour_bar=True)

    def figure(
        self,
        heads: Sequence[Head] | None = None,
        *,
        layer: int | None = None,
        prompt: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Figure:
        """Draw many heads beside each other: those named, a whole layer's, or the first 16.

        Args:
            heads: Which, as pairs (layer, head).
            layer: Or all that were kept of a layer.
            prompt: Which prompt; the first kept by default.
            start: The first position shown, of queries and keys.
            stop: The position after the last one shown; the end by default.

        Raises:
            ValueError: One of them was not kept, or none is of that layer.
        """
        if heads is not None and layer is not None:
            raise ValueError("heads and layer both say which heads. Pass one of them.")
        shown = self.heads[:_MOST_PANELS] if heads is None else list(heads)
        if layer is not None:
            shown = sorted(head for head in self.heads if head[0] == layer)
        if not shown:
            raise ValueError(f"no head of layer {layer} was kept. Ask for them by heads=.")
        columns = min(len(shown), 4)
        rows = -(-len(shown) // columns)
        side = 9.0 / max(columns, 3)
        figure = plotting.new_figure(side * columns + 0.9, side * rows + 0.6)
        panels = figure.subplots(rows, columns, squeeze=False)
        for ax, head in zip(panels.flat, shown, strict=False):
            self._panel(head, prompt, start, stop, ax, colour_bar=False)
        for ax in panels.flat[len(shown) :]:
            ax.set_visible(False)
        for i, ax in enumerate(panels.flat[: len(shown)]):
            ax.set_title(f"head {shown[i][0]}.{shown[i][1]}", fontsize=9, loc="left", pad=4)
            ax.set_ylabel("query" if i % columns == 0 else "")
            ax.set_xlabel("key" if i + columns >= len(shown) else "")
            ax.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= len(shown))
        mesh = panels.flat[0].collections[0]
        bar = figure.colorbar(mesh, ax=list(panels.flat), shrink=0.5, aspect=25, pad=0.02)
        bar.set_label("attention (share)", fontsize=9)
        figure.suptitle(self._about(prompt), fontsize=10, x=0.01, ha="left")
        return figure

    def _panel(
        self,
        head: Head,
        prompt: int | None,
        start: int,
        stop: int | None,
        ax: Axes | None,
        *,
        colour_bar: bool,
    ) -> Axes:
        shown = self.pattern(head, prompt).values[start:stop, start:stop]
        if not shown.size:
            raise ValueError(
                f"no position lies between start={start} and stop={stop}: there are "
                f"{len(self.tokens(prompt))}."
            )
        ax = plotting.attention_pattern(
            shown, self.tokens(prompt)[start:stop], ax=ax, colour_bar=colour_bar
        )
        plotting.title(ax, f"head {head[0]}.{head[1]} · {self._about(prompt)}")
        return ax

    def _about(self, prompt: int | None) -> str:
        return f"{self.convention.data}, prompt {self._prompt(prompt)}"

    def _prompt(self, prompt: int | None) -> int:
        kept = self.data["prompt"].values.tolist()
        if prompt is not None and prompt not in kept:
            raise ValueError(f"prompt {prompt} was not kept, only {kept}. Ask for it.")
        return kept[0] if prompt is None else prompt
