"""Find lists of single samples in a batch, as ``tuple(zip(*items))`` returns them.

Such a collate function does not stack its samples: the batch holds a list with one
tensor, or one dict or tuple of tensors, for each sample. None of these tensors has a
dimension that runs over samples, whatever its shape. So the tensors that the entries of
a list have in the same place, a *column*, are treated as one tensor with a sample in
each row. Samples of different shapes are padded with zeros to compare them with items.

*Guarantee.* A list is taken for one of samples only if each column has the shapes of
one part of the items, and the list is as long as the batch, or all entries have the
content of that part. Stacking adds a dimension, so a list of stacked tensors has other
shapes.

*What breaks it.* A list of samples that ``collate_fn`` resized is not recognised. A
list of tensors that are each made of all items, have the shapes of items, and are as
many as the items is taken for a list of samples.

>>> from opacus_pi.attribution.item_fingerprints import fingerprint_items
>>> import torch
>>> items = [(torch.tensor([[1.0, 2.0]]), 0), (torch.tensor([[3.0, 4.0]]), 1)]
>>> batch = tuple(zip(*items))
>>> places = places_of_lists(fingerprint_items(items), batch)
>>> [column.stacked().shape for column in separated(batch, places).columns]
[torch.Size([2, 1, 2])]
"""

from collections import Counter
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from opacus_pi._torch_compat import StorageWeakRef
from opacus_pi.attribution.item_fingerprints import ItemFingerprints
from opacus_pi.attribution.samples import (
    DelayedChecksums,
    DeliveredTensor,
    StoredSamples,
    children_of,
    places_compared,
    sample_checksums,
    tensors_in,
)
from opacus_pi.attribution.whole_contents import has_lookalikes, whole_checksums

__all__ = [
    "Column",
    "DeliveredColumn",
    "Place",
    "Separated",
    "places_of_lists",
    "separated",
]

Indices = NDArray[np.int64]
Place = tuple[int, ...]
"""Which child of the batch a list is, of that child which one, and so on."""

_MAX_DEPTH = 4  # of lists in a batch


class Column:
    """The tensors that the entries of a list of samples have in the same place.

    Args:
        samples: One tensor for each sample, at least one.
    """

    def __init__(self, samples: list[Tensor]) -> None:
        self.samples = samples
        self.is_even = len({sample.shape for sample in samples}) == 1

    def stacked(self) -> Tensor:
        """Return one tensor, ``(b, ...)``; smaller samples end with zeros."""
        if self.is_even:
            return torch.stack([sample.detach() for sample in self.samples])
        shapes = np.array([sample.shape for sample in self.samples])
        largest = shapes.max(axis=0)
        return torch.stack(
            [
                F.pad(
                    s.detach(),
                    [n for gap in (largest - s.shape)[::-1] for n in (0, gap)],
                )
                for s in self.samples
            ]
        )

    def checksums(self) -> tuple[Indices, Indices]:
        """Return the width and the checksum of each sample, int64 ``(b,)`` each."""
        found = [sample_checksums(sample[None], 0) for sample in self.samples]
        return np.array([w for w, _ in found]), np.array([s[0] for _, s in found])

    @cached_property
    def content(self) -> DelayedChecksums:
        """The content of samples of one shape, without a copy of all of it."""
        width = self.samples[0].numel()
        rows = [sample.detach().reshape(-1) for sample in self.samples]
        places = places_compared(width) if width else np.empty(0, np.int64)
        if len(places) < width:
            chosen = torch.from_numpy(places).to(rows[0].device)
            rows = [row.index_select(0, chosen) for row in rows]
        content = DelayedChecksums(torch.stack(rows), 0)
        if len(places) < width and content.width:
            content.width = width
            if content.is_on_host and has_lookalikes(content.entries):
                content.whole = whole_checksums(self.stacked(), 0)
        return content


class DeliveredColumn(DeliveredTensor):
    """A delivered list of samples of one shape, which are recognised by content.

    Args:
        column: The samples.
        verify: Whether to look at their content.
    """

    def __init__(self, column: Column, *, verify: bool) -> None:
        self.dim, self.stored = 0, _StoredApart(column.samples)
        self.content = column.content if verify else None
        self._is_audited = False

    def is_whole(self, tensor: Tensor, dim: int) -> bool:
        """Return False: no tensor has the memory of all samples."""
        return False


