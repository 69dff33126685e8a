r"""From the moments of single updates to the divergence of a whole training run.

**Idea.** An update's moment depends on the weights it starts from, and those on the
earlier updates. Hölder's inequality separates the last update from all earlier ones,
at the price of a slightly larger order for the earlier ones; applied T times it gives
a sum over updates in which update t, with i = T - t updates after it, is taken at its
own order:

:math:`D_\alpha(P \| Q) \le \frac{1}{\alpha-1} \sum_{t=1}^{T} w^{-i}\,\frac1p
\ln E\big[M_t(\alpha_i)^p\big],\quad
\alpha_i = 1 + (\alpha-1)\,w^i,\quad w = \frac{p}{p-1}`.

The expectation is over the weights before update t, in training with the example.

**Guarantee.** With the true expectations this is an upper bound of the divergence for
every p > 1. The functions here replace expectations by means over the runs that they
are given, which makes every value an estimate. The sum over the updates of one interval
is exact for modes "ceil" and "chord" and accurate to 1e-12 relative for "exact".

**What breaks it.** A p chosen on the very runs that are averaged: with one run the
best p is infinite, which gives the plain sum of losses and bounds nothing. The
published order and coefficient (``published_orders``) count updates from the start
instead of from the end; they are kept for reproduction and are no bound.

Arrays in, arrays out; ``losses`` applies these functions to ledgers.

Source: Thudi et al. (arXiv:2307.00310), Theorem 3.3, with the order and coefficient
that its proof gives; docs/theory.md, Section 2.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import require
from opacus_pi.accounting.moments import log_moments

Array = NDArray[np.float64]
PUBLISHED = ("icml2025", "thudi2024_code")
_OVERFLOWS = 1e150  # a larger ratio has no float64 square: its loss is infinite
_MAX_EXAMPLES = 1 << 16  # limits the memory of one evaluation
_MAX_ORDERS = 16
_MAX_TERMS = 1_000_000  # updates or parts of an interval that are summed one by one
_LONG = 4096  # updates; from here on the sum of a polynomial needs its ends only
_NODE_DIGITS = 23.0  # nominal interpolation error exp(-23) = 1e-10; measured: 1e-12


def default_hoelder_p(num_steps: int) -> float:
    """Return Hölder's p where none is given: 3T, the paper's choice.

    Over T updates the order minus 1 then grows by (p/(p-1))^T, at most a factor of 1.5.

    Args:
        num_steps: Number of updates, T.
    """
    return max(3.0 * num_steps, 3.0)


def corrected_order(
    order: float | Array, hoelder_p: float, remaining: ArrayLike
) -> Array:
    """Return the order at which an update is taken: 1 + (order-1)·(p/(p-1))^i.

    Args:
        order: Rényi order of the whole composition, above 1; any shape.
        hoelder_p: p, above 1; ``inf`` leaves the order unchanged.
        remaining: i, the number of updates after this one, any shape.

    Returns:
        float64 in the common shape of ``order`` and ``remaining``.
    """
    return 1 + (order - 1) * np.exp(log_order_growth(hoelder_p) * np.asarray(remaining))


def printed_order(order: float, hoelder_p: float, step: ArrayLike) -> Array:
    """Return the published order: o_p(a) = p/(p-1)·a - 1/p applied ``step`` times.

    Args:
        order: Rényi order, above 1.
        hoelder_p: p, above 1.
        step: How many times, any shape; the papers count updates from the start.

    Returns:
        float64 in the shape of ``step``.

    Source: Sepahvand et al. (ICML 2025), Definition 4.2. The iterates have the closed
    form order + (order - 1 + 1/p)·((p/(p-1))^step - 1).
    """
    grown = np.expm1(log_order_growth(hoelder_p) * np.asarray(step))
    return order + (order - 1 + 1 / hoelder_p) * grown


def log_order_growth(hoelder_p: float) -> float:
    """Return ln(p/(p-1)), the growth of order - 1 per later update; 0 at p = ∞."""
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
    """Return orders and weights for the sum over the updates of one interval.

    Σ_k weights[k]·A(orders[k]) = Σ_i w^(-i)/(order-1)·A(order_i), where A is the log
    moment (or its mean over runs): exactly for "ceil" and "chord", to 1e-12 relative
    for "exact". The norms are constant within an interval, so A is one smooth function
    of the order, and a polynomial through a few orders serves thousands of updates.

    Args:
        order: Rényi order of the whole composition, above 1.
        hoelder_p: p, above 1, or ``inf``: every update at ``order``.
        remaining: Fewest and most updates that follow one of the interval's updates.
        sample_rate: q, which limits how fast a moment changes with its order.
        mode: How the moment is taken at real orders, as in ``log_moment``.
        single_run: Whether A is the log moment of one run, which is linear between
            integer orders in mode "chord".

    Returns:
        Orders ``(K,)`` and weights ``(K,)``. They are cached and shared: do not write
        to them. For a single run the orders of "ceil" and "chord" are integers (if
        q < 1), so that a moment at them is the same in every mode.
    """
    low, high = (float(corrected_order(order, hoelder_p, i)) for i in remaining)
    count = remaining[1] - remaining[0] + 1
    if mode == "ceil":
        corners = np.arange(math.ceil(low), math.ceil(high) + 1, dtype=np.float64)
        sums = pieces(order, hoelder_p, remaining, corners)[1]
        return corners, sums
    if mode == "chord" and sample_rate < 1:
        # The chord of one run is linear between integer orders: its values there
        # suffice. A power mean over runs bends it, so every order is kept.
        if single_run:
            top = max(math.ceil(high), math.floor(low) + 1)
            corners = np.arange(math.floor(low), top + 1, dtype=np.float64)
            return corners, linear_weights(order, hoelder_p, remaining, corners)
        require(
            count <= _MAX_TERMS,
            f"With several runs and mode='chord', at most {_MAX_TERMS} updates may lie "
            f"between two rows of the ledger, got {count}.",
            "Use mode='exact' or 'ceil'.",
        )
        visited = corrected_order(order, hoelder_p, np.arange(*remaining))
        visited = np.append(visited, high)
        return visited, 1 / (visited - 1)
    if math.isinf(hoelder_p):
        return np.array([low]), np.array([count / (order - 1)])
    # How far, in updates, the log moment is analytic off the real line: the zeros of
    # the moment lie about π/ln(1/q) from real orders, and one update moves the order
    # by (order - 1)·ln w. A mean over runs is less smooth: a quarter is used for it.
    reach = math.pi / (high * max(-math.log(sample_rate or 1), 1.0))
    reach *= log_order_growth(hoelder_p) ** -1 * (1.0 if single_run else 0.25)
    rules = [
        _interpolation_rule(first, last, reach)
        for first, last in _split_interval(remaining, reach)
    ]
    nodes = np.concatenate([nodes for nodes, _ in rules])
    orders = corrected_order(order, hoelder_p, nodes)
    return orders, np.concatenate([weights for _, weights in rules]) / (orders - 1)


def linear_weights(
    order: float | Array,
    hoelder_p: float,
    remaining: tuple[int, int],
    corners: Array,
) -> Array:
    """Return how often each corner of a piecewise linear function counts in a sum.

    For every f that is linear between the corners, Σ_k weights[k]·f(corners[k]) is the
    sum of f(order_i)/(order_i - 1) over the updates of an interval. The updates between
    two corners are summed in closed form, however many they are.

    Args:
        order: Rényi order of the whole composition, above 1; or several, ``(K, 1)``.
        hoelder_p: p, above 1, or ``inf``.
        remaining: Fewest and most updates that follow one of the interval's updates.
        corners: Increasing orders ``(C,)``, or ``(K, C)``; the first is at most, and
            the last at least, every order of the interval.

    Returns:
        float64 ``(C,)``, at least 0; ``(K, C)`` for several orders.
    """
    counts, sums = pieces(order, hoelder_p, remaining, corners)
    weights: Array = sums.copy()
    if corners.shape[-1] > 1:
        # Σ (order_i - c)/(order_i - 1) = count - (c-1)·Σ 1/(order_i - 1)
        later = sums[..., 1:]
        above = counts[..., 1:] - (corners[..., :-1] - 1) * later
        above /= np.diff(corners)
        above = np.clip(above, 0, later)
        weights[..., 1:] = above
        weights[..., :-1] += later - above
    return weights


def pieces(
    order: float | Array,
    hoelder_p: float,
    remaining: tuple[int, int],
    corners: Array,
) -> tuple[Array, Array]:
    """Return the number of updates whose order is in each piece, and Σ 1/(order - 1).

    Args:
        order: Rényi order of the whole composition, above 1; or several, ``(K, 1)``.
        hoelder_p: p, above 1, or ``inf``.
        remaining: Fewest and most updates that follow one of the interval's updates.
        corners: Increasing orders ``(C,)``, or ``(K, C)``; the last is at least every
            order. Piece k holds the orders above corner k - 1 and up to corner k.

    Returns:
        Two arrays ``(C,)``; ``(K, C)`` for several orders.
    """
    fewest, most = remaining
    growth = log_order_growth(hoelder_p)
    last = _last_updates(order, growth, remaining, corners)
    last[..., -1] = most
    first = np.empty_like(last)
    first[..., 0], first[..., 1:] = fewest, last[..., :-1] + 1
    counts = (last - first + 1).astype(np.float64)
    # 1/(order_i - 1) = w^(-i)/(order - 1), a geometric series
    series = np.expm1(-growth * counts) / math.expm1(-growth) if growth else counts
    sums: Array = np.exp(-growth * first) * series / (order - 1)
    return counts, sums


def _last_updates(
    order: float | Array, growth: float, remaining: tuple[int, int], corners: Array
) -> NDArray[np.int64]:
    """Return the last update whose order is at most each corner; else the one before.

    Args:
        order: As in ``pieces``.
        growth: ``log_order_growth`` of p.
        remaining: As in ``pieces``.
        corners: As in ``pieces``.
    """
    fewest, most = remaining

    def order_of(update: NDArray[np.int64]) -> Array:
        grown: Array = np.exp(growth * update)
        return 1 + (order - 1) * grown

    if not growth:
        inside = np.broadcast_to(order, np.broadcast(order, corners).shape) <= corners
        return np.where(inside, most, fewest - 1)
    # The closed form may be one update off by rounding: its neighbours are compared.
    with np.errstate(divide="ignore"):
        exact = np.log(np.maximum(corners - 1, 0) / (order - 1)) / growth
    last = np.floor(np.clip(exact, fewest - 1, most)).astype(np.int64)
    last = np.where((order_of(last + 1) <= corners) & (last < most), last + 1, last)
    return np.where((order_of(last) > corners) & (last >= fewest), last - 1, last)


def _split_interval(remaining: tuple[int, int], reach: float) -> list[tuple[int, int]]:
    """Cut an interval into parts that a few interpolation nodes serve.

    ``reach`` is the distance, in updates, over which the divergence is analytic off the
    real line: the wider the part in units of it, the more nodes it needs.

    Returns:
        First and last of each part.
    """
    count = remaining[1] - remaining[0] + 1
    num_parts = math.ceil(count / (0.8 * reach + 1))
    require(
        num_parts <= _MAX_TERMS,
        f"The loss of the {count} updates between two rows needs a sum of {num_parts} "
        f"parts with this hoelder_p, and at most {_MAX_TERMS} are computed.",
        "Choose hoelder_p of about 3·num_steps, the default.",
    )
    short, longer = divmod(count, num_parts)
    sizes = [short + 1] * longer + [short] * (num_parts - longer)
    starts = remaining[0] + np.cumsum([0, *sizes])
    ends = starts[1:] - 1
    return list(zip(starts[:-1].tolist(), ends.tolist(), strict=True))


def _interpolation_rule(first: int, last: int, reach: float) -> tuple[Array, Array]:
    """Return Chebyshev nodes over a range of updates, and their weights in its sum.

    The interpolating polynomial is summed over all updates in closed form. Where the
    rule would need as many nodes as there are updates, every update is its own node.

    Args:
        first: First of the range.
        last: Last of the range, included.
        reach: As in ``_split_interval``.
    """
    half, count = (last - first) / 2, last - first + 1
    size = math.ceil(_NODE_DIGITS / math.asinh(reach / half)) + 1 if half else 1
    if count <= max(size, 2):
        return np.arange(first, last + 1, dtype=np.float64), np.ones(count)
    angles = (np.arange(size) + 0.5) * math.pi / size
    nodes = first + half * (1 + np.cos(angles))
    if count > _LONG:
        return nodes, _chebyshev_weights(angles, count)
    # Each weight is the sum of one Lagrange polynomial, by the barycentric formula.
    gaps = np.arange(first, last + 1)[:, None] - nodes
    parts = (
        (-1.0) ** np.arange(size) * np.sin(angles) / np.where(gaps == 0, 1e-30, gaps)
    )
    return nodes, (parts / parts.sum(axis=1, keepdims=True)).sum(axis=0)


def _chebyshev_weights(angles: Array, count: int) -> Array:
    """Return the weights of Chebyshev nodes in a sum over many equally spaced points.

    The interpolating polynomial is a sum of Chebyshev polynomials T_k, whose sums over
    the points follow from the Euler-Maclaurin formula: the integral, half the end
    values, and corrections by derivatives at the ends. For thousands of points and a
    few nodes, two corrections are exact to rounding.

    Args:
        angles: arccos of the nodes on [-1, 1], ``(m,)``, m up to some dozens.
        count: Number of points, from -1 to 1.
    """
    k = np.arange(0, len(angles), 2, dtype=np.float64)  # sums of odd T_k vanish
    width = 2 / (count - 1)
    slope = k**2  # first derivative at 1; the third:
    third = k**2 * (k**2 - 1) * (k**2 - 4) / 15
    sums = (count - 1) / (1 - k**2) + 1 + width * slope / 6 - width**3 * third / 360
    sums[1:] *= 2
    weights: Array = np.cos(np.outer(angles, k)) @ sums / len(angles)
    return weights


def hoelder_losses(
    ratios: Array,
    sample_rate: float,
    order: float,
    remaining: tuple[int, int],
    *,
    hoelder_p: float,
    mode: str,
) -> Array:
    """Return an interval's share of the Rényi divergence, by Hölder's inequality.

    D(order) <= Σ_t w^(-i)/(order-1)·(1/p)·ln E[M_t(order_i)^p] with w = p/(p-1),
    i = T - t updates after update t, and order_i = 1 + (order-1)·w^i. The expectation
    is over the weights before update t. With a single run the p's cancel outside the
    orders.

    Args:
        ratios: The interval's gradient norms divided by the noise's standard
            deviation, ``(R, n)`` for R runs.
        sample_rate: q.
        order: Rényi order, above 1.
        remaining: Fewest and most updates that follow one of the interval's updates.
        hoelder_p: p, above 1; ``inf``: the largest of the runs, orders unchanged.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(n,)``, in nats.

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
    """Return Σ_k weights[k]·(1/p)·ln(mean over runs of M(orders[k])^p).

    Args:
        ratios: Gradient norms divided by the noise, ``(R, n)`` for R runs.
        sample_rate: q.
        orders: ``(K,)``, above 1.
        weights: ``(K,)``.
        hoelder_p: p of the power mean over runs.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(n,)``, in nats.
    """
    blocks = [
        _weighted_sum(
            ratios[:, i : i + _MAX_EXAMPLES],
            sample_rate,
            orders,
            weights,
            hoelder_p,
            mode,
        )
        for i in range(0, ratios.shape[1], _MAX_EXAMPLES)
    ]
    return np.concatenate([np.empty(0), *blocks])


