r"""From Rényi divergences, or a Gaussian shift, to (epsilon, delta).

Rényi divergences at several orders imply a pair (ε, δ) by the tightest conversion
known; it is an upper bound, not exact. For a Gaussian shift of μ standard deviations
of the noise the pair is known exactly, and is the same in both directions:

:math:`\delta(\varepsilon) = \Phi(\mu/2 - \varepsilon/\mu)
- e^{\varepsilon}\,\Phi(-\mu/2 - \varepsilon/\mu)`.

Both conversions are computed so that small δ keep their digits; the inverses round in
the safe direction (ε up, μ down).

>>> round(float(rdp_to_epsilon([0.5], [8.0], delta=1e-5)), 6)
1.714109
>>> round(float(gaussian_delta(1.0, 1.0)), 6)
0.126937
>>> round(float(gaussian_epsilon(1.0, gaussian_delta(1.0, 1.0))), 9)
1.0

Source: Canonne, Kamath and Steinke (arXiv:2004.00010), Proposition 12; Balle and Wang
(arXiv:1805.06530), Theorem 8; Dong, Roth and Su (arXiv:1905.02383).
"""

import inspect
import math
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, erfcx, ndtr

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, one_number

__all__ = [
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "rdp_to_delta",
    "rdp_to_epsilon",
]

Array = NDArray[np.float64]
_HALVINGS = 100
_ULPS = 1e-15  # upper limit of the relative rounding error of one special function


def rdp_to_epsilon(
    divergences: ArrayLike, orders: ArrayLike, delta: float, *, conversion: str = "best"
) -> Array:
    r"""Return the smallest epsilon that Rényi divergences imply at a given delta.

    :math:`\varepsilon = \min_a D_a + \ln\frac{a-1}{a} - \frac{\ln\delta + \ln a}{a-1}`
    over the given orders a, and at least 0.

    Args:
        divergences: D at each order, ``(K,)`` or ``(K, n)``, in nats.
        orders: a, above 1, ``(K,)``.
        delta: δ in (0, 1).
        conversion: ``"best"``, or ``"mironov"`` for the looser D_a + ln(1/delta)/(a-1)
            of older papers.

    Returns:
        float64 scalar or ``(n,)``, at least 0: a bound if the divergences are bounds.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Canonne, Kamath and Steinke (arXiv:2004.00010), Proposition 12; Mironov
    (arXiv:1702.07476), Proposition 3.
    """
    values, a = _checked(divergences, orders)
    check_delta(delta)
    expect(
        conversion in ("best", "mironov"),
        "conversion",
        repr(conversion),
        'must be "best" or "mironov"',
        'Try "best", the default.',
    )
    offset = (
        epsilon_offset(a, delta)
        if conversion == "best"
        else -math.log(delta) / (a - 1.0)
    )
    least: NDArray[np.float64] = (values + offset).min(axis=0)
    return np.maximum(least, 0.0)


def rdp_to_delta(divergences: ArrayLike, orders: ArrayLike, epsilon: float) -> Array:
    r"""Return the smallest delta that Rényi divergences imply at a given epsilon.

    :math:`\delta = \min_a \frac{e^{(a-1)(D_a-\varepsilon)}}{a-1} (1 - 1/a)^a` over the
    given orders a, and at most 1.

    Args:
        divergences: D at each order, ``(K,)`` or ``(K, n)``, in nats.
        orders: a, above 1, ``(K,)``.
        epsilon: ε, at least 0.

    Returns:
        float64 scalar or ``(n,)``, in [0, 1].

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Canonne, Kamath and Steinke (arXiv:2004.00010), Proposition 12.
    """
    values, a = _checked(divergences, orders)
    in_range(
        0,
        math.inf,
        epsilon=epsilon,
        remedy="Check the sign: an epsilon is never negative.",
    )
    log_delta = (a - 1) * (values - epsilon) + a * np.log1p(-1 / a) - np.log(a - 1)
    least: NDArray[np.float64] = log_delta.min(axis=0)
    return np.exp(np.minimum(least, 0.0))


def epsilon_offset(orders: Array, delta: float) -> Array:
    """Return the amount to add to a divergence at each order to get an epsilon.

    Args:
        orders: Rényi orders above 1, any shape.
        delta: δ in (0, 1).

    Returns:
        float64 in the shape of ``orders``; may be negative.
    """
    return np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)