class _StoredApart(StoredSamples):
    """The places in memory of samples that are each a tensor.

    Args:
        samples: The tensors, of one shape.
    """

    def __init__(self, samples: list[Tensor]) -> None:
        self._sizes, self._number = tuple(samples[0].shape), len(samples)
        self._storages = [StorageWeakRef(s.untyped_storage()) for s in samples]

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self._number

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self._sizes

    def positions(self, tensor: Tensor, dim: int) -> None:
        """Return None: a tensor of several samples is a copy of them."""

    def expired(self) -> bool:
        """Return whether the memory of all samples was freed."""
        return all(storage.expired() for storage in self._storages)


class Separated(NamedTuple):
    """The tensors of a batch.

    Attributes:
        columns: Of its lists of samples.
        others: The tensors outside of them.
    """

    columns: list[Column]
    others: list[Tensor]


def separated(batch: Any, places: Collection[Place]) -> Separated:
    """Return the tensors of a batch, those of lists of samples by column.

    Args:
        batch: Tensors in any nesting.
        places: The places of its lists of samples.
    """
    if not places:
        return Separated([], tensors_in(batch))
    columns: list[Column] = []
    others: list[Tensor] = []
    if () in places:
        columns = _columns(batch) or []
        return Separated(columns, others)
    for number, child in enumerate(children_of(batch)):
        found = separated(child, [p[1:] for p in places if p[0] == number])
        columns += found.columns
        others += found.others
    return Separated(columns, others)


def places_of_lists(items: ItemFingerprints, batch: Any) -> tuple[Place, ...]:
    """Return the places of the lists of samples in a batch.

    Args:
        items: Fingerprints of the items, from before ``collate_fn``.
        batch: What ``collate_fn`` returned.
    """
    return tuple(_places(items, batch, _MAX_DEPTH))


def _places(items: ItemFingerprints, nested: Any, depth: int) -> Iterator[Place]:
    """Yield the places of lists of samples, ``depth`` levels deep."""
    if isinstance(nested, Tensor) or not depth:
        return
    if isinstance(nested, list | tuple) and _is_list_of_samples(items, nested):
        yield ()
        return
    for number, child in enumerate(children_of(nested)):
        for place in _places(items, child, depth - 1):
            yield (number, *place)


def _is_list_of_samples(items: ItemFingerprints, entries: Any) -> bool:
    """Return whether each entry of a list is one sample, or a part of it."""
    if not 0 < len(entries) <= len(items):
        return False
    columns = _columns(entries)
    if not columns:
        return False
    # The transposed list may have the same shapes: then only the content tells.
    is_clear = len(entries) == len(items) != len(columns)
    return all(
        any(
            _are_shapes_of(items, part, column)
            if is_clear
            else _are_content_of(items, part, column)
            for part in range(items.widths.shape[1])
        )
        for column in columns
    )


def _columns(entries: Any) -> list[Column] | None:
    """Return the columns of a list; None if its entries have not as many tensors."""
    rows = [tensors_in(entry) for entry in entries]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        return None
    columns = [list(column) for column in zip(*rows, strict=True)]
    if any(
        len({(t.dim(), t.dtype, t.device) for t in column}) > 1 for column in columns
    ):
        return None
    return [Column(column) for column in columns]


def _are_shapes_of(items: ItemFingerprints, part: int, column: Column) -> bool:
    """Return whether samples have the shapes of one part of all items."""
    shapes = Counter(tuple(sample.shape) for sample in column.samples)
    return shapes == Counter(items.shapes[part])


def _are_content_of(items: ItemFingerprints, part: int, column: Column) -> bool:
    """Return whether each sample is one part of an item."""
    shapes = items.shapes[part]
    if not {tuple(sample.shape) for sample in column.samples} <= set(shapes):
        return False
    return bool(np.isin(column.checksums()[1], items.checksums_of(part)).all())
