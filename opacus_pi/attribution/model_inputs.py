"""Recognise the delivered samples in one input of the model.

An input is compared with the recent deliveries, by its memory and, where this does not
match or was written to, by the checksums of its samples. ``evidence`` joins what all
inputs of a forward pass show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi.attribution.causes import (
    CHANGED_IN_PLACE,
    MIXED,
    MOVED_AND_CHANGED,
    NOT_DELIVERED,
    TWO_TENSORS,
    Cause,
)
from opacus_pi.attribution.delivery import Delivery, Indices
from opacus_pi.attribution.lookalikes import (
    LOOKS_ALIKE,
    UNKNOWN,
    Alike,
    Matches,
    matched,
    rows_of_all,
)
from opacus_pi.attribution.mixtures import made_of_others
from opacus_pi.attribution.samples import DelayedChecksums, DeliveredTensor

__all__ = ["Finding", "Input", "SharedRows", "lost_order"]


@dataclass(frozen=True, eq=False)
class Finding:
    """The samples of one delivery that were recognised in one input of the model.

    Args:
        delivery: The delivery.
        positions: int64 ``(b,)``: position of each sample in it, or a negative code.
        by_storage: Whether the memory matched; otherwise the content did.
        is_assumed: Samples whose memory is known and whose content was changed, bool
            ``(b,)``; None: none.
        cause: Why samples are unknown or assumed.
        groups: Samples that look alike, where all such samples were given.
        stays: Samples that have the content of their own places, bool ``(b,)``; None:
            not known.
    """

    delivery: Delivery
    positions: Indices
    by_storage: bool
    is_assumed: NDArray[np.bool_] | None = None
    cause: Cause = NOT_DELIVERED
    groups: tuple[Alike, ...] = ()
    stays: NDArray[np.bool_] | None = None

    @cached_property
    def is_known(self) -> NDArray[np.bool_]:
        """Mask of the recognised samples, bool ``(b,)``."""
        known: NDArray[np.bool_] = self.positions >= 0
        return known if self.is_assumed is None else known & ~self.is_assumed

    @cached_property
    def num_known(self) -> int:
        """Number of recognised samples."""
        return int(np.count_nonzero(self.is_known))

    @cached_property
    def is_explained(self) -> NDArray[np.bool_]:
        """Mask of the samples that are like one or several of the delivery."""
        explained: NDArray[np.bool_] = self.is_known | (self.positions == LOOKS_ALIKE)
        return explained

    @cached_property
    def num_explained(self) -> int:
        """Number of samples that may be different samples of the delivery."""
        num_alike = np.count_nonzero(self.positions == LOOKS_ALIKE)
        return len(np.unique(self.positions[self.is_known])) + int(num_alike)

    @property
    def has_moved(self) -> bool:
        """Return whether samples were moved within the delivered memory."""
        is_clear = self.by_storage and bool(self.is_explained.all())
        return self.cause is MOVED_AND_CHANGED and not is_clear

    @property
    def is_whole(self) -> bool:
        """Return whether the samples are certain, or all as they were delivered."""
        size = len(self.positions)
        is_equal = self.stays is not None and bool(self.stays.all())
        return self.num_known == size or (self.num_explained == size and is_equal)

    def without_order(self, cause: Cause) -> "Finding":
        """Return the same finding with nothing assumed.

        Args:
            cause: Why samples cannot be assumed to be in their places.
        """
        if self.is_assumed is None:
            return self
        return replace(
            self,
            positions=np.where(self.is_assumed, UNKNOWN, self.positions),
            is_assumed=None,
            cause=cause,
        )

    @property
    def is_as_large(self) -> bool:
        """Return whether the input has as many samples as the delivery."""
        return len(self.positions) == len(self.delivery.indices or [])

    @property
    def is_in_place(self) -> bool:
        """Return whether sizes agree and all recognised samples are in their places."""
        places = np.arange(len(self.positions))
        same = (self.positions == places)[self.is_known]
        return self.is_as_large and bool(same.all())


@dataclass(eq=False)
class Input:
    """One tensor among the model's inputs, with the samples recognised in it.

    Args:
        tensor: The tensor.
        dim: Its dimension that runs over the samples.
        findings: The finding for each delivery whose samples it contains.
        changes: Whether its samples are all alike, but different from those of an
            earlier batch.
    """

    tensor: Tensor
    dim: int
    findings: list[Finding] = field(default_factory=list)
    changes: bool = False

    def __len__(self) -> int:
        return self.tensor.shape[self.dim]

    @cached_property
    def content(self) -> DelayedChecksums:
        """Return what the input contains."""
        return DelayedChecksums(self.tensor, self.dim, keeps_tensor=True)

    @cached_property
    def is_pattern(self) -> bool:
        """Return whether it looks like a mask or positions computed from other inputs.

        That is: all samples are alike, and the same in each batch; or they have one
        entry, two different numbers only, or whole numbers that rise by at most one,
        as positions do. A single number in all entries must be the same in each batch.
        """
        if self.is_alike and not self.changes:
            return True
        return self.has_pattern and not (self.changes and self._is_one_number)

    @cached_property
    def is_alike(self) -> bool:
        """Return whether there are several samples, and all of them are alike."""
        sums = self.content.checksums
        return len(sums) > 1 and bool((sums == sums[0]).all())

    @property
    def _is_one_number(self) -> bool:
        """Return whether samples have several entries, and all of them are equal."""
        entries = self.content.entries
        return entries.shape[1] > 1 and bool((entries == entries.flat[0]).all())

    @cached_property
    def has_pattern(self) -> bool:
        """Return whether its numbers are those of a mask or of positions."""
        if self.content.width <= 1:
            return True
        entries = self.content.entries
        other = entries[entries != entries.flat[0]]
        if not other.size or (other == other.flat[0]).all():
            return True
        if self.tensor.is_floating_point():
            return False
        rises = np.diff(entries, axis=1)
        width = max(1, self.content.width // entries.shape[1])
        falls = np.count_nonzero((rises < 0) | (rises > width), axis=1)
        return bool((falls <= 1).all() and (entries <= self.content.width + 1).all())

    def compared_with(self, delivery: Delivery) -> list[tuple[Indices, Indices]]:
        """Return the input's checksums and those of each tensor as wide as it.

        Args:
            delivery: The delivery of these tensors.
        """
        return [
            (self.content.checksums_like(before), before.best_checksums)
            for before in delivery.all_contents()
            if before.width == self.content.width
        ]

    def finding_in(self, delivery: Delivery) -> Finding | None:
        """Return the finding for a delivery; None if there is none."""
        return next((f for f in self.findings if f.delivery is delivery), None)

    def look(
        self, recent: Sequence[Delivery], *, verify: bool, moves_in_place: bool = False
    ) -> None:
        """Compare the input with deliveries: by its memory, else by its content.

        Args:
            recent: Deliveries, the newest first.
            verify: Whether samples are recognised by content.
            moves_in_place: Whether the loop moves samples within delivered memory.
        """
        stored = self._in_storage(recent, moves_in_place=moves_in_place)
        if stored is not None and (stored.is_explained.any() or not verify):
            self.findings = [stored]
            return
        self.findings = self._in_content(recent) if verify else []
        if stored is not None and not any(f.is_explained.any() for f in self.findings):
            self.findings = [stored]  # written to, and unlike all that was delivered

    def _in_storage(
        self, recent: Sequence[Delivery], *, moves_in_place: bool
    ) -> Finding | None:
        """Find the delivery whose memory contains the input."""
        for delivery in recent:
            for delivered in delivery.tensors:
                where = delivered.stored.positions(self.tensor, self.dim)
                if where is not None:
                    was_written = moves_in_place or delivered.stored.modified(
                        self.tensor
                    )
                    changed = delivered.changed(self.tensor)
                    if changed is not None and changed[where].any():
                        return self._rewritten(delivery, delivered, where, changed)
                    if not was_written or delivered.content is None:
                        return Finding(delivery, where, True)
                    now = delivered.content_now(self.tensor)
                    same = matched(
                        now.checksums_like(delivered.content)[where],
                        delivered.content.best_checksums,
                    )
                    is_alike = same.positions == LOOKS_ALIKE
                    positions = np.where(is_alike, LOOKS_ALIKE, where)
                    stays = where == np.arange(len(where))
                    return Finding(
                        delivery, positions, True, groups=same.groups, stays=stays
                    )
        return None

    def _rewritten(
        self,
        delivery: Delivery,
        delivered: DeliveredTensor,
        where: Indices,
        changed: NDArray[np.bool_],
    ) -> Finding:
        """Return the finding for delivered memory whose content has changed.

        Args:
            delivery: The delivery.
            delivered: Its tensor in whose memory the input is.
            where: Position of each sample, by its memory.
            changed: Whether the content of each delivered sample has changed.
        """
        found, cause = Matches(np.full(len(where), UNKNOWN)), None
        if delivered.content is not None and delivered.content.width:
            now = delivered.content_now(self.tensor)
            found = matched(
                now.checksums_like(delivered.content)[where],
                delivered.content.best_checksums,
            )
            cause = lost_order(now, delivered.content)
        finding = _changed_in_place(delivery, where, changed[where], found)
        return finding if cause is None else finding.without_order(cause)

    def _in_content(self, recent: Sequence[Delivery]) -> list[Finding]:
        """Find the deliveries that have samples with the input's checksums."""
        width, findings = self.content.width, []
        for delivery in recent:
            known = list(delivery.differing.get(width, ()))
            if self.is_alike:
                known += delivery.alike(width)
            found = [
                _by_content(delivery, self.content.checksums_like(c), c.best_checksums)
                for c in known
            ]
            if found:
                best = max(found, key=lambda f: f.num_explained)
                if any(_is_beside(best, other) for other in found):
                    best = replace(best, cause=TWO_TENSORS)
                if best.is_explained.any():
                    findings.append(best)
        return findings


