"""Rank correlations over many examples, with the class as the unit.

Examples of one class resemble each other, and so do near copies of one image. So
thousands of examples are a sample of a few classes, and a score that only tells classes
apart would correlate with any other such score. The correlation is therefore measured
*within* each class, by scores averaged over the trainings; the classes are the sample.
Trainings differ, too: the correlations over all examples of each training say by how
much. All trainings have the same examples, so more trainings do not reduce the first
error.

Correlations are transformed by Fisher's artanh, so that an interval never leaves
[-1, 1]. Student's intervals over classes and over trainings are added as independent
errors. The artanh of a correlation near 1 is so large that a few such classes would
outweigh others that are far below a limit. So a mean correlation must be above a limit,
or below it, both as it is and by its artanh, and so must a lead over another one.
Classes of fewer than 30 examples are left
out: with two or three, the rank correlation is often exactly 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.verdicts import (
    LEVEL,
    NOT_TESTABLE,
    Verdict,
    not_finite,
    of_tests,
)
from opacus_pi.evaluation.intervals import ConfidenceInterval

Floats = NDArray[np.float64]
FEWEST_TRAININGS = 3
FEWEST_CLASSES = 5
FEWEST_EXAMPLES = 30  # of a class
_ONE = 1 - 1e-9  # the largest correlation whose artanh is used
Mean = tuple[float, Callable[[float], float]]  # and its error at a level


@dataclass(frozen=True)
class Correlations:
    """Spearman's rank correlations of two scores.

    Attributes:
        of_trainings: Over all examples, for each training, ``(trainings,)``.
        of_classes: Within each class, by scores averaged over the trainings,
            ``(classes,)``, as ``within_classes`` returns them; empty if the examples
            were stored without their classes.
    """

    of_trainings: Floats
    of_classes: Floats

    def unusable(self) -> str:
        """Return why nothing can be said from these numbers; empty if it can."""
        trainings, classes = len(self.of_trainings), len(self.of_classes)
        if trainings < FEWEST_TRAININGS:
            return f"{trainings} trainings; at least {FEWEST_TRAININGS} are needed"
        if not classes:
            return (
                "stored without the classes of the examples, which are the unit of the "
                "test"
            )
        if classes < FEWEST_CLASSES:
            return (
                f"{classes} classes of at least {FEWEST_EXAMPLES} examples; at least "
                f"{FEWEST_CLASSES} are needed"
            )
        return not_finite(
            {
                "correlations of trainings": self.of_trainings,
                "correlations within classes": self.of_classes,
            }
        )


def artanh(correlations: ArrayLike) -> Floats:
    """Return Fisher's transform of correlations, finite for those of 1 and -1 too."""
    return np.arctanh(np.clip(correlations, -_ONE, _ONE))


def within_classes(first: ArrayLike, second: ArrayLike, labels: ArrayLike) -> Floats:
    """Return Spearman's rank correlation of two scores within each class.

    Args:
        first: One score, ``(n,)``.
        second: Another score, ``(n,)``.
        labels: The class of each example, ``(n,)``.

    Returns:
        ``(classes,)``, without those of fewer than ``FEWEST_EXAMPLES``; NaN where a
        score does not vary within a class.
    """
    scores, classes = np.array([first, second], dtype=np.float64), np.asarray(labels)
    names, sizes = np.unique(classes, return_counts=True)
    large = names[sizes >= FEWEST_EXAMPLES]
    return np.array([_spearman(scores[:, classes == k]) for k in large])


def _spearman(scores: Floats) -> float:
    ranks = stats.rankdata(scores, axis=1)
    if not ranks.std(1).all():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def correlation(found: Correlations) -> ConfidenceInterval:
    """Return the mean correlation within classes, by its artanh, with its interval."""
    middle, error = _by_artanh(found)
    half = error(LEVEL)
    ends = np.tanh([middle, middle - half, middle + half])
    return ConfidenceInterval(*map(float, ends))


def _artanh(found: Correlations) -> list[Floats]:
    parts = found.of_classes, found.of_trainings
    return [artanh(one) for one in parts]


def _by_artanh(found: Correlations) -> Mean:
    return _mean(*_artanh(found))


def _mean(classes: Floats, trainings: Floats) -> Mean:
    """Return the mean over classes, and its error at any level.

    The error is the half width of a one-sided interval over classes and trainings.
    """
    parts = [
        (v.std(ddof=1) / np.sqrt(len(v)), len(v) - 1) for v in (classes, trainings)
    ]

    def error(level: float) -> float:
        return float(np.hypot(*(stats.t.isf(level, n) * one for one, n in parts)))

    return float(classes.mean()), error


def _p_above(mean: Mean, limit: float) -> float:
    """Return at which level the mean is just above the limit; 1 if it is below."""
    distance = mean[0] - limit
    if distance <= 0:
        return 1.0
    low, high = 0.0, 0.5
    for _ in range(40):
        level = (low + high) / 2
        low, high = (low, level) if mean[1](level) < distance else (level, high)
    return high


def _tests(by_artanh: Mean, plain: Mean, limit: float) -> tuple[float, float]:
    """Return p-values of above and below the limit, by both scales."""
    pairs = (by_artanh, float(np.arctanh(limit))), (plain, limit)
    above = max(_p_above(mean, one) for mean, one in pairs)
    below = max(_p_above((-mean[0], mean[1]), -one) for mean, one in pairs)
    return above, below


def above(
    found: Correlations, least: float, digits: int = 3, among: int = 1
) -> Verdict:
    """Decide whether a correlation is above a limit that was fixed beforehand.

    Args:
        found: The correlations.
        least: The limit.
        digits: Decimal places of the text.
        among: From how many correlations the lowest was chosen.
    """
    reason = found.unusable()
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    plain = _mean(found.of_classes, found.of_trainings)
    p_above, p_below = _tests(_by_artanh(found), plain, least)
    tests = p_above, among * p_below
    effect = _effect(
        "mean correlation within classes", correlation(found), tests, found
    )
    remark = (
        f"the lowest correlation of a class is {found.of_classes.min():.3f}; over all "
        f"examples it is {found.of_trainings.mean():.3f}"
    )
    return of_tests(*tests, replace(effect, limit=least, digits=digits), remark)


def ahead(found: Correlations, other: Correlations) -> Verdict:
    """Decide whether one correlation exceeds another on the same examples."""
    reason = found.unusable() or other.unusable()
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    both = zip(_artanh(found), _artanh(other), strict=True)
    classes, trainings = (one - two for one, two in both)
    lead = _mean(classes, trainings)
    plain = _mean(
        found.of_classes - other.of_classes, found.of_trainings - other.of_trainings
    )
    half = lead[1](LEVEL)
    interval = ConfidenceInterval(lead[0], lead[0] - half, lead[0] + half)
    tests = _tests(lead, plain, 0.0)
    return of_tests(
        *tests, _effect("lead in the artanh of the correlation", interval, tests, found)
    )


def _effect(
    name: str,
    interval: ConfidenceInterval,
    tests: tuple[float, float],
    found: Correlations,
) -> Effect:
    """Return an effect with the smaller p-value of above and below."""
    side = int(tests[0] > tests[1])
    return Effect(
        name,
        *interval,
        p=min(1.0, tests[side]),
        side=("above", "below")[side],
        units=f"{len(found.of_classes)} classes",
        trainings=len(found.of_trainings),
        digits=3,
    )
