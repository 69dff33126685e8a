"""What identifies the rows of a tensor: where they are stored, and what they contain.

>>> import torch
>>> batch = torch.arange(8.0).reshape(4, 2)
>>> StoredRows(batch, 0).positions(batch[2:], 0)
array([2, 3])
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_MAX_DEPTH = 6  # of nested batches
_SAMPLED = 256  # entries of a row that its checksum looks at
_WEIGHTS = np.random.default_rng(0).integers(1, 2**62, _SAMPLED, dtype=np.int64) * 2 + 1


def tensors_in(nested: Any, depth: int = _MAX_DEPTH) -> Iterator[Tensor]:
    """The dense tensors in any nesting of lists, tuples and dict-like objects.

    Packed sequences are left out: their rows are no examples.
    """
    if isinstance(nested, Tensor):
        if _is_dense(nested):
            yield nested
    elif depth > 0 and not isinstance(nested, str | bytes | PackedSequence):
        if not isinstance(nested, list | tuple):  # dict, UserDict, BatchEncoding
            values = getattr(nested, "values", None)
            nested = values() if callable(values) else _fields(nested)
        for item in nested:
            yield from tensors_in(item, depth - 1)


def _fields(nested: Any) -> Iterator[Any]:
    """The values of a dataclass; of anything else, nothing."""
    if is_dataclass(nested) and not isinstance(nested, type):
        yield from (getattr(nested, field.name) for field in fields(nested))


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has its entries in memory of its own."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_nested
        and (type(tensor) is Tensor or not is_traceable_wrapper_subclass(tensor))
    )


class StoredRows:
    """Where in memory the rows of a delivered tensor are.

    Memory is referred to weakly: an address alone is reused within a few updates.

    Args:
        tensor: A dense tensor.
        dim: Its dimension that runs over the rows.
    """

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = _layout(tensor, dim)
        _, _, self._start, shape, strides = self._layout
        self._length, self._stride = shape[dim], strides[dim]
        self._version, self._item_size = _version(tensor), tensor.element_size()

    def positions(self, tensor: Tensor, dim: int) -> NDArray[np.int64] | None:
        """Which of these rows a tensor's rows are, None unless all of them are.

        Args:
            tensor: A tensor that may be a view of this memory.
            dim: Its dimension that runs over the rows.
        """
        if not self._is_stored_in(tensor):
            return None
        if _layout(tensor, dim) == self._layout:
            return np.arange(self._length)
        offset = tensor.storage_offset() - self._start
        starts = offset + np.arange(tensor.shape[dim]) * tensor.stride(dim)
        extent = sum(
            (size - 1) * stride
            for d, (size, stride) in enumerate(
                zip(tensor.shape, tensor.stride(), strict=True)
            )
            if d != dim
        )
        if self._stride <= 0 or not len(starts) or tensor.numel() == 0:
            return None
        rows, within = np.divmod(starts, self._stride)
        inside = (rows >= 0) & (rows < self._length)
        inside &= within + extent < self._stride
        return rows if inside.all() else None

    def are_all_of(self, tensor: Tensor, dim: int) -> bool:
        """Whether a tensor's rows are these rows, all of them, in this order."""
        return self._is_stored_in(tensor) and _layout(tensor, dim) == self._layout

    def expired(self) -> bool:
        """Whether nobody holds the memory any more."""
        return bool(self._storage.expired())

    def modified(self, tensor: Tensor) -> bool:
        """Whether the memory was written to since."""
        return _version(tensor) != self._version

    def _is_stored_in(self, tensor: Tensor) -> bool:
        """Whether the tensor lives in this memory."""
        same = tensor.untyped_storage()._cdata == self._storage.cdata
        return same and tensor.element_size() == self._item_size


class SampledRows:
    """Enough entries of each row to recognise it later; a small copy.

    Args:
        tensor: A dense tensor.
        dim: Its dimension that runs over the rows.

    Attributes:
        width: Number of entries in a row; 0 if rows cannot be recognised.
    """

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self._length = tensor.shape[dim]
        self.width = tensor.numel() // self._length if self._length else 0
        if tensor.is_complex():
            self.width = 0
        if self.width:
            rows = tensor.detach() if dim == 0 else tensor.detach().movedim(dim, 0)
            rows, step = rows.contiguous(), max(1, self.width // _SAMPLED)
            shape = self._length, min(self.width // step, _SAMPLED)
            start = rows.storage_offset()
            self._entries = rows.as_strided(shape, (self.width, step), start).clone()

    def checksums(self) -> NDArray[np.int64]:
        """int64 ``(b,)``; they survive copying, moving, reshaping and widening."""
        if not self.width:
            return np.zeros(self._length, dtype=np.int64)
        entries = self._entries.cpu().float().contiguous()
        bits = entries.numpy().view(np.int32).astype(np.int64)
        return bits @ _WEIGHTS[: bits.shape[1]]  # wraps around


def row_checksums(tensor: Tensor, dim: int) -> tuple[int, NDArray[np.int64]]:
    """A checksum of each row.

    Args:
        tensor: The tensor.
        dim: Its dimension that runs over the rows.

    Returns:
        Number of entries in a row, and int64 ``(b,)``.
    """
    sampled = SampledRows(tensor, dim)
    return sampled.width, sampled.checksums()


def _layout(tensor: Tensor, dim: int) -> tuple[Any, ...]:
    """What two views of one memory share if they are the same rows."""
    return dim, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> int:
    """How often the memory was written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
