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

from opacus_pi._validate import expect, one_number
from opacus_pi.accounting.composition import weighted_log_moments
from opacus_pi.accounting.dyadic_cells import DyadicCells, halved, octaves

Array = NDArray[np.float64]

_MARGIN = 0.01  # share of the tolerance reserved for rounding errors
_LEAST = 1e-8  # smallest tolerance whose margin exceeds the moments' error, 1e-11


class UpperTable:
    """Table of a convex function on [0, ∞) with f(0) = 0, never below the function.

    Between nodes the value is that of the chord. A cell is halved until its error is
    certified.

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
        nodes = octaves(low, high)
        values = function(nodes.view(np.float64))
        while True:
            gaps = _gaps(nodes.view(np.float64), values, steepest)
            excess = gaps / (tolerance * (1 - 2 * _MARGIN))
            if excess.max() <= 1:
                break
            # Halving a cell divides its error by about 4.
            halvings = (excess > 1) * 1 + (excess > 4) + (excess > 16)
            nodes, values = halved(function, nodes, values, halvings)
        # Raise the lines by the margin: rounding must not push a value below f.
        more = 1 + _MARGIN * tolerance
        slopes, intercepts = _lines(
            nodes.view(np.float64), values * more, steepest * more
        )
        self._cells = DyadicCells(nodes)
        self._slope = slopes[self._cells.of_slots]
        self._intercept = intercepts[self._cells.of_slots]

    def __call__(self, s: Array) -> Array:
        """Return upper bounds of f, within the tolerance.

        Args:
            s: float64, at least 0, any shape; ``inf`` gives ``inf``.

        Returns:
            float64 in the shape of ``s``.
        """
        slot = self._cells.slots(s)
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
    one_number(tolerance=tolerance, remedy="Pass 0 for exact losses.")
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


def _lines(nodes: Array, values: Array, steepest: float) -> tuple[Array, Array]:
    """Return the lines before the first node, of each chord, after the last node."""
    x, y = np.concatenate([[0.0], nodes]), np.concatenate([[0.0], values])
    slopes = np.append(np.diff(y) / np.diff(x), steepest)
    return slopes, y - slopes * x
