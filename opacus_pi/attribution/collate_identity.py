"""Match each sample of a collated batch to the item of the data set that it is.

``collate_fn`` may sort, pad, drop, replace or mix the items that the data set returned,
and the batch does not show it. So the items are fingerprinted where they are loaded, in
the worker process, before ``collate_fn`` sees them; the samples of its batch are
fingerprinted after it, and each is looked up among the items. Only the resulting item
numbers are sent with the batch. torch's own collate functions keep the order by
construction, so nothing is computed for them.

*Guarantee.* A sample is taken for an item only if the checksum of one of its tensors is
that of the item, or if the tensor begins with the item's entries (padding), and if no
other tensor of the batch shows another item. A sample that is made of several items
matches no item. What cannot be compared at all (text that becomes numbers, images that
become tensors, transforms within ``collate_fn``) is *unchecked*: samples are taken to
be in the order of the items.

*What breaks it.* At most 512 entries of an item are compared (``samples.py``). Mixtures
are found if a sample is a sum of two items, or consists of entries of two items; a
transform that is not linear hides them. A batch in which nothing has moved but items
that are equal counts as one in order. What a batch has besides its items (padding,
masks, a mean over the batch) is compared with nothing; ``has_more`` says that there is
such a thing. Items that were left out are counted (``num_left_out``) if the samples
could be compared; why they were is not known. A data set whose ``__getitems__`` returns
items in another order than it was asked for is not noticed.

>>> import torch
>>> items = fingerprint_items([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
>>> follow(items, torch.tensor([[3.0, 0.0], [1.0, 2.0]]), batch_dim=0).items
array([1, 0])
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from opacus_pi.attribution.causes import (
    ALIKE_IN_COLLATE,
    CHANGED_IN_COLLATE,
    COLLATE,
    MIXED_IN_COLLATE,
    NUMBER_IN_COLLATE,
    PARTS_IN_COLLATE,
    Cause,
)
from opacus_pi.attribution.item_contents import contents_of, joint_sums, labels_of
from opacus_pi.attribution.item_fingerprints import ItemFingerprints, fingerprint_items
from opacus_pi.attribution.listed_samples import (
    Column,
    Place,
    Separated,
    places_of_lists,
    separated,
)
from opacus_pi.attribution.mixtures import OtherSamples, made_of_others
from opacus_pi.attribution.samples import (
    DelayedChecksums,
    checksums_of_entries,
    places_compared,
    places_up_to,
    running_checksums,
    smallest_bound,
)

__all__ = [
    "BY_CONSTRUCTION",
    "NOT_FOLLOWED",
    "UNCHECKED",
    "CollateIdentity",
    "FollowedBatch",
    "FollowingCollate",
    "follow",
    "keeps_order",
]

Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]
_MIN_ENTRIES = 4  # of an item that is found in a part of a batch by itself


@dataclass(frozen=True, eq=False)
class CollateIdentity:
    """The known relation between the items and the samples of one collated batch.

    Args:
        items: int64 ``(b,)``: the item number of each sample, -1 if it matches none;
            None: sample i is item i.
        notes: Causes that concern all samples.
        cause: Why samples match no item.
        has_more: Whether the batch has entries that its items do not have.
        num_left_out: How many items are in no sample, without those that are None.
        contents: int64 ``(n,)``: a checksum of the largest part of each item; None: the
            items are the samples of the batch.
        labels: int64 ``(n, p)``: checksums of the small parts of each item.
        copies: The places of samples, int64 ``(k,)``, that are equal items, of which it
            is not known which is which, for each such item.
        lists: The places in the batch of lists with one sample in each entry.
    """

    items: NDArray[np.int64] | None = None
    notes: tuple[Cause, ...] = ()
    cause: Cause = CHANGED_IN_COLLATE
    has_more: bool = False
    num_left_out: int = 0
    contents: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None
    copies: tuple[NDArray[np.int64], ...] = ()
    lists: tuple[Place, ...] = ()


BY_CONSTRUCTION = CollateIdentity()
NOT_FOLLOWED = CollateIdentity()
"""The samples may be in another order; whoever records does not ask for it."""
UNCHECKED = CollateIdentity(notes=(COLLATE,), has_more=True)


class FollowedBatch(NamedTuple):
    """A batch on its way from the worker process to the iterator.

    A named tuple, because torch's memory pinning handles the entries of tuples and does
    not change the identity.
    """

    batch: Any
    identity: CollateIdentity


class FollowingCollate:
    """A ``collate_fn`` that also finds out which item each sample is.

    It can be pickled, for worker processes, if the loader's own can.

    Args:
        collate_fn: The loader's own ``collate_fn``; it keeps its state and gets the
            same calls.
        is_single: Whether it is given one item instead of a list (``batch_size=None``).
        batch_dim: The dimension that should run over the samples.
    """

    def __init__(
        self, collate_fn: Callable[[Any], Any], *, is_single: bool, batch_dim: int = 0
    ) -> None:
        self.collate_fn = collate_fn
        self.is_single, self.batch_dim = is_single, batch_dim

    def __call__(self, items: Any) -> FollowedBatch:
        """Collate items, and return beside the batch which items its samples are."""
        if self.is_single:  # one item is one sample, whatever collate_fn does
            return FollowedBatch(self.collate_fn(items), BY_CONSTRUCTION)
        if not isinstance(items, list | tuple):  # __getitems__ may return anything
            return FollowedBatch(self.collate_fn(items), UNCHECKED)
        fingerprints = fingerprint_items(items)
        num_items = sum(item is not None for item in items)
        batch = self.collate_fn(items)
        with torch.no_grad():
            identity = follow(fingerprints, batch, self.batch_dim)
        identity = replace(
            identity,
            num_left_out=_num_left_out(identity.items, num_items),
            contents=contents_of(fingerprints),
            labels=labels_of(fingerprints),
        )
        return FollowedBatch(batch, identity)


def keeps_order(collate_fn: Callable[..., Any] | None) -> bool:
    """Return whether sample i of a batch is item i by construction.

    Args:
        collate_fn: The loader's ``collate_fn``, without the wrappers that this library
            or Opacus puts around it.
    """
    return collate_fn in (None, default_collate, default_convert)


# ------------------------------------------------------------------------ all tensors
def follow(items: ItemFingerprints, batch: Any, batch_dim: int) -> CollateIdentity:
    """Find out which item each sample of a batch is.

    Args:
        items: Fingerprints of the items, from before ``collate_fn``.
        batch: What ``collate_fn`` returned.
        batch_dim: The dimension that should run over the samples.
    """
    if not len(items):
        return BY_CONSTRUCTION
    lists = places_of_lists(items, batch)
    identity = _followed(items, separated(batch, lists), batch_dim)
    return replace(identity, lists=lists) if lists else identity


def _followed(
    items: ItemFingerprints, batch: Separated, batch_dim: int
) -> CollateIdentity:
    """Find out which item each sample is.

    Args:
        items: The items, at least one.
        batch: The tensors of the batch.
        batch_dim: The dimension that should run over the samples.
    """
    columns, tensors = batch.columns, [t for t in batch.others if t.dim()]
    if not tensors and not columns:
        return UNCHECKED
    is_only_samples = len(tensors) == len(batch.others)
    if is_only_samples and _are_in_place(items, batch, batch_dim):
        return BY_CONSTRUCTION
    even = [Samples(c.stacked(), 0) for c in columns if c.is_even]
    even += [_as_samples(items, tensor, batch_dim) for tensor in tensors]
    padded = [Samples(c.stacked(), 0) for c in columns if not c.is_even]
    identity = _matched(items, padded + even)
    chosen = identity.items
    is_whole = is_only_samples and _are_whole_items(items, even, chosen)
    is_whole &= all(_are_items(items, samples, chosen) for samples in padded)
    is_whole &= chosen is None or len(chosen) <= len(items)
    return identity if is_whole else replace(identity, has_more=True)


def _num_left_out(chosen: Indices | None, num_items: int) -> int:
    """Return how many items are in no sample of a batch.

    Args:
        chosen: Which item each sample is, -1 if it matches none, which may be any of
            the others; None: all items, in order.
        num_items: The number of items.
    """
    if chosen is None:
        return 0
    is_known = chosen >= 0
    num_used = len(np.unique(chosen[is_known])) + np.count_nonzero(~is_known)
    return max(0, num_items - int(num_used))


def _matched(items: ItemFingerprints, samples: "list[Samples]") -> CollateIdentity:
    """Find out which item each sample is.

    Args:
        items: The items.
        samples: The tensors of the batch.
    """
    for tensor in samples:
        if _are_rows_of(items, tensor):
            return CollateIdentity(np.full(len(tensor), -1), cause=PARTS_IN_COLLATE)
    found = [c for s in samples if (c := s.candidates(items)) is not None]
    if not found:
        return _without_content(items, samples)
    size = max(map(len, found))
    found = [candidates for candidates in found if len(candidates) == size]
    samples = [s for s in samples if len(s) == size]
    joint = _narrowed(np.logical_and.reduce(found), items, samples)
    return _chosen(items, samples, joint, found)


def _are_whole_items(
    items: ItemFingerprints, samples: "list[Samples]", chosen: Indices | None
) -> bool:
    """Return whether every tensor has exactly the entries of one part of the items.

    Args:
        items: The items.
        samples: The tensors of the batch.
        chosen: Which item each sample is, -1 if it matches none; None: in order.
    """
    order = np.arange(len(items)) if chosen is None else chosen
    is_known = order >= 0
    widths = items.widths[order]
    for tensor in samples:
        if len(tensor) != len(order):
            return False
        sums = tensor.content.checksums
        if not any(
            (
                (widths[:, part] == tensor.width)
                & (items.checksums_of(part)[order] == sums)
            )[is_known].all()
            for part in range(widths.shape[1])
        ):
            return False
    return True


def _are_items(
    items: ItemFingerprints, samples: "Samples", chosen: Indices | None
) -> bool:
    """Return whether samples of different shapes are the items that were chosen.

    Args:
        items: The items.
        samples: The samples, which were padded to compare them.
        chosen: As for ``_are_whole_items``.
    """
    order = np.arange(len(items)) if chosen is None else chosen
    found = samples.candidates(items)
    if found is None or len(found) != len(order):
        return False
    return bool(found[np.arange(len(order)), order][order >= 0].all())


def _narrowed(joint: Mask, items: ItemFingerprints, samples: "list[Samples]") -> Mask:
    """Return which items each sample may be if its numbers, such as labels, count too.

    Args:
        joint: Which item each sample may be by its content, bool ``(b, n)``.
        items: The items.
        samples: The tensors of the batch, with as many samples.
    """
    for by_part in (s.numbers(items).values() for s in samples):
        agreeing = [m for m in by_part if (m & joint).any(axis=1).all()]
        moved = [m for m in by_part if _are_same_values(m)]
        for by_number in agreeing or moved[:1]:
            joint = joint & by_number
    return joint


def _are_in_place(items: ItemFingerprints, batch: Separated, batch_dim: int) -> bool:
    """Return whether every tensor has the entries of the items, in their places.

    This is what most collate functions do. Comparing entries takes less time than
    computing checksums of them.
    """
    is_shown = False
    for column in batch.columns:
        if not _is_in_place(items, column):
            return False
        is_shown = is_shown or not column.is_even or _is_evidence(column.content)
    for tensor in batch.others:
        if tensor.ndim <= batch_dim or tensor.shape[batch_dim] != len(items):
            return False
        content = DelayedChecksums(tensor, batch_dim, keeps_tensor=True)
        if not _has_equal_part(items, content):
            return False
        is_shown = is_shown or _is_evidence(content)
    return is_shown


def _is_in_place(items: ItemFingerprints, column: Column) -> bool:
    """Return whether a list has one part of each item, in the order of the items."""
    if len(column.samples) != len(items):
        return False
    if column.is_even:
        return _has_equal_part(items, column.content)
    widths, sums = column.checksums()
    return any(
        np.array_equal(items.widths[:, part], widths)
        and np.array_equal(items.checksums_of(part), sums)
        for part in range(items.widths.shape[1])
    )


def _is_evidence(content: DelayedChecksums) -> bool:
    """Return whether samples are more than a number each, and are not all alike."""
    return content.width > 1 and _differ(content)


def _has_equal_part(items: ItemFingerprints, content: DelayedChecksums) -> bool:
    """Return whether a tensor's samples equal one part of all items."""
    if not content.width:
        return False
    own = content.entries.view(np.int32)
    return any(
        entries.shape == own.shape
        and np.array_equal(entries.view(np.int32), own)
        and bool((items.widths[:, part] == content.width).all())
        and _are_same_whole(items, part, content)
        for part, entries in enumerate(items.entries)
    )


