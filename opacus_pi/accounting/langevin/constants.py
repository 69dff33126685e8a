"""The constants of two convex objectives on given data, for certified bounds.

Objectives f(w) = (1/N)·Σ_i ℓ_i(w) + (λ/2)‖w‖². The denominator N is **fixed**: it stays
what it was when points are removed, so that removing a point changes nobody else's
weight. Constants are rounded in the safe direction.

>>> data = np.array([[3.0, 4.0], [0.0, 1.0]])
>>> found = logistic_constants(data, regularisation=0.1)
>>> found.strong_convexity, found.example_bounds.tolist()
(0.1, [5.0, 1.0])
"""

import math
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, positive

_SLACK = 1e-12  # Relative rounding error of an eigenvalue, generously.


@dataclass(frozen=True, eq=False)
class LossConstants:
    """What bounds need to know about an objective on a domain.

    Attributes:
        smoothness: L, largest eigenvalue of the Hessian.
        strong_convexity: m, smallest eigenvalue.
        gradient_bound: M, largest norm of the whole objective's gradient; ``inf`` on an
            unbounded domain.
        example_bounds: float64 ``(n,)``, largest gradient norm of each example's own
            loss ℓ_i, without the regulariser and the denominator.
        denominator: N. An update with learning rate η moves by at most
            η·example_bounds/N because of one example.
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
    """Constants of L2-regularised logistic regression, ℓ_i = ln(1 + exp(−y_i·x_iᵀw)).

    L = λ_max(XᵀX)/(4N) + λ, m = λ, ‖∇ℓ_i‖ ≤ ‖x_i‖, M ≤ Σ‖x_i‖/N + λR.

    Args:
        features: X ``(n, d)``, a column of ones included if there is an intercept
            (which is then regularised too). Labels are ±1.
        regularisation: λ > 0.
        radius: R of the ball around 0 that weights are projected onto.
        denominator: N; default n. Pass the original n for a retain set.

    Returns:
        The constants. Those of all the data hold for any part of it as well.

    Raises:
        ValueError: If an argument is outside its domain.
    """
    X, N = _data(features, regularisation, denominator)
    norms = np.linalg.norm(X, axis=1)
    return LossConstants(
        smoothness=_up(_spectrum(X)[1] / (4 * N)) + regularisation,
        strong_convexity=regularisation,
        gradient_bound=_up(norms.sum() / N + regularisation * radius),
        example_bounds=norms,
        denominator=N,
    )


def ridge_constants(
    features: ArrayLike,
    targets: ArrayLike,
    *,
    regularisation: float,
    radius: float,
    denominator: float | None = None,
) -> LossConstants:
    """Constants of ridge regression, ℓ_i = (x_iᵀw − y_i)²/2, on a ball.

    L = λ_max(XᵀX)/N + λ, m = λ_min(XᵀX)/N + λ, ‖∇ℓ_i‖ ≤ ‖x_i‖(‖x_i‖R + |y_i|),
    M ≤ L·R + ‖Xᵀy‖/N. Without a ball no example's gradient is bounded.

    Args:
        features: X ``(n, d)``.
        targets: y ``(n,)``.
        regularisation: λ > 0.
        radius: R of the ball around 0 that weights are projected onto.
        denominator: N; default n. Pass the original n for a retain set.

    Returns:
        The constants. All but m hold for any part of the data as well; for a retain
        set, compute m from its own features (or use λ).

    Raises:
        ValueError: If an argument is outside its domain.
    """
    X, N = _data(features, regularisation, denominator)
    y = np.asarray(targets, dtype=np.float64)
    expect(
        y.shape == X.shape[:1],
        "targets",
        f"an array of shape {y.shape}",
        f"to have shape {X.shape[:1]}",
        "Give one target per row of features.",
    )
    in_range(0, np.finfo(float).max, radius=radius, remedy="Project onto a ball.")
    lowest, highest = _spectrum(X)
    norms = np.linalg.norm(X, axis=1)
    smoothness = _up(highest / N) + regularisation
    return LossConstants(
        smoothness=smoothness,
        strong_convexity=max(0.0, lowest - _SLACK * highest) / N + regularisation,
        gradient_bound=_up(smoothness * radius + float(np.linalg.norm(X.T @ y)) / N),
        example_bounds=_up(norms * (norms * radius + np.abs(y))),
        denominator=N,
    )


def _data(
    features: ArrayLike, regularisation: float, denominator: float | None
) -> tuple[NDArray[np.float64], float]:
    """Checked features and denominator."""
    X = np.asarray(features, dtype=np.float64)
    expect(
        X.ndim == 2 and X.size > 0 and bool(np.isfinite(X).all()),
        "features",
        f"an array of shape {X.shape}",
        "to be a finite matrix of shape (n, d)",
        "One row per example.",
    )
    N = float(len(X) if denominator is None else denominator)
    positive(
        regularisation=regularisation,
        denominator=N,
        remedy="Strong convexity comes from the regulariser.",
    )
    return X, N


def _spectrum(X: NDArray[np.float64]) -> tuple[float, float]:
    """Smallest and largest eigenvalue of XᵀX."""
    values = np.linalg.eigvalsh(X.T @ X)
    return max(0.0, float(values[0])), max(0.0, float(values[-1]))


@overload
def _up(value: float) -> float: ...
@overload
def _up(value: NDArray[np.float64]) -> NDArray[np.float64]: ...
def _up(value: Any) -> Any:
    """The value, raised beyond its rounding error."""
    return value * (1 + _SLACK)
