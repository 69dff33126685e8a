"""Whole runs whose laws are Gaussian, so that all divergences have a closed form."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.looseness.case import Array, Case, gaussian_divergence
from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.contraction import Divergence
from opacus_pi.accounting.langevin.learning_phase import (
    contractive_divergence,
    halved_noise_divergence,
)
from opacus_pi.accounting.langevin.lsi import lsi_track
from opacus_pi.accounting.langevin.shifted import shifted_mu_squared
from opacus_pi.accounting.langevin.unlearning import unlearning_divergence
from opacus_pi.accounting.published import corollary_4_1


def constant_gradients(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield full batches with a gradient that never changes: D_α = T·α·r²/2."""
    for _ in range(number):
        num_steps, ratio = int(rng.integers(1, 400)), 10 ** rng.uniform(-3, 0)
        order = float(rng.choice([1.5, 2.0, 8.0, 32.0]))
        ledger = GradNormLedger(
            NoisySGD(num_steps, 1.0, 1.0), [num_steps], [[np.float32(ratio)]]
        )
        published = {
            name: float(privacy_losses(ledger, order, convention=convention)[0])
            for name, convention in (
                ("Definition 4.2", "icml2025"),
                ("released code", "thudi2024_code"),
            )
        }
        yield Case(
            "constant gradient, full batch",
            num_steps * order * float(ledger.grad_norms[0, 0]) ** 2 / 2,
            {"Hölder": float(privacy_losses(ledger, order)[0])},
            published,
        )


