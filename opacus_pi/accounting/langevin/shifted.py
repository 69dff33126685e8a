r"""Shifted divergence: privacy amplification by iteration, with optimal payments.

**Idea.** Two runs of w ← Π(φ_t(w) + N(0, s_t·I)) have c_t-Lipschitz maps that differ by
at most d_t in sup-norm (d_t > 0 where the example is in the update, 0 in unlearning),
and start within W_∞ distance z_0. Instead of paying for each difference when it occurs,
the distance may be carried along, shrink with the maps, and be paid for by the noise of
later steps. Part of the distance, a_t, is paid for by step t's noise:

:math:`z_t = c_t z_{t-1} + d_t - a_t \ge 0,\quad z_N = 0,\quad
D_\alpha \le \frac{\alpha}{2} \sum_t \frac{a_t^2}{s_t}` for every α.

Which payments are the cheapest is a convex problem with a closed solution, the taut
string (``shifted_mu_squared``).

**Guarantee.** A bound in both directions, for every order, and the smallest that this
argument gives. It needs neither smoothness nor log-Sobolev constants. Random batches
are covered by conditioning on a schedule that does not look at the data.

**What breaks it.** Shifts d_t that are not sup-norms: norms observed along one run are
not a bound on the distance of the maps. Use a clip norm or a Lipschitz constant.

Source: Feldman et al. 2018; Altschuler & Talwar 2022 (arXiv 2205.13710);
docs/theory.md, Section 9.

>>> round(shifted_mu_squared([0.5, 0.5], [1.0, 0.0], [1.0, 1.0]), 12)
0.2
"""

import math

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive

__all__ = [
    "initial_distance_mu_squared",
    "learn_unlearn_mu_squared",
    "shifted_mu_squared",
]


def shifted_mu_squared(
    lipschitz: ArrayLike,
    shifts: ArrayLike,
    noise_variances: ArrayLike,
    *,
    initial_distance: float = 0.0,
) -> float:
    """Return the smallest μ² that shifted divergences can prove; D_α ≤ α·μ²/2.

    P and Q are the distributions of the final weights of two runs of one noisy process,
    such as training with and without an example. Each step's noise hides a part a_t of
    the distance between the runs, at the price a_t²/s_t. The smallest total price that
    hides the whole distance is μ². The solution is the taut string: the greatest convex
    minorant of the accumulated distances as a function of the accumulated noise, both
    multiplied forward to the end of the run.

    Args:
        lipschitz: c_t, ``(N,)``, the Lipschitz constant of each step's map; 1 for
            convex losses, 1 − ηm for strongly convex ones.
        shifts: d_t ≥ 0, ``(N,)``, sup-distance between the two runs' maps, e.g.
            η·C/batch_size for an example clipped to C; 0 after its removal.
        noise_variances: s_t > 0 on the weights, ``(N,)``.
        initial_distance: z_0, W_∞ distance of the two starting distributions.

    Returns:
        μ². Both D_α(P ‖ Q) and D_α(Q ‖ P) are at most α·μ²/2 at every order α.

    Raises:
        ValueError: If the lengths differ, or a value is outside its domain.

    Source: Feldman et al. 2018; Altschuler & Talwar 2022 (arXiv 2205.13710).
    """
    c, d, s = (np.asarray(a, np.float64) for a in (lipschitz, shifts, noise_variances))
    expect(
        c.ndim == 1 and c.shape == d.shape == s.shape and c.size > 0,
        "lipschitz, shifts, noise_variances",
        f"shapes {c.shape}, {d.shape}, {s.shape}",
        "must share one shape (N,)",
        "Give one number for every step.",
    )
    remedy = "Check the signs: distances and Lipschitz constants are never negative."
    in_range(
        0, math.inf, lipschitz=c, shifts=d, initial_distance=initial_distance,
        remedy=remedy,
    )  # fmt: skip
    positive(noise_variances=s, remedy="Give every step a noise above 0.")
    constant = np.flatnonzero(c == 0)
    if constant.size:  # a constant map erases all earlier differences
        c, d, s = c[constant[-1] :], d[constant[-1] :], s[constant[-1] :]
    # With C_t = c_2·…·c_t, divide distances by C_t and variances by C_t². Then the
    # maps do not shrink, and the path of accumulated distances has increments
    # d_t/C_t over widths s_t/C_t².
    rises = np.append(d[0] + c[0] * initial_distance, d[1:])
    stretch = np.concatenate([[0.0], np.cumsum(np.log(c[1:]))])
    return _minorant_energy(np.log(s) - 2 * stretch, rises / np.sqrt(s))