def _weighted_sum(
    ratios: Array, q: float, orders: Array, weights: Array, p: float, mode: str
) -> Array:
    """Return Σ_k weights[k]·(mean over runs of the log moments at orders[k]).

    Clipping gives many examples the same norm: equal columns are evaluated once.
    """
    if len(ratios) == 1:  # same result, without the cost of comparing columns
        distinct, places = np.unique(ratios[0], return_inverse=True)
        distinct = distinct[None]
    else:
        distinct, places = np.unique(ratios, return_inverse=True, axis=1)
    finite = (distinct < _OVERFLOWS).all(axis=0)
    total = np.zeros(distinct.shape[1])
    if q > 0:
        total[~finite] = math.inf
    flat = distinct[:, finite].reshape(-1)
    for k in range(0, len(orders), _MAX_ORDERS):
        chosen = slice(k, k + _MAX_ORDERS)
        moments = log_moments(flat, q, orders[chosen], mode=mode)
        moments = moments.reshape(len(moments), len(ratios), finite.sum())
        total[finite] += weights[chosen] @ mean_over_runs(moments, p)
    return total[places.reshape(-1)]


def mean_over_runs(log_values: Array, power: float) -> Array:
    """Return the power mean over runs, (1/p)·ln(mean of exp(p·x)), along axis -2.

    Args:
        log_values: x, ``(..., R, n)`` for R runs.
        power: p, above 0; ``inf``: the largest of the runs.

    Returns:
        float64 ``(..., n)``; x itself for a single run.
    """
    if log_values.shape[-2] == 1:
        return log_values[..., 0, :]
    # Relative to the largest value nothing overflows, and expm1 with log1p keeps the
    # digits of small differences between runs.
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
    """Return one update's order and weight as published, for reproduction only.

    The published term is coefficient·ln E[M(⌈o_p^t(order)⌉)^p]/(order-1), with
    o_p(a) = p/(p-1)·a - 1/p and t counted from the start. The coefficient is
    ((p-1)/p)^(t+1) in ``"icml2025"`` (Definition 4.2 as printed; p-1 times what
    Hölder's inequality gives) and (p-1)^t/p^(t+1) in ``"thudi2024_code"`` (the released
    code). Neither is a bound: t would have to count the updates that follow.

    Args:
        order: Rényi order, above 1.
        step: t.
        hoelder_p: p, above 1 and finite.
        convention: ``"icml2025"`` or ``"thudi2024_code"``.

    Returns:
        An order ``(1,)`` and a weight ``(1,)`` for ``weighted_log_moments``.

    Source: Sepahvand et al. (ICML 2025), Definition 4.2; the code of Thudi et al.
    """
    visited = np.ceil(printed_order(order, hoelder_p, step))
    decay = math.exp(-log_order_growth(hoelder_p) * step) / (order - 1)
    factor = hoelder_p - 1 if convention == "icml2025" else 1
    return np.array([visited]), np.array([decay * factor])
