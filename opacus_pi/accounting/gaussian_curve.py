"""The exact (epsilon, delta) of a Gaussian shift, μ standard deviations of the noise.

δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ), the same in both directions.

>>> round(float(gaussian_delta(1.0, 1.0)), 6)
0.126937
>>> round(float(gaussian_epsilon(1.0, gaussian_delta(1.0, 1.0))), 9)
1.0

Source: Balle and Wang (arXiv:1805.06530), Theorem 8; Dong, Roth and Su
(arXiv:1905.02383).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr

from opacus_pi._types import ArrayLike
from opacus_pi._validate import in_range
from opacus_pi.accounting.conversion import check_delta

Array = NDArray[np.float64]

_HALVINGS = 100


def gaussian_delta(mu: ArrayLike, epsilon: ArrayLike) -> Array:
    """Delta of a Gaussian shift at a given epsilon.

    Args:
        mu: Length of the shift over the noise's standard deviation, at least 0.
        epsilon: At least 0, of a shape that broadcasts with ``mu``.

    Returns:
        float64 in the common shape.

    Raises:
        ValueError: If an argument is negative or not a number.
    """
    _check_mu(mu)
    in_range(0, np.inf, epsilon=epsilon, remedy="It bounds a log probability ratio.")
    return _delta(np.asarray(mu, np.float64), np.asarray(epsilon, np.float64))


def gaussian_epsilon(mu: ArrayLike, delta: float) -> Array:
    """Smallest epsilon of a Gaussian shift at a given delta, rounded up.

    Args:
        mu: Length of the shift over the noise's standard deviation, any shape.
        delta: In (0, 1).

    Returns:
        float64 in the shape of ``mu``, at least 0; ``inf`` where ``mu`` is.

    Raises:
        ValueError: If an argument is outside its domain.
    """
    _check_mu(mu)
    check_delta(delta)
    m = np.asarray(mu, dtype=np.float64)
    high = m * (m / 2 + np.sqrt(-2 * np.log(delta)))  # there delta(ε) ≤ delta
    low = np.zeros_like(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = _delta(m, middle) <= delta
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(_delta(m, np.zeros_like(m)) <= delta, 0.0, high)


def gaussian_mu(epsilon: ArrayLike, delta: float) -> Array:
    """Longest Gaussian shift that is (epsilon, delta)-private, rounded down.

    Args:
        epsilon: At least 0 and finite, any shape.
        delta: In (0, 1).

    Returns:
        float64 in the shape of ``epsilon``.

    Raises:
        ValueError: If an argument is outside its domain.
    """
    largest = np.finfo(np.float64).max
    in_range(0, largest, epsilon=epsilon, remedy="Without a bound no shift is longest.")
    check_delta(delta)
    e = np.asarray(epsilon, dtype=np.float64)
    low, high = np.zeros_like(e), np.ones_like(e)
    while (_delta(high, e) <= delta).any():
        high = np.where(_delta(high, e) <= delta, 2 * high, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        private = _delta(middle, e) <= delta
        low, high = np.where(private, middle, low), np.where(private, high, middle)
    return low


def _delta(mu: Array, epsilon: Array) -> Array:
    """Delta without cancellation: both terms as multiples of exp(−a²/2)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        far = erfcx(-b / np.sqrt(2)) / 2  # e^ε·Φ(b) / exp(−a²/2)
        scale = np.exp(-np.square(a) / 2)
        below = scale * (erfcx(-a / np.sqrt(2)) / 2 - far)
        values = np.where(a < 0, below, ndtr(a) - scale * far)
    values = np.where(np.isinf(mu), np.where(np.isinf(epsilon), 0.0, 1.0), values)
    return np.where(mu == 0, 0.0, np.clip(values, 0.0, 1.0))


def _check_mu(mu: ArrayLike) -> None:
    """Refuse a shift of negative length."""
    in_range(0, np.inf, mu=mu, remedy="It is a norm over a standard deviation.")
