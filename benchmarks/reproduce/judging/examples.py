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
errors.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
    not_finite,
    of_interval,
    text_of,
)
from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval

Floats = NDArray[np.float64]
FEWEST_TRAININGS = 3
FEWEST_CLASSES = 5
_ONE = 1 - 1e-9  # the largest correlation whose artanh is used


@dataclass(frozen=True)
class Correlations:
    """Spearman's rank correlations of two scores.

    Attributes:
        of_trainings: Over all examples, for each training, ``(trainings,)``.
        of_classes: Within each class, by scores averaged over the trainings,
            ``(classes,)``; empty if the examples were stored without their classes.
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
                f"test (over all examples {self.of_trainings.mean():.4f})"
            )
        if classes < FEWEST_CLASSES:
            return f"{classes} classes; at least {FEWEST_CLASSES} are needed"
        return not_finite(
            {
                "correlations of trainings": self.of_trainings,
                "correlations within classes": self.of_classes,
            }
        )

    def text(self) -> str:
        """Return the number of classes, and the correlation over all examples."""
        return (
            f"{len(self.of_classes)} classes; over all examples "
            f"{self.of_trainings.mean():.3f}, {len(self.of_trainings)} trainings"
        )


def within_classes(first: ArrayLike, second: ArrayLike, labels: ArrayLike) -> Floats:
    """Return Spearman's rank correlation of two scores within each class.

    Args:
        first: One score, ``(n,)``.
        second: Another score, ``(n,)``.
        labels: The class of each example, ``(n,)``.

    Returns:
        ``(classes,)``; NaN where a score does not vary within a class.
    """
    scores, classes = np.array([first, second], dtype=np.float64), np.asarray(labels)
    return np.array([_spearman(scores[:, classes == k]) for k in np.unique(classes)])


def _spearman(scores: Floats) -> float:
    ranks = stats.rankdata(scores, axis=1)
    if not ranks.std(1).all():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def correlation(found: Correlations) -> ConfidenceInterval:
    """Return the mean correlation within classes, with its 95 % interval."""
    z = (np.arctanh(np.clip(v, -_ONE, _ONE)) for v in _parts(found))
    return ConfidenceInterval(*map(float, np.tanh(_interval(*z))))


def _parts(found: Correlations) -> tuple[Floats, Floats]:
    return found.of_classes, found.of_trainings


def _interval(classes: Floats, trainings: Floats) -> ConfidenceInterval:
    """Return the mean over classes, with an interval over classes and trainings."""
    halves = [
        one.high - one.estimate for one in map(mean_interval, (classes, trainings))
    ]
    middle, half = float(classes.mean()), float(np.hypot(*halves))
    return ConfidenceInterval(middle, middle - half, middle + half)


def above(found: Correlations, least: float, digits: int = 3) -> Verdict:
    """Decide whether a correlation is above a limit that was fixed beforehand.

    Args:
        found: The correlations.
        least: The limit.
        digits: Decimal places of the text.
    """
    reason = found.unusable()
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    inside = correlation(found)
    text = f"{text_of(inside, digits)} against {least:g} within {found.text()}"
    if inside.low > least:
        return Verdict(BORNE_OUT, text)
    return Verdict(NOT_BORNE_OUT if inside.high < least else UNDECIDED, text)


def ahead(found: Correlations, other: Correlations) -> Verdict:
    """Decide whether one correlation exceeds another on the same examples."""
    reason = found.unusable() or other.unusable()
    if reason:
        return Verdict(NOT_TESTABLE, reason)
    both = zip(_parts(found), _parts(other), strict=True)
    lead = _interval(*(one - two for one, two in both))
    return Verdict(
        of_interval(lead.low, lead.high), f"by {text_of(lead)} within {found.text()}"
    )
