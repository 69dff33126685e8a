r"""Upper bounds on a group's log moment that need only norms or one eigenvalue.

**Idea.** Let V_S be the sum of the gradients of a subset S of the group. If lengths a_S
satisfy ⟨V_S, V_T⟩ ≤ a_S·a_T, then for every real order the moment of the mixture of the
N(V_S, I) is at most that of the mixture of the N(a_S, 1) on a line:

:math:`\ln M \le \ln E_{z \sim N(0,1)} \Big(\sum_S w_S\,
e^{a_S z - a_S^2/2}\Big)^{\alpha}`.

The moment is the expectation of a convex function of a sum of log-normal weights, and
grows with each covariance (Kahane's inequality). Two choices of lengths:

* a_S = Σ_{x∈S} ‖g_x‖/σ (``scalar_law``): tight when gradients are parallel,
* a_S = √(λ_max(K)·|S|) (``operator_norm_law``): tight when they are orthogonal.

**Guarantee.** Upper bounds at every real order. Norms are rounded up where they are put
on a grid. The integral is computed by the trapezoid rule to about 1e-11 relative.

**What breaks it.** Between two neighbouring lengths the mixture has zeros close to the
real line, near which its real power is not analytic; ``_grid`` makes the step small
enough for the largest gap that matters.

Source: Kahane 1986, for the comparison of Gaussian processes; docs/theory.md,
Section 4.

>>> lengths, log_weights = scalar_law([0.7], 0.01)
>>> round(mixture_log_moment(lengths, log_weights, 5.0), 12)  # a single example
0.000647052429
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import binom

from opacus_pi._types import ArrayLike
from opacus_pi._validate import numbers
from opacus_pi.accounting.group.moments import subset_sums
from opacus_pi.accounting.quadrature import log_psi, log_sum, softplus

_ENUMERATED = 12  # group size up to which all subsets are listed
_CELLS = 8192  # largest number of grid cells for the sum of all norms
_CELLS_PER_NORM = 16  # grid cells for a norm of average length
_DIGITS = 34.0  # exp(-34): error of the trapezoid rule
_WINDOW = 45.0  # exp(-45): the integrand is left out below this share of its peak
_COARSE = 0.5  # distance of the points at which the integrand is searched
_BLOCK = 4_000_000  # entries of the integrand computed at a time


class LengthLaw(NamedTuple):
    """Discrete distribution of a length a; the mixture of N(a, 1) bounds a moment.

    Args:
        lengths: Possible lengths a, at least 0, float64 ``(J,)``.
        log_weights: Logarithms of their probabilities, ``(J,)``.
    """

    lengths: NDArray[np.float64]
    log_weights: NDArray[np.float64]


def scalar_law(norms: ArrayLike, sample_rate: float) -> LengthLaw:
    """Return the distribution of a Poisson-sampled subset's sum of norms, rounded up.

    Up to 12 norms every subset is listed. For more, norms are rounded **up** to a grid
    (by at most a sixteenth of their mean, or an 8192nd of their sum) and convolved.

    Args:
        norms: ‖g_x‖/σ, ``(m,)``.
        sample_rate: q.

    Returns:
        Lengths a ``(J,)`` and the logarithms of their probabilities ``(J,)``.
    """
    lengths = numbers("norms", norms)
    lengths = lengths[lengths > 0]
    if len(lengths) <= _ENUMERATED:
        return LengthLaw(*subset_sums(lengths, sample_rate))
    cell = max(lengths.mean() / _CELLS_PER_NORM, lengths.sum() / _CELLS)
    steps, counts = np.unique(np.ceil(lengths / cell).astype(int), return_counts=True)
    law = np.zeros(1)
    for step, count in zip(steps, counts, strict=True):
        law = _convolve(law, int(step), int(count), sample_rate)
    possible = law > -math.inf
    return LengthLaw(np.flatnonzero(possible) * cell, law[possible])


def operator_norm_law(
    largest_eigenvalue: float, group_size: int, sample_rate: float
) -> LengthLaw:
    """Return the distribution of √(λ·|S|), |S| ~ Bin(m, q).

    Args:
        largest_eigenvalue: λ of the scaled Gram matrix K.
        group_size: m.
        sample_rate: q.

    Returns:
        Lengths a ``(m + 1,)`` and the logarithms of their probabilities.
    """
    counts, log_weights = binomial_law(group_size, sample_rate)
    return LengthLaw(np.sqrt(largest_eigenvalue * counts), log_weights)


def binomial_law(group_size: int, sample_rate: float) -> LengthLaw:
    """Return the distribution of |S|, how many of m examples are sampled: Bin(m, q).

    Args:
        group_size: m.
        sample_rate: q.

    Returns:
        The counts that are possible and the logarithms of their probabilities.
    """
    counts = np.arange(group_size + 1)
    log_weights = binom.logpmf(counts, group_size, sample_rate)
    possible = log_weights > -math.inf
    return LengthLaw(counts[possible].astype(np.float64), log_weights[possible])


def mixture_log_moment(
    lengths: ArrayLike, log_weights: ArrayLike, order: float
) -> float:
    r"""Return the log moment of a mixture of N(a_j, 1) against N(0, 1).

    :math:`\ln E_z (\sum_j w_j e^{a_j z - a_j^2/2})^\alpha` with z ~ N(0, 1).

    Args:
        lengths: a_j ≥ 0, ``(J,)``.
        log_weights: ln w_j, ``(J,)``, of probabilities that sum to 1.
        order: α ≥ 1.

    Returns:
        The log moment in nats, also where it is tiny or exceeds float64's range as a
        moment.
    """
    return float(mixture_log_moments(lengths, log_weights, [order])[0])


def mixture_log_moments(
    lengths: ArrayLike, log_weights: ArrayLike, orders: ArrayLike
) -> NDArray[np.float64]:
    """Return what ``mixture_log_moment`` does, for several orders of one mixture.

    Args:
        lengths: a_j ≥ 0, ``(J,)``.
        log_weights: ln w_j, ``(J,)``, of probabilities that sum to 1.
        orders: α ≥ 1, ``(K,)``.

    Returns:
        The log moments in nats, float64 ``(K,)``.
    """
    a, w = numbers("lengths", lengths), numbers("log_weights", log_weights)
    a, w = a[w > -math.inf], w[w > -math.inf]
    powers = numbers("orders", orders)
    if not a.any():
        return np.zeros(len(powers))
    if len(a) == 1:
        single: NDArray[np.float64] = powers * (powers - 1) / 2 * a[0] ** 2
        return np.maximum(single, 0.0)
    envelope = _envelope(a, w)
    return np.array([_integrated(a, w, order, envelope) for order in powers.tolist()])


def _integrated(
    a: NDArray[np.float64], w: NDArray[np.float64], order: float, envelope: "_Envelope"
) -> float:
    """Return the log moment of a mixture with two or more lengths."""
    if order <= 1:
        return 0.0
    points, fine = _grid(a, w, order, envelope)
    mean_psi = log_sum(_log_integrand(points, a, w, order) - math.log(2 * math.pi) / 2)
    excess = math.log(order - 1) + math.log(fine) + mean_psi
    return float(softplus(np.asarray(excess)))


class _Envelope(NamedTuple):
    """Largest of the terms ln w_j + a_j·z - a_j²/2 as a function of z.

    Args:
        slopes: Lengths of the terms that are the largest somewhere, ascending.
        heights: Their values at z = 0.
    """

    slopes: NDArray[np.float64]
    heights: NDArray[np.float64]

    @property
    def changes(self) -> NDArray[np.float64]:
        """Where the largest term changes, ascending."""
        return -np.diff(self.heights) / np.diff(self.slopes)

    def at(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the largest term."""
        place = np.searchsorted(self.changes, z)
        largest: NDArray[np.float64] = self.heights[place] + self.slopes[place] * z
        return largest


