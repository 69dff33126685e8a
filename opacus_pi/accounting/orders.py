"""The Rényi orders that a composition visits, and how to sum over them quickly.

Hölder's inequality raises the order a little at every update that follows: with
w = p/(p-1), the update with i updates after it is taken at order 1 + (order-1)·w^i.
A moment is a smooth function of its order, so a sum over thousands of updates with one
gradient norm needs only a few orders.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike

Array = NDArray[np.float64]

_DIGITS = 23.0  # nominal error exp(-23); 1e-12 where measured


def corrected_order(order: float, hoelder_p: float, remaining: ArrayLike) -> Array:
    """Order of the update with ``remaining`` updates after it: 1 + (order-1)·w^i."""
    return 1 + (order - 1) * np.exp(log_growth(hoelder_p) * np.asarray(remaining))


def printed_order(order: float, hoelder_p: float, step: ArrayLike) -> Array:
    """Published order: o_p(a) = p/(p-1)·a - 1/p applied ``step`` times."""
    grown = np.expm1(log_growth(hoelder_p) * np.asarray(step))
    return order + (order - 1 + 1 / hoelder_p) * grown


def log_growth(hoelder_p: float) -> float:
    """Logarithm of p/(p-1); 0 at p = ∞."""
    return -math.log1p(-1 / hoelder_p)


@lru_cache(maxsize=4096)
def interval_orders(
    order: float,
    hoelder_p: float,
    remaining: tuple[int, int],
    *,
    sample_rate: float,
    mode: str,
    single_run: bool,
) -> tuple[Array, Array]:
    """Orders and weights for the sum over the updates of one interval.

    Σ_k weights[k]·A(orders[k]) = Σ_i w^(-i)/(order-1)·A(order_i), A being the log
    moment (or its mean over runs): exactly for "ceil" and "chord", to 1e-12 relative
    for "exact".

    Args:
        order: Rényi order of the whole composition, above 1.
        hoelder_p: p, above 1, or ``inf``: every update at ``order``.
        remaining: Fewest and most updates that follow one of the interval's.
        sample_rate: q, which limits how fast a moment changes with its order.
        mode: How the moment is taken at real orders.
        single_run: Whether A is one run's log moment, linear along a chord.

    Returns:
        Orders ``(K,)`` and weights ``(K,)``, shared: read them only. For a single run
        the orders of "ceil" and "chord" are whole numbers (if q < 1), so that a moment
        at them is the same in every mode.
    """
    after = np.arange(remaining[0], remaining[1] + 1)
    if math.isinf(hoelder_p):
        visited = np.array([float(order)])
        shares = np.array([len(after) / (order - 1)])
    else:
        visited = corrected_order(order, hoelder_p, after)
        shares = 1 / (visited - 1)  # w^(-i) / (order-1)
    if mode == "ceil":
        return _collect(np.ceil(visited), shares)
    if mode == "chord" and sample_rate < 1:
        if not single_run:  # kinks at whole orders, bent by the mean over runs
            return visited, shares
        below = np.floor(visited)
        upper = (visited - below) * shares
        corners = np.concatenate([below, below + 1])
        return _collect(corners, np.concatenate([shares - upper, upper]))
    if math.isinf(hoelder_p):
        return visited, shares
    reach = math.pi / (visited[-1] * max(-math.log(sample_rate or 1), 1.0))
    reach *= log_growth(hoelder_p) ** -1 * (1.0 if single_run else 0.25)
    rules = [_interpolation(panel, reach) for panel in _split(after, reach)]
    nodes = np.concatenate([nodes for nodes, _ in rules])
    orders = corrected_order(order, hoelder_p, nodes)
    return orders, np.concatenate([weights for _, weights in rules]) / (orders - 1)


def _collect(orders: Array, shares: Array) -> tuple[Array, Array]:
    """Add up the shares of equal orders."""
    distinct, places = np.unique(orders, return_inverse=True)
    return distinct, np.bincount(places, weights=shares).astype(np.float64, copy=False)


def _split(after: NDArray[np.int64], reach: float) -> list[NDArray[np.int64]]:
    """Cut an interval so that few nodes serve each part.

    ``reach`` is how far, in updates, the divergence is analytic off the real line: ln M
    has its zeros about π/ln(1/q) from real orders.
    """
    return np.array_split(after, math.ceil(len(after) / (0.8 * reach + 1)))


def _interpolation(after: NDArray[np.int64], reach: float) -> tuple[Array, Array]:
    """Chebyshev nodes over a range of updates, and the sums of their polynomials."""
    half = (after[-1] - after[0]) / 2
    if len(after) <= 2:
        return after.astype(np.float64), np.ones(len(after))
    size = math.ceil(_DIGITS / math.asinh(reach / half)) + 1
    if size >= len(after):
        return after.astype(np.float64), np.ones(len(after))
    angles = (np.arange(size) + 0.5) * math.pi / size
    nodes = after[0] + half * (1 + np.cos(angles))
    gaps = after[:, None] - nodes
    parts = (
        (-1.0) ** np.arange(size) * np.sin(angles) / np.where(gaps == 0, 1e-30, gaps)
    )
    return nodes, (parts / parts.sum(axis=1, keepdims=True)).sum(axis=0)
