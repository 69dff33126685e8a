r"""Bounds on how far a noisy process brings two distributions together.

**Idea.** Both distributions go through the same steps: for unlearning, the distribution
of the model that was trained on the forget set and that of the retrained model, both
continued on the retain set. Gaussian noise of the same size is added to both, which
makes them harder to distinguish. Three bounds on the divergence afterwards, from the
divergence before:

* ``hypercontractive_bound`` needs the log-Sobolev constants of the second distribution.
* ``source_bound`` needs the same; it is the form of the literature, and never smaller.
* ``dobrushin_bound`` needs only a bounded domain, no convexity and no smoothness.

The first rests on one fact. While variance grows by dt at log-Sobolev constant C, the
order may move with α' = (α − 1)/C, and then ((α − 1)/α)·D_α does not increase:

:math:`D_\alpha(\text{after}) \le \frac{\alpha}{G + \alpha - 1}\,
D_{\alpha_0}(\text{before}),\quad \alpha_0 = 1 + \frac{\alpha - 1}{G}`,

where ln G is the integral of dt/C.

**Guarantee.** Upper bounds for all distributions with the given constants; the first is
an equality for shifted Gaussians.

**What breaks it.** The log-Sobolev constant of the wrong distribution (it must be the
second argument's), or random batches, whose mixture has no such constant; the Dobrushin
bound allows them.

Source: own derivation, docs/theory.md, Sections 6 and 8; Vempala and Wibisono 2019 for
a fixed order.

>>> def gaussian(order):  # two Gaussians, a distance of one standard deviation
...     return order / 2
>>> round(hypercontractive_bound(gaussian, 6.0, math.log(20.0)), 12)  # exact here
0.15
>>> round(source_bound(gaussian, 6.0, math.log(20.0)), 3)
1.821
"""

import math
from collections.abc import Callable

import numpy as np

from opacus_pi._validate import expect, in_range

Divergence = float | Callable[[float], float]
"""A bound at the order of the result, or a function from an order (≥ 1) to a bound."""


def hypercontractive_bound(
    divergence: Divergence, order: float, log_growth: float
) -> float:
    """Return a bound on the Rényi divergence after noisy steps, with a moving order.

    Two distributions, the first and the second, go through the same noisy steps.
    D_α(after) ≤ α/(G + α − 1) · D_{α₀}(before), α₀ = 1 + (α − 1)/G. G is the growth of
    the steps (``log_growth``). The bound is smaller than ``source_bound``, and needs
    the divergence before the steps at the lower order α₀. Equality holds for shifted
    Gaussians.

    Args:
        divergence: Bound on D(first ‖ second) before the steps: at ``order`` (it then
            holds at the lower α₀ too), or a function of the order, accepting orders
            down to 1.
        order: Rényi order α > 1 after the steps.
        log_growth: ln G of the steps, from ``lsi.log_growth`` of the **second**
            distribution.

    Returns:
        Bound on D_α(first ‖ second) after the steps, in nats.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: docs/theory.md, Section 6.
    """
    _check(order, log_growth)
    # α/(G + α − 1), divided through by G so that an infinite G gives 0.
    shrink = math.exp(-log_growth)
    initial = _divergence_at(divergence, 1 + (order - 1) * shrink)
    if initial == math.inf:
        return math.inf
    return order * shrink / (1 + (order - 1) * shrink) * initial


def source_bound(divergence: Divergence, order: float, log_growth: float) -> float:
    """Return a bound on the Rényi divergence at one fixed order: D_α·G^(−1/α).

    This is the usual form in the literature, which drops the derivative with respect to
    the order. ``hypercontractive_bound`` is never larger.

    Args:
        divergence: Bound on D_α(first ‖ second) before, or a function of the order.
        order: Rényi order α > 1.
        log_growth: ln G of the steps along the second distribution.

    Returns:
        Bound on D_α(first ‖ second) after the steps, in nats.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: Vempala & Wibisono 2019; Chien et al. 2024 (arXiv 2401.10371), Theorem 3.2.
    """
    _check(order, log_growth)
    initial = _divergence_at(divergence, order)
    return math.inf if initial == math.inf else initial * math.exp(-log_growth / order)


