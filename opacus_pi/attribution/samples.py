"""Recognise a sample of a batch by its memory or by its content.

A sample is one position of a physical batch. Two facts show later which sample a
tensor holds: the memory that it is stored in, and a checksum of some of its entries.
Views of a delivered batch share its memory; copies on another device, of another shape
or of a wider type keep the checksum.

*Guarantee.* Storage that matches is the very memory that was delivered: it is referred
to by a weak reference to torch's storage object, never by an address, which the
allocator reuses within a few updates. Whether it still has the content that was
delivered is checked by comparing the entries, however they were written to
(``DeliveredTensor.changed``). Equal checksums of different samples have a chance of
about 2^-64 where the entries that are looked at differ.

*What breaks it.* Of a sample with more than 512 entries, 256 to 512 are looked at, in
places drawn once by a generator of their own (``places_compared``). If two delivered
samples in host memory are equal there, all entries are compared (``whole_contents``);
on an accelerator, samples that differ only in others have the same checksum. A write
to a share f of the entries that is made without knowing these places goes unseen with a
probability of at most ``(1 - f)**256``. On an accelerator a comparison waits for
the device, so it is made only where torch has counted a write, and for the batches that
are audited. Numbers are compared in single precision: whole numbers above 2^24 may be
equal to their neighbours, and types that cannot hold the values, such as ``half`` after
``float``, change the checksum, so that the sample is not recognised.

>>> import torch
>>> batch = torch.arange(8.0).reshape(4, 2)
>>> StoredSamples(batch, 0).positions(batch[2:], 0)
array([2, 3])
>>> sample_checksums(batch[2:].double(), 0)[1] == sample_checksums(batch, 0)[1][2:]
array([ True,  True])
"""

from collections.abc import Iterator
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from opacus_pi._torch_compat import (
    StorageWeakRef,
    is_traceable_wrapper_subclass,
    num_writes,
    storage_address,
)
from opacus_pi.attribution.whole_contents import has_lookalikes, whole_checksums

__all__ = [
    "FEWEST_COMPARED",
    "DelayedChecksums",
    "DeliveredTensor",
    "StoredSamples",
    "checksums_of_entries",
    "children_of",
    "is_dense",
    "places_compared",
    "places_up_to",
    "running_checksums",
    "sample_checksums",
    "sizes_without",
    "smallest_bound",
    "tensors_in",
]

_MAX_DEPTH = 6  # of nested batches; a list may contain itself
_MAX_NODES = 4096  # of a nesting that are searched: a batch may refer to a vocabulary
# Objects that are not entered in search of tensors.
_CLOSED = (
    *(str, bytes, int, float, complex, bool, type(None), np.ndarray, np.generic),
    *(PackedSequence, nn.Module, Dataset, DataLoader, ModuleType, type),
)
FEWEST_COMPARED = 256
"""Entries of a sample that its checksum looks at, at least, if it has so many."""
_MAX_ENTRIES = 2 * FEWEST_COMPARED  # that it looks at
_FEWEST_FOR_NUMPY = 8192  # entries of tensors that NumPy compares faster than torch
_WEIGHTS = (  # odd, so that no entry is lost modulo 2^64
    np.random.default_rng(0).integers(1, 2**62, _MAX_ENTRIES, dtype=np.int64) * 2 + 1
)


def tensors_in(nested: Any) -> list[Tensor]:
    """Return the dense tensors in any nesting of containers and plain objects.

    Packed sequences are left out, because their first dimension runs over time steps
    of all samples together.

    Args:
        nested: A tensor; a list, tuple or dict-like object; or an object with
            attributes, such as a dataclass or a batch class of the user's.
    """
    # Nearly always a tensor or a few of them, for which recursion would be slow: this
    # is called several times in each update.
    if type(nested) is Tensor:
        return [nested] if is_dense(nested) else []
    if type(nested) is tuple or type(nested) is list:
        found = []
        for tensor in nested:
            if type(tensor) is not Tensor:
                break
            if is_dense(tensor):
                found.append(tensor)
        else:
            return found
    return list(_tensors_in(nested, _MAX_DEPTH, [_MAX_NODES]))