def check_delta(delta: float) -> None:
    """Raise ``ValueError`` for a delta outside (0, 1).

    Args:
        delta: The value to check.

    Raises:
        ValueError: If it is not in (0, 1).
    """
    one_number(delta=delta, remedy="Call once for each delta.")
    in_range(
        0,
        1,
        closed=False,
        delta=delta,
        remedy="Choose a number above 0 and below 1 / (data set size).",
    )


def large_delta(delta: float, num_examples: int) -> str:
    """Say that δ is too large for a data set of this size; empty if it is not.

    >>> large_delta(1e-5, 1000)
    ''
    >>> large_delta(0.01, 200).split(". ")[0]
    'δ = 0.01 is not below 1/n = 0.005 (n = 200 training examples)'

    Args:
        delta: δ in (0, 1).
        num_examples: Number of training examples.
    """
    if delta * num_examples < 1:
        return ""
    return (
        f"δ = {delta:g} is not below 1/n = {1 / num_examples:.2g} (n = {num_examples} "
        "training examples). At such a δ even a program that picks about "
        f"{delta * num_examples:.2g} of the examples at random and publishes them "
        "counts as private, with ε = 0. Choose a δ well below 1/n, such as "
        f"{0.1 / num_examples:.1g}."
    )


def warn_of_large_delta(delta: float, num_examples: int) -> None:
    """Warn, at the line of the user's code, if δ is too large for the data set.

    Args:
        delta: δ in (0, 1).
        num_examples: Number of training examples.
    """
    if sentence := large_delta(delta, num_examples):
        level, frame = 1, inspect.currentframe()
        while frame and frame.f_globals["__name__"].startswith("opacus_pi."):
            level, frame = level + 1, frame.f_back
        warnings.warn(sentence, stacklevel=level)


def check_above_one(*, remedy: str, **named: ArrayLike) -> None:
    """Check that every named number (or array) is above 1; infinity is allowed.

    Args:
        remedy: One sentence: what the caller can do.
        **named: The arguments to check, by their public names.

    Raises:
        ValueError: If an entry is at most 1 or not a number.
    """
    for name, value in named.items():
        array = numbers(name, value)
        wrong = array[~(array > 1)]
        expect(
            wrong.size == 0,
            name,
            float(wrong[0]) if wrong.size else None,
            "must be above 1",
            remedy,
        )


def check_orders(orders: ArrayLike) -> Array:
    """Return a list of orders above 1 as float64, or raise ``ValueError``.

    Args:
        orders: ``(K,)``, at least one.

    Returns:
        float64 ``(K,)``.

    Raises:
        ValueError: If it is not a flat list, is empty, or an order is not above 1.
    """
    a = numbers("orders", orders)
    expect(
        a.ndim == 1 and a.size > 0,
        "orders",
        f"an array of shape {a.shape}",
        "must be a non-empty flat list",
        "Pass one order as [order].",
    )
    check_above_one(orders=a, remedy="Pass Rényi orders above 1.")
    return a


def _checked(divergences: ArrayLike, orders: ArrayLike) -> tuple[Array, Array]:
    """Return checked divergences ``(K, …)``, and orders that broadcast against them."""
    values = numbers("divergences", divergences)
    a = check_orders(orders)
    expect(
        values.ndim in (1, 2) and len(values) == len(a),
        "divergences",
        f"an array of shape {values.shape}",
        f"must have {len(a)} rows, one per order",
        "Transpose the array if its first axis is the examples.",
    )
    in_range(
        0,
        math.inf,
        divergences=values,
        remedy=("Check the sign: a Rényi divergence is never negative."),
    )
    return values, a.reshape(-1, *[1] * (values.ndim - 1))


def gaussian_delta(mu: ArrayLike, epsilon: ArrayLike) -> Array:
    """Return delta of a Gaussian shift at a given epsilon.

    Args:
        mu: Length of the shift divided by the noise's standard deviation, at least 0.
        epsilon: At least 0, of a shape that broadcasts with ``mu``.

    Returns:
        float64 in the common shape, in [0, 1].

    Raises:
        ValueError: If an argument is negative or not a number.

    Source: Balle and Wang (arXiv:1805.06530), Theorem 8.
    """
    _check_mu(mu)
    in_range(
        0,
        np.inf,
        epsilon=epsilon,
        remedy="Check the sign: an epsilon is never negative.",
    )
    return _delta(numbers("mu", mu), numbers("epsilon", epsilon))


