"""KLOM: divergence between the margins of unlearned and of retrained models.

>>> klom([[0.0], [1.0]], [[0.0], [1.0]])
array([0.])
"""

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect

_CLIP = 100.0
_FLOOR = 1e-5


def klom(
    unlearned_margins: ArrayLike, oracle_margins: ArrayLike, *, num_bins: int = 20
) -> NDArray[np.float64]:
    r"""KL divergence of binned margins, for each example.

    :math:`\sum_b p_b \ln (p_b / \max(q_b, 10^{-5}))` with p the histogram under the
    unlearned and q under the retrained models, over ``num_bins`` equal bins from the
    smallest to the largest margin of either, after clipping to ±100. Two samples of one
    law are not at 0: about (bins in use - 1) (1/k + 1/j) / 2 for large k and j, so
    compare with the oracles split in two.

    Args:
        unlearned_margins: ln(p / (1 - p)) at the label, ``(k, n)``: k models.
        oracle_margins: The same for retrained models, ``(j, n)``.
        num_bins: Number of bins.

    Returns:
        float64 ``(n,)``, in nats; the published summary is a mean or 95th percentile
        over the forget, retain or validation set.

    Raises:
        ValueError: If shapes disagree, a margin is NaN, or there is no bin.

    Source: Georgiev et al. 2024 (arXiv:2410.23232), Appendix E.1. The released code
    drops the largest margin from its histogram; here it is in the last bin.
    """
    expect(num_bins >= 1, "num_bins", num_bins, "must be at least 1", "20 is usual.")
    unlearned = np.clip(np.asarray(unlearned_margins, dtype=np.float64), -_CLIP, _CLIP)
    oracle = np.clip(np.asarray(oracle_margins, dtype=np.float64), -_CLIP, _CLIP)
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
    q = np.maximum(_histogram((oracle - low) * scale, num_bins), _FLOOR)
    terms = p * (np.log(np.where(p > 0, p, 1.0)) - np.log(q))
    result: NDArray[np.float64] = terms.sum(axis=0)
    return result


def _histogram(places: NDArray[np.float64], num_bins: int) -> NDArray[np.float64]:
    """Fractions in each bin, ``(num_bins, n)``."""
    bins = np.minimum(places.astype(np.int64), num_bins - 1)
    columns = np.broadcast_to(np.arange(places.shape[1]), places.shape)
    counts = np.zeros((num_bins, places.shape[1]))
    np.add.at(counts, (bins, columns), 1.0)
    return counts / len(places)
