"""Notice a data set that returns one example under different indices.

A data set may permute itself between epochs, or choose at random what it returns. Then
an index does not stand for one example, and what is recorded under it belongs to
several. So a checksum of the content of each index is kept from the first time that it
was delivered. If an index later has other content, this is looked up among the others.

*Guarantee.* A sample is reported only if its index had other content before, and if
exactly one other index had the content that it has now. At least half of the changed
samples so far must have the content of other indices, and more of them than chance
explains. So a data set that changes its items at random (augmentation) is not reported,
even if contents are few and a changed item is now and then equal to another one. How
often chance does this is estimated by the share of examples whose first content another
example had, too. Where there are none, the first moved sample is reported. The labels
of changed samples are compared, too (``item_labels``): once they show that examples
have moved, every changed sample is reported. 18 bytes are kept for each example, and 8
for each of its labels.

*What breaks it.* Moved items that are also changed, where labels do not show it:
``doubt`` says so. If examples are equal, the first
moved samples are not reported: about 10 if half of many examples are equal to others,
more if the examples are few. A data set without equal items that becomes most of its
other items by random changes is reported. At most 64 entries of an item are compared,
of its largest tensor, or all tensors of an item of single numbers.

>>> contents = ItemContents()
>>> contents.moved(np.array([0, 1, 2]), np.array([11, 12, 13]))
array([False, False, False])
>>> contents.moved(np.array([1, 2]), np.array([11, 99]))  # half of the changed ones
array([ True, False])
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi._validate import require
from opacus_pi.attribution.causes import (
    CONTENTS_OF_OTHERS,
    LABELS_CHANGED,
    LABELS_KEPT,
    MOVED_IN_DATA_SET,
    NOTHING_KEPT,
    Cause,
)
from opacus_pi.attribution.item_fingerprints import ItemFingerprints
from opacus_pi.attribution.item_labels import WIDEST_LABEL, ItemLabels
from opacus_pi.attribution.samples import checksums_of_entries, places_compared

__all__ = [
    "SMALL",
    "ItemContents",
    "content_sums",
    "contents_of",
    "joint_sums",
    "labels_of",
]

Indices = NDArray[np.int64]
SMALL = 4
"""Entries of the largest part of an item below which all parts are its content."""
_FEWEST_COMPARED = 32  # entries of an item: more would cost time in each update
_LEAST_SHARE = 0.5  # of changed samples, from which on they are taken to have moved
_IMPROBABLE = math.log(1e-3)  # log of the probability below which chance is ruled out
_LABELS = "labels."  # prefix of names in a saved state
_MAX_INDEX = 1 << 32  # of a saved state: memory is needed for all indices up to it
_GROWTH = 1.25  # of the number of known contents after which they are sorted again


def content_sums(
    entries: NDArray[np.float32], widths: Indices | None = None
) -> Indices:
    """Compute a checksum of each row from at most 64 of its entries, int64 ``(b,)``.

    The checksum of a row does not depend on the other rows.

    Args:
        entries: float32 ``(b, k)``: what ``places_compared`` looks at in each item.
        widths: int64 ``(b,)``: number of entries of each item, where rows of shorter
            items have zeros at their ends. None: all are equal.
    """
    if widths is None or (widths == widths[0]).all():
        places = places_compared(entries.shape[1], _FEWEST_COMPARED)
        return checksums_of_entries(entries[:, places])
    each = np.stack([_places_of(width) for width in widths.tolist()])
    padded = np.pad(entries, ((0, 0), (0, 1)))  # a zero for the places left over
    return checksums_of_entries(np.take_along_axis(padded, each, axis=1))


def joint_sums(parts: Sequence[Indices]) -> Indices:
    """Compute one checksum of all parts of each item, int64 ``(b,)``.

    Args:
        parts: The checksums of each part, ``(b,)``.
    """
    return checksums_of_entries(np.stack(parts, axis=1).view(np.float32))


def contents_of(items: ItemFingerprints) -> Indices:
    """Compute a checksum of the largest part of each item, or of all if it is small.

    It does not depend on the other items of the batch, nor do the labels.

    Args:
        items: Fingerprints of the items.

    Returns:
        int64 ``(n,)``; 0 for an item without a fingerprint.
    """
    sums = np.zeros(len(items), np.int64)
    largest, is_small = _largest_parts(items)
    for part in np.unique(largest).tolist():
        rows = largest == part
        sums[rows] = content_sums(items.entries[part], items.widths[:, part])[rows]
    if is_small.any():
        each = [items.checksums_of(part) for part in range(items.widths.shape[1])]
        sums[is_small] = joint_sums(each)[is_small] if each else 0
    return sums


def labels_of(items: ItemFingerprints) -> Indices:
    """Compute checksums of the small parts of each item, but not of its content.

    Args:
        items: Fingerprints of the items.

    Returns:
        int64 ``(n, m)``: 0 for what is no label.
    """
    widths = items.widths
    largest, is_small = _largest_parts(items)
    is_label = (widths > 0) & (widths <= WIDEST_LABEL)
    if widths.size:
        rows = np.flatnonzero(~is_small)
        is_label[rows, largest[rows]] = False
    sums = np.zeros_like(widths)
    for part in np.flatnonzero(is_label.any(axis=0)).tolist():
        sums[:, part] = np.where(is_label[:, part], items.checksums_of(part), 0)
    return sums


def _largest_parts(items: ItemFingerprints) -> tuple[Indices, NDArray[np.bool_]]:
    """Return the largest part of each item, and which items have only small parts."""
    if not items.widths.size:
        return np.zeros(0, np.int64), np.ones(len(items), np.bool_)
    return items.widths.argmax(axis=1), items.widths.max(axis=1) < SMALL


@lru_cache(maxsize=4096)
def _places_of(width: int) -> Indices:
    """Return which of its entries the checksum of an item uses, and -1 for the rest."""
    places = np.full(2 * _FEWEST_COMPARED, -1)
    if width:
        own = places_compared(len(places_compared(width)), _FEWEST_COMPARED)
        places[: len(own)] = own
    return places


def _not_known() -> None:
    """Return no labels."""


class ItemContents:
    """The checksum of each index of a data set when it was first delivered.

    Labels are compared where the content of an index has changed.

    Attributes:
        num_same: How often an index was delivered again with the same content.
    """

    def __init__(self) -> None:
        self._labels = ItemLabels()
        self._sums = np.zeros(0, np.int64)  # 0: not delivered yet
        self._num_known = 0
        self._values = np.zeros(0, np.int64)  # the known ones, sorted
        self._is_unique = np.zeros(0, np.bool_)  # whether exactly one index has each
        self._num_sorted = 0
        self._num_changed = self._num_moved = self.num_same = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is known of each index, as tensors, for a checkpoint."""
        (known,) = self._sums.nonzero()
        labels = self._labels.state_dict()
        return {
            "indices": torch.from_numpy(known),
            "sums": torch.from_numpy(self._sums[known]),
            "counts": torch.tensor([self._num_changed, self._num_moved, self.num_same]),
            **{f"{_LABELS}{name}": value for name, value in labels.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "ItemContents":
        """Return the contents that ``state_dict`` saved.

        Args:
            state: What it returned.

        Raises:
            ValueError: If an entry is missing, or of another type or shape.
        """
        _require_whole(state)
        contents = cls()
        contents.moved(state["indices"].numpy(), state["sums"].numpy())
        counts = state["counts"].tolist()
        contents._num_changed, contents._num_moved, contents.num_same = counts
        parts = state.items()
        labels = {n.removeprefix(_LABELS): v for n, v in parts if n.startswith(_LABELS)}
        contents._labels = ItemLabels.from_state_dict(labels)
        return contents

    def moved(
        self,
        indices: Indices,
        sums: Indices,
        labels_of: Callable[[], Indices | None] = _not_known,
    ) -> NDArray[np.bool_]:
        """Return which samples seem to be another example than their index had before.

        Args:
            indices: Data-set indices of the samples, ``(b,)``, none negative.
            sums: Checksums of their contents, ``(b,)``.
            labels_of: Returns checksums of their labels, ``(b, p)``, or None. Called
                where an index is new or has other content than at first.

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
        self.num_same += len(sums) - len(other)
        if not len(other):  # nearly always after the first epochs
            return moved
        is_new = own[other] == 0
        new, changed = other[is_new], other[~is_new]
        labels = labels_of()
        if len(new):
            self._sums[indices[new]] = sums[new]
            self._num_known += len(new)
            self._labels.add(indices[new], _rows(labels, new))
        if len(changed):
            self._labels.compare(indices[changed], _rows(labels, changed))
            are_known, are_unique = self._looked_up(sums[changed])
            self._num_changed += len(changed)
            self._num_moved += int(np.count_nonzero(are_known))
            if self._labels.have_moved:
                moved[changed] = True
            elif self._have_moved():
                moved[changed] = are_unique
        return moved

    def cause(self) -> Cause:
        """Return why samples are reported as moved."""
        return MOVED_IN_DATA_SET if self._have_moved() else LABELS_CHANGED

    def doubt(self) -> Cause | None:
        """Return why contents do not show that each index stands for one example.

        None is returned if no content has changed, and if moved samples were reported.
        """
        if not self._num_changed or self._labels.have_moved or self._have_moved():
            return None
        if self._num_moved >= _LEAST_SHARE * self._num_changed:
            return CONTENTS_OF_OTHERS
        return LABELS_KEPT if self._labels.are_kept else NOTHING_KEPT

    def _have_moved(self) -> bool:
        """Return whether chance does not explain the contents of changed samples."""
        share = self._num_moved / self._num_changed
        return share >= _LEAST_SHARE and self.is_beyond_chance(
            self._num_moved, self._num_changed
        )

    def is_beyond_chance(self, num: int, total: int) -> bool:
        """Return whether chance does not explain that so many samples are of others.

        By chance, a content is that of another example as often as the first contents
        are. Chernoff's bound limits the probability that so many samples have one; two
        standard errors of the share are allowed for.

        Args:
            num: Samples that have the content of another index.
            total: All samples that were compared.
        """
        share, num_sorted = num / total, max(1, self._num_sorted)
        equal = 1 - np.count_nonzero(self._is_unique) / num_sorted
        by_chance = equal + 2 * math.sqrt(equal / num_sorted)
        if not by_chance or share <= by_chance:
            return num > 0 and not by_chance
        divergence = share * math.log(share / by_chance)
        if share < 1:
            divergence += (1 - share) * math.log((1 - share) / (1 - by_chance))
        return -total * divergence <= _IMPROBABLE

    def of_others(
        self, indices: Indices, sums: Indices
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which contents other indices had at first, and which exactly one had.

        Args:
            indices: The index for which each content is taken, ``(b,)``, delivered.
            sums: Checksums of the contents, ``(b,)``.

        Returns:
            Two masks, bool ``(b,)``.
        """
        are_known, are_unique = self._looked_up(sums)
        is_own = self._sums.take(indices, mode="clip") == sums
        return are_known & ~is_own, are_unique & ~is_own

    def _looked_up(self, sums: Indices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which checksums one index had at least, and which exactly one had."""
        if self._num_known > _GROWTH * self._num_sorted:
            known = self._sums[self._sums != 0]
            self._values, counts = np.unique(known, return_counts=True)
            self._is_unique, self._num_sorted = counts == 1, self._num_known
        if not len(self._values):
            return np.zeros(len(sums), np.bool_), np.zeros(len(sums), np.bool_)
        places = np.searchsorted(self._values, sums).clip(max=len(self._values) - 1)
        found: NDArray[np.bool_] = self._values[places] == sums
        return found, found & self._is_unique[places]


def _require_whole(state: Mapping[str, Any]) -> None:
    """Refuse a state that ``ItemContents.state_dict`` cannot have returned."""
    indices, first = (_shape_of(state, f"{_LABELS}{n}") for n in ("indices", "first"))
    size, num_labelled = max(0, _shape_of(state, "indices")[0]), max(0, indices[0])
    num_parts = max(0, first[-1])
    shapes = {
        "indices": (size,),
        "sums": (size,),
        "counts": (3,),
        f"{_LABELS}indices": (num_labelled,),
        f"{_LABELS}first": (num_labelled, num_parts),
        f"{_LABELS}counts": (2, num_parts),
        f"{_LABELS}have_moved": (1,),
    }
    for name, shape in shapes.items():
        kind = torch.bool if name.endswith("have_moved") else torch.int64
        is_right = _shape_of(state, name) == shape and state[name].dtype is kind
        if is_right and name.endswith("indices"):
            is_right = not ((state[name] < 0) | (state[name] >= _MAX_INDEX)).any()
        require(
            is_right,
            f"The saved contents are incomplete or damaged: their entry {name!r} is "
            "missing, of another type or shape, or out of range.",
            "Resume from another checkpoint.",
        )


def _shape_of(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Return the shape of an entry of a saved state, ``(-1,)`` if it is no tensor."""
    value = state.get(name)
    return tuple(value.shape) or (-1,) if isinstance(value, Tensor) else (-1,)


def _rows(labels: Indices | None, places: Indices) -> Indices | None:
    """Return the labels of some samples; None if they are not known."""
    return None if labels is None else labels[places]
