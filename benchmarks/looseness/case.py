"""What a case is: an exact divergence and bounds on it."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """An exact Rényi divergence beside bounds on it.

    Attributes:
        family: Name of the kind of case.
        exact: The divergence, computed without the library.
        ours: Bounds of the library's default convention; never below ``exact``.
        published: Published formulas, for comparison. Not all of them are bounds.
        tolerance: Relative numerical error of ``exact``.
    """

    family: str
    exact: float
    ours: dict[str, float]
    published: dict[str, float] = field(default_factory=dict)
    tolerance: float = 1e-9

    def violations(self) -> list[str]:
        """Return the names of the library's bounds that are below the exact value."""
        slack = self.tolerance * max(1e-12, self.exact)
        return [name for name, b in self.ours.items() if not b >= self.exact - slack]


def gaussian_divergence(
    mean: Array, cov: Array, other_mean: Array, other_cov: Array, order: float
) -> float:
    """Return D_α(N(mean, cov) ‖ N(other_mean, other_cov)); ``inf`` if infinite."""
    mixed = (1 - order) * cov + order * other_cov
    if np.linalg.eigvalsh((mixed + mixed.T) / 2)[0] <= 0:
        return math.inf
    gap = mean - other_mean
    logdet = [np.linalg.slogdet(m)[1] for m in (mixed, cov, other_cov)]
    spread = logdet[0] - (1 - order) * logdet[1] - order * logdet[2]
    shift = order / 2 * gap @ np.linalg.solve(mixed, gap)
    return float(shift - spread / (2 * (order - 1)))


def grid_divergence(first: Array, second: Array, order: float) -> float:
    """Return D_α of two laws, given by their masses on one grid."""
    seen = (first > 1e-280) & (second > 1e-280)
    logs = order * np.log(first[seen]) + (1 - order) * np.log(second[seen])
    top = logs.max()
    return float((top + np.log(np.exp(logs - top).sum())) / (order - 1))
