"""Adaptive chains on a line, their laws and joint divergences computed on a grid."""

import math
from collections.abc import Iterator

import numpy as np
from scipy.special import ndtr

from benchmarks.looseness.case import Array, Case, grid_divergence
from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.accounting.langevin import unlearning_divergence
from opacus_pi.accounting.learning_phase import contractive_divergence
from opacus_pi.accounting.lsi import lsi_track
from opacus_pi.accounting.process import LangevinConstants

_RUNS = 400


class Chain:
    """w ← c·w + shift − B·step·g(w) + N(0, step²·σ²), B ~ Bernoulli(q) with the point.

    g(w) = 2·sigmoid(2w) is bounded, and depends on where the run is.
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
        """Transition masses between grid points."""
        gap = (self.x - mean[:, None]) ** 2 / (2 * self.noise)
        cell = (self.x[1] - self.x[0]) / math.sqrt(2 * math.pi * self.noise)
        return np.exp(-gap) * cell

    def laws(self, num_steps: int) -> tuple[list[Array], list[Array]]:
        """The laws after 0 … T updates, with and without the point."""
        with_x, without = [self.start], [self.start]
        for _ in range(num_steps):
            with_x.append(with_x[-1] @ self.with_x)
            without.append(without[-1] @ self.without)
        return with_x, without

    def joint(self, num_steps: int, order: float) -> float:
        """D_α of the whole trajectory."""
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
        """Values at evenly spaced quantiles of a law: equally likely runs."""
        levels = (np.arange(_RUNS) + 0.5) / _RUNS
        return values[np.searchsorted(np.cumsum(law) / law.sum(), levels)]

    def ledgers(self, laws: list[Array], *, at: int = 0) -> list[GradNormLedger]:
        """Equally likely runs; row t speaks of the weights after t + ``at`` updates."""
        num_steps = len(laws) - 1
        mechanism = NoisySGD(num_steps, self.rate, 1.0, float(self.ratios.max()) + 1e-6)
        rows = np.array([self.quantiles(law, self.ratios) for law in laws[:-1]])
        steps = np.arange(num_steps) + at
        return [GradNormLedger(mechanism, steps, rows[:, [i]]) for i in range(_RUNS)]


def adaptive_chains(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Composition over a run, the last iterate, and unlearning afterwards."""
    for _ in range(number):
        rate = float(rng.choice([1.0, 0.3, 0.1]))
        c, num_steps = float(rng.uniform(0.7, 0.95)), int(rng.integers(2, 25))
        chain = Chain(c, 0.1, float(rng.uniform(2, 6)), rate)
        order = float(rng.choice([1.5, 2.0, 4.0]))
        with_x, without = chain.laws(num_steps)
        runs, later = chain.ledgers(with_x), chain.ledgers(with_x, at=1)
        joint = chain.joint(num_steps, order)
        printed = float(privacy_losses(later, order, convention="icml2025")[0])
        yield Case(
            "adaptive chain, whole run",
            joint,
            {"Hölder": float(privacy_losses(runs, order, rule="left")[0])},
            {"Definition 4.2": printed},
            tolerance=1e-5,
        )
        constants = LangevinConstants(
            learning_rate=1.0,
            noise_variance=chain.noise,
            smoothness=1 - c,
            strong_convexity=1 - c,
        )
        shared = {"lipschitz": c, "noise_variance": chain.noise}
        lsi = lsi_track(0.0, num_steps, **shared)
        last = grid_divergence(with_x[-1], without[-1], order)
        if rate == 1:
            moves = np.array([chain.quantiles(law, chain.moves) for law in with_x[:-1]])
            recursion = contractive_divergence(
                moves, order, lsi=lsi, hoelder_p=30.0, **shared
            )
            yield Case(
                "adaptive chain, last iterate",
                last,
                {"contractive": recursion},
                {"Definition 4.2": printed},
                tolerance=1e-5,
            )
        k = int(rng.integers(1, 30))
        unlearned, retrained = with_x[-1], without[-1]
        for _ in range(k):
            unlearned, retrained = unlearned @ chain.without, retrained @ chain.without

        def loss(a: float, runs: list = runs) -> float:
            return float(privacy_losses(runs, max(a, 1 + 1e-6), rule="left")[0])

        bounds = {
            form: unlearning_divergence(
                loss, order, k, constants, initial_lsi=float(lsi[-1]), form=form
            ).divergence
            for form in ("hypercontractive", "source")
        }
        yield Case(
            "adaptive chain, learned then unlearned",
            grid_divergence(unlearned, retrained, order),
            {"hypercontractive": bounds["hypercontractive"]},
            {"D·G^(−1/α)": bounds["source"]},
            tolerance=1e-4,
        )


def double_wells(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """A non-convex loss on an interval: learning with a point, unlearning without."""
    x = np.linspace(-1, 1, 401)
    edges = np.r_[-np.inf, (x[:-1] + x[1:]) / 2, np.inf]
    for _ in range(number):
        tilt, eta = rng.uniform(-0.2, 0.2), float(rng.uniform(0.05, 0.3))
        noise = 2 * eta * rng.uniform(0.4, 1.0) ** 2
        slope = rng.uniform(0.2, 0.8)
        gradient = x**3 - x + tilt
        extra = slope * np.tanh(2 * x - 1)
        order, k = float(rng.choice([1.5, 3.0, 8.0])), int(rng.integers(1, 40))

        def kernel(move: Array, step: float = eta, s: float = noise) -> Array:
            # Projection puts the mass beyond the ends on the end points.
            gaps = (edges - (x - step * move)[:, None]) / math.sqrt(s)
            return np.diff(ndtr(gaps), axis=1)

        with_x, without = kernel(gradient + extra), kernel(gradient)
        start = np.full(len(x), 1 / len(x))
        first = start @ np.linalg.matrix_power(with_x, 20)
        second = start @ np.linalg.matrix_power(without, 20)
        constants = LangevinConstants(
            learning_rate=eta,
            noise_variance=noise,
            smoothness=2.0,
            strong_convexity=-1.0,
            radius=1.0,
            gradient_bound=float(np.abs(gradient).max()),
        )

        def initial(a: float, laws: tuple = (first, second)) -> float:
            return grid_divergence(*laws, max(a, 1 + 1e-6))

        forms = {
            form: unlearning_divergence(
                initial,
                order,
                k,
                constants,
                initial_lsi=constants.lsi_cap,
                form=form,
            ).divergence
            for form in ("best", "dobrushin", "source")
        }
        after = np.linalg.matrix_power(without, k)
        exact = grid_divergence(first @ after, second @ after, order)
        yield Case(
            "double well on an interval",
            exact if exact > 1e-12 else 0.0,  # Rounding of the masses.
            {name: forms[name] for name in ("best", "dobrushin")},
            {"D·G^(−1/α)": forms["source"]},
            tolerance=1e-6,
        )
