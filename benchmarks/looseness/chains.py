"""Adaptive Markov chains on a line: laws and joint divergences computed on a grid.

The gradient of the point to forget depends on the weights, so it differs between runs.
Expectations over runs are computed from runs at evenly spaced quantiles of the law.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
from scipy.special import ndtr

from benchmarks.looseness.case import Array, Case, grid_divergence
from benchmarks.looseness.contraction import unlearning_bounds
from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.learning_phase import contractive_divergence
from opacus_pi.accounting.langevin.lsi import lsi_track

_RUNS = 400


class Chain:
    """Training w ← c·w − B·step·g(w) + N(0, step²·σ²), with and without one point.

    With the point, B ~ Bernoulli(q); without it, B = 0. The gradient of the point,
    g(w) = 2·sigmoid(2w), is bounded and depends on the weight.

    Args:
        shrink: The factor c.
        step: The learning rate.
        sigma: Noise on the gradient.
        rate: The sample rate q.
    """

    def __init__(self, shrink: float, step: float, sigma: float, rate: float) -> None:
        self.shrink, self.rate = shrink, rate
        self.noise = (step * sigma) ** 2
        spread = math.sqrt(self.noise / (1 - shrink**2))
        self.x = np.linspace(-12 * spread - 2, 12 * spread + 1, 901)
        push = 2 / (1 + np.exp(-2 * self.x))
        self.ratios, self.moves = push / sigma, step * push
        mean = shrink * self.x
        self.without = self._kernel(mean)
        drawn = rate * self._kernel(mean - self.moves)
        self.with_x = (1 - rate) * self.without + drawn
        self.start = np.zeros_like(self.x)
        self.start[np.argmin(np.abs(self.x))] = 1.0

    def _kernel(self, mean: Array) -> Array:
        """Return the transition masses between grid points."""
        gap = (self.x - mean[:, None]) ** 2 / (2 * self.noise)
        cell = (self.x[1] - self.x[0]) / math.sqrt(2 * math.pi * self.noise)
        return np.exp(-gap) * cell

    def laws(self, num_steps: int) -> tuple[list[Array], list[Array]]:
        """Return the laws after 0 … T updates, with and without the point."""
        with_x, without = [self.start], [self.start]
        for _ in range(num_steps):
            with_x.append(with_x[-1] @ self.with_x)
            without.append(without[-1] @ self.without)
        return with_x, without

    def lsi(self, num_steps: int) -> Array:
        """Return LSI constants of the laws without the point."""
        return lsi_track(
            0.0, num_steps, lipschitz=self.shrink, noise_variance=self.noise
        )

    def joint(self, num_steps: int, order: float) -> float:
        """Return D_α of the whole trajectory."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.without > 0, self.with_x / self.without, 1.0)
        step = ratio**order * self.without
        value, log_scale = np.ones_like(self.x), 0.0
        for _ in range(num_steps):
            value = step @ value
            log_scale += math.log(value.max())
            value = value / value.max()
        return (math.log(self.start @ value) + log_scale) / (order - 1)

    def quantiles(self, law: Array, values: Array) -> Array:
        """Return values at evenly spaced quantiles of a law: equally likely runs."""
        levels = (np.arange(_RUNS) + 0.5) / _RUNS
        return values[np.searchsorted(np.cumsum(law) / law.sum(), levels)]

    def ledgers(self, laws: list[Array], *, at: int = 0) -> list[GradNormLedger]:
        """Return ledgers of equally likely runs, with rows at steps t + ``at``."""
        num_steps = len(laws) - 1
        mechanism = NoisySGD(num_steps, self.rate, 1.0, float(self.ratios.max()) + 1e-6)
        rows = np.array([self.quantiles(law, self.ratios) for law in laws[:-1]])
        steps = np.arange(num_steps) + at
        return [GradNormLedger(mechanism, steps, rows[:, [i]]) for i in range(_RUNS)]


