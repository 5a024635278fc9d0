"""How many prompts are enough: for an interval of a wanted width, for finding an effect."""

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from mechinterp.stats.intervals import check_share
from mechinterp.stats.units import mean_and_error


def prompts_needed(
    values: Float[np.ndarray, "... sample"],
    half_width: float,
    confidence: float = 0.95,
    clusters: Shaped[np.ndarray, " _"] | None = None,
) -> Float[np.ndarray, "..."]:
    """Return how many prompts make a t-interval of the mean at most ``half_width`` to a side.

    Judged by the spread of ``values``, which is itself uncertain when they are few. With
    ``clusters``, how many clusters of such sizes. At least 2; NaN for cells with NaN, or where
    a single sample shows no spread.

    Args:
        values: One cell per leading index.
        half_width: In the unit of ``values``.
        confidence: Of the interval.
        clusters: A label per sample.

    Raises:
        ValueError: ``half_width`` is not positive, or the confidence not between 0 and 1.

    Source: Stein 1945, Ann Math Stat 16:243, its first stage.
    """
    check_share("confidence", confidence)
    if not half_width > 0:
        raise ValueError(
            f"half_width is {half_width}, but an interval has a width above 0. "
            "Pass one, in the unit of the samples."
        )
    _, error, n = mean_and_error(values, clusters)
    spread = error * np.sqrt(n) / half_width
    tail = (1 - confidence) / 2
    needed = np.maximum(np.ceil((stats.norm.isf(tail) * spread) ** 2), 2.0)
    # t is wider than the normal by a few prompts' worth, and NaN never is too few.
    while (few := stats.t.isf(tail, needed - 1) * spread > np.sqrt(needed)).any():
        needed = needed + few
    return np.asarray(needed)


def power(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Return the chance that a two-sided t-test over ``n`` prompts finds an effect.

    ``sd`` is the standard deviation of the effect over prompts, in the same unit. The sign-flip
    test has nearly the same power, from about ten prompts on.

    Args:
        effect: The mean effect.
        sd: Its standard deviation over prompts.
        n: How many prompts.
        alpha: Below which p the effect counts as found.

    Raises:
        ValueError: ``sd`` is not positive, ``n`` is below 2, or alpha not between 0 and 1.

    Source: the noncentral t distribution, by scipy.
    """
    check_share("alpha", alpha)
    if not sd > 0 or n < 2:
        raise ValueError(f"sd is {sd} and n is {n}. Pass an sd above 0 and at least 2 prompts.")
    bar, shift = stats.t.isf(alpha / 2, n - 1), abs(effect) / sd * np.sqrt(n)
    return float(stats.nct.sf(bar, n - 1, shift) + stats.nct.cdf(-bar, n - 1, shift))
