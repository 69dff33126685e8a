"""One or two subsampled Gaussian updates, and mixtures under noisy steps."""

import math
from collections.abc import Iterator

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr

from benchmarks.looseness.case import Array, Case, grid_divergence
from benchmarks.looseness.contraction import unlearning_bounds
from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    log_moment,
    privacy_losses,
    trajectory_losses,
)
from opacus_pi.accounting.langevin.constants import LangevinConstants

_Z = np.linspace(-45, 45, 36_001)


def _log_normal(z: Array, mean: float = 0.0, variance: float = 1.0) -> Array:
    """Return the logarithm of a normal density."""
    return -((z - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2


def _log_ratio(z: Array, ratio: float, rate: float) -> Array:
    """Return ln dP/dQ of one subsampled step."""
    shifted = math.log(rate) + ratio * z - ratio**2 / 2
    return shifted if rate == 1 else np.logaddexp(math.log1p(-rate), shifted)


def _moment(ratio: float, rate: float, order: float) -> float:
    """Return ln E_Q (dP/dQ)^α, by the trapezoid rule."""
    step = math.log(_Z[1] - _Z[0])
    return float(
        logsumexp(order * _log_ratio(_Z, ratio, rate) + _log_normal(_Z) + step)
    )


def subsampled_step(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield Poisson-subsampled updates at orders that are not whole."""
    for _ in range(number):
        ratio, rate = 10 ** rng.uniform(-0.7, 0.5), 10 ** rng.uniform(-2, -0.1)
        order = 1 + 10 ** rng.uniform(-0.7, 0.9)
        moments = {
            mode: float(log_moment(ratio, rate, order, mode=mode))
            for mode in ("exact", "chord", "ceil")
        }
        yield Case(
            "one subsampled step",
            _moment(ratio, rate, order) / (order - 1),
            {mode: moments[mode] / (order - 1) for mode in ("exact", "chord")},
            {"order rounded up": moments["ceil"] / (order - 1)},
            tolerance=1e-7,  # this quadrature loses digits of small moments
        )


def two_adaptive_steps(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield two updates; the outcome of the first determines the second gradient.

    The probability of a large one is a multiple of 1/8, so the mean over eight runs is
    the expectation.
    """
    for _ in range(number):
        first, small = rng.uniform(0.3, 1.5, size=2)
        large = small * rng.uniform(2, 6)
        rate, order = rng.choice([1.0, 0.3, 0.05]), rng.choice([1.5, 2.0, 4.0, 6.0])
        share = int(rng.integers(1, 8)) / 8
        cut = brentq(
            lambda c, a=first, q=rate, s=share: (
                (1 - q) * ndtr(-c) + q * ndtr(a - c) - s
            ),
            -40,
            40,
        )
        second = np.where(
            _Z > cut, _moment(large, rate, order), _moment(small, rate, order)
        )
        log_terms = order * _log_ratio(_Z, first, rate) + _log_normal(_Z) + second
        exact = float(logsumexp(log_terms)) + math.log(_Z[1] - _Z[0])
        mechanism = NoisySGD(2, float(rate), 1.0)
        norms = [large if i < 8 * share else small for i in range(8)]
        runs = [GradNormLedger(mechanism, [0, 1], [[first], [r]]) for r in norms]
        later = [GradNormLedger(mechanism, [1, 2], [[first], [r]]) for r in norms]
        yield Case(
            "two adaptive steps",
            exact / (order - 1),
            {
                "Hölder": float(privacy_losses(runs, order, rule="left")[0]),
                "trajectory": float(
                    trajectory_losses(runs, order, 3.0, rule="left")[0]
                ),
            },
            {"Definition 4.2": privacy_losses(later, order, convention="icml2025")[0]},
            tolerance=1e-3,  # the threshold lies within one cell of the grid
        )


def mixtures(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield a random mixture and a law of known LSI constant, under k noisy steps."""
    x = np.linspace(-30, 30, 12_001)
    dx = x[1] - x[0]
    for _ in range(number):
        size = int(rng.integers(1, 4))
        weights = rng.dirichlet(np.ones(size))
        means, variances = rng.uniform(-3, 3, size), rng.uniform(0.1, 0.9, size)
        c, noise = rng.uniform(0.5, 1.0), 10 ** rng.uniform(-1.5, 0.3)
        num_steps, order = int(rng.integers(1, 6)), rng.choice([1.5, 3.0, 8.0])

        def laws(k: int, args: tuple = (weights, means, variances, c, noise)) -> tuple:
            w, m, v, shrink, s = args
            shift = shrink**k
            added = s * (shrink ** (2 * np.arange(k))).sum()
            parts = [
                np.log(wi) + _log_normal(x, shift * mi, shift**2 * vi + added)
                for wi, mi, vi in zip(w, m, v, strict=True)
            ]
            second = _log_normal(x, 0.0, shift**2 + added)
            return np.exp(logsumexp(parts, axis=0)) * dx, np.exp(second) * dx

        # constants of a quadratic loss whose gradient step is exactly c·w
        constants = LangevinConstants(
            learning_rate=1.0,
            noise_variance=noise,
            smoothness=1 - c,
            strong_convexity=1 - c,
        )

        def initial(a: float, before: tuple = laws(0)) -> float:
            return max(0.0, grid_divergence(*before, a))

        yield Case(
            "mixtures under Langevin noise",
            grid_divergence(*laws(num_steps), order),
            *unlearning_bounds(initial, order, num_steps, constants, initial_lsi=1.0),
            tolerance=1e-6,
        )
