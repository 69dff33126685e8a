r"""Exact distributions of ridge regression weights after noisy gradient descent.

**Idea.** One step is w ← w − η(Hw − b) + N(0, s·I) with H = XᵀX/N + λI, b = XᵀY/N. It
is linear, so every iterate is Gaussian if the start is. With H = V·diag(e)·Vᵀ and
a = 1 − ηe, k steps turn a mean M and a covariance S, in the basis V, into

:math:`a^k M + \frac{1-a^k}{e} V^T b, \qquad
a^k S a^k + s\,\mathrm{diag}\frac{1-a^{2k}}{1-a^2}`.

The columns of w are independent and share S. Two distributions are compared exactly:
the one of the weights after what was done, and the one of retraining for as many steps.

**Guarantee.** Equalities, up to rounding of float64. The comparison loses few digits
after many steps, because the differences of means and of covariances are multiplied by
a^k instead of being subtracted at the end.

**What breaks it.** Feature vectors of a norm above 1 or more examples than N: then 0 ≤
a < 1 may fail. Also anything in the process that depends on a removed example except H
and b: its scaling, step size, noise or N.

Source: docs/theory.md, "Ridge heads".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opacus_pi.unlearning.heads.gaussian_pairs import GaussianPair

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Process:
    """The settings of noisy gradient descent, none of which depends on the data.

    Attributes:
        learning_rate: η, at most 1/(1 + λ).
        regularisation: λ.
        noise_variance: s, on the weights.
        initial_variance: Variance of every weight at the start.
        denominator: N, fixed when examples are removed.
    """

    learning_rate: float
    regularisation: float
    noise_variance: float
    initial_variance: float
    denominator: float

    def noise_gathered(self, rates: Array, num_steps: float) -> Array:
        """Return s(1 − a^{2k})/(1 − a²), the variance that k steps add.

        Args:
            rates: ηe = 1 − a, in (0, 1].
            num_steps: k.
        """
        kept = -np.expm1(2 * num_steps * _log_decay(rates))
        return self.noise_variance * kept / (rates * (2 - rates))

    def start_kept(self, rates: Array, num_steps: float) -> Array:
        """Return a^{2k}·v, what is left of the variance at the start."""
        return self.initial_variance * decay(rates, 2 * num_steps)

    def variances(self, rates: Array, num_steps: float) -> Array:
        """Return the variances after k steps from the start, in the eigenbasis."""
        return self.noise_gathered(rates, num_steps) + self.start_kept(rates, num_steps)


def _log_decay(rates: Array) -> Array:
    """Return ln a, −inf where a = 0."""
    with np.errstate(divide="ignore"):
        return np.log1p(-np.minimum(rates, 1.0))


def decay(rates: Array, num_steps: float) -> Array:
    """Return a^k of a = 1 − ηe.

    Args:
        rates: ηe, in (0, 1].
        num_steps: k.
    """
    if num_steps == 0:
        return np.ones_like(rates)
    return np.exp(num_steps * _log_decay(rates))


@dataclass(frozen=True)
class Law:
    """A Gaussian distribution of weights, with independent columns of one covariance.

    Attributes:
        mean: ``(d, m)``.
        covariance: ``(d, d)``.
    """

    mean: Array
    covariance: Array


@dataclass(frozen=True)
class Descent:
    """Noisy gradient descent on some examples, in the eigenbasis of its Hessian.

    Attributes:
        process: Everything that does not depend on the examples.
        basis: V, ``(d, d)``.
        rates: ηe, ``(d,)``.
        optimum: Vᵀw of the ridge solution w = H⁻¹b, ``(d, m)``.
    """

    process: Process
    basis: Array
    rates: Array
    optimum: Array

    @classmethod
    def of(cls, process: Process, gram: Array, slope: Array) -> "Descent":
        """Return the descent on some examples.

        Args:
            process: Everything that does not depend on the examples.
            gram: XᵀX/N, ``(d, d)``; feature vectors of norm at most 1, at most N of
                them.
            slope: XᵀY/N, ``(d, m)``.
        """
        values, basis = np.linalg.eigh(gram)
        eigenvalues = np.clip(values, 0.0, 1.0) + process.regularisation
        rates = np.minimum(process.learning_rate * eigenvalues, 1.0)
        return cls(process, basis, rates, basis.T @ slope / eigenvalues[:, None])

    def trained(self, num_steps: int) -> Law:
        """Return the distribution after k steps from the start."""
        left = decay(self.rates, num_steps)[:, None]
        variances = self.process.variances(self.rates, num_steps)
        return Law(
            self.basis @ (self.optimum - left * self.optimum),
            (self.basis * variances) @ self.basis.T,
        )

    def advanced(self, law: Law, num_steps: int) -> Law:
        """Return the distribution after k steps from a given distribution."""
        left = decay(self.rates, num_steps)
        mean = self.basis.T @ law.mean
        mean = left[:, None] * mean + (self.optimum - left[:, None] * self.optimum)
        spread = self.basis.T @ law.covariance @ self.basis * np.outer(left, left)
        spread += np.diag(self.process.noise_gathered(self.rates, num_steps))
        return Law(self.basis @ mean, self.basis @ spread @ self.basis.T)


@dataclass(frozen=True)
class Gap:
    """The difference between a distribution and that of retraining.

    Attributes:
        descent: Descent on the examples that stay.
        num_steps: Steps that both distributions have had.
        mean: Difference of the means in the basis of ``descent``, ``(d, m)``.
        covariance: Difference of the covariances, ``(d, d)``.
    """

    descent: Descent
    num_steps: int
    mean: Array
    covariance: Array

    @classmethod
    def between(cls, law: Law, descent: Descent, num_steps: int) -> "Gap":
        """Return the gap between a distribution and retraining.

        Args:
            law: Of the weights after ``num_steps`` steps in all.
            descent: On the examples that stay; retraining follows it from the start.
            num_steps: Steps that were made.
        """
        V = descent.basis
        left = decay(descent.rates, num_steps)[:, None]
        mean = V.T @ law.mean - (descent.optimum - left * descent.optimum)
        covariance = V.T @ law.covariance @ V
        covariance -= np.diag(descent.process.variances(descent.rates, num_steps))
        return cls(descent, num_steps, mean, covariance)

    def pair(self, num_steps: int) -> GaussianPair:
        """Return unlearned against retrained after k more steps of both.

        Args:
            num_steps: k.
        """
        rates = self.descent.rates
        variances = self.descent.process.variances(rates, self.num_steps + num_steps)
        scale = decay(rates, num_steps) / np.sqrt(variances)
        spread = self.covariance * np.outer(scale, scale)
        betas, axes = np.linalg.eigh((spread + spread.T) / 2)
        shift = axes.T @ (scale[:, None] * self.mean)
        squares = np.square(shift).sum(axis=1)
        return GaussianPair(betas[None], squares[None], self.mean.shape[1])