def _are_same_whole(
    items: ItemFingerprints, part: int, content: DelayedChecksums
) -> bool:
    """Return whether samples equal a part in all entries, if that must be compared."""
    whole = items.whole.get(part)
    return whole is None or np.array_equal(whole, content.of_all_entries())


def _differ(content: DelayedChecksums) -> bool:
    """Return whether there are several samples, and not all of them are alike."""
    bits = content.entries.view(np.int32)
    return len(bits) > 1 and bool((bits[0] != bits).any())


def _are_same_values(matches: Mask) -> bool:
    """Return whether the samples have the numbers of the items, equally often."""
    per_sample, per_item = matches.sum(axis=1), matches.sum(axis=0)
    return bool(per_sample.all()) and np.array_equal(
        np.sort(per_sample), np.sort(per_item)
    )


def _without_content(
    items: ItemFingerprints, samples: "list[Samples]"
) -> CollateIdentity:
    """Return the relation if no sample has the content of an item."""
    size = len(samples[0])
    nothing = np.full(size, -1)
    if size != len(items):  # or it is a list with some tensors for each sample
        is_list = len(samples) >= len(items)
        unmatched = CollateIdentity(nothing, cause=NUMBER_IN_COLLATE)
        return UNCHECKED if is_list else unmatched
    others = _made_of_others(items, samples)
    if others.mixed.any():
        return CollateIdentity(nothing, cause=MIXED_IN_COLLATE)
    if others.moved.any():
        return CollateIdentity(nothing)
    return _by_numbers(items, samples)


