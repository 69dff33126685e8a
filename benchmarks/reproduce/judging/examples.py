"""Rank correlations over many examples, one for each training.

Two errors add up: trainings differ (Student's interval over seeds), and the examples
are a sample (normal interval, Bonett and Wright 2000). All trainings have the same
examples, so more seeds do not reduce the second error. The interval covers both and is
cut at -1 and 1.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
    text_of,
)
from opacus_pi.evaluation.intervals import ConfidenceInterval, mean_interval

Floats = NDArray[np.float64]
_FEWEST = 3  # trainings
_RESAMPLED = 400


def correlation(rho: ArrayLike, num_examples: int) -> ConfidenceInterval:
    """Return the mean correlation with an interval over trainings and examples.

    Args:
        rho: Spearman's rank correlation of each training, ``(seeds,)``.
        num_examples: Number of examples that were ranked.
    """
    seeds = mean_interval(np.clip(rho, -1, 1))
    half = seeds.high - seeds.estimate
    middle = np.arctanh(np.clip(seeds.estimate, -1 + 1e-9, 1 - 1e-9))
    error = np.sqrt((1 + seeds.estimate**2 / 2) / max(1, num_examples - 3))
    ends = np.tanh(middle + stats.norm.ppf([0.025, 0.975]) * error)
    below, above = seeds.estimate - ends[0], ends[1] - seeds.estimate
    return ConfidenceInterval(
        seeds.estimate,
        float(max(-1.0, seeds.estimate - np.hypot(half, below))),
        float(min(1.0, seeds.estimate + np.hypot(half, above))),
    )


def above(rho: ArrayLike, num_examples: int, least: float, digits: int = 3) -> Verdict:
    """Decide whether a correlation is above a limit.

    Args:
        rho: As for ``correlation``.
        num_examples: As for ``correlation``.
        least: The limit.
        digits: Decimal places of the text.
    """
    found, seeds = correlation(rho, num_examples), np.size(rho)
    text = f"{text_of(found, digits)}, {seeds} trainings, {num_examples:,} examples"
    if seeds < _FEWEST:
        return Verdict(NOT_TESTABLE, text)
    if found.low > least:
        return Verdict(BORNE_OUT, text)
    return Verdict(NOT_BORNE_OUT if found.high < least else UNDECIDED, text)


def ahead(rho: Floats, other: Floats, resampled: Floats) -> ConfidenceInterval:
    """Return by how much one correlation exceeds another on the same examples.

    Args:
        rho: Correlations of each training, ``(seeds,)``.
        other: Those of the other score.
        resampled: Differences on resampled examples, from ``resample``.
    """
    seeds = mean_interval(rho - other)
    half = seeds.high - seeds.estimate
    low, high = np.quantile(resampled - resampled.mean(), [0.025, 0.975])
    return ConfidenceInterval(
        seeds.estimate,
        float(seeds.estimate - np.hypot(half, low)),
        float(seeds.estimate + np.hypot(half, high)),
    )


def resample(losses: ArrayLike, first: ArrayLike, second: ArrayLike) -> Floats:
    """Return differences of two correlations with the losses, on resampled examples.

    Args:
        losses: Privacy losses, ``(n,)``.
        first: One score, ``(n,)``.
        second: Another score, ``(n,)``.

    Returns:
        ``rho(first) - rho(second)`` on each bootstrap sample of the examples.
    """
    x, a, b = (np.asarray(one, dtype=np.float64) for one in (losses, first, second))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_RESAMPLED):
        rows = rng.integers(len(x), size=len(x))
        ranks = stats.rankdata(np.array([x[rows], a[rows], b[rows]]), axis=1)
        table = np.corrcoef(ranks)
        found.append(table[0, 1] - table[0, 2])
    return np.array(found)
