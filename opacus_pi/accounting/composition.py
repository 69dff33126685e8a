"""From the moments of single updates to the divergence of a whole training run.

Arrays in, arrays out; ``privacy_loss`` applies these to ledgers. Several runs of the
same training estimate the expectations over the weights that the theorems contain.
"""

import math

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.moments import log_moments
from opacus_pi.accounting.orders import interval_orders, log_growth, printed_order

Array = NDArray[np.float64]
PUBLISHED = ("icml2025", "thudi2024_code")
_OVERFLOWS = 1e150  # a larger ratio has no float64 square
_BLOCK = 1 << 16  # examples evaluated at a time
_ORDERS = 16  # orders evaluated at a time


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
    decay = math.exp(-log_growth(hoelder_p) * step) / (order - 1)
    factor = hoelder_p - 1 if convention == "icml2025" else 1
    return np.array([visited]), np.array([decay * factor])


def trajectory_losses_of_sums(sums: Array, order: float, kappa: float) -> Array:
    """Divergence from whole trajectories' sums, with one use of Hölder's inequality.

    D(order) <= ln E exp(κ(order-1)·S)/(κ(order-1)), S = Σ_t D_t at the order
    1 + κ/(κ-1)·(order-1) along one run.

    Args:
        sums: S of each run, ``(R, n)``.
        order: Above 1.
        kappa: κ, above 1; ``inf``: the largest of the runs.

    Returns:
        float64 ``(n,)``.
    """
    return mean_over_runs(sums, kappa * (order - 1))
