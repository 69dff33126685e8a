r"""Rényi divergence of one subsampled Gaussian step at any real order, by quadrature.

**Idea.** Write P/Q = 1 + y(z) and b = order - 1. Because E_Q[y] = 0, the constant and
the linear part of (1+y)^(1+b) can be subtracted before integrating, which leaves an
integrand that is nowhere negative:

:math:`e^{bD} = 1 + b\,E_Q[\psi],\quad
\psi = \frac{(1+y)^{1+b} - 1 - (1+b)\,y}{b} \ge 0`.

The trapezoid rule integrates it: for an integrand that is analytic in a strip around
the real line, its error falls exponentially with the number of points.

**Guarantee.** About 1e-11 relative error, as compared with integration in extended
precision (see the tests); it is not interval arithmetic. Nothing is subtracted from
1, so a divergence of 1e-20 keeps its digits. b = 0 is the limit
psi = (1+y)·ln(1+y) - y, the Kullback-Leibler divergence.

**What breaks it.** P/Q has zeros at distance π/r from the real line, near which its
real power is not analytic. The step shrinks with 1/r; where the two peaks of the
integrand lie far apart, two closed forms replace the sum (``_peaks_are_apart``).

Source: Trefethen and Weideman 2014, SIAM Review 56, Theorem 5.1, for the error of the
trapezoid rule on the line.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TAIL = 8.6  # standard deviations; beyond lies 1e-17 of a peak's mass
_DIGITS = 34.0  # exp(-34) = 2e-15, the trapezoid rule's error
_BLOCK = 1 << 15  # grid points evaluated at a time
_SMALL = 3e-3  # order·|y| below which psi is computed by its series
_LARGE = 68.0  # b·ln(P/Q), or ln(P/Q), above which psi is computed in log space
_FEW = 32  # ratios for which a common grid is cheapest, even up to twice the smallest


def real_order_divergences(ratios: Array, sample_rate: float, orders: Array) -> Array:
    """Return divergences at real orders, to about 1e-11 relative.

    Where the two peaks of the integrand lie far apart, the integral is the sum of two
    closed forms. Elsewhere the trapezoid rule converges geometrically, because the
    integrand is analytic in the strip |Im z| < π/r.

    Args:
        ratios: r, finite, above 0, shape ``(m,)``; ascending order is fastest.
        sample_rate: q in (0, 1).
        orders: At least 1, shape ``(K,)``; fastest if close to each other.

    Returns:
        float64 ``(K, m)``, in nats.
    """
    apart = _peaks_are_apart(ratios, sample_rate, orders[:, None])
    result = np.empty(apart.shape)
    for row, far, order in zip(result, apart, orders, strict=True):
        if far.any():
            row[far] = _two_peaks(ratios[far], sample_rate, order - 1)
    close = np.flatnonzero(~apart.all(axis=0))
    for columns in _blocks(ratios[close], orders.max(), sample_rate):
        chosen = close[columns]
        for like in _groups_of_similar(orders - 1):
            values = _trapezoid(ratios[chosen], sample_rate, orders[like])
            kept = result[np.ix_(like, chosen)]
            result[np.ix_(like, chosen)] = np.where(
                apart[np.ix_(like, chosen)], kept, values
            )
    return result


def _groups_of_similar(powers: Array) -> list[NDArray[np.int64]]:
    """Return positions of powers b, grouped so that none is over 1.5 times another.

    Orders of one group share a grid: its width follows the largest order, and smaller
    orders would waste points on it.
    """
    ascending = np.argsort(powers)
    scale = np.log(np.maximum(powers[ascending], 1e-300)) / math.log(1.5)
    groups = np.floor(scale - scale[0])
    return np.split(ascending, np.flatnonzero(np.diff(groups)) + 1)


def _peaks_are_apart(ratios: Array, q: float, orders: Array) -> NDArray[np.bool_]:
    """Return where the integral between the peaks at 0 and order·r is below 1e-15.

    The densities cross at r/2 + logit/r, with logit = ln((1-q)/q). Either this point
    lies deep in the tails of both peaks, or the far peak outweighs everything else.
    """
    logit = math.log1p(-q) - math.log(q)
    half = ratios**2 / 2
    crossing = half - abs(logit) >= math.sqrt(2 * (_DIGITS + 2 + abs(logit))) * ratios
    outweighed = _DIGITS + 2 + max(logit, 0) + np.log(orders)
    return crossing | ((orders - 1) * half >= outweighed)


def _two_peaks(ratios: Array, q: float, b: float) -> Array:
    """Return divergences from the two peaks alone.

    Near 0, P/Q is 1-q: E[psi] there is psi(-q). At the far peak it is q·N(r, 1)/N(0,
    1), whose moments are known: q·((e^X - 1)/b - 1) with X = b·(ln q + (1+b)·r²/2).
    """
    near = _psi(np.array([-q]), np.array([math.log1p(-q)]), b)
    slope = math.log(q) + (1 + b) * ratios**2 / 2  # X = b·slope
    if b == 0:
        return near + q * (slope - 1)
    log_far = math.log(q) - math.log(b) + _log_expm1(b * slope, b)
    with np.errstate(divide="ignore"):
        log_mean = np.logaddexp(np.log(near), log_far)
    return softplus(math.log(b) + log_mean) / b


def _log_expm1(x: Array, b: float) -> Array:
    """Return ln(e^x - 1 - b) without overflow, for x well above b."""
    large = x > 30
    small = np.log(np.expm1(np.where(large, 30.0, x)) - b)
    return np.where(large, x + np.log1p(-(1 + b) * np.exp(-np.maximum(x, 30))), small)


def _blocks(ratios: Array, order: float, q: float) -> list[NDArray[np.int64]]:
    """Return positions of similar ratios, few enough for the memory of one grid.

    A grid serves ratios up to the one it was made for. A block ends where a ratio
    exceeds the first by a quarter, or, while it has few members, by a factor of two.
    """
    ascending = np.argsort(ratios, kind="stable")
    blocks, start = [], 0
    while start < len(ratios):
        near, far = np.searchsorted(
            ratios,
            [max(x * ratios[ascending[start]], 0.25) for x in (1.25, 2.0)],
            side="right",
            sorter=ascending,
        )
        end = max(near, min(far, start + _FEW))
        points = len(_grid(ratios[ascending[end - 1]], order, q)[0])
        end = min(end, start + max(1, _BLOCK // points))
        blocks.append(ascending[start:end])
        start = end
    return blocks


def _grid(ratio: float, order: float, q: float) -> tuple[Array, float]:
    """Return trapezoid points and their distance, for ratios up to the one given.

    The error of the trapezoid rule is bounded by shifting the path of integration by
    i·d into the complex plane. The shift multiplies the bound by exp(d²/2), and the
    distance of the points multiplies it by exp(-2πd/step). The shift is π/ratio, up to
    which the integrand is analytic, or less where exp(d²/2) would be too large; the
    step is chosen so that the error is exp(-34). The points reach beyond the last peak
    of the integrand, at order·r, or at 2r, the peak of y², where P/Q is close to 1.
    """
    shift = min(math.pi / ratio, math.sqrt(2 * _DIGITS))
    step = 2 * math.pi * shift / (_DIGITS + shift**2 / 2)
    logit = max(math.log1p(-q) - math.log(q), 0.0)
    crossing = max(2 * math.sqrt(logit / 1.5), ratio / 2 + logit / ratio)
    last = max(order * ratio, min(2 * ratio, crossing))
    return np.arange(-_TAIL, last + _TAIL + step, step), step


def _trapezoid(ratios: Array, q: float, orders: Array) -> Array:
    """Return divergences on one common grid for similar orders, shape ``(K, m)``.

    psi = ((1+y)·(e^(b·l) - 1) - b·y)/b with l = ln(1+y). Three forms share the grid:
    this one; the series in y where it would cancel (order·|y| small); and the logarithm
    of psi where it might overflow (b·l large).
    """
    z, step = _grid(ratios.max(), orders.max(), q)
    log_weight = -(z**2) / 2 + math.log(step / math.sqrt(2 * math.pi))
    exponent = np.outer(ratios, z) - ratios[:, None] ** 2 / 2
    y = q * np.expm1(np.minimum(exponent, 600.0))
    log_ratio = np.where(
        exponent > 500.0, math.log(q) + exponent, np.log1p(np.maximum(y, -q))
    )
    large = log_ratio * max(orders.max() - 1, 1.0) > _LARGE
    small = np.abs(y) * orders.max() < _SMALL
    weight = np.exp(log_weight)
    b = orders[:, None] - 1
    mean = _coefficients(b) @ _powers(np.where(small, y, 0.0), weight)
    closed = np.where(large | small, 0.0, weight)
    y[large] = 0.0
    mean -= (closed * y).sum(axis=1)
    mean += _power_sums(log_ratio, closed * (1 + y), orders - 1)
    if not large.any():
        return _from_mean(mean, b)
    log_far = _log_sums_at_large(
        np.where(large, log_ratio, 0.0), log_weight, orders - 1
    )
    with np.errstate(divide="ignore"):
        return _from_log_mean(np.logaddexp(np.log(np.maximum(mean, 0)), log_far), b)


def _power_sums(log_ratio: Array, weights: Array, powers: Array) -> Array:
    """Return Σ weights·(e^(b·l) - 1)/b over the grid, ``(K, m)``.

    At b = 0 it is the limit, Σ weights·l.
    """
    first, last = _nonzero_columns(weights)
    used = weights[:, first:last]
    logs = np.where(used > 0, log_ratio[:, first:last], 0.0)
    out = np.empty((len(powers), len(weights)))
    for row, b in zip(out, powers, strict=True):
        grown = np.expm1(b * logs) / b if b else logs
        np.einsum("ij,ij->i", grown, used, out=row)
    return out


def _log_sums_at_large(log_ratio: Array, log_weight: Array, powers: Array) -> Array:
    """Return ln Σ e^l·((e^(b·l) - 1)/b - 1) over the grid for large l, ``(K, m)``.

    Entries of 0 in ``log_ratio`` mark the points that other forms cover; they are left
    out.
    """
    first, last = _nonzero_columns(log_ratio)
    logs = log_ratio[:, first:last]
    outside = np.where(logs > 0, log_weight[first:last], -np.inf)
    outside += logs
    out = np.empty((len(powers), len(log_ratio)))
    for row, b in zip(out, powers, strict=True):
        if b > 0.5:  # b·l > 45: the power alone is left
            row[:] = log_sum(b * logs + outside) - math.log(b)
        else:
            enough = np.maximum(logs, 45.0)
            log_terms = (
                _log_expm1(b * enough, b) - math.log(b) if b else np.log(enough - 1)
            )
            row[:] = log_sum(log_terms + outside)
    return out


def _nonzero_columns(weights: Array) -> tuple[int, int]:
    """Return the first column that is not all 0, and the one after the last."""
    columns = np.flatnonzero(weights.any(axis=0))
    return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)


def _powers(y: Array, weight: Array) -> Array:
    """Return weighted sums of y², y³, … y⁷ over the grid, ``(6, m)``."""
    power, sums = y, []
    for _ in range(6):
        power = power * y
        sums.append(power @ weight)
    return np.array(sums)


def _coefficients(b: Array) -> Array:
    """Return the coefficients of psi up to y⁷; ``(K, 1)`` gives ``(K, 6)``.

    They are the binomial coefficients of (1+y)^(1+b) from y² on, divided by b:
    (1+b)/2·y²·(1 + (b-1)/3·y·(1 + (b-2)/4·y·(…))).
    """
    k = np.arange(3.0, 8.0)
    return np.cumprod(np.concatenate([(1 + b) / 2, (b + 2 - k) / k], axis=1), axis=1)


def _psi(y: Array, log_ratio: Array, b: float) -> Array:
    """Return psi at P/Q = 1 + y, for y not close to 0."""
    return _scaled_psi(log_ratio, b) * np.exp(log_ratio)


def log_psi(y: Array, log_ratio: Array, b: float) -> Array:
    """Return ln psi, also where psi itself would overflow.

    Args:
        y: P/Q - 1; used where it is small.
        log_ratio: ln(P/Q); used elsewhere. Same shape as ``y``.
        b: order - 1, at least 0.

    Returns:
        float64 in the same shape; -inf where y = 0.
    """
    small = _is_small(y, b)
    power = b * log_ratio
    large = power > 30
    scaled = _scaled_psi(np.where(large, 0.0, log_ratio), b)
    with np.errstate(divide="ignore"):
        log_scaled = np.where(
            large, power - math.log(b) if b else 0.0, np.log(np.where(large, 1, scaled))
        )
        series = np.log(_series(np.where(small, y, 0.0), b))
    rest = (b * np.expm1(-np.where(large, log_ratio, 0.0)) - 1) * np.exp(-power * large)
    log_scaled += np.log1p(np.where(large, rest, 0.0))
    return np.where(small, series, log_ratio + log_scaled)


def _is_small(y: Array, b: float) -> NDArray[np.bool_]:
    """Return where the series has converged and the closed form begins to cancel."""
    return np.abs(y) * (1 + b) < _SMALL


def _scaled_psi(log_ratio: Array, b: float) -> Array:
    """Return psi divided by P/Q, as a function of ln(P/Q)."""
    grown = np.expm1(b * log_ratio) / b if b else log_ratio
    return grown + np.expm1(-log_ratio)


def _series(y: Array, b: float) -> Array:
    """Return psi by the first six terms of its power series."""
    coefficients = _coefficients(np.array([[b]]))[0]
    total = np.full_like(y, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= y
        total += coefficient
    return total * y * y


def _from_mean(mean_psi: Array, b: Array) -> Array:
    """Return D = ln(1 + b·E[psi]) / b for b ``(K, 1)``, all 0 or none."""
    return np.log1p(b * mean_psi) / b if b.all() else mean_psi


def _from_log_mean(log_mean_psi: Array, b: Array) -> Array:
    """Return the same as ``_from_mean``, from ln E[psi]."""
    if not b.all():
        return np.exp(log_mean_psi)
    return softplus(np.log(b) + log_mean_psi) / b


def log_sum(log_terms: Array) -> Array:
    """Return the logarithm of the sum of exponentials along the last axis."""
    top = np.maximum(log_terms.max(axis=-1), -1e300)
    with np.errstate(divide="ignore"):
        rest: Array = np.exp(log_terms - top[..., None]).sum(axis=-1)
        result: Array = top + np.log(rest)
        return result


def softplus(x: Array) -> Array:
    """Return ln(1 + e^x), accurate for x → -∞ and without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
