"""Divergence after learning when later noise hides the contribution of early steps.

**Idea.** Plain composition adds up every step's divergence and grows with the run. With
a log-Sobolev constant of the other distribution, each step's noise can do two things: a
share of it hides the example's own contribution, the rest contracts the divergence
accumulated before (``contraction``). One schedule covers learning and any number of
unlearning requests: after its removal an example shifts nothing, and every step only
contracts.

**Guarantee.** A bound if the mean over the given runs is the expectation; otherwise an
estimate. On strongly convex losses it stays bounded however long the run is.

**What breaks it.** Random batches: the constants are those of one fixed map a step.
Steps must be full-batch, or follow a schedule that does not look at the data.

Source: docs/theory.md, Sections 6 and 7; ``halved_noise_divergence`` is the form of
Chien et al. 2024.

>>> from opacus_pi.accounting.langevin.lsi import lsi_track
>>> shifts = np.r_[np.full((500, 1), 0.1), np.zeros((50, 1))]  # learn, then without x
>>> lsi = lsi_track(0.5, 550, lipschitz=0.9, noise_variance=0.5)
>>> setting = {"lsi": lsi, "lipschitz": 0.9, "noise_variance": 0.5, "hoelder_p": 100.0}
>>> learned = contractive_divergence(shifts[:500], 4.0, **setting | {"lsi": lsi[:501]})
>>> forgotten = contractive_divergence(shifts, 4.0, **setting)
>>> bool(learned < 500 * 4.0 * 0.1**2 / (2 * 0.5) / 10), bool(forgotten < learned / 1e4)
(True, True)
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive
from opacus_pi.accounting.langevin.lsi import schedules


def contractive_divergence(
    shifts: ArrayLike,
    order: float,
    *,
    lsi: ArrayLike,
    lipschitz: ArrayLike,
    noise_variance: ArrayLike,
    hoelder_p: float,
    noise_share: float = 0.5,
) -> float | NDArray[np.float64]:
    """Return the divergence that one example causes after noisy, contracting steps.

    The divergence D is computed by a recursion backwards over the steps t. It starts
    from D = 0, a = α and weight 1; θ is the share of the noise s that hides the
    example:

        g = 1 + (1−θ)s/(c²C_t + θs),   a₀ = 1 + (a−1)/g,   weight ← weight·a/(a₀g),
        D += weight·ln E exp(p·a₀(a₀−1)·shift²/(2θs)) / (p(a₀−1)),
        a ← 1 + (a₀−1)·p/(p−1).

    A step in which the example shifts nothing needs no Hölder split and spends no
    noise: θ = 0 and a ← a₀ there. Steps must be full-batch, or follow a schedule that
    does not look at the data.

    Args:
        shifts: ‖F(w_t) − F'(w_t)‖, the distance by which the example moves the mean of
            step t (learning rate times its gradient's norm, divided by the
            denominator): ``(T, runs)`` or ``(T, runs, n)``, along independent runs that
            **include** the example; 0 where it takes no part.
        order: Rényi order α > 1 of the result.
        lsi: C_t, ``(T + 1,)`` (the last entry is not used) or ``(T,)``: LSI constants
            of the iterates **without** the example, from ``lsi_track``.
        lipschitz: c of the map without the example, a number or ``(T,)``.
        noise_variance: s on the weights, a number or ``(T,)``.
        hoelder_p: p > 1, fixed beforehand. ``inf`` takes the largest shift over runs.
        noise_share: θ in (0, 1).

    Returns:
        Float or float64 ``(n,)``, in nats: bounds D_α(with ‖ without) if the mean over
        runs is the expectation (it is an estimate otherwise).

    Raises:
        ValueError: If shapes disagree or a value is outside its domain.

    Source: docs/theory.md, Section 7.
    """
    d, constants, square, s = _checked(shifts, lsi, lipschitz, noise_variance)
    expect(1 < order < math.inf, "order", order, "must be in (1, inf)", "Try 8.")
    expect(
        hoelder_p > 1,
        "hoelder_p",
        hoelder_p,
        "must be above 1",
        "Try 3 times the number of steps.",
    )
    in_range(
        0,
        1,
        closed=False,
        noise_share=noise_share,
        remedy="Both parts need noise: try 0.5.",
    )
    growth = 1.0 if hoelder_p == math.inf else hoelder_p / (hoelder_p - 1)
    a, weight, total = float(order), 1.0, np.zeros(d.shape[2:])
    for t in range(len(d) - 1, -1, -1):
        # One step: contract at the lower order a₀ what came before, then pay for the
        # example's own shift with the noise that is left for it.
        moved = bool((d[t] > 0).any())
        paying = noise_share * s[t] if moved else 0.0
        spread = square[t] * constants[t] + paying
        shrink = 1 / (1 + (s[t] - paying) / spread) if spread else 0.0  # 1/g
        lower = 1 + (a - 1) * shrink
        weight *= a * shrink / lower
        if moved:
            price = lower * d[t] ** 2 / (2 * paying)
            total = total + weight * _power_mean(price, lower - 1, hoelder_p)
        a = 1 + (lower - 1) * (growth if moved else 1.0)
    return float(total) if total.ndim == 0 else total


def halved_noise_divergence(
    shifts: ArrayLike,
    order: float,
    *,
    lsi: ArrayLike,
    lipschitz: ArrayLike,
    noise_variance: ArrayLike,
) -> float:
    """Return the worst-case divergence of the last iterate at one fixed order.

    Each step's noise is split into halves h = s/2: one hides the shift, one contracts,
    D ← (D + α·shift²/(2h))·(1 + h/(c²C_t + h))^(−1/α).

    Args:
        shifts: ``(T,)``, largest distance by which the example can move step t's mean.
        order: Rényi order α > 1.
        lsi: C_t, ``(T,)`` or ``(T + 1,)``: LSI constants of the iterates without the
            example.
        lipschitz: c, a number or ``(T,)``.
        noise_variance: s on the weights, a number or ``(T,)``.

    Returns:
        Bound on D_α(with ‖ without) after T steps, in nats.

    Raises:
        ValueError: If shapes disagree or a value is outside its domain.

    Source: the learning phase of Chien et al. 2024 (arXiv 2401.10371), in general form.
    ``contractive_divergence`` is tighter.
    """
    column = np.reshape(numbers("shifts", shifts), (-1, 1))
    d, constants, square, s = _checked(column, lsi, lipschitz, noise_variance)
    expect(1 < order < math.inf, "order", order, "must be in (1, inf)", "Try 8.")
    half = s / 2
    kept = (1 + half / (square * constants + half)) ** (-1 / order)
    total = 0.0
    for cost, share in zip(order * d[:, 0] ** 2 / (2 * half), kept, strict=True):
        total = (total + float(cost)) * float(share)
    return total


def _power_mean(
    prices: NDArray[np.float64], excess: float, hoelder_p: float
) -> NDArray[np.float64]:
    """Return ln(mean over runs of exp(p·excess·price))/(p·excess), with its limits."""
    result: NDArray[np.float64]
    if hoelder_p == math.inf:
        result = prices.max(axis=0)
    elif hoelder_p * excess == 0:
        result = prices.mean(axis=0)
    else:
        scale = hoelder_p * excess
        result = (logsumexp(scale * prices, axis=0) - math.log(len(prices))) / scale
    return result


def _checked(
    shifts: ArrayLike, lsi: ArrayLike, lipschitz: ArrayLike, noise_variance: ArrayLike
) -> tuple[NDArray[np.float64], ...]:
    """Return checked shifts, LSI constants, c² and s of each step."""
    d = numbers("shifts", shifts)
    constants = numbers("lsi", lsi)
    remedy = "Check the signs: distances and constants are never negative."
    in_range(0, math.inf, shifts=d, lsi=constants, remedy=remedy)
    positive(noise_variance=noise_variance, remedy="Give every step a noise above 0.")
    num_steps = len(d) if d.ndim else 0
    expect(
        d.ndim in (2, 3) and d.size > 0,
        "shifts",
        f"an array of shape {d.shape}",
        "must have shape (T, runs) or (T, runs, n)",
        "For one run pass shifts[:, None].",
    )
    expect(
        constants.shape in ((num_steps,), (num_steps + 1,)),
        "lsi",
        f"an array of shape {constants.shape}",
        f"must have shape ({num_steps + 1},)",
        "Pass what lsi_track returns for the same steps.",
    )
    return d, constants[:num_steps], *schedules(num_steps, lipschitz, noise_variance)
