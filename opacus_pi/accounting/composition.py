"""From the moments of single updates to the divergence of a whole training run.

Arrays in, arrays out; ``privacy_loss`` applies these to ledgers. Several runs of the
same training estimate the expectations over the weights that the theorems contain.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi.accounting.moments import log_moments

Array = NDArray[np.float64]
PUBLISHED = ("icml2025", "thudi2024_code")
_OVERFLOWS = 1e150  # a larger ratio has no float64 square
_BLOCK = 1 << 16  # examples evaluated at a time
_ORDERS = 16  # orders evaluated at a time
_DIGITS = 23.0  # nominal error exp(-23); 1e-12 where measured


def corrected_order(order: float, hoelder_p: float, remaining: ArrayLike) -> Array:
    """Order of the update with ``remaining`` updates after it: 1 + (order-1)·w^i."""
    return 1 + (order - 1) * np.exp(log_order_growth(hoelder_p) * np.asarray(remaining))


def printed_order(order: float, hoelder_p: float, step: ArrayLike) -> Array:
    """Published order: o_p(a) = p/(p-1)·a - 1/p applied ``step`` times."""
    grown = np.expm1(log_order_growth(hoelder_p) * np.asarray(step))
    return order + (order - 1 + 1 / hoelder_p) * grown


def log_order_growth(hoelder_p: float) -> float:
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
    reach *= log_order_growth(hoelder_p) ** -1 * (1.0 if single_run else 0.25)
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


def hoelder_losses(
    ratios: Array,
    sample_rate: float,
    order: float,
    remaining: tuple[int, int],
    *,
    hoelder_p: float,
    mode: str,
) -> Array:
    """Share of an interval of updates in the Rényi divergence, by Hölder's inequality.

    D(order) <= Σ_t ((p-1)/p)^i/(order-1)·(1/p)·ln E[M_t(order_i)^p], with i = T - t
    updates after update t, order_i = 1 + (order-1)·(p/(p-1))^i, and the expectation
    over the weights before update t. With a single run the p's cancel outside the
    orders.

    Args:
        ratios: The interval's gradient norms over the noise, ``(R, n)`` for R runs.
        sample_rate: q.
        order: Above 1.
        remaining: Fewest and most updates that follow one of the interval's.
        hoelder_p: p, above 1; ``inf``: the largest of the runs, orders unchanged.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(n,)``.

    Source: Thudi et al. (arXiv:2307.00310), Theorem 3.3, with the order and the
    coefficient that the proof gives.
    """
    orders, weights = interval_orders(
        order,
        hoelder_p,
        remaining,
        sample_rate=sample_rate,
        mode=mode,
        single_run=len(ratios) == 1,
    )
    return weighted_log_moments(
        ratios, sample_rate, orders, weights, hoelder_p=hoelder_p, mode=mode
    )


def weighted_log_moments(
    ratios: Array,
    sample_rate: float,
    orders: Array,
    weights: Array,
    *,
    hoelder_p: float,
    mode: str,
) -> Array:
    """Σ_k weights[k]·(1/p)·ln(mean over runs of M(orders[k])^p).

    Args:
        ratios: ``(R, n)`` for R runs.
        sample_rate: q.
        orders: ``(K,)``, above 1.
        weights: ``(K,)``.
        hoelder_p: p.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(n,)``.
    """
    blocks = [
        _weighted_sum(
            ratios[:, i : i + _BLOCK], sample_rate, orders, weights, hoelder_p, mode
        )
        for i in range(0, ratios.shape[1], _BLOCK)
    ]
    return np.concatenate([np.empty(0), *blocks])


def _weighted_sum(
    ratios: Array, q: float, orders: Array, weights: Array, p: float, mode: str
) -> Array:
    """Σ_k weights[k]·(mean over runs of the log moments at orders[k])."""
    if len(ratios) == 1:  # the same, without the cost of comparing columns
        distinct, places = np.unique(ratios[0], return_inverse=True)
        distinct = distinct[None]
    else:
        distinct, places = np.unique(ratios, return_inverse=True, axis=1)
    finite = (distinct < _OVERFLOWS).all(axis=0)
    total = np.zeros(distinct.shape[1])
    if q > 0:
        total[~finite] = math.inf
    flat = distinct[:, finite].reshape(-1)
    for k in range(0, len(orders), _ORDERS):
        chosen = slice(k, k + _ORDERS)
        moments = log_moments(flat, q, orders[chosen], mode=mode)
        moments = moments.reshape(len(moments), len(ratios), finite.sum())
        total[finite] += weights[chosen] @ mean_over_runs(moments, p)
    return total[places.reshape(-1)]


def mean_over_runs(log_values: Array, power: float) -> Array:
    """The power mean over runs, (1/p)·ln mean exp(p·x), along the last axis but one."""
    if log_values.shape[-2] == 1:
        return log_values[..., 0, :]
    top: NDArray[np.float64] = log_values.max(axis=-2)
    if math.isinf(power):
        return top
    with np.errstate(invalid="ignore"):
        below: NDArray[np.float64] = np.expm1(
            power * (log_values - top[..., None, :])
        ).mean(axis=-2)
    return np.where(np.isinf(top), top, top + np.log1p(below) / power)


def published_orders(
    order: float, step: int, *, hoelder_p: float, convention: str
) -> tuple[Array, Array]:
    """One update's order and weight as published, for reproduction only.

    coefficient·ln E[M(⌈o_p^t(order)⌉)^p]/(order-1), with o_p(a) = p/(p-1)·a - 1/p and
    t counted forward. The coefficient is ((p-1)/p)^(t+1) in ``"icml2025"`` (Definition
    4.2 as printed; p-1 times what Hölder's inequality gives) and (p-1)^t/p^(t+1) in
    ``"thudi2024_code"`` (the released code). Neither is a bound: t would have to count
    the updates that follow.

    Args:
        order: Above 1.
        step: t.
        hoelder_p: p, above 1 and finite.
        convention: One of the two.

    Returns:
        An order ``(1,)`` and a weight ``(1,)`` for ``weighted_log_moments``.
    """
    visited = np.ceil(printed_order(order, hoelder_p, step))
    decay = math.exp(-log_order_growth(hoelder_p) * step) / (order - 1)
    factor = hoelder_p - 1 if convention == "icml2025" else 1
    return np.array([visited]), np.array([decay * factor])
