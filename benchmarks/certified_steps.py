"""Certified steps to unlearn a convex problem, by this library and by published bounds.

``Problem`` is L2-regularised logistic regression on rows of norm at most 1. Its
constants follow from this norm, the number of examples and the setting: none of them
looks at a row. ``our_steps`` and ``published_steps`` return how many unlearning steps
each bound requires for (``EPSILON``, δ).
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit

from benchmarks.common.binary_data import Array, BinaryData
from opacus_pi.accounting import (
    LangevinConstants,
    learn_unlearn_mu_squared,
    lsi_track,
    public_logistic_constants,
    steps_to_unlearn,
)
from opacus_pi.accounting.conversion import epsilon_offset, gaussian_epsilon
from opacus_pi.accounting.langevin.contraction import first_step
from opacus_pi.accounting.langevin.shifted import initial_distance_mu_squared
from opacus_pi.accounting.published import (
    chien_learning_divergence,
    chien_rate,
    corollary_4_4_steps,
    mironov_allowance,
    steps_at_rate,
)

ORDERS = 1 + np.geomspace(1e-2, 1e3, 400)
EPSILON = 1.0


@dataclass(frozen=True)
class Setting:
    """How one data set is learned; chosen without looking at its rows.

    Attributes:
        regularisation: L2 penalty λ.
        sigma: Noise level σ; a step adds noise of variance 2ησ².
        num_steps: Steps of learning.
        radius: Of the ball onto which the weights are projected.
        delta: δ of all claims.
    """

    regularisation: float
    sigma: float
    num_steps: int
    radius: float = 20.0
    delta: float = 1e-5


@dataclass(frozen=True, eq=False)
class Phase:
    """One run of noisy gradient descent, as it was seen while it ran.

    Attributes:
        start: Weights before.
        end: Weights after.
        rows: Bool ``(n,)``, the rows that were used.
        num_steps: Steps made.
        noise_std: Standard deviation of the noise that each step added.
        learning_rate: η of each step.
        denominator: What the sum over rows was divided by.
        longest_row: Largest norm of the rows that were used.
    """

    start: Array
    end: Array
    rows: Array
    num_steps: int
    noise_std: float
    learning_rate: float
    denominator: float
    longest_row: float


class Problem:
    """Objective of a data set, its constants and its noisy gradient descent."""

    def __init__(self, data: BinaryData, setting: Setting) -> None:
        self.data, self.setting = data, setting
        x, y = data.train
        self.size = len(x)
        self.delta = setting.delta
        self.signed = csr_matrix(x * y[:, None])
        self.loss = public_logistic_constants(
            self.size, regularisation=setting.regularisation, radius=setting.radius
        )
        self.learning_rate = 1 / self.loss.smoothness
        self.process = LangevinConstants(
            learning_rate=self.learning_rate,
            noise_variance=2 * self.learning_rate * setting.sigma**2,
            smoothness=self.loss.smoothness,
            strong_convexity=self.loss.strong_convexity,
            radius=setting.radius,
            gradient_bound=self.loss.gradient_bound,
        )

    def descend(
        self, start: Array, keep: Array, num_steps: int, rng: np.random.Generator
    ) -> Phase:
        """Run noisy projected gradient descent on some rows, and say what was done."""
        rows = self.signed[np.flatnonzero(keep)]
        spread = math.sqrt(self.process.noise_variance)
        w = start
        for _ in range(num_steps):
            slope = -(rows.T @ expit(-(rows @ w))) / self.size
            gradient = slope + self.setting.regularisation * w
            w = w - self.learning_rate * gradient + spread * rng.normal(size=w.shape)
            w = w * min(1.0, self.setting.radius / np.linalg.norm(w))
        longest = math.sqrt(rows.multiply(rows).sum(axis=1).max())
        return Phase(
            start, w, keep.copy(), num_steps, spread, self.learning_rate, self.size,
            longest,
        )  # fmt: skip

    def accuracy(self, w: Array) -> float:
        """Return the share of test rows that are classified correctly."""
        x, y = self.data.test
        return float((y * (x @ w) > 0).mean())

    def shift(self, forget: Array | None, size: int) -> float:
        """Return how far the points can move the mean of a step: η·sup‖Σ ∇ℓ_i‖/n.

        The slopes of the loss lie in [0, 1]. So the sum over a set is at most the sum
        of its norms, and at most √(λ_max·size), where λ_max is the largest eigenvalue
        of its Gram matrix.

        Args:
            forget: The rows to forget; None: any rows of norm at most 1.
            size: Number of rows to forget.
        """
        largest = float(self.loss.example_bounds[:size].sum())
        if forget is not None:
            rows = self.signed[forget].toarray()
            top = np.linalg.norm(rows, 2) * math.sqrt(size) * (1 + 1e-12)
            largest = min(largest, top)
        return self.learning_rate * largest / self.loss.denominator

    def mu_squared(self, shift: float, num_unlearning_steps: int) -> float:
        """Return μ² of the shifted-divergence bound after learning and unlearning."""
        return float(
            learn_unlearn_mu_squared(
                self.process.lipschitz,
                shift,
                self.setting.num_steps,
                num_unlearning_steps,
                self.process.noise_variance,
            )
        )

    @property
    def allowed(self) -> Array:
        """Largest divergence at each order that gives ε."""
        return EPSILON - epsilon_offset(ORDERS, self.delta)


def our_steps(problem: Problem, forget: Array, size: int) -> dict[str, float]:
    """Return steps to ε by the library's bounds, for any points and for these."""
    total = problem.setting.num_steps

    def shifted(shift: float) -> float:
        def meets(k: int) -> bool:
            mu = math.sqrt(problem.mu_squared(shift, k))
            return bool(gaussian_epsilon(mu, problem.delta) <= EPSILON)

        return first_step(meets, total)

    process, any_set = problem.process, problem.shift(None, size)
    lsi = lsi_track(
        0.0, total, lipschitz=process.lipschitz, noise_variance=process.noise_variance
    )
    learned = problem.mu_squared(any_set, 0)
    contracted = min(
        steps_to_unlearn(
            lambda a: a * learned / 2,
            float(order),
            float(target),
            process,
            initial_lsi=float(lsi[-1]),
            form="hypercontractive",
            max_num_steps=total,
        ).num_steps
        for order, target in zip(ORDERS, problem.allowed, strict=True)
        if target > 0
    )
    return {
        "shifted": shifted(any_set),
        "shifted, this set": shifted(problem.shift(forget, size)),
        "hyper-contractive": contracted,
    }


