"""Attacks with many models: can unlearned models be distinguished from retrained ones?

Both tests compare, for each example, the *margins* ln(p / (1 - p)) of the confidence p
at the label between many models that unlearned the forget set and many models that were
retrained without it. ``u_lira`` is the strongest of the usual attacks and gives an
accuracy and a lower limit of epsilon; ``klom`` is a divergence of histograms. Both are
expensive, because they need many trained models.

>>> import numpy as np
>>> random = np.random.default_rng(0)
>>> same = u_lira(random.normal(size=(40, 300)), random.normal(size=(40, 300)))
>>> bool(abs(same.accuracy - 0.5) < 0.02)
True
>>> klom([[0.0], [1.0]], [[0.0], [1.0]])
array([0.])
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, numbers
from opacus_pi.evaluation.intervals import ConfidenceInterval, epsilon_interval

__all__ = ["ULira", "klom", "u_lira"]

Array = NDArray[np.float64]
_EXAMPLES_AT_ONCE = 512  # limits the memory; few, so that the caches hold a block
_SMALLEST_STD = 1e-6  # of a fitted normal distribution
_LARGEST_MARGIN = 100.0  # KLOM clips margins to +- this
_SMALLEST_FRACTION = 1e-5  # KLOM replaces smaller fractions of retrained models


@dataclass(frozen=True, eq=False)
class ULira:
    """Result of the U-LiRA attack: log likelihood ratios of models and examples.

    A ratio above 0 means that the attacker takes the model for an unlearned one.

    Attributes:
        unlearned: Ratios of the k unlearned models, float64 ``(k, m)``.
        retrained: Ratios of the j retrained models, float64 ``(j, m)``.
    """

    unlearned: Array
    retrained: Array

    @property
    def accuracies(self) -> Array:
        """Balanced accuracy on each example, float64 ``(m,)``; 1/2 means forgotten."""
        return (_positive(self.unlearned) + 1 - _positive(self.retrained)) / 2

    @property
    def accuracy(self) -> float:
        """Balanced accuracy averaged over the forget set."""
        return float(self.accuracies.mean())

    def epsilons(
        self, *, delta: float = 1e-5, confidence: float = 0.95
    ) -> list[ConfidenceInterval]:
        """Compute the epsilon that the attack proves for each example.

        Args:
            delta: δ.
            confidence: Coverage, for each example separately.

        Returns:
            One interval for each example. Ties count as errors, which keeps the lower
            limit valid.
        """
        false_positives = (self.retrained >= 0).sum(axis=0)
        false_negatives = (self.unlearned <= 0).sum(axis=0)
        sizes = len(self.retrained), len(self.unlearned)
        counts = np.stack([false_positives, false_negatives], axis=1)
        # Many examples have the same counts: few intervals have to be computed.
        codes = counts[:, 0] * (sizes[1] + 1) + counts[:, 1]
        _, first, places = np.unique(codes, return_index=True, return_inverse=True)
        distinct = counts[first]
        intervals = [
            epsilon_interval(
                int(fp), sizes[0], int(fn), sizes[1], delta=delta, confidence=confidence
            )
            for fp, fn in distinct
        ]
        return [intervals[place] for place in places.reshape(-1)]


def u_lira(unlearned_margins: ArrayLike, oracle_margins: ArrayLike) -> ULira:
    """Run the likelihood-ratio attack: each model is judged by all the others.

    For each model and example, one normal distribution is fitted to the example's
    margins under the unlearned models and one to its margins under the retrained
    models. The judged model is left out of its own side, and one model is left out of
    the other side to keep the sizes equal. If unlearning is perfect, the expected
    accuracy is then exactly 1/2.

    Args:
        unlearned_margins: ln(p / (1 - p)) of the confidence p at the label
            (``Predictions.margins``), for k models and m forget examples, ``(k, m)``.
        oracle_margins: The same for j models retrained without them, ``(j, m)``.

    Returns:
        The log likelihood ratios.

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
        oracle.shape[1],
        f"must have {unlearned.shape[1]} examples, as unlearned_margins has",
        "Evaluate both on the same forget set.",
    )
    found = ULira(np.empty(unlearned.shape), np.empty(oracle.shape))
    for start in range(0, unlearned.shape[1], _EXAMPLES_AT_ONCE):
        part = slice(start, start + _EXAMPLES_AT_ONCE)
        first, second = _Side.of(unlearned[:, part]), _Side.of(oracle[:, part])
        _write_ratios(found.unlearned[:, part], first, second, sign=1)
        _write_ratios(found.retrained[:, part], second, first, sign=-1)
    return found


@dataclass(frozen=True, eq=False)
class _Side:
    """Margins of one side, with the moments of each column without row i, for every i.

    The moments are updated from the sums over all rows, so the cost is that of one pass
    and not of n passes. The values are centred first, which avoids cancellation.

    Args:
        centre: Mean of each column, ``(m,)``.
        moved: Margins minus the centre, ``(k, m)``.
        variances: Variance of each column without row i, ``(k, m)``. At least 1e-12: a
            smaller one would make the density infinite where all models agree.
        log_variances: Their logarithms.
    """

    centre: Array
    moved: Array
    variances: Array
    log_variances: Array

    @classmethod
    def of(cls, values: Array) -> "_Side":
        """Return the moments of margins ``(k, m)``, k at least 3."""
        n = len(values) - 1
        centre = values.mean(axis=0)
        moved = values - centre
        # Without row i the mean moves by -moved/n, and the sum of squares around it
        # falls by moved^2 (1 + 1/n).
        variances = moved**2
        total = variances.sum(axis=0)
        variances *= -(n + 1) / n
        variances += total
        variances /= n - 1
        np.maximum(variances, _SMALLEST_STD**2, out=variances)
        return cls(centre, moved, variances, np.log(variances))


