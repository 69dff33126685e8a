"""Slow, direct computations from the definitions, for comparison."""

import math
from functools import cache

import mpmath
import numpy as np


def mp_integer_moment(r, q, order):
    """ln of the binomial sum, at 60 digits."""
    with mpmath.workdps(60):
        r, q = mpmath.mpf(r), mpmath.mpf(q)
        total = mpmath.fsum(
            mpmath.binomial(order, k)
            * q**k
            * (1 - q) ** (order - k)
            * mpmath.expm1(k * (k - 1) * r * r / 2)
            for k in range(2, order + 1)
        )
        return float(mpmath.log1p(total))


def mp_real_moment(r, q, order):
    """ln E_Q[(P/Q)^order] by quadrature of the definition, at 30 digits."""
    with mpmath.workdps(30):
        r, q, a = mpmath.mpf(r), mpmath.mpf(q), mpmath.mpf(order)

        def log_integrand(z):
            ratio = mpmath.log1p(q * mpmath.expm1(r * z - r * r / 2))
            return a * ratio - z * z / 2 - mpmath.log(2 * mpmath.pi) / 2

        crossing = (mpmath.log1p(-q) - mpmath.log(q)) / r + r / 2
        centres = [mpmath.mpf(0), a * r, crossing]
        cuts = {c + d for c in centres for d in (-25, -12, -6, -3, 0, 3, 6, 12, 25)}
        cuts |= {crossing + d / r for d in (-30, -8, -2, 2, 8, 30) if d / r < 25}
        points = sorted(cuts)
        shift = max(log_integrand(z) for z in points)
        total = mpmath.quad(lambda z: mpmath.exp(log_integrand(z) - shift), points)
        return float(shift + mpmath.log(total))


@cache
def log_moment(r, q, order):
    """ln M for moderate ratios: a fine Riemann sum in extended precision."""
    if q == 1:
        return order * (order - 1) * r * r / 2
    r, q, a = np.longdouble(r), np.longdouble(q), np.longdouble(order)
    z = np.linspace(np.longdouble(-12), a * r + 12, 6001)
    y = q * np.expm1(r * z - r * r / 2)
    density = np.exp(-z * z / 2) * (z[1] - z[0]) / np.sqrt(2 * np.longdouble(np.pi))
    excess = np.expm1(a * np.log1p(y)) - a * y
    return float(np.log1p((excess * density).sum()))


def moment(r, q, order, mode):
    """ln M as a mode takes it at real orders."""
    if mode == "ceil":
        return log_moment(r, q, float(math.ceil(order)))
    if mode == "chord" and q < 1:
        below = math.floor(order)
        low = log_moment(r, q, float(below)) if below > 1 else 0.0
        return low + (order - below) * (log_moment(r, q, below + 1.0) - low)
    return log_moment(r, q, float(order))


def mean_over_runs(values, p):
    """(1/p) ln mean exp(p·x), or the largest."""
    top = max(values)
    if math.isinf(p) or len(values) == 1:
        return top
    return (
        top + math.log(sum(math.exp(p * (v - top)) for v in values) / len(values)) / p
    )


def filled(column):
    """NaN → next observation, else last, else infinity, one example at a time."""
    out = []
    for i, value in enumerate(column):
        later = [v for v in column[i:] if not math.isnan(v)]
        earlier = [v for v in column[:i] if not math.isnan(v)]
        if math.isnan(value):
            value = later[0] if later else earlier[-1] if earlier else math.inf
        out.append(value)
    return out


def rows_around(steps, update):
    """(row at the end, row at the start) of the interval that contains an update."""
    right = [i for i, s in enumerate(steps) if s >= update]
    left = [i for i, s in enumerate(steps) if s <= update - 1]
    at_end = right[0] if right else len(steps) - 1
    return at_end, (left[-1] if left else 0)


def step_loss(runs, example, row, facts_row, update, composition):
    """What one update contributes, with one row's norms."""
    order, convention, p, mode = composition
    mechanism = runs[0].mechanism

    def fact(name):
        value = getattr(mechanism, name)
        return float(value if np.ndim(value) == 0 else value[facts_row])

    q, sigma, clip = (fact(n) for n in ("sample_rate", "noise_std", "max_grad_norm"))
    norms = [
        filled([float(v) for v in run.grad_norms[:, example]])[row] for run in runs
    ]
    ratios = [min(g, clip) / sigma for g in norms]
    if convention == "corrected":
        after = mechanism.num_steps - update
        w = 1.0 if math.isinf(p) else p / (p - 1)
        taken = 1 + (order - 1) * w**after
        share, q = (q, 1.0) if mechanism.sampling == "fixed" else (1.0, q)
        mean = mean_over_runs([moment(r, q, taken, mode) for r in ratios], p)
        return share * mean * w**-after / (order - 1)
    t = int(runs[0].steps[row])
    if convention == "icml2025":
        t = max(t, 1)
    taken = order
    for _ in range(t):
        taken = p / (p - 1) * taken - 1 / p
    taken = math.ceil(taken - 1e-12)
    mean = mean_over_runs([moment(r, q, taken, "ceil") for r in ratios], p)
    powers = {
        "icml2025": ((p - 1) / p) ** (t + 1) * p,
        "thudi2024_code": ((p - 1) / p) ** t,
    }
    return powers[convention] / (order - 1) * mean


def privacy_loss(runs, example, order, convention, rule, p, mode):
    """Sum over the updates, one at a time; "max" compares whole intervals."""
    mechanism, steps = runs[0].mechanism, runs[0].steps
    p = 3 * mechanism.num_steps if p is None else p
    how = (order, convention, p, mode)
    intervals = {}
    for t in range(1, mechanism.num_steps + 1):
        end, start = rows_around(steps, t)
        cut = next((s for s in steps if s >= t), None)
        loss = [step_loss(runs, example, row, end, t, how) for row in (end, start)]
        sums = intervals.setdefault(cut, [0.0, 0.0])
        intervals[cut] = [sums[0] + loss[0], sums[1] + loss[1]]
    pick = {
        "right": lambda s: s[0],
        "left": lambda s: s[1],
        "trapezoid": lambda s: (s[0] + s[1]) / 2,
        "max": max,
    }[rule]
    return sum(pick(s) for s in intervals.values())
