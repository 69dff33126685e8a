"""Fill the gaps of an observed ledger: norms of examples that were not drawn.

An observed ledger holds the norms that training computed anyway, so a row has a gap for
every example that was not drawn since the row before. Two rules fill them, both
estimates:

* ``fill_unobserved``, the default: the example's next observation, else its last. An
  example's loss then depends on its own observations only. Where norms shrink during
  training, an example that is drawn late is charged too little for its early rows.
* ``fill_by_rank``: the example keeps its rank among the examples that were drawn, and
  gets the norm that this rank has in the row. This follows the shrinking of all norms,
  but the loss of an example then depends on the norms of others.

An example that was never observed is filled with infinity, which later becomes the clip
norm: it never counts as harmless. Both rules fail if norms change quickly between two
observations of an example.

>>> fill_unobserved([[8, 6, 4, np.nan], [np.nan, 2, 1, 3]])
array([[8., 6., 4., 3.],
       [8., 2., 1., 3.]])
>>> fill_by_rank([[8, 6, 4, np.nan], [np.nan, 2, 1, 3]])
array([[8., 6., 4., 8.],
       [3., 2., 1., 3.]])
"""

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import numbers, real_array

__all__ = ["fill_by_rank", "fill_unobserved", "middle_ranks"]


def fill_unobserved(rows: ArrayLike) -> NDArray[np.float64]:
    """Fill each example's gaps: its next observation, else its last, else infinity.

    Infinity stands for the clip norm, the largest norm that a gradient can have after
    clipping. So an example that was never observed never counts as harmless.

    Args:
        rows: ``(N, n)``, NaN where not observed.

    Returns:
        float64 ``(N, n)`` without NaN.
    """
    filled = np.array(real_array("rows", rows), dtype=np.float64)
    if not any(np.isnan(row).any() for row in filled):
        return filled
    for backwards in (True, False):
        order = range(len(filled) - 2, -1, -1) if backwards else range(1, len(filled))
        for i in order:
            neighbour = filled[i + 1 if backwards else i - 1]
            np.copyto(filled[i], neighbour, where=np.isnan(filled[i]))
    for row in filled:
        row[np.isnan(row)] = np.inf
    return filled


def fill_by_rank(rows: ArrayLike) -> NDArray[np.float64]:
    """Fill each gap with the norm that the example's rank has in that row.

    The rank comes from the next row in which the example was drawn, else from its last.
    The norm is the quantile at this rank of the norms observed in the row of the gap.


    Args:
        rows: ``(N, n)``, NaN where not observed.

    Returns:
        float64 ``(N, n)``; NaN only where an example, or a row, has no observation.
    """
    filled = np.array(numbers("rows", rows))
    ranks = fill_unobserved([_ranks(row) for row in filled])
    for row, rank in zip(filled, ranks, strict=True):
        seen = np.sort(row[~np.isnan(row)])
        gaps = np.isnan(row) & np.isfinite(rank)
        if len(seen):
            row[gaps] = np.interp(rank[gaps], middle_ranks(len(seen)), seen)
    return filled


def _ranks(row: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks among the observed norms, in (0, 1); equal norms share one rank.

    Entries that were not observed stay NaN.
    """
    from scipy.stats import rankdata  # takes half a second, and few callers need it

    ranks: NDArray[np.float64] = rankdata(row, nan_policy="omit")
    return (ranks - 0.5) / max(1, int(np.count_nonzero(~np.isnan(row))))


def middle_ranks(count: int) -> NDArray[np.float64]:
    """Return the ranks of different norms: (i + 1/2) / count.

    Args:
        count: How many norms there are.
    """
    middles: NDArray[np.float64] = (np.arange(count) + 0.5) / count
    return middles
