"""Rank correlations over forget sets: a permutation test, and an interval.

The test asks: if the sets' values were independent of their difficulty, how often would
a random order of the sets correlate as highly as the observed one? It assumes nothing
about the distribution of the values. Up to eight sets all orders are counted; for more,
a fixed sample of them.

The interval contains every correlation that the observed one does not contradict: the
correlation rho of two normal variables belongs to it if samples of this many sets would
give at least, and at most, the observed rank correlation in 2.5 % of the cases or more.
It lies in [-1, 1], and its width is never 0: a perfect order of eight sets is also seen
if the correlation is high but not perfect.

>>> rank_test([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 5, 4, 6, 7, 8]).text()
'Spearman 0.98, 95 % [0.73, 1.00], permutation p = 0.0002, 8 sets'
"""

from functools import lru_cache
from itertools import permutations
from math import factorial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
_EXACT = 8  # sets up to which all orders are counted
_SAMPLED = 20_000  # orders in the sample for more sets
_DRAWS = 4_000  # simulated samples for each correlation of the grid
_GRID = np.concatenate([[-1.0], np.tanh(np.linspace(-5, 5, 241)), [1.0]])
_TAIL = 0.025
_SAME = 1e-9  # correlations closer than this are equal


class RankTest(NamedTuple):
    """A rank correlation over forget sets.

    Attributes:
        rho: Spearman's rank correlation; 0 if one side is constant.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_rising: Share of the orders of the sets that correlate at least as highly.
        p_falling: Share that correlate at most as highly.
        num_sets: Number of sets.
    """

    rho: float
    low: float
    high: float
    p_rising: float
    p_falling: float
    num_sets: int

    def text(self) -> str:
        """Return correlation, interval, p-value and number of sets as text."""
        p = min(self.p_rising, self.p_falling)
        shown = f"= {p:.4f}" if p >= 1e-4 else "< 0.0001"
        digits = 2 if self.high - self.low > 0.02 else 4
        low, high = (f"{end:.{digits}f}" for end in (self.low, self.high))
        return (
            f"Spearman {self.rho:.2f}, 95 % [{low}, {high}], permutation p {shown}, "
            f"{self.num_sets} sets"
        )


def rank_test(difficulty: ArrayLike, values: ArrayLike) -> RankTest:
    """Test whether values rise with difficulty.

    Args:
        difficulty: One number for each set, ``(m,)``.
        values: The values of the sets, ``(m,)``; inf is above all others.

    Returns:
        The correlation with its interval and one-sided p-values.
    """
    x, y = (_standard_ranks(one) for one in (difficulty, values))
    found = _orders(len(x))
    rho = float(x @ y)
    others = y[found] @ x
    counted = len(x) <= _EXACT  # the observed order is among those counted
    p_rising, p_falling = (
        float(hits.sum() + (not counted)) / (len(found) + (not counted))
        for hits in (others >= rho - _SAME, others <= rho + _SAME)
    )
    return RankTest(rho, *rank_interval(rho, len(x)), p_rising, p_falling, len(x))


def rank_interval(rho: float, num_sets: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a rank correlation.

    Args:
        rho: The observed rank correlation.
        num_sets: Number of sets, at least 3.
    """
    low, high = _limits(num_sets)
    allowed = np.flatnonzero((low <= rho + _SAME) & (high >= rho - _SAME))
    outer = max(0, allowed[0] - 1), min(len(_GRID) - 1, allowed[-1] + 1)
    ends = _GRID[list(outer)]  # the ends lie between two points of the grid
    first, last = 6 / np.pi * np.arcsin(ends / 2)  # Spearman's of normal variables
    return float(max(-1.0, min(first, rho))), float(min(1.0, max(last, rho)))


@lru_cache(maxsize=64)
def _limits(num_sets: int) -> tuple[Floats, Floats]:
    """Return the 2.5 % and 97.5 % points of rho, for each correlation of the grid."""
    rng = np.random.default_rng(num_sets)
    first, second = rng.normal(size=(2, _DRAWS, num_sets))
    ranks = _row_ranks(first)
    found = np.array(
        [
            (ranks * _row_ranks(r * first + np.sqrt(1 - r**2) * second)).sum(1)
            for r in _GRID
        ]
    )
    low, high = np.quantile(found, [_TAIL, 1 - _TAIL], axis=1)
    return np.maximum.accumulate(low), np.maximum.accumulate(high)


@lru_cache(maxsize=64)
def _orders(num_sets: int) -> NDArray[np.int64]:
    """Return all orders of the sets, or a fixed sample of them, ``(orders, sets)``."""
    if num_sets <= _EXACT:
        found = np.array(list(permutations(range(num_sets))))
        assert len(found) == factorial(num_sets)
        return found
    rng = np.random.default_rng(num_sets)
    return rng.permuted(np.tile(np.arange(num_sets), (_SAMPLED, 1)), axis=1)


def _standard_ranks(values: ArrayLike) -> Floats:
    """Return ranks of mean 0 and length 1, so that a product is Spearman's rho."""
    ranks = stats.rankdata(np.asarray(values, dtype=np.float64))
    centred = ranks - ranks.mean()
    length = float(np.linalg.norm(centred))
    return centred / length if length else centred


def _row_ranks(values: Floats) -> Floats:
    """Return standard ranks of each row; rows without ties."""
    ranks = values.argsort(1).argsort(1) - (values.shape[1] - 1) / 2
    return ranks / np.linalg.norm(ranks, axis=1, keepdims=True)
