"""What heads are redundant: the views of all pairs, clusters, and a suggested order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechinterp.heads.redundancy_distance import (
    READS,
    TITLES,
    UNITS,
    clustered_by,
    distances,
    is_signed,
    reads,
    said_of,
)
from mechinterp.heads.redundancy_plot import clustered_figure, clustered_grid
from mechinterp.heads.redundancy_tree import Tree
from mechinterp.names import unknown
from mechinterp.nulls import Head
from mechinterp.results import NotedFrame, Result


@dataclass(frozen=True, eq=False)
class RedundancyAtlas(Result):
    """Views of all pairs of heads, on ``head_a`` and ``head_b``, labelled ``"layer.head"``.

    ``redundancy`` sums up the views that are not causal: 1 for heads that are identical in all
    of them, 0 for an average pair (1 less the distance ``"mean"``, see ``clusters``). ``js``,
    ``cka``, ``cosine``, ``read_q``, ``read_k``, ``read_v`` and ``write`` are as in
    ``mi.redundancy_atlas``; overlaps come with what random subspaces have (``write_expected``)
    and its standard deviation (``write_spread``). ``shared_kv``: the two heads have one
    key/value head. NaN: a head whose output is zero has no cosine, a constant one no CKA.

    Where interaction was measured, ``alone`` (``prompt``, ``head``) and ``together``
    (``prompt``, ``pair``) are effects on the metric of the task: ablated less intact.
    """

    @property
    def heads(self) -> list[Head]:
        """The heads that were compared, as pairs (layer, head)."""
        layers, index = (self.data[name].values for name in ("layer_a", "index_a"))
        return [(int(layer), int(head)) for layer, head in zip(layers, index, strict=True)]

    @property
    def effect(self) -> xr.DataArray:
        """The redundancy of every pair, once: NaN unless the first head comes before."""
        return self.effect_of(None)

    def effect_of(self, metric: str | None) -> xr.DataArray:
        """Return the view ``metric`` of every pair; interaction on ``prompt`` and ``pair``.

        Raises:
            ValueError: There is no such view, or interaction was not measured.
        """
        view = metric or "redundancy"
        if view == "interaction":
            return self.interaction
        values = self.matrix(view)
        return values.where(np.triu(np.ones(values.shape, dtype=bool), 1))

    @property
    def interaction(self) -> xr.DataArray:
        """``Δ(a, b) - Δ(a) - Δ(b)`` per prompt, of the pairs that were measured.

        Raises:
            ValueError: It was not measured.
        """
        if "together" not in self.data:
            raise ValueError(
                "interaction was not measured. Pass task= to mi.redundancy_atlas, or a task as "
                "data."
            )
        alone, together = self.data["alone"], self.data["together"]
        apart = sum(
            alone.sel(head=self.data[end].values).values.astype(float)
            for end in ("of_a", "of_b")
        )
        return (together - apart).rename("interaction")

    def matrix(self, view: str) -> xr.DataArray:
        """Return a view of all pairs, on ``head_a`` and ``head_b``.

        ``"read"`` is the mean of ``read_q``, ``read_k`` and ``read_v`` (``read_q`` alone for
        heads that share keys and values); ``"interaction"`` the mean over prompts, NaN for
        pairs that were not measured.

        Raises:
            ValueError: There is no such view, or interaction was not measured.
        """
        if view == "interaction":
            return self._interactions()
        if view == "read":
            return self._labelled(reads(self.data), "read")
        if view not in UNITS:
            raise ValueError(unknown("view", view, [*UNITS, "read", "interaction"]))
        return self.data[view]

    def distance(self, view: str = "mean") -> xr.DataArray:
        """Return how far every two heads are apart in a ``view``; ``clusters`` says by what.

        Raises:
            ValueError: There is no such view.
        """
        return self._labelled(distances(self.data, view), "distance")

    def clusters(
        self, view: str = "mean", *, threshold: float | None = None, n: int | None = None
    ) -> pd.DataFrame:
        """Return clusters of heads, the largest first, and one head that stands for each.

        By average linkage. The distance is ``js`` in bits, ``1 - cka``, ``1 - |cosine|``, or
        1 less the overlap (``read_q``, ``read_k``, ``read_v``, ``write``, or ``read``, the
        mean over the three, of ``read_q`` alone for heads that share keys and values); 1 where
        a view is not defined. ``mean`` is that of ``js``, ``cka``, ``cosine``, ``read`` and
        ``write``, each divided by its mean over all pairs: 0 identical, 1 an average pair.

        ``representative`` is decided merge by merge, between those of the two halves: the head
        whose ablation alone moves the metric more (the size of the mean), where that was
        measured; else the one nearer on average to all members (the medoid of the two); the
        earlier one on a tie. ``distance`` is that between a cluster's two halves.

        Args:
            view: What clusters are made by.
            threshold: Up to what distance clusters are merged. Default: half the mean distance
                of all pairs.
            n: How many clusters to make instead.

        Raises:
            ValueError: There is no such view; both ``threshold`` and ``n``, or ``n`` outside
                1 to the number of heads.
        """
        tree = self.tree(view)
        heads = len(self.heads)
        if n is not None and threshold is not None:
            raise ValueError("threshold and n both say where to cut. Pass one of them.")
        if n is not None and not 1 <= n <= heads:
            raise ValueError(
                f"n={n} clusters cannot be made of {heads} heads. Pass 1 to {heads}."
            )
        if n is None:
            limit = tree.distance.sum() / (heads * (heads - 1)) / 2
            n = tree.merged_within(limit if threshold is None else threshold)
        rows = tree.cut(n)
        names = self.data["head_a"].values
        return pd.DataFrame(
            {
                "cluster": np.arange(1, len(rows) + 1),
                "size": [len(members) for members, _, _ in rows],
                "representative": [str(names[stands]) for _, stands, _ in rows],
                "distance": [distance for _, _, distance in rows],
                "heads": [[str(names[i]) for i in members] for members, _, _ in rows],
            }
        )

    def pruning_order(self, view: str = "mean") -> list[Head]:
        """Return all heads in the order in which they can go, redundant ones first.

        The tree of ``clusters``, in a ``view``, is gone through from the most similar pair up.
        At each merge two heads stand for its halves, and the weaker of them goes next; the
        stronger stands for the whole. What is weaker is decided as for ``representative``
        there, so that on a tie the later head goes. The last head is the one that outlives all
        merges.

        Raises:
            ValueError: There is no such view.
        """
        return [self.heads[i] for i in self.tree(view).order()]

    def top(self, n: int = 10, *, metric: str | None = None) -> pd.DataFrame:
        """Return the ``n`` pairs most alike by the view ``metric``, with all views as columns.

        By default the view is ``redundancy``. By ``interaction`` those with the largest in
        size come first, with the interval and p-value of ``statistics``.
        """
        view = metric or "redundancy"
        if view == "interaction":
            return self._top_interactions(n)
        values = self.effect_of(view)
        numbers = np.abs(values.values) if view == "cosine" else values.values
        ranked = numbers if view == "js" else -numbers
        order = np.argsort(ranked, axis=None, kind="stable")[:n]  # NaN goes last
        where = np.unravel_index(order, values.shape)
        names = self.data["head_a"].values.tolist()
        table = self._views_of([names[i] for i in where[0]], [names[i] for i in where[1]])
        first = [column for column in table.columns if column == view]
        others = [column for column in table.columns[2:] if column not in first]
        table = NotedFrame(table[["head_a", "head_b", *first, *others]])
        table.attrs["note"] = said_of(self.data, self.convention.settings)
        return table

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pair with all views, and per prompt of a measured effect.

        The rows of effects have ``alone`` of a ``head``, or ``together`` and ``interaction``
        of a ``pair``.
        """
        pairs = self.data.drop_dims([d for d in ("prompt", "pair", "head") if d in self.data])
        frames = [pairs.to_dataframe().reset_index()]
        if "together" in self.data:
            effects = self.data[["together"]].assign(interaction=self.interaction)
            frames += [
                self.data["alone"].to_dataframe().reset_index(),
                effects.to_dataframe().reset_index(),
            ]
        return pd.concat(frames, ignore_index=True)

    def plot(self, ax: Axes | None = None, *, view: str = "redundancy") -> Axes:
        """Draw a view of all pairs, heads in the order of the clusters by that view.

        Interaction has no distance: heads stand in the order by the mean of the other views.
        """
        values, label, title, note = self._drawn(view)
        order = self.tree(clustered_by(view)).leaves
        return clustered_grid(values, order, ax, label, is_signed(view), title, note)

    def figure(self, view: str = "redundancy") -> Figure:
        """Draw a view of all pairs as ``plot`` does, with the tree of clusters beside it."""
        values, label, title, note = self._drawn(view)
        by = clustered_by(view)
        name = "distance, mean of views" if by == "mean" else f"distance by {by}"
        tree = self.tree(by)
        return clustered_figure(values, tree, label, is_signed(view), title, note, name)

    def tree(self, view: str = "mean") -> Tree:
        """Return the merge tree by a view, see ``clusters``."""
        worth = None
        if "alone" in self.data:
            worth = np.abs(self.data["alone"].mean("prompt").values)
        return Tree(distances(self.data, view), worth)

    def _drawn(self, view: str) -> tuple[xr.DataArray, str, str, str]:
        values, told = self.matrix(view), self.convention.settings
        label = TITLES.get(view, view)
        if view == "interaction":
            unit = told["interaction_unit"] or "metric"
            label = f"interaction on {told['interaction_metric']} ({unit})"
        title = f"{label.split(' (')[0]} · {self.convention.data}"
        note = [f"{len(self.heads)} heads of {self.convention.model}", *self._notes(view)]
        return values, label, title, "; ".join(note)

    def _notes(self, view: str) -> list[str]:
        told = self.convention.settings
        if view == "js":
            return [f"{told['queries']} of {told['queries_of']} queries"]
        if view in ("cka", "cosine"):
            return [f"{told['tokens']} tokens"]
        if view in ("write", *READS):
            expected = float(self.data[f"{view}_expected"].median())
            return [f"random subspaces: {expected:.3f}"]
        if view == "interaction":
            n = self.data.sizes["prompt"]
            return [f"{told['interaction_on']}, {n} prompts", "grey: not measured"]
        return []

    def _interactions(self) -> xr.DataArray:
        mean = self.interaction.mean("prompt")
        place = {name: i for i, name in enumerate(self.data["head_a"].values)}
        found = np.full((len(place), len(place)), np.nan)
        a = [place[name] for name in mean["of_a"].values]
        b = [place[name] for name in mean["of_b"].values]
        found[a, b] = found[b, a] = mean.values
        return self._labelled(found, "interaction")

    def _labelled(self, values: np.ndarray, name: str) -> xr.DataArray:
        return self.data["js"].copy(data=values).rename(name).drop_attrs()

    def _views_of(self, a: Sequence[str], b: Sequence[str]) -> pd.DataFrame:
        names = [*UNITS, *(["interaction"] if "together" in self.data else [])]
        at = {
            f"head_{s}": xr.DataArray(list(names), dims="row")
            for s, names in zip("ab", (a, b), strict=True)
        }
        columns = {name: self.matrix(name).sel(at).values for name in names}
        return pd.DataFrame({"head_a": list(a), "head_b": list(b)} | columns)

    def _top_interactions(self, n: int) -> pd.DataFrame:
        table = super().top(n, metric="interaction")
        ends = [label.split(" + ") for label in table["pair"]]
        views = self._views_of([a for a, _ in ends], [b for _, b in ends])
        said = table.drop(columns=["pair", "effect"])
        first = views[["head_a", "head_b", "interaction"]]
        others = views.drop(columns=["head_a", "head_b", "interaction"])
        joined = NotedFrame(pd.concat([first, said, others], axis=1))
        joined.attrs["note"] = "\n".join(
            filter(
                None,
                [table.attrs.get("note", ""), said_of(self.data, self.convention.settings)],
            )
        )
        return joined
