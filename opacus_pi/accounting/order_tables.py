r"""Upper bounds of the losses of all rows of a run, at many orders, from one table.

**Idea.** A log moment ln M(a, s) is convex in the order a (Hölder's inequality) and
convex in s = r²/2 (``tables`` has the proof). Exact values on a grid of orders and s
therefore bound it everywhere: a chord lies above a convex function. By Hölder's
inequality the updates of every interval are taken at orders of their own, some
thousands in all. Chords between the grid's orders give all of them as one weighted sum
of the grid's values, and chords between the grid's s give every example's loss.

**Guarantee.** Every value is an upper bound, and by at most the relative tolerance
of the epsilon wherever it can decide one. Means over norms that were not observed are
at most 30 times the tolerance above. The error is computed and not
assumed: a convex function lies above the extended neighbouring chords. The grid is
made finer until the distance is small enough. The values are convex in the order, as
the losses are, so the best order can be found by bisection.

**What breaks it.** As for ``tables``: a function that is not convex in s, such as a
mean over several runs, or a rule with negative weights.

Source: own derivation; docs/theory.md, Section 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.dyadic_cells import DyadicCells
from opacus_pi.accounting.order_bands import Band, bands_of
from opacus_pi.accounting.row_orders import RowUpdates

__all__ = ["OrderTables", "order_tables"]

Array = NDArray[np.float64]
_MARGIN = 0.01  # share of the tolerance reserved for rounding errors


@dataclass(frozen=True, eq=False)
class OrderTables:
    """Lines of s that bound the loss of each row, for each cell of s and each order.

    Args:
        places: Positions of the orders that are tabulated among those asked for; the
            others give no epsilon below the cap.
        slopes: For each row, float64 ``(cells, K)``; ``inf`` where an order is never an
            example's best one.
        intercepts: In the same form, finite.
        cells: For each row, the cells of its s. The last one, beyond all s, has no
            line.
    """

    places: NDArray[np.int64]
    slopes: tuple[Array, ...]
    intercepts: tuple[Array, ...]
    cells: tuple[DyadicCells, ...]

    def cells_of(self, row: int, s: Array) -> NDArray[np.int64]:
        """Return the cell of each s; the largest s belongs to the cell below it.

        Args:
            row: Position of the row.
            s: r²/2, float64 ``(m,)``.
        """
        return np.minimum(self.cells[row].of(s), len(self.slopes[row]) - 1)

    def losses(self, row: int, s: Array) -> Array:
        """Return upper bounds of a row's loss at every tabulated order.

        Args:
            row: Position of the row.
            s: r²/2, float64 ``(m,)``.

        Returns:
            float64 ``(m, K)``, in nats.
        """
        cell = self.cells_of(row, s)
        with np.errstate(invalid="ignore"):
            result: Array = self.slopes[row][cell] * s[:, None]
        result += self.intercepts[row][cell]
        return result


@lru_cache(maxsize=4)
def order_tables(
    rows: tuple[RowUpdates, ...],
    orders: tuple[float, ...],
    offsets: tuple[float, ...],
    hoelder_p: float,
    tolerance: float,
    for_means: bool,
) -> OrderTables:
    """Return the tables of a run; the latest four are kept.

    Args:
        rows: The updates of each row.
        orders: Rényi orders of the result, above 1, ascending.
        offsets: What each order adds to a loss to make it an epsilon.
        hoelder_p: p of Hölder's inequality.
        tolerance: Largest relative error of an epsilon, from 1e-4 to 1.
        for_means: Whether means over several norms are taken. Their error is at most 30
            times the tolerance.
    """
    choices, added = np.array(orders), np.array(offsets)
    bands = {
        rate: bands_of(
            rate,
            rows,
            choices,
            hoelder_p,
            tolerance * (1 - 2 * _MARGIN),
            everywhere=for_means,
        )
        for rate in {row.sample_rate for row in rows}
    }
    # No epsilon exceeds that of an example with the largest s in every row.
    highest = [
        next(band for band in bands[row.sample_rate] if band.reaches(row.highest))
        for row in rows
    ]
    largest = sum(band.at_highest(row) for band, row in zip(highest, rows, strict=True))
    cap = float((largest + added).min())
    kept = np.flatnonzero(added < cap)
    if not len(kept):
        kept = np.arange(len(added))
    for band in (band for alike in bands.values() for band in alike):
        band.keep_orders(kept, cap - added[kept], added[kept])
        band.refine()
    cells = {rate: DyadicCells(_nodes(alike)) for rate, alike in bands.items()}
    lines = [_lines(bands[row.sample_rate], row, len(kept), tolerance) for row in rows]
    return OrderTables(
        kept,
        tuple(slopes for slopes, _ in lines),
        tuple(intercepts for _, intercepts in lines),
        tuple(cells[row.sample_rate] for row in rows),
    )


def _nodes(bands: Sequence[Band]) -> NDArray[np.int64]:
    """Return the bits of all nodes of neighbouring bands."""
    inner = [band.inner_nodes for band in bands]
    return np.concatenate([inner[0][:1], *(nodes[1:] for nodes in inner)])


def _lines(
    bands: Sequence[Band], row: RowUpdates, num_orders: int, tolerance: float
) -> tuple[Array, Array]:
    """Return slope and intercept of each cell of a row, ``(cells, K)`` each.

    They are raised by the margin: rounding must not push a value below the loss.
    """
    x = np.append(0.0, _nodes(bands).view(np.float64))
    slopes = np.full((len(x) - 1, num_orders), math.inf)
    intercepts = np.zeros((len(x) - 1, num_orders))
    done = 0
    for band in bands:
        upper = band.inner_losses(row)  # (K, nodes), for the orders that matter here
        if not done:
            upper = np.concatenate([np.zeros((len(upper), 1)), upper], axis=1)
        cells = slice(done, done + upper.shape[1] - 1)
        ends = x[done : done + upper.shape[1]]
        part = np.diff(upper, axis=1) / np.diff(ends)
        slopes[cells, : len(upper)] = part.T
        intercepts[cells, : len(upper)] = (upper[:, :-1] - part * ends[:-1]).T
        done = cells.stop
    more = 1 + _MARGIN * tolerance
    return slopes * more, intercepts * more
