"""Confidence intervals: of a mean over seeds, and of the epsilon that an attack shows.

>>> mean_interval([1.0, 2.0, 3.0])  # doctest: +ELLIPSIS
Interval(estimate=2.0, low=-0.484..., high=4.484...)
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The mean of independent values (seeds) with Student's interval.

    Args:
        values: At least one number, ``(k,)``; a single one has an infinite interval.
        confidence: Coverage, if the values are normal.

    Returns:
        Mean and ends.

    Raises:
        ValueError: If there is no value or one is NaN, or ``confidence`` leaves (0, 1).
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    expect(
        array.size > 0 and not np.isnan(array).any(),
        "values",
        array,
        "must be at least one number",
        "Pass the metric's value for every seed.",
    )
    in_range(0, 1, closed=False, remedy="0.95 is usual.", confidence=confidence)
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, -np.inf, np.inf)
    margin = stats.t.ppf((1 + confidence) / 2, array.size - 1) * stats.sem(array)
    return Interval(mean, mean - float(margin), mean + float(margin))


def epsilon_interval(
    false_positives: int,
    num_negatives: int,
    false_negatives: int,
    num_positives: int,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
) -> Interval:
    r"""The epsilon that the errors of an attack rule out.

    (ε, δ)-indistinguishability of unlearned and retrained models forces
    :math:`1 - \delta - \mathrm{FNR} \le e^\varepsilon \mathrm{FPR}` and the same with
    the errors exchanged, so every attack shows a lower limit of ε:
    :math:`\max(0, \ln\frac{1-\delta-FNR}{FPR}, \ln\frac{1-\delta-FPR}{FNR})`. The ends
    put Clopper-Pearson limits in place of the rates, each at half the error
    probability, so that both hold together.

    Args:
        false_positives: Retrained models called unlearned.
        num_negatives: Retrained models judged.
        false_negatives: Unlearned models called retrained.
        num_positives: Unlearned models judged.
        delta: δ.
        confidence: Coverage of the interval for an attack fixed beforehand whose
            judgements are independent.

    Returns:
        The plug-in value and the ends; infinite where an error rate of 0 cannot be
        ruled out. ``low`` is what may be claimed.

    Raises:
        ValueError: If a count is impossible, or delta or the confidence not in (0, 1).

    Source: Kairouz et al. 2015 (arXiv:1311.0776), Theorem 2.1; Nasr et al. 2021
    (arXiv:2101.04535) for the intervals.
    """
    in_range(0, 1, closed=False, remedy="Pass a probability.", delta=delta)
    in_range(0, 1, closed=False, remedy="0.95 is usual.", confidence=confidence)
    for name, total in (("negatives", num_negatives), ("positives", num_positives)):
        expect(
            total >= 1, f"num_{name}", total, "must be at least 1", "Judge some models."
        )
    remedy = "Errors are some of the trials."
    in_range(0, num_negatives, remedy=remedy, false_positives=false_positives)
    in_range(0, num_positives, remedy=remedy, false_negatives=false_negatives)
    tail = (1 - confidence) / 4
    rates = zip(
        _rate_and_limits(false_positives, num_negatives, tail),
        _rate_and_limits(false_negatives, num_positives, tail),
        strict=True,
    )
    shown, high, low = (_shown_epsilon(fpr, fnr, delta) for fpr, fnr in rates)
    return Interval(shown, low, high)


def _rate_and_limits(
    errors: int, total: int, tail: float
) -> tuple[float, float, float]:
    """An error rate with its lower and upper Clopper-Pearson limits."""
    low, high = 0.0, 1.0
    if errors > 0:
        low = float(stats.beta.ppf(tail, errors, total - errors + 1))
    if errors < total:
        high = float(stats.beta.ppf(1 - tail, errors + 1, total - errors))
    return errors / total, low, high


def _shown_epsilon(fpr: float, fnr: float, delta: float) -> float:
    """The smallest epsilon that these error rates allow."""
    shown = 0.0
    for one, other in ((fpr, fnr), (fnr, fpr)):
        if one < 1 - delta:
            shown = max(shown, np.log((1 - delta - one) / other) if other else np.inf)
    return float(shown)
