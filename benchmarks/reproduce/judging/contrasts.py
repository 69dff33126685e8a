"""Means over forget sets, differences between groups of them, and equivalence.

Values come as ``(seeds, sets)``. Seeds are averaged first, so that every test has one
value for each set.
"""

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks.reproduce.judging.order import LEVEL, too_few_sets
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
    of_interval,
    text_of,
)
from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval

Floats = NDArray[np.float64]
_SAME = 1e-12


def by_set(values: ArrayLike) -> Floats:
    """Return the mean over seeds of values ``(seeds, sets)``."""
    return np.asarray(values, dtype=np.float64).mean(0)


def positive(values: ArrayLike, what: str, digits: int = 3) -> Verdict:
    """Decide whether a mean over sets is above 0, by Student's interval over sets.

    Args:
        values: ``(seeds, sets)``.
        what: What the values are, for the text.
        digits: Decimal places of the text.
    """
    means = by_set(values)
    reason = too_few_sets(len(means))
    if len(means) < 2:
        return Verdict(NOT_TESTABLE, f"{what} {means.mean():.{digits}f}; {reason}")
    found = mean_interval(means)
    if reason:
        return Verdict(NOT_TESTABLE, f"{what} {means.mean():.{digits}f}; {reason}")
    text = f"{what} {text_of(found, digits)}, {len(means)} sets"
    return Verdict(of_interval(found.low, found.high), text)


def groups_differ(first: ArrayLike, second: ArrayLike, what: str) -> Verdict:
    """Decide whether one group of sets has larger values than another.

    By permutation: the sets are divided anew into two groups of these sizes, in all
    possible ways.

    Args:
        first: Values of the group that is claimed to be larger, ``(seeds, sets)``.
        second: Values of the other group.
        what: What the difference is, for the text.
    """
    one, two = by_set(first), by_set(second)
    p_larger, p_smaller = _permuted(one, two)
    found = _welch(one, two)
    text = (
        f"{what} {text_of(found)}, permutation p = {min(p_larger, p_smaller):.4f}, "
        f"{len(one)} against {len(two)} sets"
    )
    if min(len(one), len(two)) < 4:
        return Verdict(NOT_TESTABLE, f"{text}; at least 4 sets of each are needed")
    if p_larger <= LEVEL:
        return Verdict(BORNE_OUT, text)
    return Verdict(NOT_BORNE_OUT if p_smaller <= LEVEL else UNDECIDED, text)


def _permuted(one: Floats, two: Floats) -> tuple[float, float]:
    """Return the shares of divisions with at least, and at most, this difference."""
    pooled, size = np.concatenate([one, two]), len(one)
    sums = pooled[list(combinations(range(len(pooled)), size))].sum(1)
    seen, slack = one.sum(), _SAME * max(1.0, float(np.abs(pooled).sum()))
    return float((sums >= seen - slack).mean()), float((sums <= seen + slack).mean())


def _welch(one: Floats, two: Floats) -> ConfidenceInterval:
    """Return the difference of two means, with Welch's 95 % interval."""
    middle = float(one.mean() - two.mean())
    if min(len(one), len(two)) < 2:
        return ConfidenceInterval(middle, -np.inf, np.inf)
    parts = np.array([v.var(ddof=1) / len(v) for v in (one, two)])
    if not parts.sum():
        return ConfidenceInterval(middle, middle, middle)
    freedom = parts.sum() ** 2 / (parts**2 / (len(one) - 1, len(two) - 1)).sum()
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(parts.sum()))
    return ConfidenceInterval(middle, middle - half, middle + half)


def halves(values: Floats) -> tuple[Floats, Floats]:
    """Return the harder and the easier half of sets that are sorted by difficulty."""
    middle = len(values) // 2
    return values[-middle:], values[:middle]


def alike(values: ArrayLike, limit: float, what: str) -> Verdict:
    """Decide whether the harder and the easier half of the sets are alike.

    Alike means that the 95 % interval of their difference lies within the limit on both
    sides. So too few sets cannot make them alike.

    Args:
        values: ``(seeds, sets)``, easiest set first.
        limit: Largest difference that counts as alike.
        what: What the values are, for the text.
    """
    means = by_set(values)
    reason = too_few_sets(len(means))
    spread = f"{what} of the sets from {means.min():.3f} to {means.max():.3f}"
    if reason:
        return Verdict(NOT_TESTABLE, f"{spread}; {reason}")
    found = _welch(*halves(means))
    text = f"{spread}; harder minus easier half {text_of(found)}, {len(means)} sets"
    if -limit < found.low and found.high < limit:
        return Verdict(BORNE_OUT, text)
    apart = found.low > limit or found.high < -limit
    return Verdict(NOT_BORNE_OUT if apart else UNDECIDED, text)


def shrinks(small: ArrayLike, large: ArrayLike, what: str) -> Verdict:
    """Decide whether the separation of hard from easy sets is smaller for large sets.

    The separation is the mean of the harder half of the sets minus that of the easier
    half. Sets of the two sizes share some examples, which makes the interval wider than
    necessary.

    Args:
        small: Values for small sets, ``(seeds, sets)``, easiest first.
        large: Values for large sets.
        what: What the values are, for the text.
    """
    groups = [halves(by_set(values)) for values in (small, large)]
    fewest = min(by_set(values).size for values in (small, large))
    first, second = (_welch(*pair) for pair in groups)
    parts = [(v.var(ddof=1) / len(v), len(v) - 1) for pair in groups for v in pair]
    variances, freedoms = np.array(parts).T
    middle = first.estimate - second.estimate
    apart = f"{first.estimate:.3f} for the smallest sets, {second.estimate:.3f}"
    text = f"{what}, harder minus easier half: {apart} for the largest"
    reason = too_few_sets(fewest)
    if reason or not variances.sum():
        return Verdict(NOT_TESTABLE, f"{text}; {reason or 'the sets do not differ'}")
    freedom = variances.sum() ** 2 / (variances**2 / freedoms).sum()
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variances.sum()))
    found = ConfidenceInterval(middle, middle - half, middle + half)
    kind = of_interval(found.low, found.high)
    return Verdict(kind, f"{text}; shrinks by {text_of(found)}")
