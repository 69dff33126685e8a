"""Ridge regression by noisy gradient descent without clipping: the laws are Gaussian.

The gradient of the point to forget is linear in the weights. Expectations over runs are
means over evenly spread points of the law of the residuals.
"""

import math
from collections.abc import Iterator

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from benchmarks.looseness.case import Array, Case, gaussian_divergence
from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    privacy_losses,
    trajectory_losses,
)
from opacus_pi.accounting.langevin.learning_phase import contractive_divergence
from opacus_pi.accounting.langevin.lsi import lsi_track

_RUNS = 512
_KAPPA = 3.0


class Ridge:
    """Training w ← w − η·(Hw − b) + N(0, s·I) from N(0, v·I), on random data.

    H = XᵀX/n + λI and b = Xᵀy/n. If the first point is left out, n stays the same.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        size, self.dims = int(rng.integers(5, 12)), int(rng.integers(1, 4))
        self.points = rng.normal(size=(size, self.dims)) * rng.uniform(0.3, 0.7)
        self.labels = rng.normal(size=size)
        self.rate = float(rng.uniform(0.1, 0.5))
        self.penalty = float(rng.uniform(0.2, 0.6))
        self.noise = 2 * self.rate * float(rng.uniform(0.8, 2)) ** 2
        self.prior = float(rng.uniform(0.02, 0.2))

    def map(self, *, with_x: bool) -> tuple[Array, Array]:
        """Return A and c of the step w ← A·w + c + noise."""
        first = 0 if with_x else 1
        X, y = self.points[first:], self.labels[first:]
        size, eye = len(self.points), np.eye(self.dims)
        hessian = X.T @ X / size + self.penalty * eye
        return eye - self.rate * hessian, self.rate * X.T @ y / size

    def trajectory(self, num_steps: int, *, with_x: bool) -> tuple[Array, Array]:
        """Return mean and covariance of (w_0, …, w_T), stacked."""
        A, c = self.map(with_x=with_x)
        powers = [np.linalg.matrix_power(A, k) for k in range(num_steps + 1)]
        zero = np.zeros((self.dims, self.dims))
        response = np.block(
            [
                [powers[t - u] if t >= u else zero for u in range(num_steps + 1)]
                for t in range(num_steps + 1)
            ]
        )
        inputs = np.concatenate([np.zeros(self.dims), np.tile(c, num_steps)])
        spread = np.full(len(inputs), self.noise)
        spread[: self.dims] = self.prior
        return response @ inputs, response * spread @ response.T

    def residuals(self, num_steps: int) -> tuple[Array, Array]:
        """Return mean and covariance of x·w_t − y in training with x, t = 0 … T − 1."""
        mean, cov = self.trajectory(num_steps - 1, with_x=True)
        along = np.kron(np.eye(num_steps), self.points[:1])
        return along @ mean - self.labels[0], along @ cov @ along.T

    def moves(self, residuals: Array) -> Array:
        """Return how far x moves the mean of the next weights."""
        length = float(np.linalg.norm(self.points[0]))
        return self.rate * length * np.abs(residuals) / len(self.points)


def whole_runs(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield compositions of up to eight updates and the joint law of all weights."""
    for _ in range(number):
        ridge, num_steps = Ridge(rng), int(rng.integers(2, 9))
        order = float(rng.choice([1.5, 2.0, 4.0]))
        laws = [ridge.trajectory(num_steps, with_x=x) for x in (True, False)]
        mean, cov = ridge.residuals(num_steps)
        spread = qmc.Sobol(num_steps, seed=rng).random(_RUNS)
        runs = mean + ndtri(spread) @ np.linalg.cholesky(cov).T
        ratios = ridge.moves(runs) / math.sqrt(ridge.noise)
        mechanism = NoisySGD(num_steps, 1.0, 1.0)
        before, after = (
            [
                GradNormLedger(mechanism, np.arange(num_steps) + at, one[:, None])
                for one in ratios
            ]
            for at in (0, 1)
        )
        printed = privacy_losses(after, order, convention="icml2025")
        yield Case(
            "ridge, whole run",
            gaussian_divergence(*laws[0], *laws[1], order),
            {
                "Hölder": float(privacy_losses(before, order, rule="left")[0]),
                "trajectory": float(
                    trajectory_losses(before, order, _KAPPA, rule="left")[0]
                ),
            },
            {"Definition 4.2": float(printed[0])},
        )


def last_iterates(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield the contractive recursion over up to a hundred updates."""
    levels = ndtri((np.arange(_RUNS) + 0.5) / _RUNS)
    for _ in range(number):
        ridge, num_steps = Ridge(rng), int(rng.integers(2, 100))
        order = float(rng.choice([1.5, 2.0, 6.0]))
        mean, cov = ridge.residuals(num_steps)
        runs = mean[:, None] + np.sqrt(np.diag(cov))[:, None] * levels
        stretch = np.abs(np.linalg.eigvalsh(ridge.map(with_x=False)[0])).max()
        shared = {"lipschitz": float(stretch), "noise_variance": ridge.noise}
        last = slice(-ridge.dims, None)
        laws = []
        for with_x in (True, False):
            law = ridge.trajectory(num_steps, with_x=with_x)
            laws += [law[0][last], law[1][last, last]]
        yield Case(
            "ridge, last iterate",
            gaussian_divergence(*laws, order),
            {
                "contractive": contractive_divergence(
                    ridge.moves(runs),
                    order,
                    lsi=lsi_track(ridge.prior, num_steps, **shared),
                    hoelder_p=30.0,
                    **shared,
                )
            },
            tolerance=1e-7,
        )
