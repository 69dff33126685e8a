"""U-LiRA: can an attacker tell unlearned models from retrained ones, per example?

The strongest of the usual tests, and the dearest: it needs many models that learned and
unlearned the forget set, and many that never saw it.

>>> import numpy as np
>>> random = np.random.default_rng(0)
>>> same = u_lira(random.normal(size=(40, 300)), random.normal(size=(40, 300)))
>>> bool(abs(same.accuracy - 0.5) < 0.02)
True
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.evaluation.intervals import Interval, epsilon_interval

Array = NDArray[np.float64]
_SMALLEST_STD = 1e-6


@dataclass(frozen=True, eq=False)
class ULira:
    """Log likelihood ratios of every model and example; above 0 says "unlearned".

    Attributes:
        unlearned: Of the unlearned models, float64 ``(k, m)``.
        retrained: Of the retrained models, float64 ``(j, m)``.
    """

    unlearned: Array
    retrained: Array

    @property
    def accuracies(self) -> Array:
        """Balanced accuracy of the attack on each example, ``(m,)``; 1/2: forgotten."""
        return (_positive(self.unlearned) + 1 - _positive(self.retrained)) / 2

    @property
    def accuracy(self) -> float:
        """Balanced accuracy averaged over the forget set."""
        return float(self.accuracies.mean())

    def epsilons(
        self, *, delta: float = 1e-5, confidence: float = 0.95
    ) -> list[Interval]:
        """The epsilon that the attack shows for each example.

        Args:
            delta: δ.
            confidence: Coverage for each example by itself.

        Returns:
            One interval an example; ties count as errors, as suits a lower limit.
        """
        false_positives = (self.retrained >= 0).sum(axis=0)
        false_negatives = (self.unlearned <= 0).sum(axis=0)
        sizes = len(self.retrained), len(self.unlearned)
        return [
            epsilon_interval(
                int(fp), sizes[0], int(fn), sizes[1], delta=delta, confidence=confidence
            )
            for fp, fn in zip(false_positives, false_negatives, strict=True)
        ]


def u_lira(unlearned_margins: ArrayLike, oracle_margins: ArrayLike) -> ULira:
    """Likelihood-ratio attack on each example, each model judged by all the others.

    For each model and example, a normal distribution is fitted to the example's margins
    under the other unlearned models and one to those under the oracles. A judged model
    is left out of its own side and one model is left out of the other side too: then,
    if unlearning is perfect, the accuracy is exactly 1/2 in the mean over draws.

    Args:
        unlearned_margins: ln(p / (1 - p)) of the confidence p at the label
            (``Predictions.margins``), for k models and m forget examples, ``(k, m)``.
        oracle_margins: The same for j models retrained without them, ``(j, m)``.

    Returns:
        Log likelihood ratios.

    Raises:
        ValueError: If shapes disagree, a side has fewer than 3 models, or a margin is
            not finite.

    Source: Hayes et al. 2024 (arXiv:2403.01218), Algorithm 1; Kurmanji et al. 2023.
    """
    unlearned = _margins("unlearned_margins", unlearned_margins)
    oracle = _margins("oracle_margins", oracle_margins)
    expect(
        unlearned.shape[1] == oracle.shape[1],
        "oracle_margins",
        f"{oracle.shape[1]} examples",
        f"must have {unlearned.shape[1]}, as unlearned_margins",
        "Evaluate both on the same forget set.",
    )
    return ULira(
        _ratios(unlearned, unlearned, oracle, sign=1),
        _ratios(oracle, oracle, unlearned, sign=-1),
    )


def _ratios(judged: Array, own: Array, other: Array, sign: int) -> Array:
    """Log likelihood under the own side minus the other, each without a model."""
    partner = np.arange(len(judged)) % len(other)
    difference = _log_density(judged, *_without_each(own)) - _log_density(
        judged, *(moment[partner] for moment in _without_each(other))
    )
    return sign * difference


def _without_each(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each column without row i, for every i."""
    n = len(values) - 1
    centre = values.mean(axis=0)
    moved = values - centre
    mean = -moved / n
    second = (moved**2).sum(axis=0) - moved**2 - n * mean**2
    std = np.sqrt(np.maximum(second, 0) / (n - 1))
    return centre + mean, np.maximum(std, _SMALLEST_STD)


def _log_density(values: Array, mean: Array, std: Array) -> Array:
    """Of a normal distribution, up to a constant."""
    return -np.log(std) - ((values - mean) / std) ** 2 / 2


def _positive(ratios: Array) -> Array:
    """Fraction of models called unlearned, ties as halves."""
    result: Array = ((np.sign(ratios) + 1) / 2).mean(axis=0)
    return result


def _margins(name: str, values: ArrayLike) -> Array:
    """Checked margins of several models."""
    array = np.asarray(values, dtype=np.float64)
    expect(
        array.ndim == 2 and len(array) >= 3 and array.shape[1] >= 1,
        name,
        f"an array of shape {array.shape}",
        "must have shape (models, examples) with at least 3 models",
        "Stack Predictions.margins of independent models.",
    )
    expect(
        bool(np.isfinite(array).all()),
        name,
        "a margin that is not finite",
        "must be finite",
        "Clip the confidences away from 0 and 1.",
    )
    return array
