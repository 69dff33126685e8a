"""Upper bounds of a sum of log moments, tabulated once, for many examples.

An example enters only by s = r²/2, r being its gradient norm over the noise. As a
function of s a log moment ln M is increasing and *convex*, so chords between exact
values are upper bounds, and the chords beside a chord, extended, are lower bounds:
their distance certifies the error.

**Convexity, for every real order a >= 1.** With y ~ N(-s, 2s), so that E e^y = 1,

    M(s) = E[φ(e^y)],   φ(x) = (1-q+q·x)^a,   dM/ds = E[e^(2y)·φ''(e^y)]

(Itô), hence dlnM/ds = a(a-1)·E_μ[p²], where p = q·e^y/(1-q+q·e^y) and μ has a density
proportional to h(y)·exp(-y²/4s), h(y) = φ(e^y)·e^(-y/2). Only the last factor depends
on s, so d²lnM/ds² = a(a-1)·Cov_μ(p², y²)/4s². Let G(t) be the mean of p² given
|y| = t: the covariance is that of G(|y|) and y², which is not negative if G increases
(Chebyshev). Write p₊, p₋ for p at ±t, x = e^t, ρ = x²/k and k = A/B >= 1 with
A, B = 1-q+q·e^(±t). Differentiated and divided by positive factors, G' becomes

    2(1-p₊)·(ρ² + ρ²·k^a/x - k - x·k^(1-a)) + (a(p₊+p₋) - 1)·(ρ²-1),

which increases in a. At a = 1, using 1-p₊ = (ρ-1)/(x²-1), it is a positive multiple of
(ρ-1)²·(ρ + x²/ρ + 2x) >= 0, because ρ >= 1. ∎

**Straight ends.** Since p² <= 1, dlnM/ds <= c = a(a-1). Under the law tilted by e^(2y),
dM/ds = c·q²·e^(2s)·E[(1-q+q·e^(4s+y))^(a-2)], which by Jensen's inequality is at most
c·q²·e^(max(c, 2)·s); so lnM <= M - 1 is within (e^x - 1)/x, x = max(c, 2)·s, of its
tangent at 0. For large s, lnM >= c·s - a·ln(1/q) because M >= E[(q·e^y)^a].
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect
from opacus_pi.accounting.composition import weighted_log_moments

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

_MARGIN = 0.01  # share of the tolerance set aside for rounding
_LEAST = 1e-8  # so that the margin exceeds the moments' own error, 1e-11
_MANTISSA = 52  # bits of a float64's mantissa: within an octave, bits are linear in s


class UpperTable:
    """A convex function on [0, ∞) with f(0) = 0, from above, at a few ns a value.

    Between nodes the value is that of the chord. A cell is a dyadic part of an octave,
    halved until its error is certified, so that the leading bits of a float64 name it.

    Args:
        function: f, vectorised: ascending float64 ``(m,)`` to ``(m,)``, above 0.
        low: Up to here a chord from the origin is within the tolerance.
        high: From here on a line of slope ``steepest`` is within the tolerance.
        steepest: What f' nowhere exceeds.
        tolerance: Largest relative error, from 1e-8 to 1.
    """

    def __init__(
        self,
        function: Callable[[Array], Array],
        low: float,
        high: float,
        steepest: float,
        tolerance: float,
    ) -> None:
        nodes = _octaves(low, high)
        values = function(nodes.view(np.float64))
        while True:
            gaps = _gaps(nodes.view(np.float64), values, steepest)
            excess = gaps / (tolerance * (1 - 2 * _MARGIN))
            if excess.max() <= 1:
                break
            nodes, values = _refined(function, nodes, values, excess)
        more = 1 + _MARGIN * tolerance
        slopes, intercepts = _lines(
            nodes.view(np.float64), values * more, steepest * more
        )
        self._lay_out(nodes, slopes, intercepts)

    def _lay_out(self, nodes: Integers, slopes: Array, intercepts: Array) -> None:
        """Put every cell where the bits of a float64 find it.

        Equal buckets, each of as many equal slots as its smallest cell asks for. Before
        and after them is one bucket more, of one slot.
        """
        parts = min(range(_MANTISSA), key=lambda p: _num_slots(nodes, p))
        shifts = _slot_shifts(nodes, parts)
        self._bucket_shift = _MANTISSA - parts
        starts = nodes[0] + (np.arange(len(shifts)) << self._bucket_shift)
        counts = 1 << (self._bucket_shift - shifts)
        offsets = np.cumsum(counts) - counts
        place = np.arange(counts.sum()) - np.repeat(offsets, counts)
        slots = np.repeat(starts, counts) + (place << np.repeat(shifts, counts))
        cells = np.searchsorted(nodes, slots, side="right")
        cells = np.concatenate([[0], cells, [len(nodes)]])
        self._slope, self._intercept = slopes[cells], intercepts[cells]
        self._first = (nodes[0] >> self._bucket_shift) - 1
        self._last = nodes[-1] >> self._bucket_shift
        self._shift = np.concatenate([[63], shifts, [63]])
        base = 1 + offsets - (starts >> shifts)  # slot = (bits >> shift) + base
        self._base = np.concatenate([[0], base, [len(cells) - 1]])

    def __call__(self, s: Array) -> Array:
        """Upper bounds of f, within the tolerance.

        Args:
            s: float64, at least 0, any shape; ``inf`` gives ``inf``.
        """
        bits = s.view(np.int64)
        bucket = bits >> self._bucket_shift
        np.clip(bucket, self._first, self._last, out=bucket)
        bucket -= self._first
        slot = bits >> self._shift[bucket]
        slot += self._base[bucket]
        values: Array = self._slope[slot]
        values *= s
        values += self._intercept[slot]
        return values


def check_tolerance(tolerance: float, num_runs: int) -> None:
    """Refuse a tolerance that a table cannot keep; 0 is "no table"."""
    expect(
        tolerance == 0 or _LEAST <= tolerance <= 1,
        "tolerance",
        tolerance,
        f"to be 0 or in [{_LEAST:g}, 1]",
        "0 is exact; 1e-6 is fast and rounds up.",
    )
    expect(
        tolerance == 0 or num_runs == 1,
        "tolerance",
        tolerance,
        f"to be 0 with {num_runs} runs",
        "A table is a function of one gradient norm; a mean over runs, of several.",
    )


def upper_log_moments(
    ratios: Array,
    sample_rate: float,
    orders: Array,
    weights: Array,
    tolerance: float,
) -> Array:
    """Σ_k weights[k]·ln M(orders[k]) of one run, rounded up.

    Args:
        ratios: r, ``(n,)``.
        sample_rate: q.
        orders: ``(K,)``, above 1.
        weights: ``(K,)``, the sum convex in s as one with positive weights is.
        tolerance: Largest relative error, above 0.

    Returns:
        float64 ``(n,)``, never below the exact value.
    """
    if not 1e-20 < sample_rate < 1:  # a closed form, or a table too long
        return weighted_log_moments(
            ratios[None], sample_rate, orders, weights, hoelder_p=2.0, mode="exact"
        )
    scale = weights.sum()
    table = _log_moment_table(
        sample_rate, orders.tobytes(), (weights / scale).tobytes(), tolerance
    )
    with np.errstate(over="ignore"):
        s = ratios * ratios
    s /= 2
    values = table(s)
    values *= scale
    return values


@lru_cache(maxsize=512)
def _log_moment_table(
    sample_rate: float, orders: bytes, weights: bytes, tolerance: float
) -> UpperTable:
    """The table of one weighted sum of log moments."""
    visited, shares = np.frombuffer(orders), np.frombuffer(weights)

    def function(s: Array) -> Array:
        return weighted_log_moments(
            np.sqrt(2 * s)[None],
            sample_rate,
            visited,
            shares,
            hoelder_p=2.0,
            mode="exact",
        )

    slopes = visited * (visited - 1)
    steepest = float(shares @ slopes)
    lost = float(shares @ visited) * -math.log(sample_rate)
    low = tolerance / 2 / max(slopes.max(), 2.0)
    high = 2 * (1 + 1 / tolerance) * lost / steepest
    return UpperTable(function, low, high, steepest, tolerance)


def _octaves(low: float, high: float) -> Integers:
    """Bits of the powers of two around [low, high], two at least."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return np.exp2(np.arange(first, max(last, first + 1) + 1)).view(np.int64)


