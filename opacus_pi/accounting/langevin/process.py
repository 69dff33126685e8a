"""The constants of projected noisy gradient descent, and what follows from them.

>>> constants = LangevinConstants(
...     learning_rate=0.5, noise_variance=0.1, smoothness=1.0, strong_convexity=0.2
... )
>>> constants.lipschitz
0.9
"""

import math
from dataclasses import dataclass

from numpy import float64
from numpy.typing import NDArray

from opacus_pi._validate import positive
from opacus_pi.accounting.langevin.contraction import log_dobrushin_coefficient
from opacus_pi.accounting.langevin.lsi import (
    bounded_support_lsi,
    gradient_map_lipschitz,
    log_growth,
    lsi_track,
)


@dataclass(frozen=True)
class LangevinConstants:
    """The constants of w ← Π(w − η∇f(w) + N(0, s·I)) on the retain set.

    Args:
        learning_rate: η.
        noise_variance: s, per coordinate, on the **weights**: 2ησ² for Langevin noise
            √(2η)·σ, and (η·std)² for noise of standard deviation std on the gradient.
        smoothness: L, largest eigenvalue of the Hessian of f on the domain; ``inf``
            where there is no bound (a ball and ``gradient_bound`` then still give
            the ``"dobrushin"`` form).
        strong_convexity: m, smallest eigenvalue: > 0 strongly convex, 0 convex,
            −L merely smooth.
        radius: R of the ball (any convex set inside one) that Π projects onto.
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
        remedy = "Give the process's constants; inf where there is no bound."
        positive(noise_variance=self.noise_variance, radius=self.radius, remedy=remedy)
        positive(gradient_bound=self.gradient_bound, remedy=remedy)
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
        """Radius of a ball that holds the gradient map's range."""
        moved = self.radius + self.learning_rate * self.gradient_bound
        return min(moved, self.lipschitz * self.radius)

    @property
    def lsi_cap(self) -> float:
        """LSI constant that every iterate has because the domain is bounded."""
        if self.map_radius == math.inf:
            return math.inf
        return bounded_support_lsi(self.map_radius, self.noise_variance)

    @property
    def log_dobrushin(self) -> float:
        """Logarithm of one step's Dobrushin coefficient; 0 on an unbounded domain."""
        return log_dobrushin_coefficient(2 * self.map_radius, self.noise_variance)

    def log_growth(self, initial_lsi: float, num_steps: int) -> NDArray[float64]:
        """Growth of the contraction, ln G_0 … ln G_k, from the second law's constant.

        Args:
            initial_lsi: LSI constant of the retrained law where the steps begin.
            num_steps: k.

        Returns:
            float64 ``(k + 1,)``.
        """
        shared = {"lipschitz": self.lipschitz, "noise_variance": self.noise_variance}
        track = lsi_track(initial_lsi, num_steps, cap=self.lsi_cap, **shared)
        return log_growth(track, **shared)
