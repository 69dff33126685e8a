r"""Upper bounds of a sum of log moments, tabulated once, for many examples.

**Idea.** An example enters only through s = r²/2, where r is its gradient norm divided
by the noise. As a function of s, a log moment ln M is increasing and *convex* (proof
below). So a chord between two exact values lies above the function, and the
neighbouring chords, extended, lie below it.

**Guarantee.** Every tabulated value is an upper bound, by at most the relative
tolerance: the distance between a chord and the extended neighbouring chords certifies
the error, and 1 % of the tolerance is added to cover rounding, which exceeds the 1e-11
error of the moments themselves.

**What breaks it.** Convexity is needed: a table of a function that is not convex in s,
such as a sum with negative weights, is not certified. A mean over several runs is a
function of several norms and cannot be tabulated this way.

**Convexity, for every real order a >= 1.** With y ~ N(-s, 2s), so that E e^y = 1,

    M(s) = E[φ(e^y)],   φ(x) = (1-q+q·x)^a,   dM/ds = E[e^(2y)·φ''(e^y)]

by Itô's formula. Hence

:math:`\frac{d \ln M}{ds} = a(a-1)\,E_\mu[p^2],\quad
p = \frac{q e^y}{1-q+q e^y}`,

where μ has a density proportional to h(y)·exp(-y²/4s), h(y) = φ(e^y)·e^(-y/2). Only the
last factor depends on s, so d²lnM/ds² = a(a-1)·Cov_μ(p², y²)/4s². Let G(t) be the mean
of p² given |y| = t: the covariance is that of G(|y|) and y², which is not negative if G
increases (Chebyshev's association inequality). Write p₊, p₋ for p at ±t, x = e^t,
ρ = x²/k and k = A/B >= 1 with A, B = 1-q+q·e^(±t). Differentiated and divided by
positive factors, G' becomes

    2(1-p₊)·(ρ² + ρ²·k^a/x - k - x·k^(1-a)) + (a(p₊+p₋) - 1)·(ρ²-1),

which increases in a. At a = 1, using 1-p₊ = (ρ-1)/(x²-1), it is a positive multiple of
(ρ-1)²·(ρ + x²/ρ + 2x) >= 0, because ρ >= 1. ∎

**Straight ends.** Near 0 and far out a single line is enough. Since p² <= 1,
dlnM/ds <= c = a(a-1). Under the distribution tilted by e^(2y),
dM/ds = c·q²·e^(2s)·E[(1-q+q·e^(4s+y))^(a-2)], which by Jensen's inequality is at most
c·q²·e^(max(c, 2)·s); so lnM <= M - 1 is within (e^x - 1)/x, x = max(c, 2)·s, of its
tangent at 0. For large s, lnM >= c·s - a·ln(1/q) because M >= E[(q·e^y)^a].

Source: own proof; docs/theory.md, Section 1.
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

_MARGIN = 0.01  # share of the tolerance reserved for rounding errors
_LEAST = 1e-8  # smallest tolerance whose margin exceeds the moments' error, 1e-11
_MANTISSA = 52  # bits of a float64's mantissa: within an octave, bits are linear in s


class UpperTable:
    """Table of a convex function on [0, ∞) with f(0) = 0, never below the function.

    Between nodes the value is that of the chord. A cell is a dyadic part of an octave,
    halved until its error is certified. Therefore the leading bits of a float64 name
    its cell, and a look-up takes a few nanoseconds without a search.

    Args:
        function: f, vectorised: ascending float64 ``(m,)`` to ``(m,)``, above 0.
        low: Up to here a chord from the origin is within the tolerance.
        high: From here on a line of slope ``steepest`` is within the tolerance.
        steepest: An upper bound of f'.
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
        # Raise the lines by the margin: rounding must not push a value below f.
        more = 1 + _MARGIN * tolerance
        slopes, intercepts = _lines(
            nodes.view(np.float64), values * more, steepest * more
        )
        self._lay_out(nodes, slopes, intercepts)

    def _lay_out(self, nodes: Integers, slopes: Array, intercepts: Array) -> None:
        """Store each cell's line where the leading bits of a float64 find it.

        The range of the nodes is cut into equal buckets (parts of an octave). A bucket
        has as many equal slots as its smallest cell needs. One more bucket with one
        slot lies before the first node and one after the last. ``_base`` turns the
        leading bits of a number directly into its slot.
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
        """Return upper bounds of f, within the tolerance.

        Args:
            s: float64, at least 0, any shape; ``inf`` gives ``inf``.

        Returns:
            float64 in the shape of ``s``.
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
    """Raise ``ValueError`` for a tolerance that a table cannot meet; 0 means no table.

    Args:
        tolerance: The relative error allowed.
        num_runs: Number of runs; tables need a single one.

    Raises:
        ValueError: If the tolerance is out of range, or there are several runs.
    """
    expect(
        tolerance == 0 or _LEAST <= tolerance <= 1,
        "tolerance",
        tolerance,
        f"must be 0 or in [{_LEAST:g}, 1]",
        "Use 0 for exact losses, or 1e-6 for fast ones that are rounded up.",
    )
    expect(
        tolerance == 0 or num_runs == 1,
        "tolerance",
        tolerance,
        f"must be 0 with {num_runs} runs",
        "Pass 0: a table is a function of one norm, but a mean over runs depends on "
        "one norm in each run.",
    )


