"""Are values the same on all sets? Each set has to show it, within a fixed margin.

A difference that was not found is no evidence that there is none: noise alone hides it.
So the claim is the alternative of the test, not its null: a difference as large as the
margin must be ruled out. That takes two one-sided tests (TOST), or what is the same,
a confidence interval that lies within the margin. The margin is an argument, fixed in
the header of the figure; it is never computed from the spread of the values, which
would forgive noise.

One set that differs must not hide among others, so every pair of sets is tested. The
claim is confirmed only if all tests confirm it, so each of them can have the full level
(an intersection-union test). The claim is about the sets that were measured; what
varies is the training. It is also about the trainings that were run: a failure that
happens in one training of ten is often not among five of them.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.order import too_few_sets
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    LEVEL,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
    not_finite,
)

Floats = NDArray[np.float64]
FEWEST_TRAININGS = 3


def alike(values: ArrayLike, limit: float, what: str) -> Verdict:
    """Decide whether all sets lie within a margin of each other.

    Args:
        values: ``(seeds, sets)``.
        limit: Largest difference of two sets that counts as alike, fixed beforehand.
        what: What the values are, for the text.
    """
    of_sets = np.asarray(values, dtype=np.float64)
    reason = _unusable(of_sets)
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    left, right = np.array(list(combinations(range(of_sets.shape[1]), 2))).T
    apart = of_sets[:, left] - of_sets[:, right]
    error = apart.std(0, ddof=1) / np.sqrt(len(apart))
    if not error.any():
        return Verdict(NOT_TESTABLE, "all trainings gave the same numbers")
    middle, freedom = np.abs(apart.mean(0)), len(apart) - 1
    largest = float((middle + stats.t.isf(LEVEL, freedom) * error).max())
    p_beyond = _beyond(middle - limit, error, freedom).min() * len(middle)
    means = of_sets.mean(0)
    effect = _effect(
        f"largest difference of two sets in {what}",
        middle.max(),
        largest,
        limit,
        of_sets,
    )
    remark = f"the sets lie between {means.min():.3f} and {means.max():.3f}"
    return _verdict(largest < limit, float(p_beyond), effect, remark)


def at_most(
    values: ArrayLike, baseline: ArrayLike, factor: float, what: str
) -> Verdict:
    """Decide whether every set's value is at most a multiple of its own baseline.

    A few models may all lack a high value that is not rare, so that their baseline is
    too low. A set is therefore beyond only if it exceeds the multiple of the mean
    baseline of all sets, too.

    Args:
        values: ``(seeds, sets)``.
        baseline: Values of all pairs of the models to compare with, ``(sets, pairs)``.
            Pairs share models, so the variance of their mean is that of a sum of two
            models' parts.
        factor: The multiple, fixed beforehand.
        what: What the values are, for the text.
    """
    of_sets, pairs = (np.asarray(v, dtype=np.float64) for v in (values, baseline))
    reason = _unusable(of_sets) or not_finite({"baseline": pairs})
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    seeds, models = len(of_sets), (1 + np.sqrt(1 + 8 * pairs.shape[1])) / 2
    of_runs = of_sets.var(0, ddof=1) / seeds
    own = of_sets.mean(0) - factor * pairs.mean(1)
    all_sets = of_sets.mean(0) - factor * pairs.mean()
    shared = 2 / (models - 2) * (1 - 1 / pairs.shape[1])
    of_own = factor**2 * pairs.var(1, ddof=1) * shared
    of_all = factor**2 * pairs.mean(1).var(ddof=1) / len(pairs)
    error, freedom = np.sqrt(of_runs + of_own), min(seeds, models) - 1
    largest = float((own + stats.t.isf(LEVEL, freedom) * error).max())
    p_beyond = np.maximum(
        _beyond(own, error, freedom),
        _beyond(all_sets, np.sqrt(of_runs + of_all), min(seeds, len(pairs)) - 1),
    )
    name = f"{what} beyond {factor:g} times the baseline, on the worst set"
    effect = _effect(name, own.max(), largest, 0.0, of_sets)
    remark = (
        f"the mean {what} is {of_sets.mean():.3f}, and {pairs.mean():.3f} for the "
        "baseline"
    )
    return _verdict(largest < 0, float(p_beyond.min() * len(own)), effect, remark)


def _unusable(values: Floats) -> str:
    """Return why nothing can be said from values ``(seeds, sets)``; empty if it can."""
    seeds, sets = values.shape
    if seeds < FEWEST_TRAININGS:
        return f"{seeds} trainings; at least {FEWEST_TRAININGS} are needed"
    return too_few_sets(sets) or not_finite({"value of a set": values})


def _effect(
    name: str, worst: float, most: float, limit: float, values: Floats
) -> Effect:
    """Return the largest excess with its one-sided limit; values ``(seeds, sets)``."""
    trainings, sets = values.shape
    return Effect(
        name,
        float(worst),
        None,
        most,
        limit,
        units=f"{sets} sets",
        trainings=trainings,
        digits=3,
    )


def _beyond(excess: Floats, error: Floats, freedom: float) -> Floats:
    """Return Student's p-values of an excess above 0; without an error 0 or 1."""
    known = np.where(error > 0, error, 1.0)
    p = stats.t.sf(excess / known, freedom)
    return np.asarray(np.where(error > 0, p, excess <= 0), dtype=np.float64)


def _verdict(within: bool, p_beyond: float, effect: Effect, remark: str) -> Verdict:
    found = Verdict(UNDECIDED, effect=effect, remarks=(remark,))
    if within:
        return replace(found, verdict=BORNE_OUT)
    if p_beyond <= LEVEL:
        return replace(found, verdict=NOT_BORNE_OUT, p_against=p_beyond)
    return found
