"""The null of head scores: what heads of untrained models score on the same prompts.

Heads of an untrained model differ from each other, by more than their draws differ, so a head
is compared with the spread of untrained heads, not with their mean alone.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import t as student

_FEWEST = 8  # untrained heads that a spread can be taken from
SMALLEST = 1e-6  # beyond this, a normal shape of some dozens of heads says nothing


def null_p(
    scores: Float[np.ndarray, "layer head"],
    errors: Float[np.ndarray, "layer head"],
    cases: Int[np.ndarray, "layer head"],
    untrained: Float[np.ndarray, " null_head"],
    lower_too: bool,
) -> Float[np.ndarray, "layer head"]:
    """Return how probable so high a score is in one more untrained head.

    Student's t, as for one more draw from a normal distribution: the distance from the
    untrained heads' mean over ``sqrt(variance * (1 + 1/n) + error**2)``, where ``errors`` are
    the standard errors of the scores over ``cases`` (prompts, say), with the degrees of
    freedom of Welch and Satterthwaite. Scores from weights have an error of 0. With
    ``lower_too``, two-sided. Never below ``SMALLEST``: the tails are extrapolated.

    NaN stays NaN; with a single prompt nothing tells its error, and with fewer than eight
    untrained heads nothing tells their spread, so that all is NaN.
    """
    own = untrained[np.isfinite(untrained)]
    if len(own) < _FEWEST:
        return np.full_like(scores, np.nan)
    among = own.var(ddof=1) * (1 + 1 / len(own))
    gap = scores - own.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(gap == 0, 0.0, gap / np.sqrt(among + errors**2))
        drawn = np.where(errors == 0, 0.0, errors**4 / (cases - 1))
        freedom = (among + errors**2) ** 2 / (among**2 / (len(own) - 1) + drawn)
    freedom = np.nan_to_num(freedom, nan=len(own) - 1)  # neither heads nor prompts differ
    if lower_too:
        p = 2 * student.sf(np.abs(distance), freedom)
    else:
        p = student.sf(distance, freedom)
    return np.where(np.isnan(errors), np.nan, np.maximum(p, SMALLEST))
