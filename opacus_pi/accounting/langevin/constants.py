"""Constants that the Langevin bounds need: of an objective, and of the noisy process.

``logistic_constants`` and ``ridge_constants`` compute the smoothness, convexity and
gradient bounds of two convex objectives f(w) = (1/N)·Σ_i ℓ_i(w) + (λ/2)‖w‖² from given
data. The denominator N is **fixed**: it keeps its value when examples are removed, so
that removing an example does not change the weight of any other. Constants are rounded
in the safe direction.

A step size that is computed from the data depends on the examples that may have to be
forgotten, and no bound of this package covers that. Choose it from
``public_logistic_constants``, which needs a bound on the norm of a row and no data.

``LangevinConstants`` holds the constants of projected noisy gradient descent, and
derives what the bounds use: Lipschitz constant, range, log-Sobolev and Dobrushin
constants. It checks domains only; that the constants hold for the process that was run
is up to the caller, and every bound lists it among its assumptions.

>>> data = np.array([[3.0, 4.0], [0.0, 1.0]])
>>> found = logistic_constants(data, regularisation=0.1)
>>> found.strong_convexity, found.example_bounds.tolist()
(0.1, [5.0, 1.0])
>>> constants = LangevinConstants(
...     learning_rate=0.5, noise_variance=0.1, smoothness=1.0, strong_convexity=0.2
... )
>>> constants.lipschitz
0.9
"""

import math
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive
from opacus_pi.accounting.langevin.contraction import log_dobrushin_coefficient
from opacus_pi.accounting.langevin.hockey_stick import Start, hockey_stick_contraction
from opacus_pi.accounting.langevin.lsi import (
    bounded_support_lsi,
    gradient_map_lipschitz,
    log_growth,
    lsi_track,
)

_REGULARISER = (
    "Train with an L2 regulariser above 0: the bounds need a strongly convex loss."
)
_SLACK = 1e-12  # upper limit of the relative rounding error of an eigenvalue


@dataclass(frozen=True, eq=False)
class LossConstants:
    """Constants of an objective on a domain.

    Attributes:
        smoothness: L, largest eigenvalue of the Hessian.
        strong_convexity: m, smallest eigenvalue of the Hessian.
        gradient_bound: M, largest norm of the whole objective's gradient; ``inf`` on an
            unbounded domain.
        example_bounds: float64 ``(n,)``, largest gradient norm of each example's own
            loss ℓ_i, without the regulariser and the denominator.
        denominator: N. One example moves an update with learning rate η by at most
            η·example_bounds/N.
    """

    smoothness: float
    strong_convexity: float
    gradient_bound: float
    example_bounds: NDArray[np.float64]
    denominator: float


def logistic_constants(
    features: ArrayLike,
    *,
    regularisation: float,
    radius: float = math.inf,
    denominator: float | None = None,
) -> LossConstants:
    """Return the constants of L2-regularised logistic regression.

    ℓ_i = ln(1 + exp(−y_i·x_iᵀw)): L = λ_max(XᵀX)/(4N) + λ, m = λ, ‖∇ℓ_i‖ ≤ ‖x_i‖ and
    M ≤ Σ‖x_i‖/N + λR, because the logistic function has slopes up to 1/4.
    ``LossConstants`` explains L, m and M.

    Args:
        features: X ``(n, d)``, including a column of ones if there is an intercept
            (which is then regularised too). Labels are ±1.
        regularisation: λ > 0.
        radius: R of the ball around 0 that weights are projected onto.
        denominator: N; default n. Pass the original n for a retain set.

    Returns:
        The constants. Those of all the data hold for any part of it as well.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: standard bounds on the Hessian σ(1−σ)·x xᵀ of the logistic loss.
    """
    X, N = _data(features, regularisation, denominator)
    norms = np.linalg.norm(X, axis=1)
    return LossConstants(
        smoothness=_rounded_up(_spectrum(X)[1] / (4 * N)) + regularisation,
        strong_convexity=regularisation,
        gradient_bound=_rounded_up(norms.sum() / N + regularisation * radius),
        example_bounds=norms,
        denominator=N,
    )