def _minorant_energy(
    log_widths: NDArray[np.float64], roots: NDArray[np.float64]
) -> float:
    """Return ∫ slope² of the greatest convex minorant of a path, from its increments.

    Neighbouring pieces whose slopes decrease are joined. A piece is stored as the
    logarithm of its width and the square root of its energy, rise/√width: so neither
    long contractions nor expansions leave float64's range.
    """
    pieces: list[tuple[float, float]] = []
    for piece in zip(log_widths.tolist(), roots.tolist(), strict=True):
        width, root = piece
        while pieces:
            before, before_root = pieces[-1]
            half = (width - before) / 2
            if before_root * math.exp(min(half, 0.0)) < root * math.exp(
                min(-half, 0.0)
            ):
                break
            pieces.pop()
            joint = float(np.logaddexp(before, width))
            root = before_root * math.exp((before - joint) / 2) + root * math.exp(
                (width - joint) / 2
            )
            width = joint
        pieces.append((width, root))
    return sum(root * root for _, root in pieces)


def learn_unlearn_mu_squared(
    lipschitz: float,
    shift: ArrayLike,
    num_learning_steps: int,
    num_unlearning_steps: int,
    noise_variance: float,
) -> float | NDArray[np.float64]:
    """Return μ² of T equal steps with the example, then K without it, in closed form.

    With and without the example, the final weights are at most as far apart as two
    unit Gaussians whose means differ by μ.

    μ² = (c^K·d·(1−c^T)/(1−c))²·(1−c²)/((1−c^{2(T+K)})·s); (d·T)²/((T+K)·s) at c = 1.

    Args:
        lipschitz: c ≤ 1, a Lipschitz constant of the map of every step.
        shift: d, how far the example moves the weights in a learning step at most; a
            number, or one for each example.
        num_learning_steps: T.
        num_unlearning_steps: K.
        noise_variance: s on the weights.

    Returns:
        μ², in the shape of ``shift``; D_α ≤ α·μ²/2 in both directions.

    Raises:
        ValueError: If a value is outside its domain.

    Source: ``shifted_mu_squared`` with equal steps; docs/theory.md, Section 9.
    """
    total = num_learning_steps + num_unlearning_steps
    _check_equal_steps(lipschitz, shift, noise_variance, total)
    d = numbers("shift", shift)
    gathered = d * _geometric(lipschitz, num_learning_steps)
    gathered = gathered * lipschitz**num_unlearning_steps
    return gathered**2 / (noise_variance * _geometric(lipschitz**2, total))


def initial_distance_mu_squared(
    lipschitz: float, distance: float, num_steps: int, noise_variance: float
) -> float:
    """Return μ² of K equal steps that begin at a W_∞ distance Z, in closed form.

    After the steps, two runs that began at this distance are at most as far apart as
    two unit Gaussians whose means differ by μ. μ² = Z²c^{2K}(1−c²)/((1−c^{2K})·s).

    Args:
        lipschitz: c ≤ 1, a Lipschitz constant of the map of every step.
        distance: Z, W_∞ distance of the two starting distributions.
        num_steps: K ≥ 1.
        noise_variance: s on the weights.

    Returns:
        μ²; D_α ≤ α·μ²/2 in both directions.

    Raises:
        ValueError: If a value is outside its domain.

    Source: ``shifted_mu_squared`` without shifts; docs/theory.md, Section 9.
    """
    _check_equal_steps(lipschitz, distance, noise_variance, num_steps)
    arrived = (distance * lipschitz**num_steps) ** 2
    return arrived / (noise_variance * _geometric(lipschitz**2, num_steps))


def _geometric(ratio: float, num_terms: int) -> float:
    """Return 1 + r + … + r^(n−1), without cancellation near r = 1."""
    if ratio in (0.0, 1.0):
        return float(num_terms if ratio else min(num_terms, 1))
    return math.expm1(num_terms * math.log(ratio)) / (ratio - 1)


def _check_equal_steps(
    lipschitz: float, shift: ArrayLike, noise_variance: float, num_steps: int
) -> None:
    """Check the domain of the closed forms."""
    in_range(
        0,
        1,
        lipschitz=lipschitz,
        remedy="A Lipschitz constant is never negative. Use shifted_mu_squared for "
        "constants above 1.",
    )
    in_range(
        0,
        math.inf,
        shift=shift,
        remedy=("Check the sign: a distance is never negative."),
    )
    positive(noise_variance=noise_variance, remedy="Give every step a noise above 0.")
    positive(num_steps=num_steps, remedy="Pass the noise of at least one step.")