def _are_rows_of(items: ItemFingerprints, samples: "Samples") -> bool:
    """Return whether samples are the rows of the items, one item after another."""
    for part in items.shapes:
        are_rows = all(shape[1:] == samples.shape for shape in part if shape)
        if are_rows and all(part) and samples.width:
            nums = [shape[0] for shape in part]
            if max(nums) > 1 and sum(nums) == len(samples):
                return True
    return False


def _by_numbers(items: ItemFingerprints, samples: "list[Samples]") -> CollateIdentity:
    """Find out which item each sample is by its numbers, such as ids or labels.

    Args:
        items: The items.
        samples: The tensors of the batch.
    """
    matches = list(_same_numbers(items, samples))
    if not matches:
        return UNCHECKED
    joint: Mask = np.logical_and.reduce(matches)
    is_unique = bool((joint.sum(axis=1) == 1).all())
    is_changed = any(s.width > 1 for s in samples)  # there is more than numbers
    if joint.diagonal().all():
        is_clear = is_unique or bool(items.widths.all())
        return UNCHECKED if is_changed or not is_clear else BY_CONSTRUCTION
    if is_changed and not is_unique:
        return CollateIdentity(np.full(len(items), -1))
    return _chosen(items, samples, joint, matches)


def _same_numbers(items: ItemFingerprints, samples: "list[Samples]") -> Iterator[Mask]:
    """Yield which item each sample may be, for each tensor that is a part of them.

    A tensor may have the numbers of several parts. Then it is the part in its place, if
    the batch has as many tensors as an item has parts; else the first one that agrees
    with the other tensors.
    """
    joint = np.ones((len(items), len(items)), dtype=np.bool_)
    has_all = len(samples) == items.widths.shape[1]
    for place, tensor in enumerate(samples):
        if len(tensor) != len(items):
            continue
        by_part = tensor.numbers(items)
        same = {part: m for part, m in by_part.items() if _are_same_values(m)}
        agreeing = [m for m in same.values() if (m & joint).any(axis=1).all()]
        best = [same[place]] if has_all and place in same else agreeing
        for matches in (best or list(same.values()))[:1]:
            joint &= matches
            yield matches