def public_logistic_constants(
    num_examples: int,
    *,
    regularisation: float,
    max_row_norm: float = 1.0,
    radius: float = math.inf,
) -> LossConstants:
    """Return constants of logistic regression for all data of norm at most B.

    With norms up to B and at most N examples: L = B²/4 + λ, m = λ, ‖∇ℓ_i‖ ≤ B and
    M ≤ B + λR (``LossConstants`` explains L, m and M). These constants depend on no
    example, so step sizes and noise may be chosen from them.

    Args:
        num_examples: N, the fixed denominator, which must be public.
        regularisation: λ > 0.
        max_row_norm: B, the largest norm of a feature vector. Scale each vector by a
            rule that looks at this vector only.
        radius: R of the ball around 0 that weights are projected onto.

    Returns:
        The constants, for any data set of at most N such examples.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: as ``logistic_constants``, with λ_max(XᵀX) ≤ Σ‖x_i‖² ≤ N·B².
    """
    largest = np.finfo(float).max
    in_range(
        1, largest, num_examples=num_examples, remedy="Pass the number of examples."
    )
    in_range(
        0,
        largest,
        max_row_norm=max_row_norm,
        remedy="Pass the largest norm of a feature vector: 1 if each is scaled to 1.",
    )
    positive(regularisation=regularisation, remedy=_REGULARISER)
    return LossConstants(
        smoothness=_rounded_up(max_row_norm**2 / 4) + regularisation,
        strong_convexity=regularisation,
        gradient_bound=_rounded_up(max_row_norm + regularisation * radius),
        example_bounds=np.full(num_examples, float(max_row_norm)),
        denominator=float(num_examples),
    )


def ridge_constants(
    features: ArrayLike,
    targets: ArrayLike,
    *,
    regularisation: float,
    radius: float,
    denominator: float | None = None,
    only_these_rows: bool = False,
) -> LossConstants:
    """Return the constants of ridge regression, ℓ_i = (x_iᵀw − y_i)²/2, on a ball.

    L = λ_max(XᵀX)/N + λ, m = λ, ‖∇ℓ_i‖ ≤ ‖x_i‖(‖x_i‖R + |y_i|),
    M ≤ L·R + Σ‖x_i‖|y_i|/N (``LossConstants`` explains L, m and M). Without a ball no
    example's gradient is bounded.

    Args:
        features: X ``(n, d)``.
        targets: y ``(n,)``.
        regularisation: λ > 0.
        radius: R of the ball around 0 that weights are projected onto.
        denominator: N; default n. Pass the original n for a retain set.
        only_these_rows: m = λ_min(XᵀX)/N + λ, which is larger and does **not** hold
            once rows are removed. Use it for the rows of a retain set, never for the
            data before removal.

    Returns:
        The constants. They hold for any part of the data as well, unless
        ``only_these_rows``.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: the Hessian XᵀX/N + λI of the squared loss.
    """
    X, N = _data(features, regularisation, denominator)
    y = numbers("targets", targets)
    expect(
        y.shape == X.shape[:1],
        "targets",
        f"an array of shape {y.shape}",
        f"must have shape {X.shape[:1]}",
        "Give one target per row of features.",
    )
    in_range(
        0,
        np.finfo(float).max,
        radius=radius,
        remedy="Pass the radius of the ball that weights are projected onto.",
    )
    lowest, highest = _spectrum(X)
    norms = np.linalg.norm(X, axis=1)
    smoothness = _rounded_up(highest / N) + regularisation
    own_convexity = max(0.0, lowest - _SLACK * highest) / N if only_these_rows else 0.0
    return LossConstants(
        smoothness=smoothness,
        strong_convexity=own_convexity + regularisation,
        gradient_bound=_rounded_up(smoothness * radius + float(norms @ np.abs(y)) / N),
        example_bounds=_rounded_up(norms * (norms * radius + np.abs(y))),
        denominator=N,
    )


def _data(
    features: ArrayLike, regularisation: float, denominator: float | None
) -> tuple[NDArray[np.float64], float]:
    """Return checked features and denominator."""
    X = numbers("features", features)
    expect(
        X.ndim == 2 and X.size > 0 and bool(np.isfinite(X).all()),
        "features",
        f"an array of shape {X.shape}",
        "must be a finite matrix of shape (n, d)",
        "Give one row per example.",
    )
    N = float(len(X) if denominator is None else denominator)
    positive(regularisation=regularisation, remedy=_REGULARISER)
    positive(
        denominator=N, remedy="Pass the number of examples before any was removed."
    )
    return X, N


def _spectrum(X: NDArray[np.float64]) -> tuple[float, float]:
    """Return the smallest and largest eigenvalue of XᵀX."""
    values = np.linalg.eigvalsh(X.T @ X)
    return max(0.0, float(values[0])), max(0.0, float(values[-1]))


