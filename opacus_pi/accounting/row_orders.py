"""Sums over the updates of one row of a ledger, each update at an order of its own.

**Idea.** By Hölder's inequality every update of a run is taken at an order of its own.
A function that is linear between the orders of a grid (its corners) has a sum over all
of a row's updates that is a weighted sum of its values at the corners, with weights in
closed form. A convex function lies below its chords, so for it the sum is an upper
bound; how far it may be too high is a sum over the pieces between corners.

>>> row = RowUpdates(0.1, ((0, 9),), 1.0)
>>> sums = row_sums(row, np.array([2.0]), np.array([1.0, 2.0, 4.0]), 30.0)
>>> bool((sums.weights @ np.ones(3) <= 10).all())
True
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.composition import corrected_order, linear_weights, pieces

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["RowSums", "RowUpdates", "row_sums"]

Array = NDArray[np.float64]


class RowUpdates(NamedTuple):
    """The updates that take their norms from one row of a ledger.

    Args:
        sample_rate: q in (0, 1).
        remaining: For each interval of the row the fewest and the most updates that
            follow one of its updates.
        highest: The largest s = r²/2 of any example in this row, finite and above 0.
    """

    sample_rate: float
    remaining: tuple[tuple[int, int], ...]
    highest: float


class RowSums(NamedTuple):
    """Sums over the updates of a row, as weights of corners and pieces.

    Args:
        weights: How often each corner counts at each order of the result, ``(K, C)``.
        shares: Σ 1/(order - 1) over the updates whose order is in each piece,
            ``(K, C)``; piece k lies below corner k.
    """

    weights: "csr_array"
    shares: "csr_array"


def row_sums(
    row: RowUpdates, orders: Array, corners: Array, hoelder_p: float
) -> RowSums:
    """Return the sums over a row's updates.

    An interval's orders lie between few corners, so only those are looked at.

    Args:
        row: The updates.
        orders: Rényi orders of the result, ``(K,)``.
        corners: Ascending orders ``(C,)``; the first is below, and the last above,
            every order of an update.
        hoelder_p: p of Hölder's inequality.
    """
    from scipy.sparse import csr_array  # takes a tenth of a second

    column, shape = orders[:, None], (len(orders), len(corners))
    sums = [csr_array(shape), csr_array(shape)]
    for remaining in row.remaining:
        low, high = (corrected_order(orders, hoelder_p, i) for i in remaining)
        first = np.searchsorted(corners, low, side="right") - 1
        width = int((np.searchsorted(corners, high) - first).max()) + 1
        first = np.minimum(first, len(corners) - width)
        places = first[:, None] + np.arange(width)
        ends = np.arange(len(orders) + 1) * width
        near = (column, hoelder_p, remaining, corners[places])
        for i, values in enumerate((linear_weights(*near), pieces(*near)[1])):
            flat = (values.ravel(), places.ravel(), ends)
            sums[i] = sums[i] + csr_array(flat, shape=shape)
    return RowSums(*sums)