def shifted_schedules(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield scalar linear maps that differ by constants, with any noise schedule."""
    for _ in range(number):
        size = int(rng.integers(1, 60))
        c, s = rng.uniform(0.6, 1.05, size), 10 ** rng.uniform(-2, 0, size)
        d = rng.uniform(0, 0.5, size) * (rng.random(size) < 0.5)
        d[rng.integers(size)] += 0.1
        start = float(rng.uniform(0, 1) * (rng.random() < 0.5))
        later = np.append(np.cumprod(c[:0:-1])[::-1], 1.0)
        gap = start * c.prod() + (d * later).sum()
        order = float(rng.choice([1.5, 4.0, 32.0]))
        bound = shifted_mu_squared(c, d, s, initial_distance=start)
        yield Case(
            "shifted divergence, linear maps",
            order / 2 * gap**2 / (s * later**2).sum(),
            {"shifted": order / 2 * bound},
            {} if start else {"sum over steps": order / 2 * (d**2 / s).sum()},
        )


@dataclass(frozen=True)
class Quadratic:
    """Training w ← (I − ηH)w + ηb + N(0, s·I), H diagonal; x adds a constant to b."""

    eigenvalues: Array
    learning_rate: float
    noise: float
    pull: Array
    extra: Array

    def run(self, mean: Array, cov: Array, steps: int, *, with_x: bool) -> tuple:
        """Return mean and diagonal of the covariance after some steps."""
        shrink = 1 - self.learning_rate * self.eigenvalues
        target = self.pull + self.extra if with_x else self.pull
        for _ in range(steps):
            mean = shrink * mean + self.learning_rate * target
            cov = shrink**2 * cov + self.noise
        return mean, cov

    @property
    def constants(self) -> LangevinConstants:
        """The constants that the bounds use."""
        return LangevinConstants(
            learning_rate=self.learning_rate,
            noise_variance=self.noise,
            smoothness=float(self.eigenvalues.max()),
            strong_convexity=float(self.eigenvalues.min()),
        )


def _random_quadratic(rng: np.random.Generator) -> Quadratic:
    """Draw a problem in up to three dimensions with contractive steps."""
    dims = int(rng.integers(1, 4))
    eigenvalues = rng.uniform(0.1, 1.0, dims)
    return Quadratic(
        eigenvalues,
        learning_rate=float(rng.uniform(0.1, 1.0)),
        noise=10 ** rng.uniform(-2, 0),
        pull=rng.normal(size=dims),
        extra=rng.normal(size=dims) * rng.uniform(0.05, 0.5),
    )


@dataclass(frozen=True)
class Scene:
    """Learning with a point and unlearning without it, from weights N(0, v)."""

    problem: Quadratic
    order: float
    prior: float
    learned: int
    unlearned: int

    def law(self, *, with_x: bool, unlearned: bool) -> tuple[Array, Array]:
        """Return mean and variances after learning, or after unlearning as well."""
        dims = len(self.problem.pull)
        law = np.zeros(dims), np.full(dims, self.prior)
        law = self.problem.run(*law, self.learned, with_x=with_x)
        steps = self.unlearned if unlearned else 0
        return self.problem.run(*law, steps, with_x=False)

    @property
    def exact(self) -> float:
        """D_α(unlearned ‖ retrained), from the gap of the means, so nothing cancels."""
        shrink = 1 - self.problem.learning_rate * self.problem.eigenvalues
        moved = self.problem.learning_rate * self.problem.extra
        gap = moved * shrink**self.unlearned * (1 - shrink**self.learned) / (1 - shrink)
        variances = self.law(with_x=False, unlearned=True)[1]
        return self.order / 2 * float((gap**2 / variances).sum())

    def loss(self, order: float) -> float:
        """Return the exact D_α(trained ‖ trained without the point)."""
        laws = (self.law(with_x=x, unlearned=False) for x in (True, False))
        return _diagonal_divergence(*laws, max(order, 1 + 1e-9))

    @property
    def track(self) -> dict:
        """LSI constants of the retrained law and the process's constants."""
        constants = self.problem.constants
        shared = {
            "lipschitz": constants.lipschitz,
            "noise_variance": self.problem.noise,
        }
        lsi = lsi_track(self.prior, self.learned + self.unlearned, **shared)
        return {"lsi": lsi, **shared}

    @property
    def shifts(self) -> Array:
        """How far the point moves the mean in each step."""
        shift = self.problem.learning_rate * float(np.linalg.norm(self.problem.extra))
        return np.r_[np.full(self.learned, shift), np.zeros(self.unlearned)]

    def contracted(self, divergence: Divergence, form: str) -> float:
        """Return the bound after unlearning from the divergence after learning."""
        return unlearning_divergence(
            divergence,
            self.order,
            self.unlearned,
            self.problem.constants,
            initial_lsi=float(self.track["lsi"][self.learned]),
            form=form,
        ).divergence


def quadratic_unlearning(rng: np.random.Generator, number: int) -> Iterator[Case]:
    """Yield learning with a point and unlearning without it, on a quadratic loss.

    The bounds use the constants of the problem, not the covariances of the laws.
    """
    for _ in range(number):
        scene = Scene(
            _random_quadratic(rng),
            order=float(rng.choice([1.5, 4.0, 12.0])),
            prior=float(rng.uniform(0.01, 1.0)),
            learned=int(rng.integers(1, 40)),
            unlearned=int(rng.integers(0, 25)),
        )
        yield Case(
            "quadratic, from the exact loss",
            scene.exact,
            {"hypercontractive": scene.contracted(scene.loss, "hypercontractive")},
            {"D·G^(−1/α)": scene.contracted(scene.loss, "source")},
        )
        yield _end_to_end(scene)
        yield from _through_stationarity(scene)


def _end_to_end(scene: Scene) -> Case:
    """Return a case of bounds from the constants alone."""
    track, learned = scene.track, scene.learned
    steps = np.ones(len(scene.shifts))
    mu2 = shifted_mu_squared(
        track["lipschitz"] * steps, scene.shifts, track["noise_variance"] * steps
    )
    contractive = contractive_divergence(
        scene.shifts[:, None], scene.order, hoelder_p=math.inf, **track
    )
    learning = track | {"lsi": track["lsi"][:learned]}
    worst = halved_noise_divergence(scene.shifts[:learned], scene.order, **learning)
    return Case(
        "quadratic, end to end",
        scene.exact,
        {"shifted": scene.order * mu2 / 2, "contractive": contractive},
        {"worst case · G^(−1/α)": scene.contracted(worst, "source")},
    )


def _through_stationarity(scene: Scene) -> Iterator[Case]:
    """Yield Corollary 4.1 with the exact value of every quantity, if it is finite."""
    order, trained = scene.order, scene.law(with_x=False, unlearned=False)
    far = _stationary(scene.problem)
    gaps = [
        max(
            _diagonal_divergence(far, trained, a), _diagonal_divergence(trained, far, a)
        )
        for a in (4 * order - 1, 2 * order - 1)
    ]
    growth = scene.problem.constants.log_growth(
        float(scene.track["lsi"][scene.learned]), scene.unlearned
    )
    printed = corollary_4_1(order, scene.loss(4 * order), *gaps, float(growth[-1]))
    unlearned = scene.law(with_x=True, unlearned=True)
    if math.isfinite(printed):
        yield Case(
            "quadratic, against retraining for T steps",
            _diagonal_divergence(unlearned, trained, order),
            {},
            {"Corollary 4.1": printed},
        )


def _diagonal_divergence(first: tuple, second: tuple, order: float) -> float:
    """Return D_α of two Gaussians with diagonal covariances."""
    return gaussian_divergence(
        first[0], np.diag(first[1]), second[0], np.diag(second[1]), order
    )


def _stationary(q: Quadratic) -> tuple[Array, Array]:
    """Return the law to which training without the point converges."""
    shrink = 1 - q.learning_rate * q.eigenvalues
    return q.pull / q.eigenvalues, q.noise / (1 - shrink**2)
