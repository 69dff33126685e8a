"""One Poisson-subsampled Gaussian step, as one example sees it.

**Idea.** The example is in the batch with probability q, and then shifts the noised
vector by r standard deviations of the noise. Conditioned on the rest of the batch, the
step is therefore a mixture of two Gaussians on a line, and every privacy loss of the
library is built from the moments of their density ratio:

    P = (1-q)·N(0, 1) + q·N(r, 1),  Q = N(0, 1),
    M(order) = E_Q[(P/Q)^order],  D(order) = ln M(order) / (order - 1).

**Guarantee.** Values are exact up to a relative error of about 1e-11. Modes "chord"
and "ceil" are upper bounds. The direction P‖Q (with the example ‖ without it) is the
larger of the two, so one number bounds both.

**What breaks it.** The noise must not depend on the example, and neither may the
denominator of the gradient's mean: with the actual batch size in the denominator, r is
not the example's own norm. Any other sampling than Poisson's has q = 1 here.

Source: Mironov, Talwar and Zhang (arXiv:1908.10530), Sections 3.1 and 3.3.

>>> float(log_moment(0.5, 1.0, order=4))  # full batch: order·(order - 1)·r²/2
1.5
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers
from opacus_pi.accounting.quadrature import real_order_divergences, softplus

Array = NDArray[np.float64]
MODES = ("exact", "chord", "ceil")
_BLOCK = 512  # ratios summed at a time
_TERMS = 1 << 22  # terms of their sums at a time


def log_moment(
    ratio: ArrayLike, sample_rate: float, order: float, *, mode: str = "exact"
) -> Array:
    r"""Return the log moment ln M(order) of one subsampled Gaussian step.

    At integer orders, with :math:`s = r^2/2` and q the sample rate,

    :math:`\ln M(\alpha) = \ln \sum_{k=0}^{\alpha} \binom{\alpha}{k}
    q^k (1-q)^{\alpha-k} e^{k(k-1)s}`.

    Args:
        ratio: r, the example's (clipped) gradient norm divided by the standard
            deviation of the noise on the sum of gradients, any shape, at least 0.
        sample_rate: q, the probability of being in the batch, in [0, 1].
        order: Rényi order, at least 1.
        mode: How the moment is taken at an order that is not an integer. ``"exact"``:
            by quadrature. Two upper bounds avoid the quadrature: ``"chord"``
            interpolates linearly between the neighbouring integer orders (ln M is
            convex in the order), and ``"ceil"`` uses the next integer order. With
            q = 1 there is a closed form at every order, which "chord" uses too.

    Returns:
        float64 in the shape of ``ratio``, in nats; relative error about 1e-11.

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
    """Return the Rényi divergence ln M(order) / (order - 1) of one subsampled step.

    Args:
        ratio: r, the gradient norm divided by the noise's standard deviation, any
            shape, at least 0.
        sample_rate: q in [0, 1].
        order: Rényi order, at least 1; at 1 the Kullback-Leibler divergence.
        mode: As in ``log_moment``.

    Returns:
        float64 in the shape of ``ratio``, in nats.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Thudi et al. (arXiv:2307.00310), Theorem 3.2.
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
    """Return log moments at several orders; arguments are not checked.

    Args:
        ratios: r, ``(m,)``, at least 0.
        sample_rate: q in [0, 1].
        orders: ``(K,)``, at least 1.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(K, m)``, in nats.
    """
    if mode == "ceil":
        orders = np.ceil(orders)
    if mode != "chord" or sample_rate == 1:
        b = orders - 1
        with np.errstate(invalid="ignore"):
            moments = b[:, None] * _divergences(ratios, sample_rate, orders)
        return np.where(b[:, None] == 0, 0.0, moments)
    # ln M is convex in the order (Hölder's inequality), so the chord between the
    # integer orders below and above lies over it. At infinity inf - inf would be NaN.
    below = np.floor(orders)
    corners = np.unique(np.concatenate([below, below + 1]))
    values = log_moments(ratios, sample_rate, corners)
    left = np.searchsorted(corners, below)
    with np.errstate(invalid="ignore"):
        rise = (orders - below)[:, None] * (values[left + 1] - values[left])
        return np.where(np.isinf(values[left]), np.inf, values[left] + rise)


def _checked(ratio: ArrayLike, sample_rate: float, order: float, mode: str) -> Array:
    """Return the ratios as a flat array after checking the domain of every argument."""
    in_range(
        0,
        math.inf,
        ratio=ratio,
        remedy="Divide a gradient norm by the noise's standard deviation.",
    )
    in_range(
        0,
        1,
        sample_rate=sample_rate,
        remedy="Divide the batch size by the data set size.",
    )
    in_range(1, math.inf, order=order, remedy="Pass a Rényi order of at least 1.")
    expect(math.isfinite(order), "order", order, "must be finite", "Try 64.")
    expect(
        mode in MODES,
        "mode",
        repr(mode),
        f"must be in {MODES}",
        'Try "exact", the default.',
    )
    return numbers("ratio", ratio).reshape(-1)


def _divergences(ratios: Array, q: float, orders: Array) -> Array:
    """Return exact divergences ``(K, m)`` of ``(m,)`` ratios at ``(K,)`` orders from 1.

    Equal ratios are evaluated once. Two cases need no sum: r = 0 gives 0, and r = ∞
    gives ∞ unless q = 0.
    """
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
    """Return divergences at an integer order above 1; ratios ascend."""
    size = max(1, min(_BLOCK, _TERMS // order))
    parts = [
        _integer_sum(ratios[i : i + size], q, order)
        for i in range(0, len(ratios), size)
    ]
    return np.concatenate([np.empty(0), *parts]) / (order - 1)


def _integer_sum(ratios: Array, q: float, order: int) -> Array:
    """Return ln M at an integer order, summed so that small moments keep their digits.

    With s = r²/2 and weights w_k = C(order, k)·q^k·(1-q)^(order-k), which sum to 1,
    M - 1 = Σ_{k≥2} w_k·(e^(k(k-1)s) - 1). The terms k = 0 and 1 vanish and the others
    are positive: M - 1 has no cancellation, and ln M = ln(1 + (M - 1)).
    """
    s = ratios**2 / 2
    k = np.arange(2, order + 1, dtype=np.float64)
    log_weights = _log_binomials(order) + k * math.log(q) + (order - k) * math.log1p(-q)
    rates = k * (k - 1)
    kept = _contributing_terms(s, rates, log_weights)
    power = np.outer(s, rates[kept])
    exponents = power + log_weights[kept]
    top = exponents.max(axis=1)
    terms = np.exp(exponents - top[:, None])
    # e^x - 1 = e^x·(1 - e^-x). From x = 37 on the second factor rounds to 1; the
    # smallest exponent of all is that of the smallest ratio and k = 2.
    if power[0, 0] < 37:
        terms *= -np.expm1(-power)
    with np.errstate(divide="ignore"):
        return softplus(top + np.log(terms.sum(axis=1)))


def _contributing_terms(
    s: Array, rates: Array, log_weights: Array
) -> NDArray[np.bool_]:
    """Select the terms that can change the sum's last digit at one of the ratios.

    The others are below e^-41 (1e-18) of the largest term. A term grows with s: its
    value at the largest s against the largest term at the smallest s decides for all s.
    """
    ends = rates * s[[0, -1], None]
    with np.errstate(divide="ignore"):
        # ln(e^x - 1) = x + ln(1 - e^-x)
        least, most = log_weights + ends + np.log(-np.expm1(-ends))
    result: NDArray[np.bool_] = most >= least.max() - 41
    return result


@lru_cache(maxsize=512)
def _log_binomials(order: int) -> Array:
    """Return ln C(order, k) for k = 2 … order, computed from exact integers."""
    binomial, logs = order, []
    for k in range(2, order + 1):
        binomial = binomial * (order - k + 1) // k
        logs.append(math.log(binomial))
    return np.array(logs)