def _gaps(nodes: Array, values: Array, steepest: float) -> Array:
    """Certified relative error of each chord.

    On a cell the function is above the chords of both neighbours, extended: the largest
    error is below the chord's height over the point where they meet.
    """
    widths = np.diff(nodes)
    chords = np.diff(values) / widths
    left = np.concatenate([values[:1] / nodes[:1], chords[:-1]])
    right = np.append(chords[1:], steepest)
    below, above = np.maximum(chords - left, 0), np.maximum(right - chords, 0)
    turn = np.maximum(below + above, np.finfo(np.float64).tiny)
    result: Array = below * (above / turn) * widths / values[:-1]
    return result


def _refined(
    function: Callable[[Array], Array], nodes: Integers, values: Array, excess: Array
) -> tuple[Integers, Array]:
    """The nodes with cells halved, up to thrice, where the error exceeds what it may.

    Halving a cell divides its error by about 4.
    """
    halvings = (excess > 1) * 1 + (excess > 4) + (excess > 16)
    counts = 1 << halvings
    first = np.cumsum(counts) - counts
    place = np.arange(counts.sum()) - np.repeat(first, counts)
    finer = np.repeat(nodes[:-1], counts)
    finer += place * np.repeat(np.diff(nodes) >> halvings, counts)
    result = np.empty(len(finer) + 1)
    result[np.append(first, len(finer))] = values
    result[:-1][place > 0] = function(finer[place > 0].view(np.float64))
    return np.append(finer, nodes[-1]), result


def _lines(nodes: Array, values: Array, steepest: float) -> tuple[Array, Array]:
    """Slope and intercept before the first node, of every chord, and after the last."""
    x, y = np.concatenate([[0.0], nodes]), np.concatenate([[0.0], values])
    slopes = np.append(np.diff(y) / np.diff(x), steepest)
    return slopes, y - slopes * x


def _slot_shifts(nodes: Integers, parts: int) -> Integers:
    """How many bits tell nothing within a slot, for each bucket of 2^-parts octaves."""
    whole = _MANTISSA - parts
    buckets = (nodes - nodes[0]) >> whole
    shifts = np.full(buckets[-1], whole)
    cell_shifts = np.log2(np.diff(nodes)).astype(np.int64)
    np.minimum.at(shifts, buckets[:-1], cell_shifts)
    return shifts


def _num_slots(nodes: Integers, parts: int) -> int:
    """Memory of a layout with 2^parts buckets an octave."""
    num_buckets = (nodes[-1] - nodes[0]) >> (_MANTISSA - parts)
    if num_buckets > 4 * len(nodes):
        return 1 << 62
    shifts = _slot_shifts(nodes, parts)
    return int(num_buckets + (1 << (_MANTISSA - parts - shifts)).sum())
