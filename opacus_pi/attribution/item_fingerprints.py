"""Fingerprints of the items of a data set, taken before ``collate_fn``.

The items are fingerprinted where they are loaded, in the worker process, by the same
checksums as the samples of a finished batch. ``collate_identity`` looks the samples up
among them.

*Guarantee.* No item is changed and no random number is drawn. No reference to an item
is kept, so ``collate_fn`` cannot change a fingerprint: an item that it changes in place
has the fingerprint of what the data set returned.

*What breaks it.* Images, strings, sparse or complex tensors, and tensors on a GPU have
no fingerprint (width 0). Two items that differ only in such parts, or only in entries
that checksums do not use (they use all of at most 512, else at least 256), have the
same fingerprint. Other items have the same fingerprint with a probability of about
2^-64.

>>> import torch
>>> items = [(torch.tensor([1.0, 2.0]), 5), (torch.tensor([3.0, 4.0]), 5)]
>>> fingerprint_items(items).widths
array([[2, 1],
       [2, 1]])
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi.attribution.samples import (
    DelayedChecksums,
    checksums_of_entries,
    children_of,
    is_dense,
    places_compared,
)
from opacus_pi.attribution.whole_contents import has_lookalikes, whole_checksums

__all__ = ["ItemFingerprints", "fingerprint_items"]

_MAX_DEPTH = 6  # of nested items; a list may contain itself
_MAX_PARTS = 64  # of an item that are fingerprinted
_FEW_NUMBERS = 8  # a list of more numbers than these is one part, not one part each
_MAX_STACKED = 4096  # entries of a tensor up to which copying all of them is cheapest
_NUMBERS = frozenset({int, float, bool})
_SIMPLE = _NUMBERS | {Tensor, np.ndarray, str, type(None)}
_NO_ENTRIES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class ItemFingerprints:
    """Checksums of the tensors, arrays and numbers in each item of a batch.

    Args:
        widths: int64 ``(b, m)``: number of entries in the j-th part of item i; 0 if
            the item has no such part, or a part that has no checksum.
        entries: For each of the m parts, the entries that the checksums look at,
            float32 ``(b, k)``, with zeros after the last one.
        shapes: For each of the m parts its shape in each item; ``()`` for a number and
            for what has no checksum.
        whole: For each part that is as wide in all items, and equal in the entries of
            two items that are looked at: checksums of all entries, int64 ``(b,)``.
    """

    widths: NDArray[np.int64]
    entries: list[NDArray[np.float32]]
    shapes: list[list[tuple[int, ...]]]
    whole: dict[int, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.widths)

    @cached_property
    def _by_part(self) -> dict[int, NDArray[np.int64]]:
        """The checksums that were asked for."""
        return {}

    def checksums_of(self, part: int) -> NDArray[np.int64]:
        """Return the checksums of one part, int64 ``(b,)``; 0 where the width is 0.

        They are comparable with ``sample_checksums`` of the collated batch, and
        computed when they are asked for.

        Args:
            part: Which of the m parts.
        """
        if part not in self._by_part:
            self._by_part[part] = checksums_of_entries(self.entries[part])
        return self._by_part[part]

    @property
    def checksums(self) -> NDArray[np.int64]:
        """The checksums of all parts, int64 ``(b, m)``; of all entries where known."""
        sums = np.zeros_like(self.widths)
        for part in range(sums.shape[1]):
            sums[:, part] = self.best_checksums_of(part)
        return sums

    def best_checksums_of(self, part: int) -> NDArray[np.int64]:
        """Return the checksums of all entries of a part, if they are known.

        Args:
            part: Which of the m parts.

        Returns:
            int64 ``(b,)``; else what ``checksums_of`` returns.
        """
        whole = self.whole.get(part)
        return self.checksums_of(part) if whole is None else whole


def fingerprint_items(items: Any) -> ItemFingerprints:
    """Compute checksums of the parts of each item.

    Args:
        items: What the data set returned: a list of items, each any nesting of lists,
            tuples, mappings and plain objects of tensors, arrays and numbers. For any
            other object (``__getitems__`` may return one) there are no fingerprints.

    Returns:
        One row for each item, and as many columns as the item with the most parts has.
    """
    parts = [_parts(item) for item in items] if isinstance(items, list | tuple) else []
    num_parts = max(map(len, parts), default=0)
    if any(len(own) != num_parts for own in parts):
        parts = [own + [None] * (num_parts - len(own)) for own in parts]
    widths = np.zeros((len(parts), num_parts), dtype=np.int64)
    entries, shapes, whole = [], [], dict[int, NDArray[np.int64]]()
    with torch.no_grad():  # an item may require a gradient
        for j, column in enumerate(zip(*parts, strict=True)):
            widths[:, j], found, shapes_of_part = _column(column)
            entries.append(found)
            shapes.append(shapes_of_part)
            if _are_sampled(widths[:, j], found) and has_lookalikes(found):
                whole[j] = np.array([_whole_checksum(part) for part in column])
    return ItemFingerprints(widths, entries, shapes, whole)


def _are_sampled(widths: NDArray[np.int64], entries: NDArray[np.float32]) -> bool:
    """Return whether a part is as wide in all items, and not all of it looked at."""
    return bool(widths[0] > entries.shape[1] and (widths == widths[0]).all())


def _whole_checksum(part: Any) -> int:
    """Return the checksum of all entries of a tensor, an array or a list."""
    if not isinstance(part, Tensor):
        part = torch.from_numpy(_as_float32(np.asarray(part)))
    return int(whole_checksums(part.reshape(1, -1), 0)[0])


def _parts(item: Any) -> list[Any]:
    """List the parts of an item that have one checksum each; of very many, the first.

    A list of numbers, such as token ids, is one part.
    """
    is_plain = type(item) in (tuple, list) and _SIMPLE.issuperset(map(type, item))
    if is_plain and not _is_list_of_numbers(item):
        return list(item[:_MAX_PARTS])  # nearly always, and then no recursion is needed
    return list(islice(_leaves(item, _MAX_DEPTH), _MAX_PARTS))


def _is_list_of_numbers(part: Any) -> bool:
    """Return whether a part is a list, or a long tuple, of numbers only."""
    is_long = type(part) is tuple and len(part) > _FEW_NUMBERS
    is_sequence = type(part) is list or is_long
    return is_sequence and bool(part) and _NUMBERS.issuperset(map(type, part))


def _leaves(nested: Any, depth: int) -> Iterator[Any]:
    """Yield the innermost parts of nested containers and plain objects.

    The inside of an object without tensors, such as an image, yields parts without a
    checksum, or numbers that are equal in all items.
    """
    if isinstance(nested, Tensor) or _is_list_of_numbers(nested) or depth == 0:
        yield nested
        return
    is_empty = True
    for child in islice(children_of(nested), _MAX_PARTS):
        is_empty = False
        yield from _leaves(child, depth - 1)
    if is_empty:
        yield nested


def _column(
    column: Sequence[Any],
) -> tuple[Any, NDArray[np.float32], list[tuple[int, ...]]]:
    """Return the widths, the entries looked at, and the shapes of one part of all."""
    kinds = set(map(type, column))
    if kinds == {Tensor} and _can_be_stacked(column):
        stacked = DelayedChecksums(torch.stack(list(column)), 0)
        if stacked.width:
            shapes = [tuple(column[0].shape)] * len(column)
            return stacked.width, stacked.entries, shapes
    if kinds <= _NUMBERS and (numbers := np.array(column)).dtype.kind in "biuf":
        return 1, _as_float32(numbers)[:, None], [()] * len(column)
    found = [_entries(part) for part in column]
    lengths = [len(entries) for _, entries in found]
    matrix = np.zeros((len(found), max(lengths)), dtype=np.float32)
    for row, (_, entries) in zip(matrix, found, strict=True):
        row[: len(entries)] = entries
    return [width for width, _ in found], matrix, [_shape(part) for part in column]


def _shape(part: Any) -> tuple[int, ...]:
    """Return the shape of a part; ``()`` if it is not an array."""
    if isinstance(part, Tensor | np.ndarray):
        return tuple(part.shape)
    return (len(part),) if _is_list_of_numbers(part) else ()


def _can_be_stacked(column: Sequence[Tensor]) -> bool:
    """Return whether tensors are so small and alike that one joint copy is cheapest."""
    first = column[0]
    return (
        is_dense(first)
        and first.numel() <= _MAX_STACKED
        and all(
            t.shape == first.shape and t.layout is first.layout and t.is_cpu
            for t in column
        )
    )


def _entries(part: Any) -> tuple[int, NDArray[np.float32]]:
    """Return the number of entries of one part, and those that its checksum looks at.

    Returns:
        Width and float32 entries; 0 and an empty array for a part without a checksum.
    """
    if isinstance(part, Tensor):
        if not (is_dense(part) and part.is_cpu and part.numel()) or part.is_complex():
            return 0, _NO_ENTRIES
        places = torch.from_numpy(places_compared(part.numel()))
        sampled = part.detach().reshape(-1).index_select(0, places).resolve_neg()
        return part.numel(), sampled.float().numpy()
    if isinstance(part, list | tuple):
        is_array = _NUMBERS.issuperset(map(type, part))
    else:
        is_array = isinstance(part, np.ndarray | np.generic) or type(part) in _NUMBERS
    if is_array:
        return _array_entries(part)
    return 0, _NO_ENTRIES


def _array_entries(part: Any) -> tuple[int, NDArray[np.float32]]:
    """Do the same as ``_entries``, for an array, a number or a list of numbers."""
    array = np.asarray(part)
    if array.dtype.kind not in "biuf" or not array.size:  # text, objects, dates
        return 0, _NO_ENTRIES
    return array.size, _as_float32(array.reshape(-1)[places_compared(array.size)])


def _as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """Convert as torch does: a number that is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
