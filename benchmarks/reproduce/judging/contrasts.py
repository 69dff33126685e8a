"""Differences between groups of forget sets, and between two values of each set.

Values come as ``(seeds, sets)``. An effect must show in two ways. *Over sets*: sets
differ, and the next one may be different again. *Over trainings*: all sets are measured
in the same few trainings, so what is peculiar to a training appears in every set and
would look like many agreeing sets. A claim is borne out if both tests say so.

A mean can always be turned around by sets that are rare and far away, which Student's
interval does not see. The relative difference of two values that are not negative is
never beyond -1 and 1, and for such numbers there is a test that no distribution can
fool (``betting``). The price is power: it needs large effects or many sets. The other
two judges, of groups and of separations, have no such test. They take it that the sets
that were drawn show how much sets differ.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.order import too_few_sets
from benchmarks.reproduce.judging.verdicts import (
    LEVEL,
    NOT_TESTABLE,
    Verdict,
    not_finite,
    of_tests,
)
from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval

Floats = NDArray[np.float64]
FEWEST_TRAININGS = 3
FEWEST_OF_GROUP = 4  # sets, with which the smallest p of a permutation is 1 in 70
STAKES = (0.5, 0.75, 1.0)
_SAME = 1e-9


def betting(values: ArrayLike) -> float:
    """Test whether the mean of numbers in [-1, 1] is above 0.

    A gambler bets on each number in turn that it is positive, with a fixed share of the
    current fortune. If the mean is 0 or less, the fortune does not grow on average, so
    it reaches 40 times the start in at most one of 40 studies (Markov's inequality),
    whatever the distribution, and also if every number has another one. The order of
    the numbers does not matter. Source: Waudby-Smith and Ramdas 2024, with stakes that
    are fixed instead of adapted.

    Args:
        values: Independent numbers in [-1, 1].

    Returns:
        A p-value, 1 divided by the mean fortune over ``STAKES``.
    """
    array = np.asarray(values, dtype=np.float64)
    fortune = np.mean([np.prod(1 + stake * array) for stake in STAKES])
    return float(min(1.0, 1 / fortune)) if fortune > 0 else 1.0


def larger(first: ArrayLike, second: ArrayLike, what: str) -> Verdict:
    """Decide whether a first value exceeds a second one, on average over sets.

    Args:
        first: Values that are not negative, ``(seeds, sets)``.
        second: The values to compare with.
        what: The name of the difference, which is a share of the larger value.
    """
    one, two = (np.asarray(v, dtype=np.float64) for v in (first, second))
    reason = _unusable(one) or _unusable(two)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    means = one.mean(0), two.mean(0)
    top = np.maximum(*means)
    relative = np.divide(
        means[0] - means[1], top, out=np.zeros(len(top)), where=top > 0
    )
    over_sets = betting(relative), betting(-relative)
    over_trainings = student(one.mean(1) - two.mean(1))
    interval = mean_interval(relative)
    effect = Effect(what, *interval, units=f"{len(top)} sets", trainings=len(one))
    remark = f"the mean goes from {means[0].mean():.3f} to {means[1].mean():.3f}"
    return _verdict(over_sets, over_trainings, effect, remark)


def groups_differ(first: ArrayLike, second: ArrayLike, what: str) -> Verdict:
    """Decide whether one group of sets has larger values than another.

    By permutation: the sets are divided anew into two groups of these sizes, in all
    possible ways. A small group that varies more than the other would be mistaken for a
    larger one, so Welch's t test must agree.

    Args:
        first: Values of the group that is claimed to be larger, ``(seeds, sets)``.
        second: Values of the other group.
        what: The name of the difference.
    """
    one, two = (np.asarray(v, dtype=np.float64) for v in (first, second))
    reason = _unusable(one, FEWEST_OF_GROUP) or _unusable(two, FEWEST_OF_GROUP)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    means = one.mean(0), two.mean(0)
    over_sets = _both(_permuted(*means), _welch_test(*means))
    over_trainings = student(one.mean(1) - two.mean(1))
    effect = Effect(
        what,
        *_welch(*means),
        units=f"{len(means[0])} against {len(means[1])} sets",
        trainings=len(one),
        digits=3,
    )
    return _verdict(over_sets, over_trainings, effect)


def shrinks(small: ArrayLike, large: ArrayLike, what: str) -> Verdict:
    """Decide whether the separation of hard from easy sets is smaller for large sets.

    The separation is the mean of the harder half of the sets minus that of the easier
    half. Sets of the two sizes share some examples, which makes the interval wider than
    necessary.

    Args:
        small: Values for small sets, ``(seeds, sets)``, easiest first.
        large: Values for large sets.
        what: The name of the values.
    """
    both = [np.asarray(v, dtype=np.float64) for v in (small, large)]
    reason = next(
        filter(None, (_unusable(v) or too_few_sets(v.shape[1]) for v in both)), ""
    )
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    groups = [halves(values.mean(0)) for values in both]
    parts = [(v.var(ddof=1) / len(v), len(v) - 1) for pair in groups for v in pair]
    variances, freedoms = np.array(parts).T
    first, second = (float(hard.mean() - easy.mean()) for hard, easy in groups)
    if not variances.sum():
        return Verdict(NOT_TESTABLE, "the sets do not differ")
    freedom = variances.sum() ** 2 / (variances**2 / freedoms).sum()
    error = np.sqrt(variances.sum())
    p = float(stats.t.sf((first - second) / error, freedom))
    half = float(stats.t.isf(LEVEL, freedom) * error)
    shrunk = first - second
    separations = [np.subtract(*(h.mean(1) for h in halves(v))) for v in both]
    over_trainings = student(separations[0] - separations[1])
    effect = Effect(
        f"separation of hard from easy sets by {what}: smallest minus largest sets",
        shrunk,
        shrunk - half,
        shrunk + half,
        units=f"{both[0].shape[1]} and {both[1].shape[1]} sets",
        trainings=len(both[0]),
        digits=3,
    )
    remark = (
        f"the harder half minus the easier half is {first:.3f} for the smallest sets "
        f"and {second:.3f} for the largest"
    )
    return _verdict((p, 1 - p), over_trainings, effect, remark)


def halves(values: Floats) -> tuple[Floats, Floats]:
    """Return the harder and the easier half of the sets; the last axis is the set."""
    middle = values.shape[-1] // 2
    return values[..., -middle:], values[..., :middle]


def student(differences: Floats) -> tuple[float, float]:
    """Return Student's p-values of a mean above, and below, 0, over trainings."""
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    middle = float(differences.mean())
    if error <= _SAME * abs(middle) or error == 0:
        return float(middle <= 0), float(middle >= 0)
    t, freedom = middle / error, len(differences) - 1
    return float(stats.t.sf(t, freedom)), float(stats.t.cdf(t, freedom))


def _both(one: tuple[float, float], two: tuple[float, float]) -> tuple[float, float]:
    """Return the larger p-value of two tests that must agree, for both sides."""
    return max(one[0], two[0]), max(one[1], two[1])


def _unusable(values: Floats, fewest: int = 0) -> str:
    """Return why nothing can be said from values ``(seeds, sets)``; empty if it can."""
    seeds, sets = values.shape
    if seeds < FEWEST_TRAININGS:
        return f"{seeds} trainings; at least {FEWEST_TRAININGS} are needed"
    if fewest and sets < fewest:
        return f"{sets} sets in a group; at least {fewest} of each are needed"
    few = "" if fewest else too_few_sets(sets)
    return few or not_finite({"value of a set": values})


def _verdict(
    over_sets: tuple[float, float],
    over_trainings: tuple[float, float],
    effect: Effect,
    *remarks: str,
) -> Verdict:
    """Return the verdict of both tests, each given as p-values of above and below."""
    side = int(over_sets[0] > over_sets[1])
    shown = replace(
        effect,
        p=over_sets[side],
        p_trainings=over_trainings[side],
        side=("above", "below")[side],
    )
    return of_tests(*_both(over_sets, over_trainings), shown, *remarks)


def _permuted(one: Floats, two: Floats) -> tuple[float, float]:
    """Return the shares of divisions with at least, and at most, this difference."""
    pooled, size = np.concatenate([one, two]), len(one)
    sums = pooled[_divisions(len(pooled), size)].sum(1)
    seen, slack = one.sum(), _SAME * max(1.0, float(np.abs(pooled).sum()))
    return float((sums >= seen - slack).mean()), float((sums <= seen + slack).mean())


@lru_cache(maxsize=64)
def _divisions(number: int, size: int) -> NDArray[np.int64]:
    """Return which of some sets are in the first group, for all possible divisions."""
    return np.array(list(combinations(range(number), size)))


def _welch_test(one: Floats, two: Floats) -> tuple[float, float]:
    """Return Welch's p-values of a first group above, and below, the second."""
    if not (one.std() or two.std()):
        return float(one[0] <= two[0]), float(one[0] >= two[0])
    middle, error, freedom = _welch_error(one, two)
    above = float(stats.t.sf(middle / error, freedom))
    return above, 1 - above


def _welch(one: Floats, two: Floats) -> ConfidenceInterval:
    """Return the difference of two means, with Welch's 95 % interval."""
    middle, error, freedom = _welch_error(one, two)
    half = float(stats.t.isf(LEVEL, freedom) * error) if error else 0.0
    return ConfidenceInterval(middle, middle - half, middle + half)


def _welch_error(one: Floats, two: Floats) -> tuple[float, float, float]:
    """Return a difference of two means, its standard error and degrees of freedom."""
    parts = np.array([v.var(ddof=1) / len(v) for v in (one, two)])
    spent = float((parts**2 / (len(one) - 1, len(two) - 1)).sum())
    freedom = float(parts.sum()) ** 2 / spent if spent else np.inf
    return float(one.mean() - two.mean()), float(np.sqrt(parts.sum())), freedom
