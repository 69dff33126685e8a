"""From Rényi divergences to (epsilon, delta).

>>> round(float(rdp_to_epsilon([0.5], [8.0], delta=1e-5)), 6)
1.714109
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, positive

Array = NDArray[np.float64]
_HALVINGS = 100


def rdp_to_epsilon(
    divergences: ArrayLike, orders: ArrayLike, delta: float, *, conversion: str = "best"
) -> Array:
    """Smallest epsilon that Rényi divergences imply at a given delta.

    epsilon = min over orders a of D_a + ln((a-1)/a) - (ln delta + ln a)/(a-1), at
    least 0.

    Args:
        divergences: D at each order, ``(K,)`` or ``(K, n)``, in nats.
        orders: a, above 1, ``(K,)``.
        delta: In (0, 1).
        conversion: ``"best"``, or ``"mironov"`` for the looser D_a + ln(1/delta)/(a-1)
            of older papers.

    Returns:
        float64 scalar or ``(n,)``.

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
        'to be "best" or "mironov"',
        "The default is best.",
    )
    offset = (
        epsilon_offset(a, delta)
        if conversion == "best"
        else -math.log(delta) / (a - 1.0)
    )
    least: NDArray[np.float64] = (values + offset).min(axis=0)
    return np.maximum(least, 0.0)


def rdp_to_delta(divergences: ArrayLike, orders: ArrayLike, epsilon: float) -> Array:
    """Smallest delta that Rényi divergences imply at a given epsilon.

    delta = min over orders a of exp((a-1)(D_a - epsilon))·(1 - 1/a)^a/(a-1), at most 1.

    Args:
        divergences: D at each order, ``(K,)`` or ``(K, n)``, in nats.
        orders: a, above 1, ``(K,)``.
        epsilon: At least 0.

    Returns:
        float64 scalar or ``(n,)``.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Canonne, Kamath and Steinke (arXiv:2004.00010), Proposition 12.
    """
    values, a = _checked(divergences, orders)
    in_range(0, math.inf, epsilon=epsilon, remedy="It bounds a log probability ratio.")
    log_delta = (a - 1) * (values - epsilon) + a * np.log1p(-1 / a) - np.log(a - 1)
    least: NDArray[np.float64] = log_delta.min(axis=0)
    return np.exp(np.minimum(least, 0.0))


def epsilon_offset(orders: Array, delta: float) -> Array:
    """What is added to a divergence at each order to make an epsilon."""
    return np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)


def check_delta(delta: float) -> None:
    """Refuse a delta outside (0, 1)."""
    in_range(
        0, 1, closed=False, delta=delta, remedy="Usual: below 1 / (data set size)."
    )


def check_orders(orders: ArrayLike) -> Array:
    """A list of orders above 1, as float64."""
    a = np.asarray(orders, dtype=np.float64)
    expect(
        a.ndim == 1 and a.size > 0,
        "orders",
        f"an array of shape {a.shape}",
        "to be a non-empty flat list",
        "Pass one order as [order].",
    )
    positive(**{"orders - 1": a - 1}, remedy="Rényi orders here are above 1.")
    return a


def _checked(divergences: ArrayLike, orders: ArrayLike) -> tuple[Array, Array]:
    """Divergences ``(K, …)`` and orders shaped to broadcast against them."""
    values = np.asarray(divergences, dtype=np.float64)
    a = check_orders(orders)
    expect(
        values.ndim in (1, 2) and len(values) == len(a),
        "divergences",
        f"an array of shape {values.shape}",
        f"to have {len(a)} rows, one per order",
        "Transpose it if the examples come first.",
    )
    in_range(0, math.inf, divergences=values, remedy="Divergences are at least 0.")
    return values, a.reshape(-1, *[1] * (values.ndim - 1))


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