def _chosen(
    items: ItemFingerprints, samples: "list[Samples]", joint: Mask, found: list[Mask]
) -> CollateIdentity:
    """Choose one item for each sample.

    Args:
        items: The items.
        samples: The tensors of the batch.
        joint: Which item each sample may be, bool ``(b, n)``.
        found: The same for each single tensor.
    """
    is_known = joint.any(axis=1)
    is_in_place = len(joint) == len(items) and joint.diagonal()[is_known].all()
    if is_in_place and is_known.all():
        return BY_CONSTRUCTION
    is_mixed = ~is_known & np.logical_and.reduce([c.any(axis=1) for c in found])
    is_lost = is_mixed
    if not is_known.all():
        others = _made_of_others(items, samples)
        is_mixed |= ~is_known & others.mixed
        is_lost = is_mixed | (~is_known & others.moved)
    if is_in_place:
        if not is_lost.any():
            return UNCHECKED  # some samples were transformed, the others have not moved
        chosen = np.where(is_known, np.arange(len(items)), -1)
    else:
        chosen = np.fromiter(_assigned(items, joint), np.int64, len(joint))
    cause = CHANGED_IN_COLLATE if not is_known.all() else ALIKE_IN_COLLATE
    cause = MIXED_IN_COLLATE if is_mixed.any() else cause
    copies = () if is_in_place else tuple(_copies(items, chosen))
    return CollateIdentity(chosen, cause=cause, copies=copies)