def log_dobrushin_coefficient(map_diameter: float, noise_variance: float) -> float:
    """Return ln θ, the Dobrushin coefficient of one noisy step.

    θ is the largest total variation between the results of the step from two starts.

    θ = 2Φ(ρ/(2√s)) − 1 for w ↦ Π(F(w) + N(0, s·I)), where ρ bounds the distance
    between any two values of F.

    Args:
        map_diameter: ρ; on a ball of radius R with gradients up to M, at most
            2R + 2ηM. For random batches: the largest over the batches.
        noise_variance: s on the weights.

    Returns:
        ln θ ≤ 0; 0 without noise or without a bound on the range.

    Raises:
        ValueError: If an argument is negative.

    Source: total variation of two Gaussians of equal covariance.
    """
    in_range(
        0,
        math.inf,
        map_diameter=map_diameter,
        remedy="Pass inf if no bound is known.",
    )
    in_range(
        0,
        math.inf,
        noise_variance=noise_variance,
        remedy="Pass 0 for a process without noise.",
    )
    if map_diameter == 0:
        return -math.inf
    if noise_variance == 0:
        return 0.0
    argument = map_diameter / math.sqrt(8 * noise_variance)
    # θ = erf(ρ/√(8s)); near 1 its logarithm is taken from the complement.
    if argument < 1:
        return math.log(math.erf(argument))
    return math.log1p(-math.erfc(argument))


def dobrushin_bound(
    divergence: Divergence, order: float, log_coefficient: float
) -> float:
    """Return a bound on the Rényi divergence by Dobrushin's coefficient of the steps.

    exp((α−1)·D_α(after)) − 1 ≤ θ·(exp((α−1)·D_α(before)) − 1). θ is the Dobrushin
    coefficient of all steps together. Every f-divergence contracts by it; this is the
    case f(u) = u^α − 1. It holds in both directions, for random batches, and without
    convexity or smoothness.

    Args:
        divergence: Bound on D_α before, or a function of the order.
        order: Rényi order α > 1.
        log_coefficient: ln θ of all steps together (the sum of their logarithms).

    Returns:
        Bound on D_α after the steps, in nats.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: contraction of f-divergences, Cohen et al. 1993.
    """
    _check(order, 0.0)
    in_range(
        -math.inf,
        0,
        log_coefficient=log_coefficient,
        remedy="Pass the logarithm of a probability.",
    )
    exponent = (order - 1) * _divergence_at(divergence, order)
    if exponent == 0 or log_coefficient == -math.inf:
        return 0.0
    # ln θ(e^x − 1), then ln(1 + e^that): no overflow for large x.
    log_excess = log_coefficient + exponent + math.log(-math.expm1(-exponent))
    return float(np.logaddexp(0.0, log_excess)) / (order - 1)


def first_step(meets: Callable[[int], bool], limit: int) -> float:
    """Return the smallest number of steps that meets a condition which then stays met.

    The limit is doubled until it is met, then bisected.

    Args:
        meets: Whether k steps are enough.
        limit: Largest k to try.

    Returns:
        k, or ``inf`` if ``limit`` steps are not enough.
    """
    if meets(0):
        return 0
    low, high = 0, 1
    while not meets(high):
        if high >= limit:
            return math.inf
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def _divergence_at(divergence: Divergence, order: float) -> float:
    """Return the given divergence at this order."""
    value = float(divergence(order) if callable(divergence) else divergence)
    in_range(
        0,
        math.inf,
        divergence=value,
        remedy=("Check the sign: a divergence is never negative."),
    )
    return value


def _check(order: float, log_growth: float) -> None:
    """Check the domain of the arguments that all bounds share."""
    expect(
        1 < order < math.inf,
        "order",
        order,
        "must be in (1, inf)",
        "Try 8.",
    )
    in_range(0, math.inf, log_growth=log_growth, remedy="Pass what log_growth returns.")
