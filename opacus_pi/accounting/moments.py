"""One Poisson-subsampled Gaussian step, seen by one example.

The example takes part with probability q and then moves the noised vector by r standard
deviations of its noise. With P = (1-q)·N(0, 1) + q·N(r, 1) and Q = N(0, 1),

    M(order) = E_Q[(P/Q)^order],   D(order) = ln M(order) / (order - 1).

The direction P‖Q (with the example ‖ without it) is the larger of the two (Mironov,
Talwar and Zhang, arXiv:1908.10530), so one number serves both.

>>> float(log_moment(0.5, 1.0, order=4))  # full batch: order·(order - 1)·r²/2
1.5
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.accounting.quadrature import real_order_divergences, softplus

Array = NDArray[np.float64]
MODES = ("exact", "chord", "ceil")
_BLOCK = 512  # ratios summed at a time
_TERMS = 1 << 22  # terms of their sums at a time


def log_moment(
    ratio: ArrayLike, sample_rate: float, order: float, *, mode: str = "exact"
) -> Array:
    """Log moment ln M(order) of one subsampled Gaussian step.

    At integer orders ln M = ln Σ_k C(order, k) q^k (1-q)^(order-k) exp(k(k-1)r²/2).

    Args:
        ratio: r, the example's gradient norm over the noise's standard deviation, any
            shape, at least 0.
        sample_rate: q in [0, 1].
        order: Rényi order, at least 1.
        mode: How a real order is met. ``"exact"``: by quadrature. Two upper bounds:
            ``"chord"``, between the integer orders around it (ln M is convex in the
            order), and ``"ceil"``, at the next integer. With q = 1 there is a closed
            form, and "chord" uses it.

    Returns:
        float64 in ``ratio``'s shape; relative error about 1e-11.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Thudi et al. (arXiv:2307.00310), Theorem 3.2.
    """
    flat = _checked(ratio, sample_rate, order, mode)
    values = log_moments(flat, float(sample_rate), np.array([order], float), mode=mode)
    result: Array = values[0].reshape(np.shape(ratio))
    return result


def renyi_divergence(
    ratio: ArrayLike, sample_rate: float, order: float, *, mode: str = "exact"
) -> Array:
    """Rényi divergence ln M(order) / (order - 1) of one subsampled Gaussian step.

    Args:
        ratio: r, any shape, at least 0.
        sample_rate: q in [0, 1].
        order: Rényi order, at least 1; at 1 the Kullback-Leibler divergence.
        mode: As in ``log_moment``.

    Returns:
        float64 in ``ratio``'s shape, in nats.

    Raises:
        ValueError: If an argument is outside its domain.
    """
    flat = _checked(ratio, sample_rate, order, mode)
    if order == 1:
        values = _divergences(flat, float(sample_rate), np.array([1.0]))
    else:
        orders = np.array([order], dtype=np.float64)
        values = log_moments(flat, float(sample_rate), orders, mode=mode) / (order - 1)
    result: Array = values[0].reshape(np.shape(ratio))
    return result


def log_moments(
    ratios: Array, sample_rate: float, orders: Array, *, mode: str = "exact"
) -> Array:
    """Log moments, unchecked, at several orders: ``(m,)``, ``(K,)`` give ``(K, m)``."""
    if mode == "ceil":
        orders = np.ceil(orders)
    if mode != "chord" or sample_rate == 1:
        b = orders - 1
        with np.errstate(invalid="ignore"):
            moments = b[:, None] * _divergences(ratios, sample_rate, orders)
        return np.where(b[:, None] == 0, 0.0, moments)
    below = np.floor(orders)
    corners = np.unique(np.concatenate([below, below + 1]))
    values = log_moments(ratios, sample_rate, corners)
    left = np.searchsorted(corners, below)
    with np.errstate(invalid="ignore"):
        rise = (orders - below)[:, None] * (values[left + 1] - values[left])
        return np.where(np.isinf(values[left]), np.inf, values[left] + rise)


def _checked(ratio: ArrayLike, sample_rate: float, order: float, mode: str) -> Array:
    """The ratios as a flat array, all arguments in their domains."""
    in_range(
        0,
        math.inf,
        ratio=ratio,
        remedy="It is a gradient norm over the noise's standard deviation.",
    )
    in_range(
        0, 1, sample_rate=sample_rate, remedy="Divide batch size by data set size."
    )
    in_range(
        1, math.inf, order=order, remedy="Rényi orders of privacy losses start at 1."
    )
    expect(math.isfinite(order), "order", order, "to be finite", "Try 64.")
    expect(mode in MODES, "mode", repr(mode), f"in {MODES}", "The default is exact.")
    return np.asarray(ratio, dtype=np.float64).reshape(-1)


def _divergences(ratios: Array, q: float, orders: Array) -> Array:
    """Exact divergences, any orders from 1: ``(m,)`` and ``(K,)`` give ``(K, m)``."""
    if q == 1:
        return orders[:, None] * ratios**2 / 2
    distinct, places = np.unique(ratios, return_inverse=True)
    values = np.zeros((len(orders), len(distinct)))
    if q > 0:
        values[:, np.isinf(distinct)] = math.inf
        inside = (distinct > 0) & np.isfinite(distinct)
        whole = (orders == np.floor(orders)) & (orders > 1)
        real = ~whole
        for k in np.flatnonzero(whole):
            values[k, inside] = _integer_order(distinct[inside], q, int(orders[k]))
        if real.any():
            at_real = real_order_divergences(distinct[inside], q, orders[real])
            values[np.ix_(real, inside)] = at_real
    return values[:, places.reshape(-1)]


def _integer_order(ratios: Array, q: float, order: int) -> Array:
    """Divergences at an integer order above 1 and ascending ratios, blockwise."""
    size = max(1, min(_BLOCK, _TERMS // order))
    parts = [
        _integer_sum(ratios[i : i + size], q, order)
        for i in range(0, len(ratios), size)
    ]
    return np.concatenate([np.empty(0), *parts]) / (order - 1)


def _integer_sum(ratios: Array, q: float, order: int) -> Array:
    """Log moments from M - 1 = Σ_{k≥2} C(order, k) q^k (1-q)^(order-k) (e^(k(k-1)s) - 1).

    s = r²/2. Summing M - 1, not M, keeps the digits of a small moment.
    """  # noqa: E501
    s = ratios**2 / 2
    k = np.arange(2, order + 1, dtype=np.float64)
    log_weights = _log_binomials(order) + k * math.log(q) + (order - k) * math.log1p(-q)
    rates = k * (k - 1)
    kept = _matter(s, rates, log_weights)
    power = np.outer(s, rates[kept])
    exponents = power + log_weights[kept]
    top = exponents.max(axis=1)
    terms = np.exp(exponents - top[:, None])
    if power[0, 0] < 37:
        terms *= -np.expm1(-power)
    with np.errstate(divide="ignore"):
        return softplus(top + np.log(terms.sum(axis=1)))


def _matter(s: Array, rates: Array, log_weights: Array) -> NDArray[np.bool_]:
    """Which terms count: the others are below e^-41 of the largest, for every s.

    A term grows with s, so its value at the largest s and the largest term at the
    smallest s decide for all.
    """
    ends = rates * s[[0, -1], None]
    with np.errstate(divide="ignore"):
        # ln(e^x - 1) = x + ln(1 - e^-x)
        least, most = log_weights + ends + np.log(-np.expm1(-ends))
    result: NDArray[np.bool_] = most >= least.max() - 41
    return result


@lru_cache(maxsize=512)
def _log_binomials(order: int) -> Array:
    """Log binomials ln C(order, k) for k = 2 … order, from exact whole numbers."""
    binomial, logs = order, []
    for k in range(2, order + 1):
        binomial = binomial * (order - k + 1) // k
        logs.append(math.log(binomial))
    return np.array(logs)