def _copies(items: ItemFingerprints, chosen: Indices) -> Iterator[Indices]:
    """Yield the places of samples that are equal items, for each such item.

    Args:
        items: The items.
        chosen: Which item each sample is, -1 if it matches none.
    """
    places = np.flatnonzero(chosen >= 0)
    sums = joint_sums(list(items.checksums[chosen[places]].T))
    values, counts = np.unique(sums, return_counts=True)
    for value in values[counts > 1]:
        yield places[sums == value]


def _assigned(items: ItemFingerprints, joint: Mask) -> Iterator[int]:
    """Yield one item for each sample, -1 where it is not known which.

    Padding makes a short item look like the beginning of a longer one, so the longest
    matching item is chosen. Items that are equal in all their parts are
    interchangeable; each is used once before one of them is used again.
    """
    total_widths, num_uses = items.widths.sum(axis=1), np.zeros(len(items), np.int64)
    sums = items.checksums
    are_complete = bool(items.widths.all())  # all parts of all items have checksums
    for row in joint:
        possible = np.flatnonzero(row)
        if len(possible) > 1:
            widths = total_widths[possible]
            possible = possible[widths == widths.max()]
        is_alone = len(possible) == 1
        are_equal = are_complete and (sums[possible] == sums[possible[:1]]).all()
        if not len(possible) or not (is_alone or are_equal):
            yield -1
            continue
        item = possible[num_uses[possible].argmin()]
        num_uses[item] += 1
        yield int(item)


# ------------------------------------------------------------------------- one tensor
class Samples:
    """One tensor of a batch, to be compared with the items.

    Args:
        tensor: The tensor.
        dim: Its dimension that runs over the samples.
    """

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self._by_sample = tensor.detach().movedim(dim, 0)
        self.content = DelayedChecksums(tensor, dim, keeps_tensor=True)
        self.shape = tuple(self._by_sample.shape[1:])
        self._is_compared = False
        self._candidates: Mask | None = None

    def __len__(self) -> int:
        return len(self._by_sample)

    @property
    def width(self) -> int:
        """Number of entries in a sample."""
        return self.content.width

    def candidates(self, items: ItemFingerprints) -> Mask | None:
        """Return which items each sample may be, by the part that fits best.

        Args:
            items: The items; always the same ones, because the result is cached.

        Returns:
            bool ``(b, n)``; None if this tensor is no part of the items, or if its
            samples are all alike.
        """
        if not self._is_compared:
            self._is_compared, self._candidates = True, self._compare(items)
        return self._candidates

    def _compare(self, items: ItemFingerprints) -> Mask | None:
        """Compute what ``candidates`` returns."""
        if self.width <= 1:
            return None
        if _has_equal_part(items, self.content) and _differ(self.content):
            return np.eye(len(items), dtype=np.bool_)
        best: Mask | None = None
        for part in range(items.widths.shape[1]):
            matches = self._matches(items, part)
            if matches is None:
                continue
            if len(self) == len(items) and matches.diagonal().all():
                return np.eye(len(items), dtype=np.bool_)
            num = matches.any(axis=1).sum()
            if best is None or num > best.any(axis=1).sum():
                best = matches
        return best

    def _matches(self, items: ItemFingerprints, part: int) -> Mask | None:
        """Compare all samples with one part of all items.

        Returns:
            bool ``(b, n)``; None if no sample, or only some short ones, agree.
        """
        widths, sums = items.widths[:, part], items.best_checksums_of(part)
        is_whole = part in items.whole and self.width == widths[0]
        own = self.content.of_all_entries() if is_whole else self.content.checksums
        if widths.max() < 2 or _are_all_alike(sums) or _are_all_alike(own):
            return None
        matches = (widths == self.width) & (own[:, None] == sums)
        if (widths != self.width).any():
            matches |= self._padded(items, part)
        is_clear = (matches & (widths >= _MIN_ENTRIES)).any()
        return matches if matches.any(axis=1).all() or is_clear else None

    def _padded(self, items: ItemFingerprints, part: int) -> Mask:
        """Compare the beginnings of all samples with items of smaller shapes."""
        widths, sums = items.widths[:, part], items.checksums_of(part)
        shapes = items.shapes[part]
        matches = np.zeros((len(self), len(items)), dtype=np.bool_)
        is_smaller = np.array([_is_smaller(shape, self.shape) for shape in shapes])
        is_run = is_smaller & np.array([s[1:] == self.shape[1:] for s in shapes])
        bounds = np.array([smallest_bound(max(1, int(width))) for width in widths])
        for bound in np.unique(bounds[is_run]):  # padded at the end: a run of entries
            of_size = np.flatnonzero(is_run & (bounds == bound))
            places = places_up_to(int(bound))
            count = np.searchsorted(places, widths[of_size])
            run = self._flat[:, torch.from_numpy(places[: count.max()])]
            begin = running_checksums(_numbers(run))[:, count - 1]
            matches[:, of_size] = begin == sums[of_size]
        others = {
            s
            for s, is_other in zip(shapes, is_smaller & ~is_run, strict=True)
            if is_other
        }
        for shape in others:  # padded in several dimensions, as images are
            inside = torch.from_numpy(_places(shape, self.shape))
            begin = checksums_of_entries(_numbers(self._flat[:, inside]))
            of_shape = np.array([s == shape for s in shapes])
            matches |= of_shape & (begin[:, None] == sums)
        return matches

    @cached_property
    def _flat(self) -> Tensor:
        """The samples, ``(b, width)``."""
        return self._by_sample.reshape(len(self), -1)

    def numbers(self, items: ItemFingerprints) -> dict[int, Mask]:
        """Return which items have the same number, for each part that is a number.

        Returns:
            bool ``(b, n)`` by part; empty if samples are more than a number each.
        """
        if self.width != 1:
            return {}
        sums = self.content.checksums[:, None]
        parts = np.flatnonzero((items.widths == 1).all(axis=0)).tolist()
        return {
            part: sums == items.checksums_of(part)
            for part in parts
            if not _are_all_alike(items.checksums_of(part))
        }


