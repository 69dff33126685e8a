"""Published routes to certified heads, from the same rows and for the same target.

high_probability_steps  ridge by Langevin with individual sensitivities that hold with
                        high probability. Of the published text only the abstract and
                        summaries were available, which name a shifted interpolation;
                        the quantiles, the union bound and δ/2 for each part are ours.
chien_steps             strongly convex losses by Langevin, as released
NewtonHead              Newton removal with a perturbed objective: one step, and noise
                        that hides what it leaves of the gradient
"""

import math

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

from benchmarks.common.head_data import NUM_CLASSES, Array
from opacus_pi.accounting.conversion import epsilon_offset, gaussian_epsilon
from opacus_pi.accounting.langevin import shifted_mu_squared
from opacus_pi.accounting.langevin.contraction import first_step
from opacus_pi.accounting.published import (
    chien_learning_divergence,
    chien_rate,
    steps_at_rate,
)
from opacus_pi.unlearning.heads import RidgeHead, SoftmaxHead
from opacus_pi.unlearning.heads.ridge_laws import decay

EPSILON, DELTA = 1.0, 1e-5
ORDERS = 1 + np.geomspace(1e-2, 1e4, 400)
_MOST_STEPS = 1_000_000
_GAMMA = 0.25  # Lipschitz constant of the loss's second derivative, as published


def high_probability_steps(
    head: RidgeHead, row: Array, target: Array
) -> tuple[float, float]:
    """Return ε before unlearning, and the steps until it is at most the target.

    Args:
        head: A fitted head that has forgotten nothing.
        row: The example's row ``(d,)``.
        target: What the head learns for it ``(m,)``.
    """
    descent, total = head._compression().descent, head.num_steps
    x = descent.basis.T @ row
    steps = np.arange(total)
    powers = np.array([decay(descent.rates, k) for k in steps])
    means = (x * (1 - powers)) @ descent.optimum
    variances = [
        descent.process.variances(descent.rates, k) @ np.square(x) for k in steps
    ]
    quantile = norm.isf(DELTA / 2 / (2 * total * len(target)))
    residuals = np.abs(target - means) + quantile * np.sqrt(variances)[:, None]
    size = head.learning_rate * np.linalg.norm(row) / descent.process.denominator
    moves = size * np.linalg.norm(residuals, axis=1)
    contraction = 1 - head.learning_rate * head.regularisation

    def epsilon(k: int) -> float:
        shifts = np.append(moves, np.zeros(k))
        noise = np.full_like(shifts, head.noise_std**2)
        mu2 = shifted_mu_squared(np.full_like(shifts, contraction), shifts, noise)
        return float(gaussian_epsilon(math.sqrt(mu2), DELTA / 2))

    return epsilon(0), first_step(lambda k: epsilon(k) <= EPSILON, _MOST_STEPS)


def chien_steps(head: SoftmaxHead, num_points: int) -> tuple[float, float]:
    """Return ε after learning, and the steps until it is at most the target.

    Their bound is for points that are replaced; the conversion is the better one.

    Args:
        head: A fitted head.
        num_points: Points to forget.
    """
    eta, penalty = head.learning_rate, head.regularisation
    sigma = head.noise_std / math.sqrt(2 * eta)
    learned = chien_learning_divergence(
        ORDERS,
        num_points=num_points,
        gradient_bound=math.sqrt(2),
        strong_convexity=penalty,
        sigma=sigma,
        num_examples=len(head.remaining),
        learned=eta * head.num_steps,
    )
    rate = chien_rate(
        learning_rate=eta,
        sigma=sigma,
        strong_convexity=penalty,
        lsi=2 * sigma**2 / penalty,
    )
    offset = epsilon_offset(ORDERS, DELTA)
    before = max(0.0, float((learned + offset).min()))
    steps = steps_at_rate(learned, ORDERS, EPSILON - offset, rate)
    return before, 0 if before <= EPSILON else steps


class NewtonHead:
    """One-against-all logistic regression with a perturbed objective.

    Σ ln(1 + exp(−y·xᵀw)) + (λn/2)‖w‖² + bᵀw with b ~ N(0, σ²·I), for every class.

    Args:
        rows: ``(n, d)``.
        labels: ``(n,)``.
        regularisation: λ.
        sigma: σ.
        rng: Draws b.
    """

    def __init__(
        self,
        rows: Array,
        labels: np.ndarray,
        regularisation: float,
        sigma: float,
        rng: np.random.Generator,
    ) -> None:
        self.rows, self.penalty = rows, regularisation
        self.signs = np.where(labels[:, None] == np.arange(NUM_CLASSES), 1.0, -1.0)
        slopes = sigma * rng.normal(size=(NUM_CLASSES, rows.shape[1]))
        self.weights = np.array(
            [self._solved(c, slope) for c, slope in enumerate(slopes)]
        )

    def _solved(self, column: int, slope: Array) -> Array:
        """Return the minimiser for one class."""
        rows, signs, n = self.rows, self.signs[:, column], len(self.rows)

        def loss(w: Array) -> tuple[float, Array]:
            margins = signs * (rows @ w)
            value = np.logaddexp(0, -margins).sum() + self.penalty * n / 2 * w @ w
            pull = -rows.T @ (signs * expit(-margins))
            gradient = (pull + self.penalty * n * w + slope) / n
            return (value + slope @ w) / n, gradient

        start = np.zeros(rows.shape[1])
        found = minimize(loss, start, jac=True, method="L-BFGS-B", tol=1e-14)
        return found.x

    def score(self, rows: Array, labels: np.ndarray) -> float:
        """Return the accuracy."""
        return float(((rows @ self.weights.T).argmax(axis=1) == labels).mean())

    def residuals(self, indices: np.ndarray) -> Array:
        """Return bounds on the gradient that a Newton removal of each row leaves.

        γ‖X‖·‖H⁻¹Δ‖·‖XH⁻¹Δ‖ for every class, the data-dependent bound, and the length of
        all classes together.
        """
        size = np.linalg.norm(self.rows, 2)
        found = np.zeros(len(indices))
        for column, w in enumerate(self.weights):
            margins = self.signs[:, column] * (self.rows @ w)
            curvature = expit(margins) * expit(-margins)
            hessian = (self.rows.T * curvature) @ self.rows
            hessian += self.penalty * (len(self.rows) - 1) * np.eye(len(w))
            x, sign = self.rows[indices], self.signs[indices, column]
            change = self.penalty * w - (sign * expit(-margins[indices]))[:, None] * x
            # Sherman–Morrison: the Hessian without the row
            inverse = np.linalg.inv(hessian)
            steps, own = change @ inverse, x @ inverse
            shrink = curvature[indices]
            room = 1 - shrink * (own * x).sum(axis=1)
            steps += own * (shrink * (own * change).sum(axis=1) / room)[:, None]
            ends = np.linalg.norm(steps @ self.rows.T, axis=1)
            found += np.square(_GAMMA * size * np.linalg.norm(steps, axis=1) * ends)
        return np.sqrt(found)


def newton_noise(residual: float) -> float:
    """Return σ that hides a gradient residual: √(2 ln(1.5/δ))·residual/ε."""
    return math.sqrt(2 * math.log(1.5 / DELTA)) * residual / EPSILON