def _grid(
    a: NDArray[np.float64], w: NDArray[np.float64], order: float, envelope: _Envelope
) -> tuple[NDArray[np.float64], float]:
    """Return trapezoid points where the integrand matters, and their distance.

    Where the longest term changes from a_i to a_j, the mixture has zeros at about
    π/(a_j − a_i) from the real line, near which a power of it is not analytic.
    """
    low, high = math.floor(-9 / _COARSE), math.ceil((order * a.max() + 9) / _COARSE)
    coarse = np.arange(low, high + 1)
    height = _heights(coarse * _COARSE, a, w, order, envelope)
    kept = height > height.max() - _WINDOW
    kept = kept | np.roll(kept, 1) | np.roll(kept, -1)
    places, jumps = envelope.changes, np.diff(envelope.slopes)
    cells = np.clip(np.rint(places / _COARSE), low, high).astype(int) - low
    jump = jumps[kept[cells]].max(initial=0.1)
    shift = min(math.pi / (2 * jump), math.sqrt(2 * _DIGITS))
    parts = math.ceil(_COARSE * (_DIGITS + shift**2 / 2) / (2 * math.pi * shift))
    nodes = coarse[kept][:, None] * parts + np.arange(parts)
    return nodes.ravel() * (_COARSE / parts), _COARSE / parts