def _write_ratios(out: Array, own: _Side, other: _Side, sign: int) -> None:
    """Write log likelihoods under the own side minus those under the other side.

    Both sides leave out one model: the judged model, and a partner on the other side.
    If only the judged model were left out, its own side would be estimated from fewer
    models. The attack would then have an accuracy other than 1/2 even after perfect
    unlearning.

    Args:
        out: Where to write, ``(k, m)``.
        own: The side of the judged models.
        other: The other side.
        sign: 1 if the own side is that of unlearned models, else -1: the result is
            always positive for models that look unlearned.
    """
    n = len(own.moved) - 1
    left = len(other.moved) - 1
    shift = own.centre - other.centre
    for i, row in enumerate(out):
        j = i % len(other.moved)
        # The margin minus the mean without the partner, then without itself.
        distance = own.moved[i] + shift + other.moved[j] / left
        np.square(distance, out=distance)
        distance /= other.variances[j]
        np.multiply(own.moved[i], (n + 1) / n, out=row)
        np.square(row, out=row)
        row /= own.variances[i]
        np.subtract(distance, row, out=row)
        row += other.log_variances[j]
        row -= own.log_variances[i]
        row *= sign / 2


def _positive(ratios: Array) -> Array:
    """Return the fraction of models taken for unlearned; ties count as one half."""
    above = (ratios > 0).sum(axis=0)
    ties = (ratios == 0).sum(axis=0)
    result: Array = (above + ties / 2) / len(ratios)
    return result


def _margins(name: str, values: ArrayLike) -> Array:
    """Return the margins of several models as an array, after checking them.

    Args:
        name: Name of the argument, for the message.
        values: ``(models, examples)``.

    Raises:
        ValueError: If there are fewer than 3 models (a standard deviation without one
            of them needs two), no example, or a margin is not finite.
    """
    array = numbers("values", values)
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


def klom(
    unlearned_margins: ArrayLike, oracle_margins: ArrayLike, *, num_bins: int = 20
) -> NDArray[np.float64]:
    r"""Compute KLOM, the KL divergence of binned margins, for each example.

    :math:`\sum_b p_b \ln (p_b / \max(q_b, 10^{-5}))` with p the histogram under the
    unlearned and q under the retrained models, over ``num_bins`` equal bins from the
    smallest to the largest margin of either, after clipping to ±100. Two samples of the
    same distribution do not give 0 but about (bins in use - 1) (1/k + 1/j) / 2 for
    large k and j. Compare with the value for the retrained models split into two
    halves.

    Args:
        unlearned_margins: ln(p / (1 - p)) at the label, ``(k, n)``: k models.
        oracle_margins: The same for retrained models, ``(j, n)``.
        num_bins: Number of bins.

    Returns:
        float64 ``(n,)``, in nats. The authors report the mean or the 95th percentile
        over the forget, retain or validation set.

    Raises:
        ValueError: If shapes disagree, a margin is NaN, or there is no bin.

    Source: Georgiev et al. 2024 (arXiv:2410.23232), Appendix E.1. The released code
    drops the largest margin from its histogram; here it belongs to the last bin.
    """
    expect(num_bins >= 1, "num_bins", num_bins, "must be at least 1", "Try 20.")
    limits = -_LARGEST_MARGIN, _LARGEST_MARGIN
    unlearned = np.clip(numbers("unlearned_margins", unlearned_margins), *limits)
    oracle = np.clip(numbers("oracle_margins", oracle_margins), *limits)
    expect(
        unlearned.ndim == oracle.ndim == 2
        and unlearned.shape[1] == oracle.shape[1]
        and min(unlearned.size, oracle.size) > 0
        and not (np.isnan(unlearned).any() or np.isnan(oracle).any()),
        "unlearned_margins, oracle_margins",
        f"arrays of shapes {unlearned.shape}, {oracle.shape}",
        "must be numbers of shapes (models, examples) with the same examples",
        "Stack Predictions.margins of independent models.",
    )
    both = np.concatenate([unlearned, oracle])
    low, width = both.min(axis=0), np.ptp(both, axis=0)
    scale = num_bins / np.where(width > 0, width, 1.0)
    p = _histogram((unlearned - low) * scale, num_bins)
    q = np.maximum(_histogram((oracle - low) * scale, num_bins), _SMALLEST_FRACTION)
    terms = p * (np.log(np.where(p > 0, p, 1.0)) - np.log(q))
    result: NDArray[np.float64] = terms.sum(axis=0)
    return result


def _histogram(places: NDArray[np.float64], num_bins: int) -> NDArray[np.float64]:
    """Return the fractions in each bin, ``(num_bins, n)``.

    Args:
        places: Margins in units of a bin, from 0 to ``num_bins``, ``(models, n)``.
        num_bins: Number of bins. A margin at the upper end belongs to the last one.
    """
    bins = np.minimum(places.astype(np.int64), num_bins - 1)
    columns = np.broadcast_to(np.arange(places.shape[1]), places.shape)
    counts = np.zeros((num_bins, places.shape[1]))
    np.add.at(counts, (bins, columns), 1.0)
    return counts / len(places)
