"""Notice by the labels that a data set which augments also moves its examples.

If a data set changes its items at random, their contents do not show whether an index
still stands for the same example. Labels, and other small parts of an item that are not
augmented, do: a data set that permutes its examples gives most indices the label of
another example. So the small parts that each index had first are kept, and compared
with later ones.

*Guarantee.* Examples are reported as moved only if each part that could show it has
changed for some index, and if at least half of the new values of each are values that
other indices had. A part could show it if indices have different values, and if it is
not the index itself. So the position that an item returns beside a label, a target that
is augmented too, or a random number in the item, neither report nor hide anything.

*What breaks it.* Examples that are exchanged with others of equal labels. Labels that
are drawn at random from a few values look as if examples moved.

>>> labels, indices = ItemLabels(), np.arange(4)
>>> labels.add(indices, np.array([[5], [6], [7], [8]]))
>>> labels.compare(indices[:2], np.array([[5], [6]]))
>>> labels.have_moved, labels.are_kept
(False, True)
>>> labels.compare(indices[2:], np.array([[5], [8]]))
>>> labels.have_moved, labels.are_kept
(True, False)
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi.attribution.samples import checksums_of_entries

__all__ = ["WIDEST_LABEL", "ItemLabels"]

Indices = NDArray[np.int64]
WIDEST_LABEL = 64
"""Entries of the largest part of an item that is taken for a label."""
_LEAST_SHARE = 0.5  # of the new values of a part that other indices had
_GROWTH = 1.25  # of the number of indices after which their values are sorted again


class ItemLabels:
    """The small parts of the item of each index when it was first delivered.

    Attributes:
        have_moved: Whether labels have shown that examples move; it stays so.
    """

    def __init__(self) -> None:
        self.have_moved = False
        self._first = np.zeros((0, 0), np.int64)
        self._is_known = np.zeros(0, np.bool_)
        self._num_known = self._num_sorted = 0
        self._values: list[Indices] = []  # of each part, sorted
        self._can_show = np.zeros(0, np.bool_)
        self._num_changed = self._num_of_others = np.zeros(0, np.int64)

    @property
    def are_kept(self) -> bool:
        """Whether a part that would show moved examples has never changed."""
        self._sort()
        return bool((self._can_show & (self._num_changed == 0)).any())

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything noted, as tensors."""
        (known,) = self._is_known.nonzero()
        counts = np.stack([self._num_changed, self._num_of_others])
        return {
            "indices": torch.from_numpy(known),
            "first": torch.from_numpy(self._first[known]),
            "counts": torch.from_numpy(counts),
            "have_moved": torch.tensor([self.have_moved]),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "ItemLabels":
        """Return the labels that ``state_dict`` saved.

        Args:
            state: What it returned, with tensors of the right types and shapes.
        """
        labels = cls()
        indices, first = state["indices"].numpy(), state["first"].numpy()
        labels.add(indices, first)
        if len(indices):
            labels._num_changed, labels._num_of_others = state["counts"].numpy().copy()
        labels.have_moved = bool(state["have_moved"].item())
        return labels

    def add(self, indices: Indices, labels: Indices | None) -> None:
        """Note the labels of indices that are delivered for the first time.

        Args:
            indices: Data-set indices, ``(b,)``, none negative.
            labels: Checksums of the small parts of each item, ``(b, p)``; None: not
                known. If p is another one than before, they are left out.
        """
        if labels is None or not len(indices):
            return
        if not self._num_known:
            self._num_changed, self._num_of_others = np.zeros((2, labels.shape[1]), int)
            self._first = np.zeros((0, labels.shape[1]), np.int64)
        if labels.shape[1] != len(self._num_changed):
            return
        if indices.max() >= len(self._is_known):
            size = 2 * int(indices.max()) + 64
            first, is_known = self._first, self._is_known
            self._first = np.zeros((size, labels.shape[1]), np.int64)
            self._is_known = np.zeros(size, np.bool_)
            self._first[: len(first)] = first
            self._is_known[: len(first)] = is_known
        self._first[indices], self._is_known[indices] = labels, True
        self._num_known += len(indices)

    def compare(self, indices: Indices, labels: Indices | None) -> None:
        """Compare the labels of indices whose content has changed with the first ones.

        Args:
            indices: As for ``add``; each was delivered before.
            labels: As for ``add``.
        """
        if labels is None or not self._num_known or self.have_moved:
            return
        if labels.shape[1] != len(self._num_changed):
            return
        known = indices < len(self._is_known)
        known[known] = self._is_known[indices[known]]
        now = labels[known]
        differs = self._first[indices[known]] != now
        if not differs.any():
            return
        self._sort()
        for part, is_other in enumerate(differs.T):
            self._num_changed[part] += np.count_nonzero(is_other)
            found = _are_in(self._values[part], now[is_other, part])
            self._num_of_others[part] += np.count_nonzero(found)
        is_random = self._num_of_others < _LEAST_SHARE * self._num_changed
        changed = self._num_changed[self._can_show & ~is_random]
        self.have_moved = bool(len(changed) and changed.all())

    def _sort(self) -> None:
        """Find the values of each part, and the parts that can show moved examples."""
        if self._num_known <= _GROWTH * self._num_sorted:
            return
        (places,) = self._is_known.nonzero()
        first = self._first[places]
        self._values = [np.unique(part) for part in first.T]
        itself = checksums_of_entries(places.astype(np.float32)[:, None])[:, None]
        differ = np.array([len(values) > 1 for values in self._values])
        self._can_show = differ & (first != itself).any(axis=0)
        self._num_sorted = self._num_known


def _are_in(values: Indices, wanted: Indices) -> NDArray[np.bool_]:
    """Return which of some numbers are in a sorted array that is not empty."""
    places = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    found: NDArray[np.bool_] = values[places] == wanted
    return found
