"""Certified steps to unlearn a convex problem, by this library and by published bounds.

``Problem`` is L2-regularised logistic regression with all constants that the bounds
need, computed from the data. ``our_steps`` and ``published_steps`` return how many
unlearning steps each bound requires for (ε, δ) = (``EPSILON``, 1/n).
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
    logistic_constants,
    lsi_track,
    rdp_to_epsilon,
    steps_to_unlearn,
)
from opacus_pi.accounting.conversion import epsilon_offset
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
    """How one data set is learned.

    Attributes:
        regularisation: L2 penalty λ.
        sigma: Noise level σ; a step adds noise of variance 2ησ².
        num_steps: Steps of learning.
        radius: Of the ball onto which the weights are projected.
    """

    regularisation: float
    sigma: float
    num_steps: int
    radius: float = 20.0


class Problem:
    """Objective of a data set, its constants and its noisy gradient descent."""

    def __init__(self, data: BinaryData, setting: Setting) -> None:
        self.data, self.setting = data, setting
        x, y = data.train
        self.size = len(x)
        self.delta = 1 / self.size
        self.signed = csr_matrix(x * y[:, None])
        self.loss = logistic_constants(
            x, regularisation=setting.regularisation, radius=setting.radius
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
        self, w: Array, keep: Array, num_steps: int, rng: np.random.Generator
    ) -> Array:
        """Return the weights after noisy projected gradient descent on some rows."""
        rows = self.signed[np.flatnonzero(keep)]
        spread = math.sqrt(self.process.noise_variance)
        for _ in range(num_steps):
            slope = -(rows.T @ expit(-(rows @ w))) / self.size
            gradient = slope + self.setting.regularisation * w
            w = w - self.learning_rate * gradient + spread * rng.normal(size=w.shape)
            w *= min(1.0, self.setting.radius / np.linalg.norm(w))
        return w

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
            forget: The rows to forget; None: any rows.
            size: Number of rows to forget.
        """
        bounds = np.sort(self.loss.example_bounds)[-size:]
        largest = float(bounds.sum())
        if forget is not None:
            rows = self.signed[forget].toarray()
            top = np.linalg.norm(rows, 2) * math.sqrt(size) * (1 + 1e-12)
            largest = min(float(self.loss.example_bounds[forget].sum()), top)
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
            divergences = ORDERS * problem.mu_squared(shift, k) / 2
            return bool(rdp_to_epsilon(divergences, ORDERS, problem.delta) <= EPSILON)

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