def _tensors_in(nested: Any, depth: int, left: list[int]) -> Iterator[Tensor]:
    """Yield tensors, ``depth`` levels deep, while ``left[0]`` objects are left."""
    if isinstance(nested, Tensor):
        if is_dense(nested):
            yield nested
    elif depth > 0:
        for child in children_of(nested):
            left[0] -= 1
            if left[0] < 0:
                return
            yield from _tensors_in(child, depth - 1, left)


def children_of(nested: Any) -> Iterator[Any]:
    """Yield what a container or an object holds; nothing for text, numbers and code.

    Modules, data sets, loaders and classes are not entered: most of what they hold
    belongs to no batch.

    Args:
        nested: Any object that is not a tensor.
    """
    if isinstance(nested, _CLOSED):
        return
    if isinstance(nested, list | tuple):
        yield from nested
    elif hasattr(nested, "keys") and callable(getattr(nested, "values", None)):
        yield from nested.values()  # dict, UserDict, BatchEncoding
    else:
        yield from _attributes(nested)


def _attributes(nested: Any) -> Iterator[Any]:
    """Yield the values of an object's attributes, in ``__dict__`` and in slots."""
    yield from list(getattr(nested, "__dict__", {}).values())
    for cls in type(nested).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(nested, name):
                yield getattr(nested, name)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's entries can be found in memory by sizes and strides.

    This is false for sparse and nested tensors, tensors without data (``meta``), and
    subclasses that wrap other tensors.
    """
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_nested
        and (type(tensor) is Tensor or not is_traceable_wrapper_subclass(tensor))
    )


class StoredSamples:
    """The places in memory of the samples of a delivered tensor.

    Args:
        tensor: A dense tensor.
        dim: Its dimension that runs over the samples.
    """

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = _layout(tensor, dim)
        self._num_writes = num_writes(tensor)

    def __reduce__(self) -> Any:
        """Refuse copies: each would free torch's reference to the memory once more."""
        raise TypeError(
            "StoredSamples refers to tensors in the memory of this process, so it can "
            "be neither copied nor pickled. Copy the tensors instead."
        )

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        dim, _, _, shape, _ = self._layout
        return int(shape[dim])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of one sample."""
        dim, _, _, shape, _ = self._layout
        return sizes_without(shape, dim)

    def positions(self, tensor: Tensor, dim: int) -> NDArray[np.int64] | None:
        """Return the positions of a tensor's samples among these samples.

        Args:
            tensor: A tensor that may be a view of this memory.
            dim: Its dimension that runs over the samples.

        Returns:
            int64 ``(b,)``; ``None`` unless each of its samples lies within one of
            these.
        """
        if not self._is_memory_of(tensor):
            return None
        if _layout(tensor, dim) == self._layout:
            return np.arange(self.num_samples)
        own_dim, _, start, _, strides = self._layout
        stride = strides[own_dim]
        if stride <= 0 or not tensor.shape[dim] or tensor.numel() == 0:
            return None
        offset = tensor.storage_offset() - start
        starts = offset + np.arange(tensor.shape[dim]) * tensor.stride(dim)
        found, within = np.divmod(starts, stride)
        inside = (found >= 0) & (found < self.num_samples)
        # A view that reaches from one sample into the next has no one position.
        inside &= within + _extent(tensor, dim) < stride
        return found if inside.all() else None

    def are_all_of(self, tensor: Tensor, dim: int) -> bool:
        """Return whether a tensor's samples are exactly these, in this order."""
        return self._is_memory_of(tensor) and _layout(tensor, dim) == self._layout

    def expired(self) -> bool:
        """Return whether the memory was freed, so that no tensor can hold it."""
        return bool(self._storage.expired())

    def modified(self, tensor: Tensor) -> bool:
        """Return whether the memory was written to after these samples were noted.

        Args:
            tensor: A tensor that lives in this memory.
        """
        return num_writes(tensor) != self._num_writes

    def now(self, tensor: Tensor) -> Tensor:
        """Return these samples as they are now, as a view of a tensor's memory.

        Args:
            tensor: A tensor that lives in this memory.
        """
        _, dtype, start, shape, strides = self._layout
        same_type = tensor.detach()
        if tensor.dtype is not dtype:
            same_type = same_type.view(dtype)
        return same_type.as_strided(shape, strides, start)

    def _is_memory_of(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in this memory, with entries of the same size."""
        same = storage_address(tensor.untyped_storage()) == self._storage.cdata
        return same and bool(tensor.dtype.itemsize == self._layout[1].itemsize)


class DelayedChecksums:
    """Copies of a few entries of each sample, from which checksums can be computed.

    Most batches are recognised by their storage, and their checksums are never needed.
    Copying at most 512 entries of each sample at delivery is cheap, and needs no
    synchronisation with a GPU; the sums are computed only when a model is given copies.

    Args:
        tensor: A dense tensor.
        dim: Its dimension that runs over the samples.
        keeps_tensor: Whether the tensor is kept, for ``checksums_like``.

    Attributes:
        width: Number of entries in a sample; 0 if samples cannot be recognised.
        whole: Checksums of all entries, int64 ``(b,)``, by which samples are compared
            if those looked at do not distinguish them; else None.
    """

    def __init__(self, tensor: Tensor, dim: int, *, keeps_tensor: bool = False) -> None:
        self._kept = (tensor, dim) if keeps_tensor else None
        self.whole: NDArray[np.int64] | None = None
        self._num_samples = size = tensor.shape[dim]
        is_countable = size > 0 and not tensor.dtype.is_complex
        self.width = tensor.numel() // size if is_countable else 0
        if self.width:
            entries = entries_looked_at(tensor, dim, self.width)
            is_copy = self.width > _MAX_ENTRIES
            self._entries = entries if is_copy else entries.clone()

    @property
    def is_on_host(self) -> bool:
        """Whether the entries can be read without waiting for an accelerator."""
        return self.width > 0 and self._entries.is_cpu

    @cached_property
    def checksums(self) -> NDArray[np.int64]:
        """One checksum for each sample, int64 ``(b,)``.

        Copying, moving to another device, reshaping and converting to a wider type do
        not change them.
        """
        if not self.width:
            return np.zeros(self._num_samples, dtype=np.int64)
        return checksums_of_entries(self.entries)

    @cached_property
    def entries(self) -> NDArray[np.float32]:
        """The entries that the checksums look at, float32 ``(b, k)``.

        They are copied from an accelerator once, and the CPU waits for the copy.
        """
        entries = self._entries
        if entries.dtype is torch.float32 and entries.is_cpu:  # nearly always
            return entries.numpy().reshape(self._num_samples, -1)
        entries = entries.cpu().float().reshape(self._num_samples, -1)
        return entries.contiguous().numpy()

    def may_have_label(self, label: int) -> bool:
        """Return whether an entry of integers may have had this value.

        Args:
            label: The value.
        """
        entries = self._entries
        if entries.is_floating_point():
            return False
        is_all = entries.numel() == self.width * self._num_samples
        return not (self.is_on_host and is_all) or bool((entries == label).any())

    def are_entries_of(self, tensor: Tensor, dim: int) -> bool:
        """Return whether a tensor of the same shape has the same numbers here."""
        same = _are_equal(self._entries, entries_looked_at(tensor, dim, self.width))
        if self.whole is None or not same:
            return same
        return np.array_equal(self.whole, whole_checksums(tensor, dim))

    def look_at_all_if_alike(self, tensor: Tensor, dim: int) -> None:
        """Compare all entries of the samples if those looked at are equal for two.

        Args:
            tensor: The tensor.
            dim: Its dimension that runs over the samples.
        """
        is_sampled = self.width > _MAX_ENTRIES and self.is_on_host
        if is_sampled and has_lookalikes(self.entries):
            self.whole = whole_checksums(tensor, dim)

    @property
    def best_checksums(self) -> NDArray[np.int64]:
        """The checksums of all entries if they are known, else of those looked at."""
        return self.checksums if self.whole is None else self.whole

    def checksums_like(self, other: "DelayedChecksums") -> NDArray[np.int64]:
        """Return the checksums to compare with another tensor's ``best_checksums``.

        Args:
            other: The checksums of the other tensor.
        """
        is_sampled = other.whole is None or not self.width
        return self.checksums if is_sampled else self.of_all_entries()

    def of_all_entries(self) -> NDArray[np.int64]:
        """Return a checksum of all entries of each sample of the kept tensor."""
        if self.whole is None and self._kept is not None:
            self.whole = whole_checksums(*self._kept)
        return self.best_checksums


def entries_looked_at(tensor: Tensor, dim: int, width: int) -> Tensor:
    """Return the entries of each sample that its checksum looks at.

    Every operation costs time in each update, so only the necessary ones are called.

    Args:
        tensor: A dense tensor with entries.
        dim: Its dimension that runs over the samples.
        width: Number of entries in a sample.

    Returns:
        ``(b, ...)``, all entries, possibly in the tensor's memory; or ``(b, k)``, in
        memory of its own, if there are more than 512.
    """
    samples = tensor.detach() if tensor.requires_grad else tensor
    samples = samples.movedim(dim, 0) if dim else samples
    samples = samples if samples.is_contiguous() else samples.contiguous()
    if width <= _MAX_ENTRIES:
        return samples
    places = _places_on(samples.device, width)
    return samples.view(samples.shape[0], width).index_select(1, places)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Return what ``torch.equal`` does, of two tensors of the same type and shape.

    NumPy is three times as fast where there are many entries.
    """
    is_large = one.dtype is torch.float32 and one.numel() >= _FEWEST_FOR_NUMPY
    if not (is_large and one.is_cpu and other.is_cpu):
        return torch.equal(one, other)
    return bool((one.numpy() == other.resolve_neg().numpy()).all())


class DeliveredTensor:
    """One tensor of a delivered batch: where it is in memory, and what it contains.

    Args:
        tensor: A dense tensor.
        dim: Its dimension that runs over the samples.
        verify: Whether to look at its content. Otherwise a change is noticed only if
            torch has counted a write.
        is_audited: Whether to compare content although torch has counted no write and
            the comparison has to wait for an accelerator.
    """

    def __init__(
        self, tensor: Tensor, dim: int, *, verify: bool, is_audited: bool = True
    ) -> None:
        self.dim, self.stored = dim, StoredSamples(tensor, dim)
        self.content = DelayedChecksums(tensor, dim) if verify else None
        if self.content is not None:
            self.content.look_at_all_if_alike(tensor, dim)
        self._is_audited = is_audited

    def is_whole(self, tensor: Tensor, dim: int) -> bool:
        """Return whether a tensor is this whole one, in its order and unchanged.

        Args:
            tensor: Any tensor.
            dim: Its dimension that runs over the samples.
        """
        if not self.stored.are_all_of(tensor, dim):
            return False
        content = self.content if tensor.is_cpu else None
        was_written = self.stored.modified(tensor)
        if content and content.width and content.are_entries_of(tensor, dim):
            return not was_written  # nearly always
        return not was_written and self.changed(tensor) is None

    def changed(self, tensor: Tensor) -> NDArray[np.bool_] | None:
        """Return which samples have changed since the delivery.

        Args:
            tensor: A tensor that lives in this memory.

        Returns:
            bool ``(b,)``; None if no sample was changed.
        """
        was_written = self.stored.modified(tensor)
        if self.content is None or not self.content.width:
            return np.ones(self.stored.num_samples, np.bool_) if was_written else None
        if not (tensor.is_cpu or was_written or self._is_audited):
            return None
        if self.content.are_entries_of(self.stored.now(tensor), self.dim):
            return None
        now = self.content_now(tensor).checksums_like(self.content)
        changed: NDArray[np.bool_] = self.content.best_checksums != now
        return changed if changed.any() else None  # NaN is not equal to itself

    def content_now(self, tensor: Tensor) -> DelayedChecksums:
        """Return what these samples contain now.

        Args:
            tensor: A tensor that lives in this memory.
        """
        now = self.stored.now(tensor)
        return DelayedChecksums(now, self.dim, keeps_tensor=True)


def sizes_without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    """Return a shape without one dimension.

    Args:
        shape: The shape.
        dim: The dimension.
    """
    return (*shape[:dim], *shape[dim + 1 :])


def sample_checksums(tensor: Tensor, dim: int) -> tuple[int, NDArray[np.int64]]:
    """Compute a checksum of each sample of a tensor.

    Args:
        tensor: A dense tensor.
        dim: Its dimension that runs over the samples.

    Returns:
        Number of entries in a sample (0: samples cannot be recognised), and int64
        ``(b,)``.
    """
    delayed = DelayedChecksums(tensor, dim)
    return delayed.width, delayed.checksums


def checksums_of_entries(entries: NDArray[np.float32]) -> NDArray[np.int64]:
    """Compute the checksum of each row of a matrix, from the bits of its numbers.

    Args:
        entries: float32 ``(b, k)``, k at most 512. Zeros at the end of a row do not
            change its checksum.

    Returns:
        int64 ``(b,)``: a sum with fixed weights, modulo 2^64.
    """
    bits = entries.view(np.int32).astype(np.int64)
    return bits @ _WEIGHTS[: bits.shape[1]]


def running_checksums(entries: NDArray[np.float32]) -> NDArray[np.int64]:
    """Compute the checksums of all prefixes of each row of a matrix.

    Args:
        entries: As for ``checksums_of_entries``.

    Returns:
        int64 ``(b, k)``: in column j the checksum of the first j + 1 entries.
    """
    bits = entries.view(np.int32).astype(np.int64)
    running: NDArray[np.int64] = (bits * _WEIGHTS[: bits.shape[1]]).cumsum(axis=1)
    return running


@lru_cache(maxsize=4096)
def places_compared(width: int, fewest: int = FEWEST_COMPARED) -> NDArray[np.int64]:
    """Return which entries of a flattened sample its checksum looks at.

    Places that are evenly spaced would miss a change that keeps every n-th column or
    channel, and the first ones a change of the rest. These are drawn, always the same
    ones for a width, and no global generator is used.

    Args:
        width: Number of entries in the sample, at least 1.
        fewest: Number of places, at least, if there are so many.

    Returns:
        int64 ``(k,)``, rising: all up to twice the fewest; else at least the fewest and
        at most twice as many. Not to be written to.
    """
    places = places_up_to(smallest_bound(width, fewest), fewest)
    return places[: np.searchsorted(places, width)]


def smallest_bound(width: int, fewest: int = FEWEST_COMPARED) -> int:
    """Return the least power of two times ``fewest`` that a width does not exceed.

    It is at least twice ``fewest``. Widths with the same bound share their places, so
    that the places of a sample are among those of a padded one.

    Args:
        width: Number of entries in a sample.
        fewest: A power of two.
    """
    return max(2 * fewest, 1 << (width - 1).bit_length())


@lru_cache(maxsize=128)
def places_up_to(bound: int, fewest: int = FEWEST_COMPARED) -> NDArray[np.int64]:
    """Return the places for all widths from half a bound, exclusive, to the bound.

    Half of the places are drawn from each half of the bound. So let a change that does
    not know them affect a share f of the w entries of a sample, that is, shares a and b
    of ``bound / 2`` in the two halves. It misses all places with a probability of at
    most ``((1 - a) * (1 - b))**fewest``, which is at most ``(1 - f)**fewest``, because
    ``a + b = 2 f w / bound`` and b is at most ``2 w / bound - 1``.

    Args:
        bound: What ``smallest_bound`` returned.
        fewest: Half the number of places.

    Returns:
        int64 ``(2 * fewest,)``, rising. Not to be written to.
    """
    rng, half = np.random.default_rng([bound, fewest]), bound // 2
    lower, upper = (rng.choice(half, fewest, replace=False) for _ in range(2))
    places: NDArray[np.int64] = np.sort(np.concatenate([lower, upper + half]))
    return places


@lru_cache(maxsize=256)
def _places_on(device: torch.device, width: int) -> Tensor:
    """Return ``places_compared`` as a tensor on a device."""
    return torch.tensor(places_compared(width), device=device)


def _layout(tensor: Tensor, dim: int) -> tuple[Any, ...]:
    """Return a key that is equal for two views of one memory with the same samples."""
    return dim, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _extent(tensor: Tensor, dim: int) -> int:
    """Return how far the last entry of a sample is from its first, in entries."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((n - 1) * stride for d, (n, stride) in enumerate(sizes) if d != dim)
