"""Bounds exactly as published, for comparison and reproduction. Never a default.

* Corollaries 4.1 and 4.4 of the paper (Sepahvand et al. 2025), whose
  constants come from Chien et al.'s rate,
* Chien et al. 2024 (arXiv 2401.10371), strongly convex losses: divergence after
  learning, contraction rate, steps for an (ε, δ) target, sequential requests,
* group privacy by chaining single removals (Mironov 2017), to compare with
  ``group_divergence``, and the sum of losses by person, a heuristic.

The functions evaluate the printed formulas; that a formula is a bound under the printed
assumptions is the papers' claim. ``summed_losses`` is not a bound. The same inputs give
far fewer steps with ``langevin.unlearning.steps_to_unlearn``.

>>> corollary_4_4_steps(4.0, 10.0, 1e-3, 1e-4, target=0.01, rate=0.01)
5713
>>> def loss(order):  # one example: the Gaussian mechanism
...     return order * 0.01 / 2
>>> round(order_multiplied_divergence(loss, 2, 4.0), 4)  # the truth is 4·(2·0.1)²/2
0.0817
>>> round(order_multiplied_divergence(loss, 100, 4.0), 1)  # the truth is 200
227.8
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive
from opacus_pi.accounting.conversion import check_above_one
from opacus_pi.accounting.langevin.contraction import source_bound

__all__ = [
    "chien_learning_divergence",
    "chien_rate",
    "chien_sequential",
    "corollary_4_1",
    "corollary_4_4_steps",
    "mironov_allowance",
    "steps_at_rate",
    "weak_triangle",
]

_TARGET = "Pass a target above 0: noise never brings a divergence down to 0."
_NOISE = "Pass the std of the noise."
_CONVEXITY = "Pass the loss's strong convexity, such as its L2 penalty."
_RATE = "Pass the contraction rate of one step, for example from chien_rate."


def weak_triangle(
    order: float, first: float, second: float, *, factor: float = 2.0
) -> float:
    """Return a bound on D_α(P ‖ Q) through a third distribution R.

    D_α(P‖Q) ≤ (α − 1/u)/(α − 1) · D_{uα}(P‖R) + D_{(uα−1)/(u−1)}(R‖Q), any u > 1.

    Args:
        order: Rényi order α > 1.
        first: D_{uα}(P ‖ R).
        second: D_{(uα−1)/(u−1)}(R ‖ Q); at order 2α − 1 for u = 2.
        factor: u.

    Returns:
        The bound, in nats.

    Raises:
        ValueError: If α ≤ 1 or u ≤ 1.

    Source: Mironov 2017, Proposition 11 (u = 2).
    """
    check_above_one(order=order, remedy="Pass an order above 1.")
    check_above_one(factor=factor, remedy="Pass a factor above 1, such as 2.")
    return (order - 1 / factor) / (order - 1) * first + second


def corollary_4_1(
    order: float,
    loss_4a: float,
    stationarity_4a_1: float,
    stationarity_2a_1: float,
    log_growth: float,
) -> float:
    """Return the divergence from retraining for T steps, as Corollary 4.1 prints it.

    (A·ε'_{4α} + B·ε_{4α−1})·exp(−Ck/2α) + ε_{2α−1}, A = (2α−½)/(2α−2) and
    B = (2α−1)/(2α−2). The last term does not vanish with k.

    Args:
        order: Rényi order α > 1.
        loss_4a: ε'_{4α}, bound on D_{4α}(trained ‖ retrained).
        stationarity_4a_1: ε_{4α−1}, between retraining and its stationary distribution.
        stationarity_2a_1: ε_{2α−1}, the same at order 2α − 1.
        log_growth: C·k, the sum of the rates of the k steps.

    Returns:
        The bound on D_α(unlearned ‖ retrained for T steps), in nats.

    Raises:
        ValueError: If the order is at most 1 or the growth negative.

    Source: paper, Corollary 4.1.
    """
    start = weak_triangle(2 * order, loss_4a, stationarity_4a_1)
    moved = source_bound(start, 2 * order, log_growth)
    return weak_triangle(order, moved, stationarity_2a_1)


def corollary_4_4_steps(
    order: float,
    loss_4a: float,
    stationarity_4a_1: float,
    stationarity_2a_1: float,
    *,
    target: float,
    rate: float,
) -> float:
    """Return the fewest steps for which Corollary 4.1 is at most the target.

    k ≥ A·ln((B·P(x, 4α) + C·ε_{4α−1})/(δ − ε_{2α−1})), A = 2α/rate, as Corollary 4.4
    prints it.

    Args:
        order: Rényi order α > 1.
        loss_4a: P(x, 4α).
        stationarity_4a_1: ε_{4α−1}.
        stationarity_2a_1: ε_{2α−1}.
        target: δ, the divergence to reach, in nats.
        rate: Contraction per step, the C of Corollary 4.1.

    Returns:
        k; ``inf`` where the target is not above ε_{2α−1}, which no step reduces.

    Raises:
        ValueError: If a value is outside its domain.

    Source: paper, Corollary 4.4.
    """
    positive(target=target, remedy=_TARGET)
    start = corollary_4_1(order, loss_4a, stationarity_4a_1, 0.0, 0.0)
    return steps_at_rate(start, 2 * order, target - stationarity_2a_1, rate)


def chien_learning_divergence(
    order: ArrayLike,
    *,
    num_points: int,
    gradient_bound: float,
    strong_convexity: float,
    sigma: float,
    num_examples: int,
    learned: float = math.inf,
) -> NDArray[np.float64] | float:
    """Return the divergence after strongly convex learning with S examples replaced.

    4αS²M²/(mσ²n²)·(1 − exp(−mηT)), the last factor 1 at stationarity.

    Args:
        order: Rényi orders α.
        num_points: S.
        gradient_bound: M, Lipschitz constant of one example's loss.
        strong_convexity: m.
        sigma: σ of the Langevin noise √(2η)·σ.
        num_examples: n.
        learned: η·T, total step size of learning.

    Returns:
        The divergence, in the shape of ``order``, in nats.

    Raises:
        ValueError: If a constant is not positive.

    Source: Chien et al. 2024 (arXiv 2401.10371).
    """
    positive(strong_convexity=strong_convexity, remedy=_CONVEXITY)
    positive(sigma=sigma, remedy=_NOISE)
    positive(num_examples=num_examples, remedy="Pass the number of examples.")
    positive(learned=learned, remedy="Pass the sum of the learning rates of training.")
    moved = num_points * gradient_bound / (sigma * num_examples)
    factor = -math.expm1(-strong_convexity * learned)
    return 4 * np.asarray(order) * moved**2 / strong_convexity * factor


def chien_rate(
    *, learning_rate: float, sigma: float, strong_convexity: float, lsi: float
) -> float:
    """Return the contraction per step for strongly convex losses, 2σ²η/C.

    Args:
        learning_rate: η.
        sigma: σ of the Langevin noise √(2η)·σ.
        strong_convexity: m.
        lsi: C, an LSI constant of the initial distribution of learning; the authors use
            2σ²/m.

    Returns:
        The rate R of D_α·exp(−R·k/α).

    Raises:
        ValueError: If C ≤ σ²/m, or η > (2/m)(1 − σ²/(mC)).

    Source: Chien et al. 2024 (arXiv 2401.10371).
    """
    positive(learning_rate=learning_rate, remedy="Pass the step size.")
    positive(sigma=sigma, remedy=_NOISE)
    positive(strong_convexity=strong_convexity, remedy=_CONVEXITY)
    least = sigma**2 / strong_convexity
    expect(
        lsi > least,
        "lsi",
        lsi,
        f"must be above σ²/m = {least:g}",
        "Try 2σ²/m, as the authors do.",
    )
    largest = 2 / strong_convexity * (1 - least / lsi)
    expect(
        learning_rate <= largest * (1 + 1e-12),
        "learning_rate",
        learning_rate,
        f"must be at most (2/m)(1 − σ²/(mC)) = {largest:g}",
        "Use a smaller learning rate or a larger lsi.",
    )
    return 2 * sigma**2 * learning_rate / lsi


def steps_at_rate(
    divergences: ArrayLike, orders: ArrayLike, allowed: ArrayLike, rate: float
) -> float:
    """Return the fewest steps with D_α·exp(−R·k/α) ≤ allowed at one of the orders.

    Args:
        divergences: D_α before unlearning, ``(A,)``, in nats.
        orders: α, ``(A,)``.
        allowed: The divergence to reach at each order, ``(A,)``: a target, or what
            remains of ε after the offset of the conversion. Orders where nothing
            remains are not used.
        rate: R per step.

    Returns:
        k, or ``inf``.

    Raises:
        ValueError: If the rate is not positive.
    """
    positive(rate=rate, remedy=_RATE)
    start, left = np.atleast_1d(divergences), np.atleast_1d(allowed)
    usable = left > 0
    if not usable.any():
        return math.inf
    with np.errstate(divide="ignore"):
        log_ratio = np.log(start[usable] / left[usable])
    steps = np.atleast_1d(orders)[usable] / rate * np.maximum(log_ratio, 0.0)
    return max(0, math.ceil(float(steps.min())))


def mironov_allowance(epsilon: float, delta: float, orders: ArrayLike) -> NDArray[Any]:
    """Return the divergence that (ε, δ) allows at each order: ε − ln(1/δ)/(α − 1).

    Args:
        epsilon: ε.
        delta: δ in (0, 1).
        orders: Rényi orders above 1.

    Returns:
        The allowance in nats; negative where the order is too small.

    Raises:
        ValueError: If δ is outside (0, 1).

    Source: Mironov 2017, Proposition 3, as Chien et al. use it.
    """
    in_range(
        0,
        1,
        closed=False,
        delta=delta,
        remedy="Try 1 / (data set size).",
    )
    return epsilon - math.log(1 / delta) / (numbers("orders", orders) - 1)


def chien_sequential(
    order: float,
    learning_divergence: Callable[[float], float],
    log_growths: Sequence[float],
) -> float:
    """Return the divergence after sequential requests; each doubles the order.

    ε¹(α) = e^{−ΣR/α}·ε₀(α), ε^{s+1}(α) = e^{−ΣR/α}(α−½)/(α−1)·(ε₀(2α) + ε^s(2α)).

    Args:
        order: Rényi order α > 1.
        learning_divergence: ε₀ as a function of the order.
        log_growths: ΣR of each request's steps, the first request first.

    Returns:
        The bound after the last request, in nats.

    Raises:
        ValueError: If there is no request or the order is at most 1.

    Source: Chien et al. 2024 (arXiv 2401.10371), sequential unlearning.
    """
    expect(
        len(log_growths) > 0,
        "log_growths",
        "[]",
        "must contain at least one request",
        "Pass one number for each request: the sum of the rates of its steps.",
    )
    *earlier, growth = log_growths
    if not earlier:
        return source_bound(learning_divergence, order, growth)
    before = chien_sequential(2 * order, learning_divergence, earlier)
    start = (order - 0.5) / (order - 1) * (learning_divergence(2 * order) + before)
    return source_bound(start, order, growth)


def order_multiplied_divergence(
    worst_loss: Callable[[float], float], group_size: int, order: float
) -> float:
    """Return a group bound by chaining single removals; the order grows with the group.

    Halving the group, D_α over m examples ≤ (α−½)/(α−1)·D_{2α} over ⌈m/2⌉ examples +
    D_{2α−1} over ⌊m/2⌋ examples (the weak triangle inequality).

    Args:
        worst_loss: Bound on the divergence of removing **any** single example from any
            of the data sets in between, as a function of the order.
        group_size: m ≥ 1.
        order: Rényi order α > 1.

    Returns:
        The bound, in nats.

    Raises:
        ValueError: If the group is empty or the order at most 1.

    Source: Mironov 2017, Propositions 2 and 11; so in Chien et al. 2024, Corollary 3.4.
    """
    remedy = "Pass the number of examples in the group."
    in_range(1, np.inf, group_size=group_size, remedy=remedy)
    if group_size == 1:
        return float(worst_loss(order))
    half = (group_size + 1) // 2
    first = order_multiplied_divergence(worst_loss, half, 2 * order)
    second = order_multiplied_divergence(worst_loss, group_size - half, 2 * order - 1)
    return weak_triangle(order, first, second)


def summed_losses(losses: ArrayLike, owners: ArrayLike) -> NDArray[np.float64]:
    """Return the sum of per-example losses of each owner. A heuristic, **not** a bound.

    Two examples with equal gradients have four times the loss of one, not twice.

    Args:
        losses: ``(n,)``, per-example privacy losses, in nats.
        owners: int ``(n,)``, the owner of each example, 0 … U − 1.

    Returns:
        float64 ``(U,)``, in nats.

    Raises:
        ValueError: If the shapes differ.
    """
    values, who = numbers("losses", losses), np.asarray(owners)
    expect(
        values.ndim == 1 and values.shape == who.shape and who.dtype.kind in "iu",
        "owners",
        f"{who.dtype} of shape {who.shape}",
        f"must be whole numbers of shape {values.shape}",
        "Give one owner for each loss.",
    )
    in_range(0, np.inf, owners=who, remedy="Number the owners from 0.")
    return np.bincount(who, weights=values).astype(np.float64, copy=False)
