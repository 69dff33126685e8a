"""Rank correlations over forget sets and trainings: a test, and an interval.

Two things differ at random: the forget sets, which all trainings share, and the
trainings, in each of which difficulty may have another slope. A claim is about other
sets *and* other trainings, so the test counts both errors.

The sets are ranked in every training. The correlation is that of the difficulty with
the mean ranks. The test asks: if the sets' values were independent of their difficulty,
how often would a random order of the sets, plus the differences between trainings,
correlate as highly as the observed one? Up to eight sets all orders are counted; for
more, a fixed sample of them. Two corrections keep the test honest:

* *Trainings.* Each training has its own correlation. A random number with their
  standard error and Student's distribution is added to every order.
* *Unequal noise.* If the values vary more at some difficulties than at others, orders
  are not equally probable. They are then spread by the ratio of two standard errors:
  the one that allows unequal variances (HC3 of MacKinnon and White 1985), and that
  of random orders.

The interval contains every correlation that the observed one does not contradict: the
correlation rho of two normal variables belongs to it if samples of this many sets would
give at least, and at most, the observed rank correlation in 2.5 % of the cases or more.
It is then widened by the differences between trainings. It lies in [-1, 1], and its
width is never 0: a perfect order of eight sets is also seen if the correlation is high
but not perfect.

>>> rank_test([1, 2, 3, 4, 5, 6, 7, 8], [[1, 2, 3, 5, 4, 6, 7, 8]] * 3).effect(
...     "ρ"
... ).text()
'ρ: 0.98 [0.73, 1.00]; one-sided p above 0: 0.0002; 8 sets, 3 trainings'
"""

from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from benchmarks.reproduce.judging.effects import Effect

Floats = NDArray[np.float64]
_EXACT = 8  # sets up to which all orders are counted
_SAMPLED = 10_000  # orders in the sample for more sets
_DRAWS = 4_000  # simulated samples for each correlation of the grid
_GRID = np.concatenate([[-1.0], np.tanh(np.linspace(-5, 5, 241)), [1.0]])
_TAIL = 0.025
_SAME = 1e-9  # correlations closer than this are equal


class RankTest(NamedTuple):
    """A rank correlation over forget sets and trainings.

    Attributes:
        rho: Correlation of difficulty and mean ranks; 0 if one side is constant.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_rising: How often chance would correlate at least as highly.
        p_falling: How often it would correlate at most as highly.
        num_sets: Number of sets.
        num_trainings: Number of trainings.
    """

    rho: float
    low: float
    high: float
    p_rising: float
    p_falling: float
    num_sets: int
    num_trainings: int

    def effect(self, name: str) -> Effect:
        """Return correlation, interval, smaller p-value and numbers."""
        rises = self.p_rising <= self.p_falling
        return Effect(
            name,
            self.rho,
            self.low,
            self.high,
            p=self.p_rising if rises else self.p_falling,
            side="above" if rises else "below",
            units=f"{self.num_sets} sets",
            trainings=self.num_trainings,
            digits=2 if self.high - self.low > 0.02 else 4,
        )


def rank_test(difficulty: ArrayLike, values: ArrayLike) -> RankTest:
    """Test whether values rise with difficulty.

    Args:
        difficulty: One number for each set, ``(sets,)``.
        values: The values of the sets in each training, ``(trainings, sets)``, at least
            3 sets and 2 trainings.

    Returns:
        The correlation with its interval and one-sided p-values.

    Raises:
        ValueError: A number is NaN or infinite, or there are too few.
    """
    x, rows = np.asarray(difficulty, np.float64), np.asarray(values, np.float64)
    _require_usable(x, rows)
    trainings, number = rows.shape
    x, ranks = standard_ranks(x[None])[0], standard_ranks(rows)
    mean = ranks.mean(0)
    length = float(np.linalg.norm(mean))
    if length < _SAME or not x.any():
        return RankTest(0.0, -1.0, 1.0, 1.0, 1.0, number, trainings)
    each = ranks @ x / length  # their mean is the correlation
    rho = float(each.mean())
    error = float(each.std(ddof=1)) / np.sqrt(trainings)
    p_rising, p_falling = _p_values(x, mean / length, rho, error, trainings)
    low, high = rank_interval(rho, number)
    half = student_quantile(trainings - 1) * error
    return RankTest(
        rho,
        float(max(-1.0, rho - np.hypot(rho - low, half))),
        float(min(1.0, rho + np.hypot(high - rho, half))),
        p_rising,
        p_falling,
        number,
        trainings,
    )


