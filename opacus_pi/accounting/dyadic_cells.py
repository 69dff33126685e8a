"""Cells of the positive numbers, and which of them a number lies in, without a search.

**Idea.** A cell is a dyadic part of an octave: its ends are float64 numbers, and cells
are made smaller by halving. Within an octave the bits of a float64 are linear in its
value, so its leading bits name the cell, and a look-up takes a few nanoseconds.

**Guarantee.** A number is never put into a cell that does not contain it.

>>> cells = DyadicCells(octaves(1.0, 4.0))
>>> cells.of(np.array([0.0, 0.5, 1.0, 3.9, 4.0])).tolist()
[0, 0, 1, 2, 3]
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["DyadicCells", "halved", "octaves"]

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
_MANTISSA = 52  # bits of a float64's mantissa


class DyadicCells:
    """The cells between nodes, with those below the first and above the last node.

    Cell 0 holds the numbers below the first node, cell i those from node i - 1 up to
    but not including node i, the last cell those from the last node on.

    The range of the nodes is cut into equal buckets (parts of an octave). A bucket has
    as many equal slots as its smallest cell needs. One more bucket with one slot lies
    before the first node and one after the last. ``_base`` turns the leading bits of a
    number directly into its slot.

    Args:
        nodes: The bits of the nodes, ascending, as ``octaves`` and ``halved`` give
            them.
    """

    def __init__(self, nodes: Integers) -> None:
        parts = min(range(_MANTISSA), key=lambda p: _num_slots(nodes, p))
        shifts = _slot_shifts(nodes, parts)
        self._bucket_shift = _MANTISSA - parts
        starts = nodes[0] + (np.arange(len(shifts)) << self._bucket_shift)
        counts = 1 << (self._bucket_shift - shifts)
        offsets = np.cumsum(counts) - counts
        place = np.arange(counts.sum()) - np.repeat(offsets, counts)
        slots = np.repeat(starts, counts) + (place << np.repeat(shifts, counts))
        cells = np.searchsorted(nodes, slots, side="right")
        self.of_slots = np.concatenate([[0], cells, [len(nodes)]])
        self._first = (nodes[0] >> self._bucket_shift) - 1
        self._last = nodes[-1] >> self._bucket_shift
        self._shift = np.concatenate([[63], shifts, [63]])
        base = 1 + offsets - (starts >> shifts)  # slot = (bits >> shift) + base
        self._base = np.concatenate([[0], base, [len(self.of_slots) - 1]])

    def slots(self, s: Array) -> Integers:
        """Return the slot of each number; ``of_slots`` says which cell a slot is in.

        Args:
            s: float64, at least 0, any shape; ``inf`` is in the last cell.
        """
        bits = s.view(np.int64)
        bucket = bits >> self._bucket_shift
        np.clip(bucket, self._first, self._last, out=bucket)
        bucket -= self._first
        slot: Integers = bits >> self._shift[bucket]
        slot += self._base[bucket]
        return slot

    def of(self, s: Array) -> Integers:
        """Return the cell of each number.

        Args:
            s: float64, at least 0, any shape; ``inf`` is in the last cell.
        """
        result: Integers = self.of_slots[self.slots(s)]
        return result


def octaves(low: float, high: float) -> Integers:
    """Return the bits of the powers of two around [low, high], at least two.

    Args:
        low: Above 0.
        high: Above ``low``.
    """
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return np.exp2(np.arange(first, max(last, first + 1) + 1)).view(np.int64)


def halved(
    function: Callable[[Array], Array],
    nodes: Integers,
    values: Array,
    halvings: Integers,
) -> tuple[Integers, Array]:
    """Return nodes with cells halved, and the function's values at all of them.

    Args:
        function: From new nodes ``(m,)`` to values ``(..., m)``.
        nodes: The bits of the nodes.
        values: The function's values at the nodes, ``(..., len(nodes))``.
        halvings: How often to halve each cell between two nodes.
    """
    counts = 1 << halvings
    first = np.cumsum(counts) - counts
    place = np.arange(counts.sum()) - np.repeat(first, counts)
    finer = np.repeat(nodes[:-1], counts)
    finer += place * np.repeat(np.diff(nodes) >> halvings, counts)
    result = np.empty((*values.shape[:-1], len(finer) + 1))
    result[..., np.append(first, len(finer))] = values
    new = np.flatnonzero(place > 0)
    result[..., new] = function(finer[new].view(np.float64))
    return np.append(finer, nodes[-1]), result


def _slot_shifts(nodes: Integers, parts: int) -> Integers:
    """Return how many trailing bits do not matter within a slot, for each bucket.

    A bucket is 2^-parts of an octave. Its slots are as wide as its smallest cell.
    """
    whole = _MANTISSA - parts
    buckets = (nodes - nodes[0]) >> whole
    shifts = np.full(buckets[-1], whole)
    cell_shifts = np.log2(np.diff(nodes)).astype(np.int64)
    np.minimum.at(shifts, buckets[:-1], cell_shifts)
    return shifts


def _num_slots(nodes: Integers, parts: int) -> int:
    """Return the memory, in slots, of a layout with 2^parts buckets an octave."""
    num_buckets = (nodes[-1] - nodes[0]) >> (_MANTISSA - parts)
    if num_buckets > 4 * len(nodes):
        return 1 << 62
    shifts = _slot_shifts(nodes, parts)
    return int(num_buckets + (1 << (_MANTISSA - parts - shifts)).sum())