def upper_log_moments(
    ratios: Array,
    sample_rate: float,
    orders: Array,
    weights: Array,
    tolerance: float,
) -> Array:
    """Return Σ_k weights[k]·ln M(orders[k]) of one run, rounded up.

    Args:
        ratios: r, ``(n,)``.
        sample_rate: q.
        orders: ``(K,)``, above 1.
        weights: ``(K,)``; the weighted sum must be convex in s, as it is with positive
            weights.
        tolerance: Largest relative error, above 0.

    Returns:
        float64 ``(n,)``, in nats, never below the exact value.
    """
    if not 1e-20 < sample_rate < 1:  # closed form, or too many octaves for a table
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
    """Return the table of one weighted sum of log moments.

    Orders and weights are the bytes of float64 arrays, because the cache needs keys
    that can be hashed.
    """
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

    # The straight ends of the module's docstring: near 0 the tangent is within
    # (e^x - 1)/x - 1, about x/2, and far out the line a(a-1)·s loses at most a·ln(1/q).
    slopes = visited * (visited - 1)
    steepest = float(shares @ slopes)
    lost = float(shares @ visited) * -math.log(sample_rate)
    low = tolerance / 2 / max(slopes.max(), 2.0)
    high = 2 * (1 + 1 / tolerance) * lost / steepest
    return UpperTable(function, low, high, steepest, tolerance)


def _octaves(low: float, high: float) -> Integers:
    """Return the bits of the powers of two around [low, high], at least two."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return np.exp2(np.arange(first, max(last, first + 1) + 1)).view(np.int64)


def _gaps(nodes: Array, values: Array, steepest: float) -> Array:
    """Return the certified relative error of each chord.

    On a cell the function lies above the extended chords of both neighbours. The
    largest error is therefore at most the chord's height above the point where those
    two meet.
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
    """Return nodes with cells halved, up to three times, where the error is too large.

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
    """Return the lines before the first node, of each chord, after the last node."""
    x, y = np.concatenate([[0.0], nodes]), np.concatenate([[0.0], values])
    slopes = np.append(np.diff(y) / np.diff(x), steepest)
    return slopes, y - slopes * x


def _slot_shifts(nodes: Integers, parts: int) -> Integers:
    """Return how many trailing bits do not matter within a slot, for each bucket.

    A bucket is 2^-parts of an octave. Its slots are as wide as its smallest cell.
    """
    whole = _MANTISSA - parts
    buckets = (nodes - nodes[0]) >> whole
    shifts = np.full(buckets[-1], whole)
    cell_shifts = np.log2(np.diff(nodes)).astype(np.int64)
    np.minimum.at(shifts, buckets[:-1], cell_shifts)
    return shifts


def _num_slots(nodes: Integers, parts: int) -> int:
    """Return the memory, in slots, of a layout with 2^parts buckets an octave."""
    num_buckets = (nodes[-1] - nodes[0]) >> (_MANTISSA - parts)
    if num_buckets > 4 * len(nodes):
        return 1 << 62
    shifts = _slot_shifts(nodes, parts)
    return int(num_buckets + (1 << (_MANTISSA - parts - shifts)).sum())
