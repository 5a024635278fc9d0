"""Is an effect negligible? Not finding one is no answer; this test can give one."""

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from mechinterp.stats.units import mean_and_error


def equivalence_test(
    values: Float[np.ndarray, "... sample"],
    margin: float,
    clusters: Shaped[np.ndarray, " _"] | None = None,
) -> Float[np.ndarray, "..."]:
    """Return the p-value of "the mean lies outside ±margin": small when it is negligible.

    The larger p of two one-sided t-tests, one against each end. ``margin`` is in the unit of
    ``values``, and must be chosen before looking. A cell without any spread is decided by its
    mean alone (0 or 1); a single sample decides nothing (NaN).

    Args:
        values: One cell per leading index.
        margin: The largest mean that is negligible, above 0.
        clusters: A label per sample; the means of clusters are tested.

    Raises:
        ValueError: The margin is not positive.

    Source: the two one-sided tests of Schuirmann 1987, J Pharmacokinet Biopharm 15:657.
    """
    if not margin > 0:
        raise ValueError(
            f"margin is {margin}, but a negligible effect needs a size above 0. "
            "Pass one, in the unit of the samples."
        )
    mean, error, n = mean_and_error(values, clusters)
    room = margin - np.abs(mean)
    exact = error == 0
    t = np.divide(room, error, out=np.full_like(room, np.nan), where=~exact)
    return np.where(exact, np.where(room > 0, 0.0, 1.0), stats.t.sf(t, max(n - 1, 1)))
