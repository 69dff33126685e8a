"""Runs in which the outcome of the first update determines all later gradients.

Later gradients are large after a rare outcome. That outcome is rare in training but
likely under the law that the first update tilts, so a composition must get its details
right to be a bound.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri

from benchmarks.looseness.case import Case
from opacus_pi.accounting import GradNormLedger, NoisySGD, log_moment, privacy_losses
from opacus_pi.accounting.composition import corrected_order, printed_order

# updates, order, q and critical order of the first update, and the share of the
# critical order that is used
_SETTINGS = [
    (20, 16.0, 1e-4, 19.0, 0.9),
    (20, 32.0, 1e-4, 37.0, 0.95),
    (30, 32.0, 1e-2, 38.0, 0.9),
    (30, 60.0, 1e-2, 70.0, 0.95),
]


def rare_events(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield two full-batch updates, the second with a gradient after a rare outcome.

    The outcome has probability 1/R under training with the point, so the mean over R
    runs is the expectation. *Forward index* uses the theorem's coefficients with the
    number of updates before a step, as the printed definition does, instead of the
    number after it.
    """
    for _ in range(number):
        num_runs = 2 ** int(rng.integers(8, 12))
        order, first = float(rng.choice([4.0, 6.0])), float(rng.uniform(1.8, 3.0))
        p, share = 6.0, 1 / num_runs
        top = corrected_order(order, p, 1)
        later = math.sqrt(1.2 * math.log(num_runs) / (p * top * (top - 1)))
        first, later = float(np.float32(first)), float(np.float32(later))
        tilted = ndtr((order - 1) * first + ndtri(share))
        price = order * (order - 1) * later**2 / 2
        exact = order * first**2 / 2
        exact += math.log1p(tilted * math.expm1(price)) / (order - 1)
        mechanism, norms = NoisySGD(2, 1.0, 1.0), np.zeros(num_runs)
        norms[0] = later
        runs = [GradNormLedger(mechanism, [0, 1], [[first], [r]]) for r in norms]
        yield Case(
            "rare event, two updates",
            exact,
            {"Hölder": float(privacy_losses(runs, order, rule="left")[0])},
            {"forward index": _forward(order, p, first, later, share)},
        )


def _forward(order: float, p: float, first: float, later: float, share: float) -> float:
    """Return the value of the theorem with the step's own index, for two updates."""
    top = corrected_order(order, p, 1)
    large = p * top * (top - 1) * later**2 / 2
    second = math.log1p(share * math.expm1(large)) / p
    return order * first**2 / 2 + (p - 1) / p * second / (order - 1)


def threshold_orders(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield a subsampled update whose moment has a critical order, then full batches.

    The squared norms of the full batches are proportional to ln⁺ of the density ratio
    L of the first update. The value called exact leaves out outcomes with L < 1, so it
    is a lower bound. The formulas are evaluated with all outcomes, from above.
    """
    for num_steps, order, rate, critical, share in _SETTINGS[:number]:
        ratio, p = math.sqrt(-2 * math.log(rate) / (critical - 1)), 3.0 * num_steps
        tail = partial(_above_one, ratio, rate)
        later = np.arange(2, num_steps + 1)

        def growth(a: np.ndarray, order: float = order) -> np.ndarray:
            return a * (a - 1) / (order * (order - 1))

        printed = np.ceil(printed_order(order, p, later))
        slopes = (critical * share - 1) / (p * growth(printed))
        corrected = corrected_order(order, p, num_steps - later)
        shrink = (p - 1) / p

        def later_terms(
            orders: np.ndarray,
            p: float = p,
            slopes: np.ndarray = slopes,
            low: float = float(ndtr(ratio / 2)),
            tail: partial = tail,
            growth: object = growth,
        ) -> np.ndarray:
            powers = p * slopes * growth(orders)
            return np.logaddexp([tail(1 + x) for x in powers], math.log(low))

        first = math.ceil(printed_order(order, p, 1))
        definition = shrink**2 * p * float(log_moment(ratio, rate, first))
        definition += float(shrink ** (later + 1) @ later_terms(printed).clip(0))
        top = corrected_order(order, p, num_steps - 1)
        theorem = shrink ** (num_steps - 1) * float(log_moment(ratio, rate, top))
        weights = shrink ** (num_steps - later) / p
        theorem += float(weights @ later_terms(corrected).clip(0))
        yield Case(
            "threshold order, long run",
            tail(order + slopes.sum()) / (order - 1),
            {"Hölder": theorem / (order - 1)},
            {"Definition 4.2": definition / (order - 1)},
        )


def _above_one(ratio: float, rate: float, power: float) -> float:
    """Return ln E_Q[L^power; L > 1] of one subsampled update."""
    z = np.linspace(ratio / 2, power * ratio + 60, 100_001)
    log_ratio = np.logaddexp(
        math.log1p(-rate), math.log(rate) + ratio * (z - ratio / 2)
    )
    density = -z * z / 2 - math.log(2 * math.pi) / 2 + math.log(z[1] - z[0])
    return float(logsumexp(power * log_ratio + density))
