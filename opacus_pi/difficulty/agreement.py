"""Agreement of difficulty scores: rank correlations, binned means, stability in σ.

Two scores agree if they put examples in nearly the same order. The functions return
numbers with confidence intervals; they say nothing about privacy.

>>> loss = np.array([0.1, 0.2, 0.4, 0.9, 2.0])
>>> found = rank_correlations({"privacy loss": loss, "rank": [1, 2, 3, 5, 4]})
>>> found.between("privacy loss", "rank").round(2)
array([ 0.9 , -0.17,  1.  ])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from opacus_pi._frames import frame
from opacus_pi._shown import Shown
from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers
from opacus_pi.accounting.losses import privacy_losses
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, runs_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "BinnedMeans",
    "RankCorrelations",
    "binned_means",
    "rank_correlations",
    "rank_stability",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class RankCorrelations(Shown):
    """Spearman's ρ of every pair of scores, with confidence intervals.

    Args:
        names: The scores' names, k of them.
        rho: float64 ``(k, k)``; NaN where a score is the same for all examples.
        low: Lower ends of the confidence intervals, ``(k, k)``.
        high: Upper ends, ``(k, k)``.
    """

    names: tuple[str, ...]
    rho: Array
    low: Array
    high: Array

    def between(self, first: str, second: str) -> Array:
        """Return (ρ, low, high) of one pair.

        Args:
            first: Name of one score.
            second: Name of the other.

        Returns:
            float64 ``(3,)``.

        Raises:
            ValueError: If a name is unknown.
        """
        i, j = self.names.index(first), self.names.index(second)
        return np.array([self.rho[i, j], self.low[i, j], self.high[i, j]])

    def _shown(self) -> dict[str, Any]:
        return {"names": ", ".join(self.names)}

    def to_frame(self) -> "pd.DataFrame":
        """Return the correlations as a data frame of pandas.

        Returns:
            One line for each pair: ``first``, ``second``, ``rho``, ``low``, ``high``.

        Raises:
            ImportError: If pandas is not installed.
        """
        pairs = list(combinations(self.names, 2))
        ends = np.array([self.between(*pair) for pair in pairs]).reshape(-1, 3)
        return frame(
            {
                "first": [first for first, _ in pairs],
                "second": [second for _, second in pairs],
                **dict(zip(("rho", "low", "high"), ends.T, strict=True)),
            }
        )


@dataclass(frozen=True, eq=False)
class BinnedMeans:
    """Means of one quantity in bins of another.

    Args:
        x: Mean of the other quantity in each bin, ``(k,)``, not decreasing.
        mean: Mean in each bin.
        std: Standard deviation in each bin.
        count: Number of examples in each bin.
    """

    x: Array
    mean: Array
    std: Array
    count: NDArray[np.int64]


def rank_correlations(
    scores: Mapping[str, ArrayLike], *, confidence: float = 0.95
) -> RankCorrelations:
    """Return Spearman's rank correlation of every pair of scores, with intervals.

    Ties get their mean rank. The interval is tanh(atanh ρ ± z √((1 + ρ²/2)/(n - 3))).
    It covers another choice of examples in the same training run, not other training
    runs.

    Args:
        scores: Score vectors ``(n,)`` of the same n examples, by name; infinities are
            ranked.
        confidence: Nominal coverage, for examples drawn independently.

    Returns:
        The correlations and the ends of their confidence intervals.

    Raises:
        ValueError: If there are fewer than four examples, the lengths differ, a score
            is NaN, or ``confidence`` is not in (0, 1).

    Source: Bonett and Wright 2000, Psychometrika 65, equation 3, for the interval.
    """
    in_range(0, 1, closed=False, remedy="0.95 is usual.", confidence=confidence)
    expect(
        len(scores) > 0,
        "scores",
        "{}",
        "must contain a score",
        "Pass at least one score by name.",
    )
    columns = [_scores(name, values) for name, values in scores.items()]
    sizes = {len(column) for column in columns}
    expect(
        len(sizes) == 1 and min(sizes) > 3,
        "scores",
        f"vectors of length {sorted(sizes)}",
        "must have the same length, at least 4",
        "Every score must cover the same examples.",
    )
    ranks = np.array([stats.rankdata(column) for column in columns])
    centred = ranks - ranks.mean(1, keepdims=True)
    squares = (centred**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = np.clip(centred @ centred.T / np.sqrt(np.outer(squares, squares)), -1, 1)
        error = np.sqrt((1 + rho**2 / 2) / (min(sizes) - 3))
        margin = stats.norm.ppf((1 + confidence) / 2) * error
        low, high = (np.tanh(np.arctanh(rho) + sign * margin) for sign in (-1, 1))
    return RankCorrelations(tuple(scores), rho, low, high)


def binned_means(
    x: ArrayLike, y: ArrayLike, *, num_bins: int = 30, normalise: bool = True
) -> BinnedMeans:
    """Return means of y in bins of equally many examples along the ranking by x.

    Args:
        x: The quantity to bin by, finite, ``(n,)``; privacy losses in the paper.
        y: The quantity to average, finite, ``(n,)``.
        num_bins: Number of bins, at most n.
        normalise: Whether to divide y by its largest absolute value first.

    Returns:
        Mean and standard deviation in each bin; bin sizes differ by at most one
        example.

    Raises:
        ValueError: If a value is not finite, the lengths differ, or ``num_bins`` is not
            in [1, n].

    Source: paper, Figure 2.
    """
    by, values = _finite("x", x), _finite("y", y)
    expect(
        len(by) == len(values),
        "y",
        len(values),
        f"must have one value for each of the {len(by)} values of x",
        "Pass the same examples in the same order.",
    )
    remedy = "Ask for at least one bin, and at most one for each example."
    in_range(1, len(by), num_bins=num_bins, remedy=remedy)
    largest = np.abs(values).max()
    if normalise and largest > 0:
        values = values / largest
    bins = np.array_split(np.argsort(by, kind="stable"), num_bins)
    return BinnedMeans(
        np.array([by[i].mean() for i in bins]),
        np.array([values[i].mean() for i in bins]),
        np.array([values[i].std() for i in bins]),
        np.array([len(i) for i in bins]),
    )


def rank_stability(
    ledger: GradNormLedger | Sequence[GradNormLedger],
    noise_stds: Sequence[float],
    order: float,
    *,
    convention: str = "corrected",
) -> RankCorrelations:
    """Return how well rankings by privacy loss agree between assumed noise levels.

    Args:
        ledger: One run, or several independent runs of one training procedure.
        noise_stds: Standard deviations of the noise on the sum of the gradients, above
            0, each once.
        order: Rényi order, above 1.
        convention: As in ``privacy_losses``.

    Returns:
        Spearman's ρ between the losses at every pair of noise levels, with names like
        ``"σ=0.01"``.

    Raises:
        ValueError: If a noise level is repeated, or as for ``privacy_losses``.

    Source: paper, Appendix F, "Rankings across noise levels".
    """
    names = [f"σ={std:g}" for std in noise_stds]
    expect(
        len(set(names)) == len(names),
        "noise_stds",
        list(noise_stds),
        "must be different",
        "Give each noise level once.",
    )
    runs = runs_of(ledger)
    losses = {
        name: privacy_losses(
            [run.with_noise_std(std) for run in runs], order, convention=convention
        )
        for name, std in zip(names, noise_stds, strict=True)
    }
    return rank_correlations(losses)


def _scores(name: str, values: ArrayLike) -> Array:
    """Return one checked score vector.

    Args:
        name: Its name in the mapping, for the message.
        values: One number per example; infinities are allowed, NaN is not, because it
            has no rank.

    Raises:
        ValueError: If it is not a vector, or contains NaN.
    """
    array = numbers(f"scores[{name!r}]", values)
    expect(
        array.ndim == 1 and not np.isnan(array).any(),
        f"scores[{name!r}]",
        f"an array of shape {array.shape}"
        + (" with NaN" if np.isnan(array).any() else ""),
        "must be one number per example",
        "Give a score for every example.",
    )
    return array


def _finite(name: str, values: ArrayLike) -> Array:
    """Return one checked vector without infinities.

    Means in bins need finite values, unlike ranks.

    Args:
        name: Name of the argument, for the message.
        values: One number per example.

    Raises:
        ValueError: If it is not a vector of at least one number, or one is not finite.
    """
    array = numbers(name, values)
    expect(
        array.ndim == 1 and array.size > 0 and bool(np.isfinite(array).all()),
        name,
        f"shape {array.shape} with {np.sum(~np.isfinite(array))} not finite",
        "must be finite numbers, one per example",
        "Remove those examples from both vectors.",
    )
    return array