def _as_samples(items: ItemFingerprints, tensor: Tensor, batch_dim: int) -> Samples:
    """Choose the dimension of a tensor that runs over the samples.

    It is the one along which the items are found; else one as long as their number.
    """
    dims = [d for d in (batch_dim, 1 - batch_dim) if d < tensor.dim()]
    if not tensor.numel():
        return Samples(tensor, dims[0])
    as_long = [d for d in dims if tensor.shape[d] == len(items)]
    ordered = [
        Samples(tensor, d) for d in as_long + [d for d in dims if d not in as_long]
    ]
    for samples in ordered[:-1]:
        if samples.candidates(items) is not None:
            return samples
    found = ordered[-1].candidates(items) is not None
    return ordered[-1] if found else ordered[0]


def _are_all_alike(sums: NDArray[np.int64]) -> bool:
    """Return whether there are several checksums, all equal (as for masks)."""
    return len(sums) > 1 and bool((sums == sums[0]).all())


def _is_smaller(shape: tuple[int, ...], padded: tuple[int, ...]) -> bool:
    """Return whether an item of a shape fits into a padded one, in all dimensions."""
    return (
        0 < len(shape) == len(padded)
        and 0 not in shape
        and shape != padded
        and all(a <= b for a, b in zip(shape, padded, strict=True))
    )


def _numbers(entries: Tensor) -> NDArray[np.float32]:
    """Return entries as checksums use them."""
    return entries.cpu().float().contiguous().numpy()


@lru_cache(maxsize=4096)
def _places(shape: tuple[int, ...], padded: tuple[int, ...]) -> NDArray[np.int64]:
    """Return where in a padded sample the entries are that an item's checksum uses."""
    within = np.unravel_index(places_compared(int(np.prod(shape))), shape)
    places: NDArray[np.int64] = np.ravel_multi_index(within, padded)
    return places


# --------------------------------------------------------------------------- mixtures
def _made_of_others(items: ItemFingerprints, samples: list[Samples]) -> OtherSamples:
    """Find samples that are made of two items, or of another item than their own."""
    mixed, moved = np.zeros((2, len(samples[0])), dtype=np.bool_)
    for own in (s for s in samples if len(s) == len(items) == len(mixed)):
        for part in range(items.widths.shape[1]):
            if (items.widths[:, part] == own.width).all():
                others = made_of_others(own.content.entries, items.entries[part])
                mixed |= others.mixed
                moved |= others.moved
    return OtherSamples(mixed, moved)
