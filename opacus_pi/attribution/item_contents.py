"""Notice a data set that returns one example under different indices.

A data set may permute itself between epochs, or choose at random what it returns. Then
an index does not stand for one example, and what is recorded under it belongs to
several. So a checksum of the content of each index is kept from the first time that it
was delivered. If an index later has other content, this is looked up among the others.

*Guarantee.* A sample is reported only if its index had other content before, and if
exactly one other index had the content that it has now. At least half of the
changed samples so far must be like that. A data set that changes its items at random
(augmentation) is not reported: if contents are few, so that a changed item is now and
then equal to exactly one other, this happens at most in a share λ exp(-λ) ≤ 0.37, where
λ is the number of examples for each content. 16 bytes are kept for each example.

*What breaks it.* Moved items that are also changed, items of fewer than four
entries, and a data set that was permuted before a run was resumed. At most
64 entries of an item are compared, of its largest tensor.

>>> contents = ItemContents()
>>> contents.moved(np.array([0, 1, 2]), np.array([11, 12, 13]))
array([False, False, False])
>>> contents.moved(np.array([1, 2]), np.array([11, 99]))  # half of the changed ones
array([ True, False])
"""

import numpy as np
from numpy.typing import NDArray

from opacus_pi.attribution.samples import checksums_of_entries, places_compared

__all__ = ["MIN_ENTRIES", "ItemContents", "content_sums"]

Indices = NDArray[np.int64]
MIN_ENTRIES = 4
"""Entries of an item below which its content says nothing: many items are equal."""
_FEWEST_COMPARED = 32  # entries of an item: more would cost time in each update
_LEAST_SHARE = 0.5  # of changed samples, from which on they are taken to have moved
_GROWTH = 1.25  # of the number of known contents after which they are sorted again


def content_sums(entries: NDArray[np.float32]) -> Indices:
    """Compute a checksum of each row from at most 64 of its entries, int64 ``(b,)``.

    Args:
        entries: float32 ``(b, k)``.
    """
    return checksums_of_entries(
        entries[:, places_compared(entries.shape[1], _FEWEST_COMPARED)]
    )


class ItemContents:
    """The checksum of each index of a data set when it was first delivered."""

    def __init__(self) -> None:
        self._sums = np.zeros(0, np.int64)  # 0: not delivered yet
        self._num_known = 0
        self._unique = np.zeros(0, np.int64)  # sorted; exactly one index each
        self._num_sorted = 0
        self._num_changed = self._num_moved = 0

    def moved(self, indices: Indices, sums: Indices) -> NDArray[np.bool_]:
        """Return which samples have the content that another index had before.

        Args:
            indices: Data-set indices of the samples, ``(b,)``, none negative.
            sums: Checksums of their contents, ``(b,)``.

        Returns:
            bool ``(b,)``.
        """
        try:
            own = self._sums[indices]
        except IndexError:
            more = np.zeros(2 * int(indices.max()) + 64, np.int64)
            more[: len(self._sums)] = self._sums
            self._sums = more
            own = self._sums[indices]
        moved = np.zeros(len(sums), np.bool_)
        (other,) = (own != sums).nonzero()
        if not len(other):  # nearly always after the first epochs
            return moved
        is_new = own[other] == 0
        new, changed = other[is_new], other[~is_new]
        self._sums[indices[new]] = sums[new]
        self._num_known += len(new)
        if len(changed):
            are_known = self._are_known(sums[changed])
            self._num_changed += len(changed)
            self._num_moved += int(np.count_nonzero(are_known))
            if self._num_moved >= _LEAST_SHARE * self._num_changed:
                moved[changed] = are_known
        return moved

    def _are_known(self, sums: Indices) -> NDArray[np.bool_]:
        """Return which checksums exactly one index had."""
        if self._num_known > _GROWTH * self._num_sorted:
            known, counts = np.unique(self._sums[self._sums != 0], return_counts=True)
            self._unique, self._num_sorted = known[counts == 1], self._num_known
        if not len(self._unique):
            return np.zeros(len(sums), np.bool_)
        places = np.searchsorted(self._unique, sums).clip(max=len(self._unique) - 1)
        found: NDArray[np.bool_] = self._unique[places] == sums
        return found
