"""Is there any effect? Sign-flip permutation tests, and what many cells do to their p-values.

If a prompt's effect is as likely as its negative, flipping the signs of whole prompts gives
means as likely as the observed one. That is exact for any number of prompts, any spread and
any dependence between cells, as long as the effects under the null are symmetric around 0.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from mechinterp.stats.units import unit_sums

N_FLIPS = 10_000
_FLIPS, _CELLS = 1000, 4096  # at once, to bound the memory
_TIE = 1e-10  # two flips this close differ by rounding only


def sign_flip_test(
    values: Float[np.ndarray, "... sample"],
    clusters: Shaped[np.ndarray, " _"] | None = None,
    n_flips: int = N_FLIPS,
    seed: int = 0,
) -> Float[np.ndarray, "..."]:
    """Return the two-sided p-value of each cell's mean, under flips of whole units.

    All sign patterns are gone through where ``n_flips`` suffices (up to 14 units by default),
    which makes p exact; otherwise ``n_flips`` random ones, and p = (1 + b) / (1 + n_flips)
    for b flips as extreme as the data, so that p is never 0 and P(p <= a) <= a. Cells that are
    0 everywhere have p = 1. No p is below ``smallest_p``.

    Args:
        values: One cell per leading index, differences from the null (effects).
        clusters: A label per sample; samples that share one are flipped together.
        n_flips: How many sign patterns, at least 1.
        seed: Of random patterns.

    Source: Fisher 1935, The Design of Experiments, section 21; Phipson and Smyth 2010, SAGMB
    9:39, for the added ones.
    """
    cells, present, shape = _directions(values, clusters)
    observed = np.abs(cells.sum(1)) - _TIE
    reached = np.zeros(len(cells))
    for signs in _signs(cells.shape[1], n_flips, seed):
        for part in _parts(len(cells)):
            reached[part] += (np.abs(signs @ cells[part].T) >= observed[part]).sum(0)
    return _spread_out(_share(reached, cells.shape[1], n_flips), present, shape)


def max_t(
    values: Float[np.ndarray, "... sample"],
    clusters: Shaped[np.ndarray, " _"] | None = None,
    n_flips: int = N_FLIPS,
    seed: int = 0,
) -> Float[np.ndarray, "..."]:
    """Return the p-value of each cell's mean, corrected for having looked at all cells.

    The chance, if there were no effect anywhere, that any cell at all reaches a t as large as
    this one's: the family-wise error is at most a when cells with p <= a are called, whatever
    the dependence between cells, which all see the same flips. Studentised, so that noisy
    cells do not set the bar for quiet ones.

    Args:
        values: One cell per leading index, differences from the null (effects).
        clusters: A label per sample; samples that share one are flipped together.
        n_flips: How many sign patterns, at least 1.
        seed: Of random patterns.

    Source: Westfall and Young 1993, Resampling-Based Multiple Testing, the single-step max-T.
    """
    cells, present, shape = _directions(values, clusters)
    largest = []
    for signs in _signs(cells.shape[1], n_flips, seed):
        block = np.zeros(len(signs))
        for part in _parts(len(cells)):
            np.maximum(block, np.abs(signs @ cells[part].T).max(1), out=block)
        largest.append(block)
    ranked = np.sort(np.concatenate(largest))
    reached = len(ranked) - np.searchsorted(ranked, np.abs(cells.sum(1)) - _TIE)
    return _spread_out(_share(reached, cells.shape[1], n_flips), present, shape)


def false_discovery(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return p-values adjusted so that calling those <= q makes a share <= q of calls false.

    On average, and for cells that are independent or positively dependent. NaN stays NaN and
    does not count. Source: Benjamini and Hochberg 1995, by scipy.
    """
    adjusted = np.array(p, dtype=np.float64)
    present = ~np.isnan(adjusted)
    if present.any():
        adjusted[present] = stats.false_discovery_control(adjusted[present], method="bh")
    return adjusted


