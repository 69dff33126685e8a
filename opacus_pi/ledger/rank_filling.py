"""Gaps of an observed record, filled from what was observed of the other examples.

Where norms shrink during training, an example that is first drawn late has a small
norm on record, and taken for its earlier rows too it would be charged far too little.
Here an example keeps, in the rows in which it was not drawn, its rank among the
examples that were, and gets the norm that this rank has there.

>>> fill_by_rank([[8, 6, 4, np.nan], [np.nan, 2, 1, 3]])
array([[8., 6., 4., 8.],
       [3., 2., 1., 3.]])
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from opacus_pi._types import ArrayLike
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.ledger.measurements import fill_unobserved


def filled_by_rank(ledger: GradNormLedger) -> GradNormLedger:
    r"""A record whose gaps are filled by the ranks of the examples.

    For an example not drawn since the row before, of rank u (a share of those drawn) in
    the next row that it was drawn in, else its last: the u-quantile of the norms
    observed in this row. Compared with the default, its own next norm, the worst
    undercharge was 16 to 5,000 times smaller in ``benchmarks.observed_vs_exact``, and
    the largest overcharge about the same. An estimate, never a bound, and unlike the
    default one in which an example's loss depends on what was observed of others: take
    it of the whole record, before any ``subset``.

    Args:
        ledger: A record, of all examples of the run.

    Returns:
        The same record; only examples never observed, and rows in which nothing was,
        still have gaps.
    """
    with np.errstate(over="ignore"):
        filled = fill_by_rank(ledger.grad_norms).astype(np.float32)
    return replace(ledger, grad_norms=filled)


def fill_by_rank(rows: ArrayLike) -> NDArray[np.float64]:
    """Fill gaps with the quantile of their row that the example's rank names.

    Args:
        rows: ``(N, n)``, NaN where not observed.

    Returns:
        float64 ``(N, n)``; NaN only where an example, or a row, has no observation.
    """
    filled = np.array(rows, dtype=np.float64)
    ranks = fill_unobserved([_ranks(row) for row in filled])
    for row, rank in zip(filled, ranks, strict=True):
        seen = np.sort(row[~np.isnan(row)])
        gaps = np.isnan(row) & np.isfinite(rank)
        if len(seen):
            row[gaps] = np.interp(rank[gaps], _middles(len(seen)), seen)
    return filled


def _ranks(row: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank among the observed, in (0, 1); equal norms share one; NaN stays."""
    ranks: NDArray[np.float64] = rankdata(row, nan_policy="omit")
    return (ranks - 0.5) / max(1, int(np.count_nonzero(~np.isnan(row))))


def _middles(count: int) -> NDArray[np.float64]:
    """The ranks of so many different norms."""
    middles: NDArray[np.float64] = (np.arange(count) + 0.5) / count
    return middles
