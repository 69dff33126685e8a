"""Records of a pass over a loader, of a delivered batch, and of a forward pass.

A ``LoaderPass`` counts the batches that one iterator of a loader returned. A
``Delivery`` is one such batch: the data-set indices of its samples, the memory and
checksums by which its tensors can be recognised later, and the number of times it was
used. A ``ForwardPass`` says which samples the model was given, by which evidence, and
from which delivery.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi._torch_compat import StorageWeakRef
from opacus_pi.attribution.causes import Cause
from opacus_pi.attribution.collate_identity import BY_CONSTRUCTION, CollateIdentity
from opacus_pi.attribution.item_contents import SMALL, content_sums, joint_sums
from opacus_pi.attribution.item_labels import WIDEST_LABEL
from opacus_pi.attribution.listed_samples import DeliveredColumn, separated
from opacus_pi.attribution.lookalikes import Alike
from opacus_pi.attribution.samples import (
    DelayedChecksums,
    DeliveredTensor,
)

__all__ = [
    "LEFT_OUT",
    "UNATTRIBUTED",
    "Delivery",
    "ForwardPass",
    "Indices",
    "LoaderPass",
    "describe_delivery",
    "differ",
    "sample_dim",
]

UNATTRIBUTED = -1
"""In place of a data-set index: the sample is not attributed, its index is unknown."""

LEFT_OUT = -2
"""In place of a data-set index: padding, or a sample that must not be counted."""

Indices = NDArray[np.int64]
"""Data-set indices of samples, with ``UNATTRIBUTED`` and ``LEFT_OUT`` where needed."""

# Of a pass over a loader: which batches on an accelerator are compared with their
# content at delivery although torch has counted no write to them. A comparison waits
# for the device.
_AUDIT_EVERY = 32
_INT = frozenset({int})
_WIDTH = attrgetter("width")
_NO_CAUSES: Mapping[Cause, int] = MappingProxyType({})


class LoaderPass:
    """One pass over a loader, from ``iter(loader)`` on.

    Args:
        owner: The object that delivers the batches, whose attribute ``current_pass`` is
            its present pass; held by a weak reference. None: a pass that is never over.
        number: Which pass over the loader it is, from 1.
        in_parts: Whether its batches are parts of the batches of an update, as
            ``BatchMemoryManager`` makes them.
        is_stacked: Whether the first dimension of its batches runs over the samples, as
            torch's own collation stacks them.

    Attributes:
        num_delivered: How many batches were returned, those included that a resumed
            pass skipped because they were used before.
        num_unused: How many deliveries no forward pass has used yet.
        has_ended: Whether the iterator raised ``StopIteration``.
        num_filled: How many of the batches that the loop received had samples.
        last_used: Which of these was the last one that entered an update, from 1; 0:
            none did.
        first_size: How many samples the first of them had.
    """

    def __init__(
        self,
        owner: Any = None,
        *,
        number: int = 0,
        in_parts: bool = False,
        is_stacked: bool = False,
    ) -> None:
        self.number, self.in_parts, self.is_stacked = number, in_parts, is_stacked
        self.num_delivered = self.num_unused = 0
        self.num_filled = self.last_used = self.first_size = 0
        self.has_ended = False
        self._owner: Callable[[], Any] | None = None
        if owner is not None:
            self.belongs_to(owner)

    def belongs_to(self, owner: Any) -> None:
        """Set the object that delivers its batches.

        An observer creates the pass before the iterator exists, and sets the iterator
        afterwards.

        Args:
            owner: As for the class.
        """
        self._owner = weakref.ref(owner)

    @property
    def is_over(self) -> bool:
        """Return whether its iterator was deleted or has begun another pass.

        An iterator that has ended and is still held does not count as over: the loop
        may have put some of its batches aside.
        """
        if self._owner is None:
            return False
        return getattr(self._owner(), "current_pass", None) is not self

    @property
    def is_under_way(self) -> bool:
        """Return whether the loop may still get batches from this pass."""
        return not self.has_ended and not self.is_over


@dataclass(eq=False)
class Delivery:
    """One physical batch that a loader returned to the training loop.

    Args:
        indices: Data-set indices of its samples, in order, ``UNATTRIBUTED`` where
            ``collate_fn`` made the sample of several items; None: not known.
        loader_pass: The pass over the loader that it belongs to.
        number: Which batch of this pass it is, from 1.
        tensors: Its tensors that have one entry, or more, for each sample.
        identity: The item of the data set that each sample is, as far as ``collate_fn``
            could be followed.
        num_forward_passes: How many forward passes in training mode used it.
        num_recognised: How many of them were recognised by storage or content, without
            those whose gradients were cleared.
        num_updates: How many updates its samples entered.
        num_samples_used: How many samples entered updates, of all its forward passes.
        was_assumed: Whether an update used inputs that were only assumed to be it.
        num_left: How many of its samples no update used, when it last entered one.
        batch: A copy of what the loop received, if the tracker keeps batches.
        targets: Copies of the targets in it, if only these are kept.
        looked_at_by: What has looked at the labels of the batch at its delivery.
        shared: References to the memory of its other tensors.
        is_described: Whether ``tensors`` are all that the batch has.
        place: Which batch with samples of this pass it is, from 1; 0: it has none, or
            need not enter an update.
        draw: A key that the batches of one draw of the sampler share. Default: each
            batch is a draw.
    """

    indices: list[int] | None
    loader_pass: LoaderPass
    number: int = 0
    tensors: list[DeliveredTensor] = field(default_factory=list)
    identity: CollateIdentity = BY_CONSTRUCTION
    num_forward_passes: int = 0
    num_recognised: int = 0
    num_updates: int = 0
    num_samples_used: int = 0
    was_assumed: bool = False
    num_left: int = 0
    batch: Any = None
    targets: Any = None
    looked_at_by: Any = None
    shared: list[StorageWeakRef] = field(default_factory=list)
    is_described: bool = False
    place: int = 0
    draw: Any = None

    def __post_init__(self) -> None:
        if self.draw is None:
            self.draw = self.loader_pass, self.number
        # Whether the indices are those of different, known examples. Then the batch
        # needs no array of them, and an update no search for repeated examples.
        known = self.indices or ()
        is_distinct = len(set(known)) == len(known) > 0
        self.are_distinct = is_distinct and min(known) >= 0

    @property
    def size(self) -> int:
        """Number of samples without padding; 0 if it is not known."""
        indices = self.indices or ()
        if self.are_distinct:  # nearly always; then none stands for padding
            return len(indices)
        return sum(index != LEFT_OUT for index in indices)

    @cached_property
    def index_array(self) -> Indices | None:
        """The indices, int64 ``(b,)``; None if they are not known."""
        known = self.indices
        return None if known is None else np.array(known, dtype=np.int64)

    @cached_property
    def differing(self) -> dict[int, list[DelayedChecksums]]:
        """The content of each tensor whose samples differ, by entries a sample."""
        found: dict[int, list[DelayedChecksums]] = {}
        for content in self.all_contents():
            if differ(content.width, content.best_checksums):
                found.setdefault(content.width, []).append(content)
        return found

    def all_contents(self) -> list[DelayedChecksums]:
        """Return the content of all tensors, those of labels and masks included."""
        contents = [tensor.content for tensor in self.tensors]
        return [c for c in contents if c is not None and c.width]

    def has_equal_samples(self, places: Indices) -> bool:
        """Return whether some samples are equal in all that was delivered.

        Args:
            places: Their positions.
        """
        sums = [content.best_checksums for content in self.all_contents()]
        is_described = self.is_described and len(sums) == len(self.tensors)
        if len(places) == 1:
            return True
        return is_described and all((s[places] == s[places[0]]).all() for s in sums)

    def copies_among(self, positions: Indices) -> list[Alike]:
        """Return groups of samples that ``collate_fn`` may have exchanged.

        They are copies of one item, in an order that is not known.

        Args:
            positions: int64 ``(b,)``: position in the delivery of each sample, or a
                negative code.
        """
        groups = [
            Alike(np.flatnonzero(np.isin(positions, places)), places)
            for places in self.identity.copies
        ]
        return [group for group in groups if len(group.rows) > 1]

    def alike(self, width: int) -> list[DelayedChecksums]:
        """Return the content of tensors whose samples are all alike.

        Args:
            width: The number of entries in a sample, above 1.
        """
        return [
            content
            for content in self.all_contents()
            if content.width == width > 1 and not differ(width, content.best_checksums)
        ]

    def contents(self) -> Indices | None:
        """Return a checksum of the largest tensor of each sample, int64 ``(b,)``.

        If all tensors are small, it is a checksum of all of them. None is returned if
        there are none, or if the largest is on an accelerator.
        """
        largest = self._largest()
        if largest is None or not largest.is_on_host:
            return None
        if largest.width < SMALL:
            labels = self.labels()
            return None if labels is None else joint_sums(list(labels.T))
        return content_sums(largest.entries)

    def may_have_label(self, label: int) -> bool:
        """Return whether a tensor of integers may have had an entry of this value.

        Args:
            label: The value.
        """
        contents = self.all_contents()
        is_known = self.is_described and len(contents) == len(self.tensors) > 0
        return not is_known or any(c.may_have_label(label) for c in contents)

    def labels(self) -> Indices | None:
        """Return checksums of the small tensors beside the largest, int64 ``(b, p)``.

        If all tensors are small, the largest counts, too. None is returned if there
        are none.
        """
        largest = self._largest()
        found = [
            content.checksums
            for content in self.all_contents()
            if (content is not largest or content.width < SMALL)
            and content.width <= WIDEST_LABEL
            and content.is_on_host
        ]
        return np.stack(found, axis=1) if found else None

    def _largest(self) -> DelayedChecksums | None:
        """Return the content of the tensor with the most entries for each sample."""
        known = [t.content for t in self.tensors if t.content is not None]
        return max(known, key=_WIDTH, default=None)

    def leave_unattributed(self, places: Indices, cause: Cause) -> None:
        """Forget the indices of some samples.

        Args:
            places: Their positions.
            cause: Why.
        """
        indices = list(self.indices or ())
        for place in places.tolist():
            indices[place] = UNATTRIBUTED
        self.indices, self.are_distinct = indices, False
        self.identity = replace(self.identity, cause=cause)
        self.__dict__.pop("index_array", None)

    def use(self, *, is_recognised: bool) -> None:
        """Count a forward pass in training mode that was given this batch.

        Its pass has one unused delivery less, which ``assumed`` relies on: it takes
        the latest batch only where no other one is unused.

        Args:
            is_recognised: Whether the samples were recognised by storage or content.
        """
        if not self.num_forward_passes:
            self.loader_pass.num_unused -= 1
        self.num_forward_passes += 1
        self.num_recognised += is_recognised

    def may_be_waiting(self) -> bool:
        """Return whether the model may still be given this batch or a copy."""
        held = any(not tensor.stored.expired() for tensor in self.tensors)
        return not self.num_forward_passes and (held or not self.loader_pass.is_over)

    def release(self) -> None:
        """Free the data for recognising the batch: it is not compared any more.

        Gradients of many batches may wait for one update, and each of them keeps its
        delivery.
        """
        self.tensors, self.shared = [], []
        self.__dict__.pop("differing", None)


class ForwardPass:
    """The samples of one forward pass in training mode, and the evidence for them.

    Args:
        indices: Data-set indices of its samples, int64 ``(b,)``; None: not known. For
            exactly the samples of a delivery, use :meth:`of_whole_delivery`.
        evidence: One of the kinds that ``Tracker.counts`` has; empty: none.
        delivery: The batch that the samples come from.
        cause: Why samples are unattributed or assumed.
        is_assumed: Mask of the attributed samples that are only assumed, bool ``(b,)``;
            None: no sample, or all of them if the evidence is ``by_latest``.
        unattributed: Why samples are unattributed, and how many.
        notes: Causes that concern all of the attributed samples.
        num_inputs: How many samples the inputs have; None: not known.
        latest: Of inputs that were not recognised: the batch that was delivered last.

    Attributes:
        alike: Groups of samples whose order is not known, because they look alike. Each
            has one of the examples of its group.
        copies: Groups of samples whose order is not known, and that are equal in
            everything that was delivered.
        call: The forward pass with its outputs, while it may be repeated; else None.
        output_storages: Addresses of the memory of its outputs, while these exist.
        backward: When the backward pass reached it, counted by the tracker; 0: not yet.
        clipped: Whether the second backward pass of ghost clipping reached it.
    """

    def __init__(
        self,
        indices: Indices | None,
        evidence: str,
        delivery: Delivery | None = None,
        cause: Cause | None = None,
        *,
        is_assumed: NDArray[np.bool_] | None = None,
        unattributed: Mapping[Cause, int] = _NO_CAUSES,
        notes: tuple[Cause, ...] = (),
        num_inputs: int | None = None,
        latest: Delivery | None = None,
    ) -> None:
        self.evidence, self.delivery, self.cause = evidence, delivery, cause
        self.is_assumed, self.unattributed = is_assumed, unattributed
        self.notes, self.num_inputs, self.latest = notes, num_inputs, latest
        self.alike: tuple[Alike, ...] = ()
        self.copies: tuple[Alike, ...] = ()
        self.call: Any = None
        self.output_storages: list[int] = []
        self.backward = 0
        self.clipped = False
        self._indices = indices
        self._whole_delivery: Delivery | None = None
        self._distinct: list[int] | None = None

    @classmethod
    def of_whole_delivery(cls, delivery: Delivery, evidence: str) -> "ForwardPass":
        """Return a pass over all samples of a delivery, in their order.

        Its indices are those of the delivery, which are not copied.

        Args:
            delivery: The batch.
            evidence: As for the class.
        """
        forward = cls(None, evidence, delivery, notes=delivery.identity.notes)
        forward._whole_delivery = delivery
        forward._distinct = delivery.indices if delivery.are_distinct else None
        if delivery.identity.copies:
            places = np.arange(len(delivery.indices or ()))
            forward.copies = tuple(delivery.copies_among(places))
        return forward

    @property
    def is_recognised(self) -> bool:
        """Return whether storage or content shows at least one of its samples."""
        return self.evidence in ("by_storage", "by_content")

    @property
    def is_whole_delivery(self) -> bool:
        """Whether it was made by :meth:`of_whole_delivery`."""
        return self._whole_delivery is not None

    @property
    def indices(self) -> Indices | None:
        """Data-set indices of its samples, int64 ``(b,)``; None: not known."""
        if self._whole_delivery is not None:
            return self._whole_delivery.index_array
        return self._indices

    def settle(self, alike: Sequence[Alike]) -> None:
        """Note which sample is which example, as far as this is known now.

        Args:
            alike: Parts of the groups that ``alike`` has; of one sample each, where it
                is known.
        """
        delivery = self.delivery
        if self._indices is None or delivery is None or delivery.index_array is None:
            return
        for group in alike:
            self._indices[group.rows] = delivery.index_array[group.places]
        copies = [g for g in alike if delivery.has_equal_samples(g.places)]
        self.alike = tuple(group for group in alike if group not in copies)
        self.copies = (*self.copies, *(g for g in copies if len(g.rows) > 1))

    @property
    def num_samples(self) -> int | None:
        """Number of samples; None if it is not known."""
        if self._distinct is not None:
            return len(self._distinct)
        return None if self.indices is None else len(self.indices)

    def distinct_indices(self) -> list[int] | None:
        """Return its indices if it is a whole delivery of different, known examples.

        This is nearly always so, and then needs no array and no further checks.
        Otherwise None.
        """
        return self._distinct

    def complete(self, other: "ForwardPass") -> None:
        """Take over the samples that only another pass over the same batch shows.

        Args:
            other: A pass with as many samples, none of which is another one.
        """
        ours, theirs = cast(Indices, self.indices), cast(Indices, other.indices)
        indices = np.where(ours == UNATTRIBUTED, theirs, ours)
        is_known = indices != UNATTRIBUTED
        is_assumed = is_known & ~(self.were_seen | other.were_seen)
        causes = Counter(self.unattributed) | Counter(other.unattributed)
        most = [] if is_known.all() else causes.most_common(1)
        self.unattributed = {cause: int((~is_known).sum()) for cause, _ in most}
        self.cause = self.cause or other.cause
        self._indices, self.is_assumed = indices, is_assumed

    @property
    def were_seen(self) -> NDArray[np.bool_]:
        """Mask of the samples that were recognised, not assumed, bool ``(b,)``."""
        seen: NDArray[np.bool_] = cast(Indices, self.indices) != UNATTRIBUTED
        return seen if self.is_assumed is None else seen & ~self.is_assumed

    def without_indices(self, cause: Cause) -> "ForwardPass":
        """Return the same pass with no sample attributed."""
        other = ForwardPass(None, "", None, cause, num_inputs=self.num_inputs)
        other.backward, other.clipped = self.backward, self.clipped
        return other


def describe_delivery(
    indices: Any,
    batch: Any,
    loader_pass: LoaderPass,
    *,
    batch_dim: int,
    verify: bool,
    identity: CollateIdentity = BY_CONSTRUCTION,
) -> Delivery:
    """Describe a delivered batch so that it can be recognised later.

    Args:
        indices: What the sampler returned for it: indices, or one index.
        batch: Tensors in any nesting.
        loader_pass: The pass over the loader that it belongs to.
        batch_dim: The dimension that should run over the samples.
        verify: Whether to keep what checksums are computed from.
        identity: Which item each sample of the batch is.
    """
    columns, tensors = separated(batch, identity.lists)
    known, is_single = _listed(indices)
    number = loader_pass.num_delivered
    if known is None:
        return Delivery(None, loader_pass, number)
    if is_single:  # without collation the item is the one sample
        tensors = [t.unsqueeze(0) for t in tensors]
    if not known and tensors and tensors[0].dim() and tensors[0].shape[0]:
        known = [LEFT_OUT] * tensors[0].shape[0]  # padding of an empty Poisson batch
    elif identity.items is not None:
        items = identity.items.tolist()
        known = [known[i] if i >= 0 else UNATTRIBUTED for i in items]
    delivery = Delivery(known, loader_pass, number, identity=identity)
    is_audited = number % _AUDIT_EVERY <= 1
    batch_dim = 0 if loader_pass.is_stacked else batch_dim
    for tensor in tensors:
        dim = sample_dim(tensor, len(known), batch_dim)
        if dim is not None:
            delivery.tensors.append(
                DeliveredTensor(tensor, dim, verify=verify, is_audited=is_audited)
            )
        else:
            delivery.shared.append(StorageWeakRef(tensor.untyped_storage()))
    for column in columns:
        if column.is_even and len(column.samples) == len(known):
            delivery.tensors.append(DeliveredColumn(column, verify=verify))
        else:
            delivery.shared += [
                StorageWeakRef(sample.untyped_storage()) for sample in column.samples
            ]
    delivery.is_described = _has_only(batch, len(delivery.tensors))
    return delivery


def _has_only(batch: Any, num_tensors: int) -> bool:
    """Return whether a batch has only so many tensors and nothing else.

    Args:
        batch: A tensor, or a list, tuple or dict; of another nesting it is not known.
        num_tensors: The number of tensors with one entry, or more, for each sample.
    """
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    elif not isinstance(batch, list | tuple):
        batch = [batch]
    return len(batch) == num_tensors and all(isinstance(t, Tensor) for t in batch)


def _listed(indices: Any) -> tuple[list[int] | None, bool]:
    """Return a sampler's output as a list, and whether it was a single index.

    Args:
        indices: What a ``batch_sampler`` or a ``sampler`` returned.

    Returns:
        The indices; None if the output is not whole numbers (keys of a dict, for
        example), or has negative ones, of which only the data set knows what they mean.
        And whether it was one index, as without collation.
    """
    is_single = False
    if type(indices) is not list:
        if isinstance(indices, Tensor | np.ndarray):
            indices = indices.tolist()
        is_single = not isinstance(indices, list | tuple)
    listed = [indices] if is_single else list(indices)
    if set(map(type, listed)) - _INT:  # rare: NumPy's integers, or other keys
        if any(isinstance(i, bool) or not hasattr(i, "__index__") for i in listed):
            return None, is_single
        listed = [int(i) for i in listed]
    if listed and min(listed) < 0:
        return None, is_single
    return listed, is_single


def sample_dim(tensor: Tensor, num_samples: int, preferred: int) -> int | None:
    """Return which of the first two dimensions runs over the samples, if one does."""
    for dim in (preferred, 1 - preferred):
        if tensor.dim() > dim and tensor.shape[dim] == num_samples:
            return dim
    return None


def differ(width: int, sums: Indices) -> bool:
    """Return whether checksums are evidence; those of masks and labels are often alike.

    Args:
        width: Number of entries in a sample; of one number each, many are equal.
        sums: The checksums of all samples.
    """
    return width > 1 and len(sums) > 0 and (len(sums) == 1 or (sums != sums[0]).any())