class SharedRows:
    """Store of the inputs whose samples were all alike, by their place in the call.

    A table or a mask is the same in each batch. If an input's samples are all alike,
    but differ from batch to batch, it was computed, perhaps from all examples of the
    batch (such as their mean).
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], int] = {}

    def saw(self, inputs: Sequence[Input]) -> None:
        """Note which of these inputs differ from those of an earlier batch.

        Args:
            inputs: All inputs of a forward pass, compared with the deliveries already.
        """
        for place, given in enumerate(inputs):
            if given.findings or not given.is_alike:
                continue
            row = int(given.content.checksums[0])
            key = place, given.content.width
            given.changes = self._rows.setdefault(key, row) != row


def _is_beside(best: Finding, other: Finding) -> bool:
    """Return whether another tensor shows further samples of the same examples.

    Args:
        best: What the tensor shows that explains most samples of an input.
        other: What another tensor of the same delivery shows of that input.
    """
    rest = other.is_known & ~best.is_explained
    return bool(np.isin(other.positions[rest], best.positions[best.is_known]).any())


def lost_order(now: DelayedChecksums, before: DelayedChecksums) -> Cause | None:
    """Return the cause if samples that were changed are not at their own positions.

    Args:
        now: What the samples contain.
        before: What the delivered samples contained, as many and as wide.
    """
    if now.width != before.width:
        return None
    others = made_of_others(now.entries, before.entries)
    if others.moved.any():
        return MOVED_AND_CHANGED
    return MIXED if others.mixed.any() else None


def _by_content(delivery: Delivery, given: Indices, delivered: Indices) -> Finding:
    """Return the finding for samples that are compared by their checksums.

    Args:
        delivery: The delivery.
        given: Checksums of the samples that were given.
        delivered: Checksums of a delivered tensor.
    """
    found = matched(given, delivered)
    stays = given == delivered if len(given) == len(delivered) else None
    if stays is not None and bool((delivered == delivered[0]).all()):
        stays = None  # a mask, perhaps, which is the same in each batch
    return Finding(delivery, found.positions, False, groups=found.groups, stays=stays)


def _changed_in_place(
    delivery: Delivery, where: Indices, changed: NDArray[np.bool_], found: Matches
) -> Finding:
    """Return the finding for an input that was written to after its delivery.

    Args:
        delivery: The delivery in whose memory it is.
        where: Position of each sample, by its memory.
        changed: Whether its content has changed.
        found: Its samples looked up by their content.
    """
    positions = found.positions
    has_moved = (changed & (positions != UNKNOWN) & (positions != where)).any()
    if has_moved or (positions != UNKNOWN).all():
        return Finding(
            delivery,
            positions,
            not has_moved,
            None,
            MOVED_AND_CHANGED,
            groups=found.groups,
        )
    places = where.copy()
    places[rows_of_all(found.groups)] = LOOKS_ALIKE
    return Finding(
        delivery, places, True, changed, CHANGED_IN_PLACE, groups=found.groups
    )