def _heights(
    z: NDArray[np.float64],
    a: NDArray[np.float64],
    w: NDArray[np.float64],
    order: float,
    envelope: _Envelope,
) -> NDArray[np.float64]:
    """Return the logarithm of the integrand where it may matter, elsewhere -inf.

    A large group's integrand covers a long range of z and matters in a small part of
    it. A sum of J terms is at most J times the largest, so ψ ≤ max(1, (J·largest)^α /
    min(1, α - 1)). Where this is below the window of the integrand at some points, the
    integrand is so, too.
    """
    largest = order * envelope.at(z)
    guess = int(np.argmax(largest - z**2 / 2))
    tried = (np.abs(z) <= 9) | (np.abs(np.arange(len(z)) - guess) <= 1)
    height = np.full(len(z), -math.inf)
    height[tried] = _log_integrand(z[tried], a, w, order)
    most = largest + order * math.log(len(a)) - min(0.0, math.log(order - 1))
    may_matter = np.maximum(most, 0) - z**2 / 2 > height.max() - _WINDOW - 1
    may_matter &= ~tried
    height[may_matter] = _log_integrand(z[may_matter], a, w, order)
    return height


def _envelope(a: NDArray[np.float64], w: NDArray[np.float64]) -> _Envelope:
    """Return the largest terms w·exp(a·z − a²/2): their logarithms are lines in z."""
    level = w - a**2 / 2
    envelope: list[tuple[float, float]] = []
    ascending = np.lexsort((level, a))
    for slope, height in zip(
        a[ascending].tolist(), level[ascending].tolist(), strict=True
    ):
        while envelope and (
            envelope[-1][0] == slope or _is_below(envelope, slope, height)
        ):
            envelope.pop()
        envelope.append((slope, height))
    return _Envelope(*np.array(envelope).T)


def _is_below(envelope: list[tuple[float, float]], slope: float, height: float) -> bool:
    """Return whether the last line is nowhere above its neighbours in the envelope."""
    if len(envelope) < 2:
        return False
    (a, x), (b, y) = envelope[-2:]
    return (y - x) * (slope - a) <= (height - x) * (b - a)


def _log_integrand(
    z: NDArray[np.float64], a: NDArray[np.float64], w: NDArray[np.float64], order: float
) -> NDArray[np.float64]:
    """Return the logarithm of ψ(z)·e^{−z²/2}, where M = 1 + (α − 1)·E[ψ]."""
    out = np.empty(len(z))
    block = max(1, _BLOCK // len(a))
    for start in range(0, len(z), block):
        part = z[start : start + block]
        exponent = part[:, None] * a - a**2 / 2
        log_ratio = logsumexp(exponent + w, axis=1)
        y = (np.expm1(np.minimum(exponent, 30.0)) * np.exp(w)).sum(axis=1)
        log_ratio = np.where(np.abs(y) < 0.5, np.log1p(np.maximum(y, -0.5)), log_ratio)
        out[start : start + block] = log_psi(y, log_ratio, order - 1) - part**2 / 2
    return out


def _convolve(
    law: NDArray[np.float64], step: int, count: int, sample_rate: float
) -> NDArray[np.float64]:
    """Add ``count`` equal norms, each present with probability q, in log space."""
    out = np.full(len(law) + step * count, -math.inf)
    weights = binom.logpmf(np.arange(count + 1), count, sample_rate)
    for number, weight in enumerate(weights):
        if weight == -math.inf:
            continue
        view = out[number * step : number * step + len(law)]
        np.logaddexp(view, law + weight, out=view)
    return out
