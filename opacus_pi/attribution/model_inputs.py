"""Recognise the delivered samples in one input of the model.

An input is compared with the recent deliveries, by its memory and, where this does not
match or was written to, by the checksums of its samples. ``evidence`` joins what all
inputs of a forward pass show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi.attribution.causes import (
    CHANGED_IN_PLACE,
    MIXED,
    MOVED_AND_CHANGED,
    NOT_DELIVERED,
    Cause,
)
from opacus_pi.attribution.delivery import Delivery, Indices
from opacus_pi.attribution.mixtures import made_of_others
from opacus_pi.attribution.samples import DelayedChecksums

__all__ = ["LOOKS_ALIKE", "UNKNOWN", "Finding", "Input", "SharedRows", "lost_order"]

UNKNOWN = -1
"""In place of a position in a delivery: no sample of the delivery is like this one."""

LOOKS_ALIKE = -2
"""In place of a position in a delivery: several samples are like this one."""


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
    """

    delivery: Delivery
    positions: Indices
    by_storage: bool
    is_assumed: NDArray[np.bool_] | None = None
    cause: Cause = NOT_DELIVERED

    @cached_property
    def is_known(self) -> NDArray[np.bool_]:
        """Mask of the recognised samples, bool ``(b,)``."""
        known: NDArray[np.bool_] = self.positions >= 0
        return known if self.is_assumed is None else known & ~self.is_assumed

    @cached_property
    def num_known(self) -> int:
        """Number of recognised samples."""
        return int(np.count_nonzero(self.is_known))

    def without_order(self, cause: Cause) -> "Finding":
        """Return the same finding with nothing assumed.

        Args:
            cause: Why samples cannot be assumed to be in their places.
        """
        positions = np.where(self.is_known, self.positions, UNKNOWN)
        return Finding(self.delivery, positions, self.by_storage, None, cause)

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
        return DelayedChecksums(self.tensor, self.dim)

    @cached_property
    def is_pattern(self) -> bool:
        """Return whether it looks like a mask or positions computed from other inputs.

        That is: all samples are alike, and the same in each batch; or they have one
        entry, two different numbers only, or whole numbers that rise by at most one,
        as positions do.
        """
        return self.has_pattern or (self.is_alike and not self.changes)

    @cached_property
    def is_alike(self) -> bool:
        """Return whether there are several samples, and all of them are alike."""
        sums = self.content.checksums
        return len(sums) > 1 and bool((sums == sums[0]).all())

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

    def finding_in(self, delivery: Delivery) -> Finding | None:
        """Return the finding for a delivery; None if there is none."""
        return next((f for f in self.findings if f.delivery is delivery), None)

    def look(self, recent: Sequence[Delivery], *, verify: bool) -> None:
        """Compare the input with deliveries: by its memory, else by its content.

        Args:
            recent: Deliveries, the newest first.
            verify: Whether samples are recognised by content.
        """
        stored = self._in_storage(recent, verify=verify)
        if stored is not None and (stored.num_known or not verify):
            self.findings = [stored]
            return
        self.findings = self._in_content(recent) if verify else []
        if stored is not None and not any(f.num_known for f in self.findings):
            self.findings = [stored]  # written to, and unlike all that was delivered

    def _in_storage(
        self, recent: Sequence[Delivery], *, verify: bool
    ) -> Finding | None:
        """Find the delivery whose memory contains the input."""
        for delivery in recent:
            for delivered in delivery.tensors:
                where = delivered.stored.positions(self.tensor, self.dim)
                if where is not None:
                    changed = delivered.changed(self.tensor)
                    if changed is None or not changed[where].any():
                        return Finding(delivery, where, True)
                    found, cause = np.full(len(where), UNKNOWN), None
                    if delivered.content is not None:
                        now = delivered.content_now(self.tensor)
                        known = delivered.content.checksums
                        found = _positions_of(now.checksums, known)[where]
                        cause = lost_order(now, delivered.content)
                    finding = _changed_in_place(delivery, where, changed[where], found)
                    return finding if cause is None else finding.without_order(cause)
        return None

    def _in_content(self, recent: Sequence[Delivery]) -> list[Finding]:
        """Find the deliveries that have samples with the input's checksums."""
        width, sums = self.content.width, self.content.checksums
        findings = []
        for delivery in recent:
            found = [
                Finding(delivery, _positions_of(sums, known), False)
                for known in delivery.checksums.get(width, ())
            ]
            if found:
                best = max(found, key=lambda f: f.num_known)
                if (best.positions != UNKNOWN).any():
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
            if given.findings or given.has_pattern or not given.is_alike:
                continue
            row = int(given.content.checksums[0])
            key = place, given.content.width
            given.changes = self._rows.setdefault(key, row) != row


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


def _changed_in_place(
    delivery: Delivery, where: Indices, changed: NDArray[np.bool_], found: Indices
) -> Finding:
    """Return the finding for an input that was written to after its delivery.

    Args:
        delivery: The delivery in whose memory it is.
        where: Position of each sample, by its memory.
        changed: Whether its content has changed.
        found: Position of each sample, by its content.
    """
    positions = np.where(changed, found, where)
    is_unknown = positions < 0
    has_moved = bool((positions != where)[~is_unknown].any())
    if not is_unknown.any() or has_moved:
        return Finding(delivery, positions, not has_moved, None, MOVED_AND_CHANGED)
    return Finding(delivery, where, True, is_unknown, CHANGED_IN_PLACE)


def _positions_of(given: Indices, delivered: Indices) -> Indices:
    """Look up samples by their checksums.

    Where a checksum occurs twice among the delivered ones, these samples look alike,
    and it is not known which of them was given. If all the others are in their
    places, these are taken to be in theirs.

    Args:
        given: Checksums of the samples that were given.
        delivered: Checksums of a delivered tensor.

    Returns:
        int64 ``(b,)``: positions in the delivery, or negative codes.
    """
    if np.array_equal(given, delivered):
        return np.arange(len(delivered))
    values, first, counts = np.unique(delivered, return_index=True, return_counts=True)
    place = np.minimum(np.searchsorted(values, given), len(values) - 1)
    is_there = values[place] == given
    positions = np.where(is_there, first[place], UNKNOWN)
    is_alike = is_there & (counts[place] > 1)
    if is_alike.any():
        same = np.zeros(len(given), dtype=np.bool_)
        if len(given) == len(delivered):
            same = given == delivered
        stay = bool(same[is_there].all()) and bool((is_there & ~is_alike).any())
        codes = np.arange(len(given)) if stay else np.full(len(given), LOOKS_ALIKE)
        positions = np.where(is_alike, codes, positions)
    return positions