@overload
def _rounded_up(value: float) -> float: ...
@overload
def _rounded_up(value: NDArray[np.float64]) -> NDArray[np.float64]: ...
def _rounded_up(value: Any) -> Any:
    """The value, raised beyond its rounding error."""
    return value * (1 + _SLACK)


@dataclass(frozen=True)
class LangevinConstants:
    """Constants of projected noisy gradient descent on the retain set.

    One step is w ← Π(w − η∇f(w) + N(0, s·I)), where Π projects onto a convex set.

    Args:
        learning_rate: η.
        noise_variance: s, per coordinate, on the **weights**: 2ησ² for Langevin noise
            √(2η)·σ, and (η·std)² for noise of standard deviation std on the gradient.
        smoothness: L, largest eigenvalue of the Hessian of f on the domain; ``inf``
            if no bound is known (a ball and ``gradient_bound`` then still give the
            ``"dobrushin"`` form).
        strong_convexity: m, smallest eigenvalue: > 0 strongly convex, 0 convex,
            −L merely smooth.
        radius: R of the ball (or any convex set inside one) that Π projects onto.
        gradient_bound: M, largest ‖∇f‖ on the domain.

    Raises:
        ValueError: If a constant is outside its domain.
    """

    learning_rate: float
    noise_variance: float
    smoothness: float
    strong_convexity: float = 0.0
    radius: float = math.inf
    gradient_bound: float = math.inf

    def __post_init__(self) -> None:
        positive(
            noise_variance=self.noise_variance,
            remedy="Pass the variance of the noise of one step.",
        )
        positive(
            radius=self.radius,
            gradient_bound=self.gradient_bound,
            remedy="Pass inf if no bound is known.",
        )
        self.lipschitz  # noqa: B018  (its check)

    @property
    def lipschitz(self) -> float:
        """Lipschitz constant c of the gradient map."""
        return gradient_map_lipschitz(
            self.learning_rate,
            smoothness=self.smoothness,
            strong_convexity=self.strong_convexity,
        )

    @property
    def map_radius(self) -> float:
        """Radius of a ball that contains the range of the gradient map."""
        moved = self.radius + self.learning_rate * self.gradient_bound
        return min(moved, self.lipschitz * self.radius)

    @property
    def lsi_cap(self) -> float:
        """LSI constant of every iterate on a bounded domain; otherwise ``inf``."""
        if self.map_radius == math.inf:
            return math.inf
        return bounded_support_lsi(self.map_radius, self.noise_variance)

    @property
    def log_dobrushin(self) -> float:
        """Logarithm of one step's Dobrushin coefficient; 0 on an unbounded domain."""
        return log_dobrushin_coefficient(2 * self.map_radius, self.noise_variance)

    def delta_after(
        self, epsilon: ArrayLike, num_steps: int, *, initial_delta: Start = 1.0
    ) -> NDArray[np.float64]:
        """Return a bound on δ(ε) between two distributions after k steps.

        It needs a bounded domain, like ``log_dobrushin``, and never exceeds what that
        coefficient gives. Smoothness makes it smaller.

        Args:
            epsilon: ε ≥ 0, any shape.
            num_steps: k ≥ 1.
            initial_delta: A bound on δ before them, as in
                ``hockey_stick_contraction``; 1 holds for any two distributions.

        Returns:
            float64 in the shape of ``epsilon``.

        Raises:
            ValueError: If an argument is outside its domain.

        Source: ``hockey_stick_contraction``; docs/theory.md, Section 8.
        """
        positive(num_steps=num_steps, remedy="Pass the number of steps.")
        return hockey_stick_contraction(
            epsilon,
            np.full(num_steps, 2 * self.map_radius),
            math.sqrt(self.noise_variance),
            initial_delta=initial_delta,
            block_length="best" if math.isfinite(self.lipschitz) else 1,
            lipschitz=self.lipschitz,
        )

    def log_growth(self, initial_lsi: float, num_steps: int) -> NDArray[np.float64]:
        """Return ln G after 0 … k steps; divergences shrink as G grows.

        Args:
            initial_lsi: LSI constant of the retrained distribution where the steps
                begin.
            num_steps: k.

        Returns:
            float64 ``(k + 1,)``.
        """
        shared = {"lipschitz": self.lipschitz, "noise_variance": self.noise_variance}
        track = lsi_track(initial_lsi, num_steps, cap=self.lsi_cap, **shared)
        return log_growth(track, **shared)