def adaptive_chains(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield whole runs, their last iterates, and unlearning after them."""
    for _ in range(number):
        rate = float(rng.choice([1.0, 0.3, 0.1]))
        chain = Chain(
            float(rng.uniform(0.7, 0.95)), 0.1, float(rng.uniform(2, 6)), rate
        )
        num_steps, order = int(rng.integers(2, 25)), float(rng.choice([1.5, 2.0, 4.0]))
        laws = chain.laws(num_steps)
        runs = chain.ledgers(laws[0])
        later = chain.ledgers(laws[0], at=1)
        printed = float(privacy_losses(later, order, convention="icml2025")[0])
        yield Case(
            "adaptive chain, whole run",
            chain.joint(num_steps, order),
            {"Hölder": float(privacy_losses(runs, order, rule="left")[0])},
            {"Definition 4.2": printed},
            tolerance=1e-5,
        )
        if rate == 1:
            yield _last_iterate(chain, laws, order, printed)
        yield _unlearned(chain, laws, order, int(rng.integers(1, 30)))


def _last_iterate(chain: Chain, laws: tuple, order: float, printed: float) -> Case:
    """Return a case of the recursion in which the effect of early steps decays."""
    with_x, without = laws
    moves = np.array([chain.quantiles(law, chain.moves) for law in with_x[:-1]])
    recursion = contractive_divergence(
        moves,
        order,
        lsi=chain.lsi(len(moves)),
        lipschitz=chain.shrink,
        noise_variance=chain.noise,
        hoelder_p=30.0,
    )
    return Case(
        "adaptive chain, last iterate",
        grid_divergence(with_x[-1], without[-1], order),
        {"contractive": recursion},
        {"Definition 4.2": printed},
        tolerance=1e-5,
    )


def _unlearned(chain: Chain, laws: tuple, order: float, k: int) -> Case:
    """Return a case of a run's loss, contracted by k steps without the point."""
    runs, num_steps = chain.ledgers(laws[0]), len(laws[0]) - 1
    unlearned, retrained = laws[0][-1], laws[1][-1]
    for _ in range(k):
        unlearned, retrained = unlearned @ chain.without, retrained @ chain.without
    # constants of a quadratic loss whose gradient step is exactly c·w
    constants = LangevinConstants(
        learning_rate=1.0,
        noise_variance=chain.noise,
        smoothness=1 - chain.shrink,
        strong_convexity=1 - chain.shrink,
    )
    bounds = unlearning_bounds(
        lambda a: float(privacy_losses(runs, a, rule="left")[0]),
        order,
        k,
        constants,
        float(chain.lsi(num_steps)[-1]),
    )
    exact = grid_divergence(unlearned, retrained, order)
    return Case(
        "adaptive chain, learned then unlearned", exact, *bounds, tolerance=1e-4
    )


_X = np.linspace(-1, 1, 401)
_EDGES = np.r_[-np.inf, (_X[:-1] + _X[1:]) / 2, np.inf]


def _projected_kernel(move: Array, noise: float) -> Array:
    """Return transition masses of x − move + N(0, noise), projected onto [−1, 1]."""
    return np.diff(ndtr((_EDGES - (_X - move)[:, None]) / math.sqrt(noise)), axis=1)


def double_wells(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield non-convex losses on an interval: learning with a point, then without."""
    for _ in range(number):
        eta = float(rng.uniform(0.05, 0.3))
        noise = 2 * eta * float(rng.uniform(0.4, 1.0)) ** 2
        gradient = _X**3 - _X + rng.uniform(-0.2, 0.2)
        extra = rng.uniform(0.2, 0.8) * np.tanh(2 * _X - 1)
        with_x = _projected_kernel(eta * (gradient + extra), noise)
        without = _projected_kernel(eta * gradient, noise)
        start = np.full(len(_X), 1 / len(_X))
        laws = [start @ np.linalg.matrix_power(K, 20) for K in (with_x, without)]
        constants = LangevinConstants(
            learning_rate=eta,
            noise_variance=noise,
            smoothness=2.0,
            strong_convexity=-1.0,
            radius=1.0,
            gradient_bound=float(np.abs(gradient).max()),
        )
        order, k = float(rng.choice([1.5, 3.0, 8.0])), int(rng.integers(1, 40))
        after = [law @ np.linalg.matrix_power(without, k) for law in laws]
        bounds = unlearning_bounds(
            partial(grid_divergence, *laws),
            order,
            k,
            constants,
            constants.lsi_cap,
            ("best", "dobrushin"),
        )
        exact = grid_divergence(*after, order)
        yield Case(
            "double well on an interval",
            exact if exact > 1e-12 else 0.0,  # smaller values are rounding errors
            *bounds,
            tolerance=1e-6,
        )
        yield _delta_case(laws, after, k, constants)


def _delta_case(
    before: list[Array], after: list[Array], k: int, constants: LangevinConstants
) -> Case:
    """Return a case of δ at ε = 0.1 after k steps, from its exact value before them."""
    epsilon = 0.1

    def delta(laws: list[Array]) -> float:
        return float(np.maximum(laws[0] - math.exp(epsilon) * laws[1], 0).sum())

    exact, start = delta(after), delta(before)
    ours = constants.delta_after(epsilon, k, initial_delta=start)
    return Case(
        "double well on an interval, δ",
        exact if exact > 1e-12 else 0.0,
        {"hockey-stick": float(ours)},
        {"δ·θ^k": start * math.exp(k * constants.log_dobrushin)},
        tolerance=1e-6,
    )
