"""Confidence intervals of a mean over seeds, and of the epsilon that an attack proves.

>>> mean_interval([1.0, 2.0, 3.0])  # doctest: +ELLIPSIS
ConfidenceInterval(estimate=2.0, low=-0.484..., high=4.484...)
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers


class ConfidenceInterval(NamedTuple):
    """An estimate and the ends of its confidence interval.

    Attributes:
        estimate: The estimate.
        low: Lower end.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> ConfidenceInterval:
    """Compute the mean of independent values, such as one per seed.

    The confidence interval is Student's.

    Args:
        values: At least one number, ``(k,)``. The interval of a single number is
            infinite.
        confidence: Coverage of the interval if the values are normally distributed.

    Returns:
        The mean and the ends of the interval.

    Raises:
        ValueError: If there is no value or one is NaN, or ``confidence`` is outside (0,
            1).
    """
    array = numbers("values", values).ravel()
    expect(
        array.size > 0,
        "values",
        array,
        "must contain at least one number",
        "Pass the metric's value for every seed.",
    )
    expect(
        not np.isnan(array).any(),
        "values",
        array,
        "must not contain NaN",
        "A mean over the other values would be biased: find out why the metric of a "
        "seed is NaN.",
    )
    in_range(0, 1, closed=False, remedy="0.95 is usual.", confidence=confidence)
    mean = float(array.mean())
    if array.size == 1:
        return ConfidenceInterval(mean, -np.inf, np.inf)
    margin = stats.t.ppf((1 + confidence) / 2, array.size - 1) * stats.sem(array)
    return ConfidenceInterval(mean, mean - float(margin), mean + float(margin))


def prediction_margin(values: ArrayLike, *, confidence: float = 0.95) -> float:
    """Compute how far one more value may be from the mean of independent values.

    The prediction interval is Student's: the mean plus or minus the margin.

    >>> prediction_margin([1.0, 2.0, 3.0])  # doctest: +ELLIPSIS
    4.968...

    Args:
        values: At least two numbers, ``(k,)``.
        confidence: Coverage of the interval if the values and the new one are normally
            distributed.

    Returns:
        The margin, in the unit of the values.

    Raises:
        ValueError: If there are fewer than two values, one is not finite, or
            ``confidence`` is outside (0, 1).
    """
    array = numbers("values", values).ravel()
    expect(
        array.size > 1 and bool(np.isfinite(array).all()),
        "values",
        array,
        "must contain at least two finite numbers",
        "Pass the metric's value for every seed.",
    )
    in_range(0, 1, closed=False, remedy="0.95 is usual.", confidence=confidence)
    quantile = stats.t.ppf((1 + confidence) / 2, array.size - 1)
    return float(quantile * array.std(ddof=1) * np.sqrt(1 + 1 / array.size))


def epsilon_interval(
    false_positives: int,
    num_negatives: int,
    false_negatives: int,
    num_positives: int,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
) -> ConfidenceInterval:
    r"""Compute the epsilon that the error rates of an attack prove.

    If unlearned and retrained models are (ε, δ)-indistinguishable, every attack
    satisfies :math:`1 - \delta - \mathrm{FNR} \le e^\varepsilon \mathrm{FPR}`, and the
    same with the two rates exchanged. Every attack therefore proves a lower limit of ε,
    :math:`\max(0, \ln\frac{1-\delta-FNR}{FPR}, \ln\frac{1-\delta-FPR}{FNR})`. The ends
    of the interval use Clopper-Pearson limits of the rates, each at half the error
    probability, so that both hold simultaneously.

    Args:
        false_positives: Number of retrained models that the attack calls unlearned.
        num_negatives: Number of retrained models that were judged.
        false_negatives: Number of unlearned models that the attack calls retrained.
        num_positives: Number of unlearned models that were judged.
        delta: δ.
        confidence: Coverage of the interval, for an attack that was fixed beforehand
            and whose judgements are independent.

    Returns:
        The value at the observed rates, with ``low`` and ``high``. You may claim
        ``low``, which is always finite. The other two are infinite if the attack made
        no error of one of the two kinds.

    Raises:
        ValueError: If a count is impossible, or delta or the confidence not in (0, 1).

    Source: Kairouz et al. 2015 (arXiv:1311.0776), Theorem 2.1; Nasr et al. 2021
    (arXiv:2101.04535) for the intervals.
    """
    in_range(0, 1, closed=False, remedy="Pass a probability.", delta=delta)
    in_range(0, 1, closed=False, remedy="0.95 is usual.", confidence=confidence)
    for name, total in (("negatives", num_negatives), ("positives", num_positives)):
        expect(
            total >= 1,
            f"num_{name}",
            total,
            "must be at least 1",
            "Pass the number of models that were judged.",
        )
    remedy = "Count at most one error for each model."
    in_range(0, num_negatives, remedy=remedy, false_positives=false_positives)
    in_range(0, num_positives, remedy=remedy, false_negatives=false_negatives)
    tail = (1 - confidence) / 4
    rates = zip(
        _rate_and_limits(false_positives, num_negatives, tail),
        _rate_and_limits(false_negatives, num_positives, tail),
        strict=True,
    )
    shown, high, low = (_shown_epsilon(fpr, fnr, delta) for fpr, fnr in rates)
    return ConfidenceInterval(shown, low, high)


@lru_cache(maxsize=4096)
def _rate_and_limits(
    errors: int, total: int, tail: float
) -> tuple[float, float, float]:
    """Return an error rate with its lower and upper Clopper-Pearson limits.

    These limits hold for any number of trials and any rate, unlike the normal
    approximation, which fails for rates near 0. Those are the rates of a good attack.

    Args:
        errors: Number of errors.
        total: Number of trials, at least 1.
        tail: Probability with which each limit may be wrong.
    """
    low, high = 0.0, 1.0
    if errors > 0:
        low = float(stats.beta.ppf(tail, errors, total - errors + 1))
    if errors < total:
        high = float(stats.beta.ppf(1 - tail, errors + 1, total - errors))
    return errors / total, low, high


def _shown_epsilon(fpr: float, fnr: float, delta: float) -> float:
    """Return the smallest epsilon that these error rates allow.

    Args:
        fpr: False positive rate.
        fnr: False negative rate.
        delta: δ.

    Returns:
        At least 0; ``inf`` if one rate is 0 and the other is small enough.
    """
    shown = 0.0
    for one, other in ((fpr, fnr), (fnr, fpr)):
        if one < 1 - delta:
            shown = max(shown, np.log((1 - delta - one) / other) if other else np.inf)
    return float(shown)