def rank_correlation(difficulty: ArrayLike, values: ArrayLike) -> float:
    """Return the correlation of ``rank_test`` alone; 0 if one side is constant."""
    x, mean = standard_ranks(np.asarray(difficulty)[None])[0], standard_ranks(values)
    middle = mean.mean(0)
    length = float(np.linalg.norm(middle))
    return float(x @ middle / length) if length > _SAME else 0.0


def _require_usable(x: Floats, rows: Floats) -> None:
    if not (np.isfinite(x).all() and np.isfinite(rows).all()):
        raise ValueError(
            "difficulty and values must be finite numbers, got NaN or infinity. Judge "
            "such sets as not testable."
        )
    if rows.ndim != 2 or rows.shape[1:] != x.shape or min(rows.shape) < 2 or len(x) < 3:
        raise ValueError(
            f"values must be (trainings, sets) of at least 2 trainings and {len(x)} "
            f"sets (3 or more), got shape {rows.shape}."
        )


def _p_values(
    x: Floats, y: Floats, rho: float, error: float, trainings: int
) -> tuple[float, float]:
    """Return how often chance correlates at least, and at most, as highly."""
    counted = len(x) <= _EXACT  # the observed order is among those counted
    spread = _unequal(x, y, rho)
    chance = spread * (_orders_of(tuple(x)) @ y)
    if error > _SAME:
        chance = chance + error * _students(trainings - 1, len(chance))
        counted = False
    hits = [(chance >= rho - _SAME).sum(), (chance <= rho + _SAME).sum()]
    number = len(chance) + (not counted)
    rising, falling = (float(one + (not counted)) / number for one in hits)
    return rising, falling


def _unequal(x: Floats, y: Floats, rho: float) -> float:
    """Return by how much unequal variances spread the correlation; at least 1."""
    left = y - rho * x
    if not float(left @ left) > _SAME:
        return 1.0
    free = 1 - x**2 - 1 / len(x)  # share of a deviation that a line leaves
    of_sets = float((x**2) @ (left / np.maximum(free, _SAME)) ** 2)
    of_orders = float(left @ left) / (len(x) - 1)
    return float(max(1.0, np.sqrt(of_sets / of_orders)))


def rank_interval(rho: float, num_sets: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a rank correlation, over sets alone.

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
def _orders_of(x: tuple[float, ...]) -> Floats:
    """Return all orders of some numbers, or a fixed sample of them."""
    if len(x) <= _EXACT:
        return np.array(list(permutations(x)))
    rng = np.random.default_rng(len(x))
    return rng.permuted(np.tile(x, (_SAMPLED, 1)), axis=1)


@lru_cache(maxsize=64)
def _students(freedom: int, number: int) -> Floats:
    """Return the quantiles of Student's distribution, in a fixed random order."""
    levels = (np.arange(number) + 0.5) / number
    found = stats.t.ppf(levels, freedom)
    return np.asarray(np.random.default_rng(freedom).permutation(found))


@lru_cache(maxsize=64)
def student_quantile(freedom: int) -> float:
    """Return the 97.5 % point of Student's distribution; infinite without freedom."""
    return float(stats.t.ppf(1 - _TAIL, freedom)) if freedom else np.inf


def standard_ranks(rows: ArrayLike) -> Floats:
    """Return the ranks of each row, of mean 0 and length 1; 0 for a constant row.

    A product of two such rows is Spearman's correlation.
    """
    ranks = stats.rankdata(rows, axis=1)
    centred = ranks - ranks.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.where(length > 0, length, 1.0))


def _row_ranks(values: Floats) -> Floats:
    """Return standard ranks of each row; rows without ties."""
    ranks = values.argsort(1).argsort(1) - (values.shape[1] - 1) / 2
    return np.asarray(ranks / np.linalg.norm(ranks, axis=1, keepdims=True))