def published_steps(problem: Problem, size: int) -> dict[str, float]:
    """Return steps to ε by the published bounds, from the same constants."""
    sigma, m = problem.setting.sigma, problem.loss.strong_convexity
    rate = chien_rate(
        learning_rate=problem.learning_rate,
        sigma=sigma,
        strong_convexity=m,
        lsi=2 * sigma**2 / m,
    )
    # the loss at order 4α; the distance to stationarity from the diameter of the ball
    learned = problem.mu_squared(problem.shift(None, size), 0) / 2
    far = initial_distance_mu_squared(
        problem.process.lipschitz,
        2 * problem.setting.radius,
        problem.setting.num_steps,
        problem.process.noise_variance,
    )
    corollary = min(
        corollary_4_4_steps(
            order,
            4 * order * learned,
            (4 * order - 1) * far / 2,
            (2 * order - 1) * far / 2,
            target=target,
            rate=rate,
        )
        for order, target in zip(ORDERS, problem.allowed, strict=True)
        if target > 0
    )
    replaced = chien_learning_divergence(
        ORDERS,
        num_points=size,
        gradient_bound=float(problem.loss.example_bounds.max()),
        strong_convexity=m,
        sigma=sigma,
        num_examples=problem.size,
    )
    printed = mironov_allowance(EPSILON, problem.delta, ORDERS)
    return {
        "Corollary 4.4": corollary,
        "Chien et al.": steps_at_rate(replaced, ORDERS, printed, rate),
        "Chien et al., better conversion": steps_at_rate(
            replaced, ORDERS, problem.allowed, rate
        ),
    }