def gaussian_epsilon(mu: ArrayLike, delta: float) -> Array:
    """Return the smallest epsilon of a Gaussian shift at a given delta, rounded up.

    Args:
        mu: Length of the shift divided by the noise's standard deviation, any shape.
        delta: δ in (0, 1).

    Returns:
        float64 in the shape of ``mu``, at least 0; ``inf`` where ``mu`` is.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Balle and Wang (arXiv:1805.06530), Theorem 8, inverted by bisection.
    """
    _check_mu(mu)
    check_delta(delta)
    m = numbers("mu", mu)
    # δ(ε) falls with ε. At this ε the first term is Φ(-√(2 ln 1/δ)) ≤ δ already, so
    # the bisection starts with a bracket and keeps its upper end on the safe side.
    high = m * (m / 2 + np.sqrt(-2 * np.log(delta)))
    low = np.zeros_like(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = _delta(m, middle) <= delta
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(_delta(m, np.zeros_like(m)) <= delta, 0.0, high)


def gaussian_mu(epsilon: ArrayLike, delta: float) -> Array:
    """Return the longest Gaussian shift that is (epsilon, delta)-private, rounded down.

    Args:
        epsilon: At least 0 and finite, any shape.
        delta: δ in (0, 1).

    Returns:
        float64 in the shape of ``epsilon``.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Balle and Wang (arXiv:1805.06530), Theorem 8, inverted by bisection.
    """
    largest = np.finfo(np.float64).max
    in_range(
        0,
        largest,
        epsilon=epsilon,
        remedy="Pass a finite epsilon of at least 0: an infinite one allows any shift.",
    )
    check_delta(delta)
    e = numbers("epsilon", epsilon)
    low, high = np.zeros_like(e), np.ones_like(e)
    while (_delta(high, e) <= delta).any():
        high = np.where(_delta(high, e) <= delta, 2 * high, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        private = _delta(middle, e) <= delta
        low, high = np.where(private, middle, low), np.where(private, high, middle)
    return low


def _delta(mu: Array, epsilon: Array) -> Array:
    """Return delta without cancellation, both terms as multiples of exp(−a²/2)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        a, near, far = _scaled_terms(mu, epsilon)
        scale = np.exp(-np.square(a) / 2)
        values = np.where(a < 0, scale * (near - far), ndtr(a) - scale * far)
    values = np.where(np.isinf(mu), np.where(np.isinf(epsilon), 0.0, 1.0), values)
    return np.where(mu == 0, 0.0, np.clip(values, 0.0, 1.0))


def _scaled_terms(mu: Array, epsilon: Array) -> tuple[Array, Array, Array]:
    """Return a = μ/2 - ε/μ, and both terms of delta divided by exp(−a²/2).

    With b = -μ/2 - ε/μ, e^ε·Φ(b) = exp(−a²/2)·erfcx(-b/√2)/2, because b² - a² = 2ε. The
    scaled function erfcx does not underflow, and overflows in the first term only,
    where a is large and the term is Φ(a) without scaling.
    """
    a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return a, erfcx(-a / np.sqrt(2)) / 2, erfcx(-b / np.sqrt(2)) / 2


def log_gaussian_delta(mu: Array, epsilon: Array) -> Array:
    """Return the logarithm of delta of a Gaussian shift, rounded up.

    It does not underflow, and it lies above the exact value by a small multiple of the
    rounding error, so that products of many of them are bounds.

    Args:
        mu: As in ``gaussian_delta``; not checked here.
        epsilon: As in ``gaussian_delta``; not checked here.

    Returns:
        float64 in the common shape, at most 0; ``-inf`` where δ = 0.

    Source: Balle and Wang (arXiv:1805.06530), Theorem 8.
    """
    m, e = mu, epsilon
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        a, near, far = _scaled_terms(m, e)
        error = _ULPS * (4 + m + e / m)  # relative error of each term
        below = near * (1 + error) - far * (1 - error)
        tail = np.log(below) - np.square(a) / 2 + np.abs(a) * error
        rest = ndtr(-a) + np.exp(-np.square(a) / 2) * far  # 1 - δ, for a ≥ 0
        bulk = np.log1p(-rest * (1 - (1 + np.abs(a)) * error))
        at_zero = np.log(erf(m / np.sqrt(8)) * (1 + _ULPS))
        values = np.where(a < 0, tail, np.where((e == 0) & (m < 1), at_zero, bulk))
    values = np.where(np.isinf(m), np.where(np.isinf(e), -np.inf, 0.0), values)
    values = np.where((m == 0) | np.isinf(e), -np.inf, values)
    return np.minimum(values, 0.0)


def _check_mu(mu: ArrayLike) -> None:
    """Raise ``ValueError`` for a shift of negative length."""
    in_range(
        0,
        np.inf,
        mu=mu,
        remedy="Divide the length of the shift by the noise's standard deviation.",
    )
