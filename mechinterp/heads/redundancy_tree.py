"""The merge tree of heads: clusters, who stands for them, and in what order heads can go."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform


@dataclass(frozen=True, eq=False)
class Step:
    """One merge: the cluster it makes, at what distance, who stays for it and who goes."""

    members: tuple[int, ...]
    distance: float
    stays: int
    goes: int


class Tree:
    """Hierarchical clustering by average linkage (UPGMA), of distances from 0 up.

    Whoever stands for a cluster is decided merge by merge, between those that stand for its
    two halves: the one worth more stays, where ``worth`` knows both; otherwise the one nearer
    on average to all members of the merged cluster (its medoid of the two); the earlier one
    where that is equal.
    """

    def __init__(
        self,
        distance: Float[np.ndarray, "head head"],
        worth: Float[np.ndarray, " head"] | None = None,
    ) -> None:
        self.distance = (distance + distance.T) / 2
        np.fill_diagonal(self.distance, 0.0)
        self.worth = worth
        self.linkage = linkage(squareform(self.distance, checks=False), "average")
        self.steps = self._steps()

    @property
    def leaves(self) -> list[int]:
        """The heads in the order in which they stand under the tree."""
        return [int(i) for i in leaves_list(self.linkage)]

    def cut(self, n: int) -> list[tuple[tuple[int, ...], int, float]]:
        """Return ``n`` clusters as members, head that stands for them, and distance.

        The distance is that at which a cluster's halves were merged; 0 for a single head. The
        largest come first, then by their first head.
        """
        size = len(self.distance)
        found: dict[int, tuple[tuple[int, ...], int, float]] = {
            i: ((i,), i, 0.0) for i in range(size)
        }
        for i, step in enumerate(self.steps[: size - n]):
            for half in self.linkage[i, :2]:
                del found[int(half)]
            found[size + i] = (step.members, step.stays, step.distance)
        return sorted(found.values(), key=lambda each: (-len(each[0]), each[0][0]))

    def merged_within(self, threshold: float) -> int:
        """Return how many clusters remain once all merges up to a distance are made."""
        return len(self.distance) - int((self.linkage[:, 2] <= threshold).sum())

    def order(self) -> list[int]:
        """Return all heads, the one to go first first: one goes at each merge."""
        return [step.goes for step in self.steps] + [self.steps[-1].stays]

    def _steps(self) -> list[Step]:
        n = len(self.distance)
        clusters: dict[int, tuple[tuple[int, ...], int]] = {i: ((i,), i) for i in range(n)}
        steps = []
        for i, (a, b, distance, _) in enumerate(self.linkage):
            (of_a, for_a), (of_b, for_b) = clusters.pop(int(a)), clusters.pop(int(b))
            members = tuple(sorted((*of_a, *of_b)))
            first, second = sorted((for_a, for_b))
            stays = second if self._stronger(second, first, members) else first
            goes = first if stays == second else second
            clusters[n + i] = (members, stays)
            steps.append(Step(members, float(distance), stays, goes))
        return steps

    def _stronger(self, one: int, other: int, members: Sequence[int]) -> bool:
        if self.worth is not None and not np.isnan(self.worth[[one, other]]).any():
            gain = float(self.worth[one] - self.worth[other])
        else:
            inside = self.distance[:, list(members)].mean(1)
            gain = float(inside[other] - inside[one])
        return gain > 1e-12
