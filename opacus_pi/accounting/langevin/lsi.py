"""Tracking the log-Sobolev constant of noisy gradient descent.

**Idea.** A distribution ν satisfies LSI(C) if Ent_ν(f²) ≤ 2C·E_ν‖∇f‖² for every smooth
f; N(0, C·I) does so with exactly this C. The constant determines how fast Gaussian
noise brings other distributions towards ν. It can be tracked through training: a
c-Lipschitz map multiplies it by c², and noise of variance s adds s.

**Guarantee.** Every constant returned is valid (an upper bound). It is needed along the
**second** argument of the divergence to be contracted, which for unlearning is the
distribution of retraining.

**What breaks it.** Random batches: an iterate's distribution is then a mixture, whose
constant this recursion does not bound. Steps must be full-batch, or follow a fixed
schedule.

Source: docs/theory.md, Section 5.

>>> lsi_track(0.0, 3, lipschitz=0.5, noise_variance=1.0)
array([0.    , 1.    , 1.25  , 1.3125])
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive

_MAX_STEPS = 10_000_000
_AT_LEAST_0 = "Pass numbers of at least 0."


def gradient_map_lipschitz(
    learning_rate: float, *, smoothness: float, strong_convexity: float = 0.0
) -> float:
    """Return the Lipschitz constant of one gradient step w ↦ w − η∇f(w).

    c = max(|1 − ηm|, |1 − ηL|), for a Hessian between m·I and L·I.

    Args:
        learning_rate: Step size η.
        smoothness: L, upper end of the Hessian's spectrum; ``inf`` if no bound is
            known (c is then infinite: only bounds that need no smoothness remain).
        strong_convexity: m, lower end: positive for strongly convex losses, 0 for
            convex ones, ``-smoothness`` for merely smooth ones.

    Returns:
        c: below 1 for strongly convex losses and η < 2/L, at most 1 for convex losses
        and η ≤ 2/L, at most 1 + ηL always.

    Raises:
        ValueError: If the learning rate is not positive or m > L.
    """
    positive(learning_rate=learning_rate, remedy="Pass the step size of the update.")
    expect(
        abs(strong_convexity) <= smoothness,
        "strong_convexity",
        strong_convexity,
        f"must be in [-smoothness, smoothness], smoothness={smoothness}",
        "Pass a lower bound on the eigenvalues of the Hessian; -smoothness always is "
        "one.",
    )
    return max(
        abs(1 - learning_rate * strong_convexity), abs(1 - learning_rate * smoothness)
    )


def bounded_support_lsi(radius: float, noise_variance: float) -> float:
    """Return an LSI constant of any distribution in a ball, plus noise N(0, s·I).

    C = 6(4R² + s)·exp(4R²/s). It does not depend on the dimension, but is astronomical
    for s ≪ R².

    Args:
        radius: R of the ball that contains the distribution before the noise.
        noise_variance: s, per coordinate.

    Returns:
        C; ``inf`` where it exceeds float64.

    Raises:
        ValueError: If the variance is not positive or the radius is negative.

    Source: Chen, Chewi & Niles-Weed 2021 (arXiv 2102.11476).
    """
    positive(
        noise_variance=noise_variance,
        remedy=("Pass the noise of the update: without noise there is no bound."),
    )
    in_range(
        0,
        math.inf,
        radius=radius,
        remedy=("Check the sign: a radius is never negative."),
    )
    square = 4 * radius * radius
    with np.errstate(over="ignore"):
        return float(6 * (square + noise_variance) * np.exp(square / noise_variance))


def lsi_track(
    initial: float,
    num_steps: int,
    *,
    lipschitz: ArrayLike,
    noise_variance: ArrayLike,
    cap: float = math.inf,
) -> NDArray[np.float64]:
    """Return log-Sobolev constants (LSI) of the iterates of noisy gradient descent.

    One step is w ← Π(F(w) + N(0, s·I)), where Π projects onto a convex set.
    C_{j+1} = min(c²·C_j + s, cap): a c-Lipschitz push-forward multiplies the constant
    by c², the noise adds s, and a projection onto a convex set changes nothing. The map
    of a step must not be random: full-batch steps, or batches that follow a fixed
    schedule.

    Args:
        initial: C_0; 0 for a fixed starting point, v for N(w_0, v·I).
        num_steps: Number of steps, k.
        lipschitz: c of each step's map F, a number or ``(k,)``.
        noise_variance: s of each step on the **weights** (2ησ² for Langevin noise
            √(2η)·σ), a number or ``(k,)``.
        cap: A constant that holds for every iterate, such as
            ``bounded_support_lsi`` of the range of F.

    Returns:
        float64 ``(k + 1,)``, C_0 … C_k.

    Raises:
        ValueError: If a value is negative or a schedule has another length.

    Source: docs/theory.md, Section 5.
    """
    in_range(0, math.inf, initial=initial, cap=cap, remedy=_AT_LEAST_0)
    squares, variances = schedules(num_steps, lipschitz, noise_variance)
    constants = [float(initial)]
    for square, variance in zip(squares.tolist(), variances.tolist(), strict=True):
        constants.append(min(_scaled_constant(square, constants[-1]) + variance, cap))
    return np.array(constants)


def log_growth(
    constants: ArrayLike, *, lipschitz: ArrayLike, noise_variance: ArrayLike
) -> NDArray[np.float64]:
    """Return the contraction by the noise of the steps so far, ln G_0 … ln G_k.

    ln G_k = Σ_{j<k} ln(1 + s/(c²·C_j)), the integral of 1/C over the noise of the
    steps.

    Args:
        constants: ``(k + 1,)``, LSI constants of the second distribution, from
            ``lsi_track``.
        lipschitz: c, a number or ``(k,)``.
        noise_variance: s on the weights, a number or ``(k,)``.

    Returns:
        float64 ``(k + 1,)``, starting with 0; ``inf`` after a step from a point mass.

    Raises:
        ValueError: If a value is negative or a schedule has another length.

    Source: docs/theory.md, Section 6.
    """
    track = numbers("constants", constants)
    in_range(0, math.inf, constants=track, remedy="Pass what lsi_track returns.")
    squares, variances = schedules(len(track) - 1, lipschitz, noise_variance)
    before = np.array(
        [_scaled_constant(a, b) for a, b in zip(squares, track, strict=False)]
    )
    with np.errstate(divide="ignore", over="ignore"):
        gains = np.log1p(np.divide(variances, before))
    return np.concatenate([[0.0], np.cumsum(np.where(variances > 0, gains, 0.0))])


def _scaled_constant(square: float, constant: float) -> float:
    """Return c²·C; 0 for a constant map or a point mass even if the other is ∞."""
    return 0.0 if square == 0 or constant == 0 else square * constant


def schedules(
    num_steps: int, lipschitz: ArrayLike, noise_variance: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the checked c² and noise variance s of each step.

    Args:
        num_steps: k.
        lipschitz: c, a number or ``(k,)``.
        noise_variance: s, a number or ``(k,)``.

    Returns:
        Two float64 arrays ``(k,)``.

    Raises:
        ValueError: If a value is negative or a schedule has another length.
    """
    remedy = f"Pass 0 to {_MAX_STEPS:,} steps: each is computed separately."
    in_range(0, _MAX_STEPS, num_steps=num_steps, remedy=remedy)
    named: dict[str, Any] = {"lipschitz": lipschitz, "noise_variance": noise_variance}
    in_range(0, math.inf, remedy=_AT_LEAST_0, **named)
    for name, value in named.items():
        expect(
            np.shape(value) in ((), (num_steps,)),
            name,
            f"an array of shape {np.shape(value)}",
            f"must be a number or have shape ({num_steps},)",
            "Give one value for all steps or one for each.",
        )
    c = np.broadcast_to(numbers("lipschitz", lipschitz), (num_steps,))
    s = np.broadcast_to(numbers("noise_variance", noise_variance), (num_steps,))
    return c * c, s
