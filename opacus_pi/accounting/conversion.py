"""From Rényi divergences to (epsilon, delta).

>>> round(float(rdp_to_epsilon([0.5], [8.0], delta=1e-5)), 6)
1.714109
"""

import math

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, positive

Array = NDArray[np.float64]


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