def holm(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return p-values adjusted so that the chance of any false call below a is at most a.

    Whatever the dependence. NaN stays NaN and does not count. Source: Holm 1979.
    """
    adjusted = np.array(p, dtype=np.float64)
    present = ~np.isnan(adjusted)
    own = adjusted[present]
    order = np.argsort(own, kind="stable")
    steps = own[order] * np.arange(len(own), 0, -1)
    own[order] = np.minimum(np.maximum.accumulate(steps), 1)
    adjusted[present] = own
    return adjusted


def smallest_p(n_units: int, n_flips: int = N_FLIPS) -> float:
    """Return the smallest two-sided p-value that flips of ``n_units`` units can give.

    2 / 2**n_units where ``n_flips`` suffices to go through all patterns: with five units no p
    below 0.05 exists.
    """
    return 1 / 2 ** (n_units - 1) if all_patterns(n_units, n_flips) else 1 / (1 + n_flips)


def all_patterns(n_units: int, n_flips: int = N_FLIPS) -> bool:
    """Whether ``n_flips`` suffices for every sign pattern (one of each pair of opposites).

    Raises:
        ValueError: There is not even one.
    """
    if n_flips < 1:
        raise ValueError(f"n_flips={n_flips} flips nothing. Pass at least 1.")
    return 2 ** (n_units - 1) <= n_flips


def _directions(
    values: Float[np.ndarray, "*cells sample"], clusters: Shaped[np.ndarray, " _"] | None
) -> tuple[Float[np.ndarray, "cell unit"], np.ndarray, tuple[int, ...]]:
    """Return the unit sums of the cells that are present, scaled to length one.

    A flip leaves a cell's sum of squares as it is, so t = (sum / length) times a growing
    function of the same ratio: with cells of length one the absolute sum ranks flips and
    cells just as a studentised t does, and a flip costs one matrix product.
    """
    sums, counts = unit_sums(values, clusters)
    flat = sums.reshape(-1, len(counts))
    present = np.asarray(np.isfinite(flat).all(1))
    cells = _scaled(flat[present], np.abs(flat[present]).max(1))  # so that no square underflows
    cells = _scaled(cells, np.linalg.norm(cells, axis=1))
    return cells, present, sums.shape[:-1]


def _scaled(
    cells: Float[np.ndarray, "cell unit"], size: Float[np.ndarray, " cell"]
) -> Float[np.ndarray, "cell unit"]:
    """Return each cell over its size; a cell of size 0 stays 0."""
    return np.divide(cells, size[:, None], out=np.zeros_like(cells), where=size[:, None] > 0)


def _signs(n: int, n_flips: int, seed: int) -> Iterator[Float[np.ndarray, "flip unit"]]:
    """Yield blocks of sign patterns. They do not depend on how many cells there are."""
    if all_patterns(n, n_flips):
        # The first sign stays: flipping every sign changes no two-sided statistic.
        codes = np.arange(2 ** (n - 1))[:, None] << 1
        for at in range(0, len(codes), _FLIPS):
            yield 1.0 - 2.0 * (codes[at : at + _FLIPS] >> np.arange(n) & 1)
        return
    rng = np.random.default_rng(seed)
    for at in range(0, n_flips, _FLIPS):
        shape = (min(_FLIPS, n_flips - at), n)
        yield 2.0 * rng.integers(0, 2, shape, dtype=np.int8) - 1.0


def _parts(n: int) -> list[slice]:
    return [slice(at, at + _CELLS) for at in range(0, n, _CELLS)]


def _share(reached: np.ndarray, n_units: int, n_flips: int) -> Float[np.ndarray, " cell"]:
    """Return the share of flips that reach the observed value, which is itself one of them."""
    if all_patterns(n_units, n_flips):
        return reached / 2 ** (n_units - 1)
    return (1 + reached) / (1 + n_flips)


def _spread_out(
    p: Float[np.ndarray, " cell"], present: np.ndarray, shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    full = np.full(present.shape, np.nan)
    full[present] = p
    return full.reshape(shape)
