"""Bands of s on which the losses of all rows are tabulated to a certified error.

**Idea.** Where the loss of an order grows from the square of the sample rate to the
order of 1, it bends sharply, at an s that is inversely proportional to the order. A
grid of orders and s that is fine enough for one s is wasted on the others. The range of
s is therefore cut into narrow bands, each with orders (corners) and s (nodes) of its
own, made finer where the error is too large.

**Guarantee.** After ``refine`` the line between two nodes is at most the
tolerance times the epsilon above the loss, for every order that may be the best one
of an example. Orders that cannot be are dropped from the band. Both are decided by
bounds that are computed from exact values, not by estimates.

**What breaks it.** As for ``order_tables``.

Source: own derivation; docs/theory.md, Section 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.composition import corrected_order
from opacus_pi.accounting.dyadic_cells import halved, octaves
from opacus_pi.accounting.moments import log_moments, renyi_divergence
from opacus_pi.accounting.row_orders import RowSums, RowUpdates, row_sums

__all__ = ["Band", "bands_of"]

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

_BETWEEN_ORDERS = 0.3  # share of the tolerance for chords between orders
_EQUAL_PART = 0.2  # of the offset, which all rows share equally
_FAR = 30.0  # times the tolerance: error of losses that only enter means
_HALVINGS = 2  # of each octave: bands and first cells are quarters
_EVERY_ROW = 8  # of these is looked at before all are
_MOST_PARTS = 8  # into which a piece between orders is cut at once
_TINY = np.finfo(np.float64).tiny


def bands_of(
    sample_rate: float,
    rows: Sequence[RowUpdates],
    orders: Array,
    hoelder_p: float,
    tolerance: float,
    *,
    everywhere: bool,
) -> list["Band"]:
    """Return the bands for all rows of one sample rate, ascending, not yet refined.

    Args:
        sample_rate: q in (0, 1).
        rows: The rows; those of other sample rates are left out.
        orders: Rényi orders of the result, ascending.
        hoelder_p: p of Hölder's inequality.
        tolerance: Largest relative error of an epsilon.
        everywhere: Bound the error of losses that cannot decide an epsilon, too, by 30
            times the tolerance: a mean over several norms may contain them.
    """
    alike = [row for row in rows if row.sample_rate == sample_rate]
    highest = max(row.highest for row in alike)
    last = max(most for row in alike for _, most in row.remaining)
    top = float(corrected_order(orders[-1], hoelder_p, last))
    steepest = max(top * (top - 1), 2.0)
    # Up to here no order's loss bends sharply: (a-1)·s is well below ln(1/q).
    smooth = min(-math.log(sample_rate) / 2 / top, highest)
    wide = octaves(min(tolerance / 8 / steepest, smooth / 4), smooth / 2)
    edges = octaves(float(wide[-1:].view(np.float64)[0]), highest)
    settings = alike, orders, hoelder_p, tolerance, len(rows)
    narrow = _quarters(edges)
    bands = [
        Band(_quarters(wide), top, *settings, everywhere=everywhere, is_lowest=True)
    ]
    for ends in zip(narrow[:-1], narrow[1:], strict=True):
        nodes = _quarters(np.array(ends))
        bands.append(Band(nodes, top, *settings, everywhere=everywhere))
    return bands


def _quarters(nodes: Integers) -> Integers:
    """Return nodes with every cell halved twice."""
    times = np.full(len(nodes) - 1, _HALVINGS)
    return halved(np.zeros_like, nodes, np.zeros(len(nodes)), times)[0]


class _Bounds(NamedTuple):
    """Bounds of a row's losses at s = 0 (where they are slopes) and at all nodes.

    Args:
        upper: float64 ``(K, J + 1)``.
        error: By how much they may exceed the exact values.
        lower: Not above the exact values.
        matters: Whether the order may be an example's best one if its s lies in the
            cell that begins at the node.
        is_far: Whether it may not, but the value is needed for a mean over norms.
        slack: Part of the offset to which the error of this loss may be compared.
    """

    upper: Array
    error: Array
    lower: Array
    matters: Flags
    is_far: Flags
    slack: Array


class Band:
    """A band of s with exact log moments at its corners and nodes.

    ``values[i, j + 1]`` is the log moment at corner i and node j, and ``values[i, 0]``
    its slope at s = 0, a(a-1)q². The first corner is the order 1, where all are 0. One
    node beyond each end helps to bound the outermost cells.

    Args:
        nodes: The bits of the nodes, without those beyond the ends.
        top: The largest order of an update.
        rows: The rows whose sample rate is that of the band.
        orders: Rényi orders of the result, ascending.
        hoelder_p: p of Hölder's inequality.
        tolerance: Largest relative error of an epsilon.
        num_rows: Number of rows of the run, at all sample rates.
        everywhere: As in ``bands_of``.
        is_lowest: Whether the band reaches down to s = 0.
    """

    def __init__(
        self,
        nodes: Integers,
        top: float,
        rows: Sequence[RowUpdates],
        orders: Array,
        hoelder_p: float,
        tolerance: float,
        num_rows: int,
        *,
        everywhere: bool,
        is_lowest: bool = False,
    ) -> None:
        self._rows, self._orders, self._p = rows, orders, hoelder_p
        self._tolerance, self._first = tolerance, int(not is_lowest)
        s = nodes.view(np.float64)
        before = [] if is_lowest else [2 * s[0] - s[1]]
        beyond = np.array([*before, *s, 2 * s[-1] - s[-2]])
        self._nodes = beyond.view(np.int64)
        self._corners = _first_corners(top, _BETWEEN_ORDERS * tolerance)
        self._values = self._at(self._corners)
        self._below = np.full(len(orders), np.inf)
        self._offsets = np.zeros(len(orders))
        self._num_rows, self._everywhere = num_rows, everywhere
        self._sums: dict[RowUpdates, RowSums] = {}

    @property
    def inner_nodes(self) -> Integers:
        """The bits of the nodes, without those beyond the ends."""
        return self._nodes[self._first : -1]

    @property
    def _s(self) -> Array:
        return self._nodes.view(np.float64)

    def reaches(self, s: float) -> bool:
        """Return whether the band ends at or above a number."""
        return bool(self._s[-2] >= s)

    def at_highest(self, row: RowUpdates) -> Array:
        """Return upper bounds of a row's largest loss at all orders, ``(K,)``."""
        node = int(np.searchsorted(self._s, row.highest))
        result: Array = self._sums_of(row).weights @ self._values[:, node + 1]
        return result

    def inner_losses(self, row: RowUpdates) -> Array:
        """Return upper bounds of a row's losses at the inner nodes, ``(K, nodes)``."""
        values = self._values[:, 1 + self._first : -1]
        if not len(self._orders):
            return np.empty((0, values.shape[1]))
        result: Array = self._sums_of(row).weights @ values
        return result

    def keep_orders(self, places: Integers, below: Array, offsets: Array) -> None:
        """Drop all orders but some.

        Args:
            places: The positions of those that stay.
            below: A loss of this size at each of them gives no epsilon below the cap.
            offsets: The offset of each.
        """
        self._orders, self._below = self._orders[places], below
        self._offsets = np.maximum(offsets, 0)
        self._sums = {}

    def _sums_of(self, row: RowUpdates) -> RowSums:
        """Return the sums over a row's updates, computed once for a set of corners."""
        if row not in self._sums:
            self._sums[row] = row_sums(row, self._orders, self._corners, self._p)
        return self._sums[row]

    def _at(self, corners: Array) -> Array:
        """Return the values at some corners and all nodes."""
        slopes = corners * (corners - 1) * self._rate**2
        moments = log_moments(np.sqrt(2 * self._s), self._rate, corners)
        return np.concatenate([slopes[:, None], moments], axis=1)

    @property
    def _rate(self) -> float:
        return self._rows[0].sample_rate

    def refine(self) -> None:
        """Make the band finer until the error of every row is small enough.

        Neighbouring rows need much the same nodes, so a few rows are satisfied first.
        """
        for step in (_EVERY_ROW, 1):
            while len(self._orders) and not self._is_fine(self._rows[::step]):
                pass

    def _is_fine(self, rows: Sequence[RowUpdates]) -> bool:
        """Return whether the error of some rows is small enough; if not, refine once.

        Orders that matter for none of the band's rows are dropped.
        """
        heights = self._heights()
        coarse = np.zeros(len(self._corners))
        excess = np.zeros(len(self._nodes))
        num_orders = 0
        for row in rows:
            bounds = self._bounds(row, heights)
            used = np.flatnonzero(bounds.matters.any(axis=1))
            num_orders = max(num_orders, int(used.max(initial=-1)) + 1)
            coarse = np.maximum(coarse, self._coarseness(row, bounds, heights))
            excess = np.maximum(excess, self._relative_errors(bounds).max(axis=0))
        if len(rows) == len(self._rows) and not self._everywhere:
            self._keep_first(num_orders)
        if not len(self._orders):
            return True
        if coarse.max() > 1:
            self._divide(coarse[: len(self._corners)])
            return False
        excess /= self._tolerance
        if excess.max() <= 1:
            return True
        # The first cell reaches down to 0 and cannot be halved; a first node that is
        # small enough was chosen for it.
        halvings = (excess > 1) * 1 + (excess > 4) + (excess > 16)
        self._halve(halvings[1:])
        return False

    def _keep_first(self, num_orders: int) -> None:
        """Drop the highest orders of the result, which do not matter in this band."""
        if num_orders == len(self._orders):
            return
        self._orders = self._orders[:num_orders]
        self._below = self._below[:num_orders]
        self._offsets = self._offsets[:num_orders]
        last = max(most for row in self._rows for _, most in row.remaining)
        highest = self._orders.max(initial=1.0)
        top = corrected_order(float(highest), self._p, last)
        count = int(np.searchsorted(self._corners, top)) + 2
        self._corners, self._values = self._corners[:count], self._values[:count]
        self._sums = {}

    def _halve(self, halvings: Integers) -> None:
        """Halve cells between nodes, but not those beyond the ends."""
        halvings[-1] = 0
        halvings[: self._first] = 0

        def function(s: Array) -> Array:
            return log_moments(np.sqrt(2 * s), self._rate, self._corners)

        self._nodes, inside = halved(
            function, self._nodes, self._values[:, 1:], halvings
        )
        self._values = np.concatenate([self._values[:, :1], inside], axis=1)

    def _divide(self, coarse: Array) -> None:
        """Cut pieces between two corners into equal parts.

        Args:
            coarse: By what factor each piece's height is too large, ``(C,)``; it falls
                with the square of the width.
        """
        coarse[-1] = 0
        parts = np.clip(np.ceil(np.sqrt(coarse)), 1, _MOST_PARTS).astype(np.int64)
        places = np.repeat(np.arange(len(parts)), parts - 1)
        first = np.cumsum(parts - 1) - (parts - 1)
        number = np.arange(len(places)) - first[places] + 1
        low, high = self._corners[places - 1], self._corners[places]
        new = low + (high - low) * number / parts[places]
        values = self._at(new)
        self._corners = np.insert(self._corners, places, new)
        self._values = np.insert(self._values, places, values, axis=0)
        self._sums = {}

    def _heights(self) -> Array:
        """Return how far each chord between two corners may lie above the function.

        A convex function lies above the extended chords of both neighbouring pieces.

        Returns:
            float64 ``(C, J + 1)``; piece k lies below corner k. Piece 0 is empty; the
            last one is not used.
        """
        widths = np.diff(self._corners)[:, None]
        chords = np.diff(self._values, axis=0) / widths
        # At order 1 the slope in the order is the Kullback-Leibler divergence.
        first = renyi_divergence(np.sqrt(2 * self._s), self._rate, 1)
        first = np.append(self._rate**2, first)
        left = np.concatenate([first[None], chords[:-1]])
        right = np.concatenate([chords[1:], chords[-1:]])
        below, above = np.maximum(chords - left, 0), np.maximum(right - chords, 0)
        inner = below * (above / np.maximum(below + above, _TINY)) * widths
        return np.concatenate([np.zeros_like(inner[:1]), inner])

    def _bounds(self, row: RowUpdates, heights: Array) -> _Bounds:
        """Return bounds of a row's losses, and where they matter.

        A loss does not matter if it alone gives an epsilon above the cap. Nor does it
        if it exceeds the loss at the order before by more than the offset falls: all
        rows' losses increase with the order, so the order before is better. The
        difference of two orders' losses increases with s, hence this holds for the
        cell if it holds at its lower end.

        The differences of all rows' losses add up to less than the fall of the offset
        if the order is the best one. So a row may be granted a part of the offset in
        proportion to its own difference, besides an equal part.
        """
        sums = self._sums_of(row)
        upper, error = sums.weights @ self._values, sums.shares @ heights
        lower = np.maximum(upper - error, 0)
        matters = lower < self._below[:, None]
        falls = np.diff(self._below)[:, None]  # of the offset, from order to order
        gained = np.maximum(lower[1:] - upper[:-1], 0)
        matters[1:] &= gained <= falls
        slack = np.broadcast_to(
            _EQUAL_PART * self._offsets[:, None] / self._num_rows, lower.shape
        ).copy()
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(gained > 0, np.minimum(gained / falls, 1), 0)
        slack[1:] += (1 - _EQUAL_PART) * self._offsets[1:, None] * part
        matters[:, 0] = True
        inside = np.append(not self._first, self._s <= row.highest)
        inside[1 : 1 + self._first] = inside[-2:] = False  # beyond the ends
        is_far = self._everywhere & ~matters & inside
        matters &= inside
        return _Bounds(upper, error, lower, matters, is_far, slack)

    def _relative_errors(self, bounds: _Bounds) -> Array:
        """Return the certified relative error of every line, 0 where it cannot matter.

        The exact loss F of an order is convex in s. At each node it lies between the
        bounds. Between two nodes it lies above both neighbouring chords, extended from
        the lower bound at the near node and the upper bound at the far one. The error
        is relative to the loss and the row's part of the offset together.

        Returns:
            float64 ``(K, J)``; cell 0 reaches from 0 to the first node.
        """
        upper, error, lower, matters, is_far, slack = bounds
        relative = np.zeros((len(upper), len(self._s)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if not self._first:
                relative[:, 0] = upper[:, 1] / self._s[0] / lower[:, 0] - 1
            gaps = _gaps(self._s, upper[:, 1:], error[:, 1:])
            far = np.where(is_far, _FAR * lower, lower + slack)
            relative[:, 1:] = gaps / far[:, 1:-1]
        used = (matters | is_far)[:, :-1]
        return np.where(used, np.nan_to_num(relative, nan=np.inf), 0.0)

    def _coarseness(self, row: RowUpdates, bounds: _Bounds, heights: Array) -> Array:
        """Return by what factor the height of each piece is too large for a row.

        Returns:
            float64 ``(C,)``, 0 for pieces that need not be divided.
        """
        shares = self._sums_of(row).shares
        coarse = np.zeros(shares.shape[1])
        allowed = _BETWEEN_ORDERS * self._tolerance
        far = np.where(bounds.is_far, _FAR * bounds.lower, bounds.lower + bounds.slack)
        limits = allowed * far
        limits[:, 0] = allowed * bounds.lower[:, 0]
        wrong = (bounds.matters | bounds.is_far) & (bounds.error > limits)
        for k in np.flatnonzero(wrong.any(axis=1)):
            nodes, part = wrong[k], slice(*shares.indptr[k : k + 2])
            used = shares.indices[part][shares.data[part] > 0]
            limit = np.maximum(limits[k, nodes] / shares.data[part].sum(), _TINY)
            found = (heights[np.ix_(used, nodes)] / limit).max(axis=1)
            coarse[used] = np.maximum(coarse[used], found)
        return coarse


def _gaps(s: Array, upper: Array, error: Array) -> Array:
    """Return how far each chord between nodes may lie above a convex function.

    Args:
        s: The nodes, ``(J,)``.
        upper: Values that are not below the function, ``(K, J)``.
        error: By how much they may exceed it, ``(K, J)``.

    Returns:
        float64 ``(K, J - 1)``; the last one is not used.
    """
    lower, widths = upper - error, np.diff(s)
    chords = np.diff(upper, axis=1) / widths
    before = np.concatenate([np.zeros((len(upper), 1)), upper[:, :-2]], axis=1)
    left = (lower[:, :-1] - before) / np.diff(np.append(0.0, s[:-1]))
    right = (upper[:, 2:] - lower[:, 1:-1]) / widths[1:]
    right = np.concatenate([right, chords[:, -1:]], axis=1)
    rise, fall = np.maximum(chords - left, 0), np.maximum(right - chords, 0)
    # The distance to the left line grows from the near node on, that to the right line
    # falls towards the other node: the smaller is largest where they meet.
    place = error[:, 1:] + fall * widths - error[:, :-1]
    place = np.clip(place / np.maximum(rise + fall, _TINY), 0, widths)
    result: Array = np.minimum(
        error[:, :-1] + rise * place, error[:, 1:] + fall * (widths - place)
    )
    return result


def _first_corners(top: float, tolerance: float) -> Array:
    """Return orders from 1 to beyond ``top`` for chords of a function like a(a-1).

    The certified height of a chord of width h is h²/a(a-1) of such a function.
    """
    # The substitution a = cosh²(u) makes equal steps of h/sqrt(a(a-1)) = 2·du.
    step = np.sqrt(tolerance) / 2
    u = np.arange(0, np.arccosh(np.sqrt(top)) + 3 * step, step)
    corners: Array = np.cosh(u) ** 2
    return corners
