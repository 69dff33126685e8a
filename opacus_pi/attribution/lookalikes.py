"""Delivered samples that look alike, and what is known about which of them is which.

Two examples of a batch may have the same input and different targets. If the loop gives
the model copies of the batch, the input alone does not show which of the two is in
which position. Three facts can: another input of the model, the targets of the loss
(``targets.py``), or the order of all other samples. Where none does, the norms of such
samples belong to their examples in an unknown order, and each example is charged the
largest of them, which is never too little.

Samples that are equal in everything that the loader delivered are copies. An exchange
of them changes nothing, unless their gradients differ, as dropout makes them. So copies
in an order that is not known are charged the largest of their norms, too, and it is
said if these norms differ by more than rounding.

*Guarantee.* A sample gets one example of several that look alike only in three cases.
Another tensor distinguishes them. Or they are copies, and the loop has not moved any
sample, or their norms are equal. Or the model's inputs have always been in the
delivered order, which a random permutation would show with a probability below 2^-20.

*What breaks it.* A loop that permutes batches only after it has kept the order of many,
and whose first permutation moves nothing but samples that look alike; and one that
moves nothing but copies. Once any other sample has moved, the run says that earlier
samples were only assumed to be in place.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "LOOKS_ALIKE",
    "UNKNOWN",
    "Alike",
    "Charged",
    "HasAlike",
    "Matches",
    "OrderSoFar",
    "alike_of",
    "charged",
    "matched",
    "refined",
    "rows_of_all",
    "settled",
]

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

UNKNOWN = -1
"""In place of a position in a delivery: no sample of the delivery is like this one."""

LOOKS_ALIKE = -2
"""In place of a position in a delivery: several samples are like this one."""

_ENOUGH = 20.0  # bits: how improbable an order must be for a loop that permutes
_ROUNDING = 1e-3  # of a norm: smaller differences of copies are not reported
_ROUNDING_OF_ALL = 1e-6  # of the largest norm of a batch, in addition


@dataclass(frozen=True, eq=False)
class Alike:
    """As many rows of an input as there are delivered samples that look like them.

    Args:
        rows: int64 ``(k,)``, rising: positions in the model's input.
        places: int64 ``(k,)``, rising: positions in the delivery.
    """

    rows: Indices
    places: Indices


@dataclass(frozen=True, eq=False)
class Matches:
    """Samples that were looked up among the delivered ones.

    Args:
        positions: int64 ``(b,)``: positions in the delivery, or negative codes.
        groups: Those samples coded as ``LOOKS_ALIKE`` of which all were given.
    """

    positions: Indices
    groups: tuple[Alike, ...] = ()


def matched(given: Indices, delivered: Indices) -> Matches:
    """Look up samples by their checksums.

    Args:
        given: Checksums of the samples that were given.
        delivered: Checksums of a delivered tensor.
    """
    values, first, counts = np.unique(delivered, return_index=True, return_counts=True)
    place = np.minimum(np.searchsorted(values, given), len(values) - 1)
    is_there = values[place] == given
    positions = np.where(is_there, first[place], UNKNOWN)
    uses = np.bincount(place[is_there], minlength=len(values))
    groups = []
    for value in np.flatnonzero((counts > 1) & (uses > 0)):
        rows = np.flatnonzero(is_there & (place == value))
        places = np.flatnonzero(delivered == values[value])
        if len(rows) > len(places):  # at least one of the examples is there twice
            positions[rows] = np.resize(places, len(rows))
            continue
        positions[rows] = LOOKS_ALIKE
        if len(rows) == len(places):
            groups.append(Alike(rows, places))
    return Matches(positions, tuple(groups))


def refined(
    groups: Sequence[Alike], given: Indices, delivered: Indices
) -> list[Alike] | None:
    """Split samples that look alike by what another tensor contains.

    Args:
        groups: Samples that look alike.
        given: Checksums of all samples in another tensor that the loop uses, ``(b,)``.
        delivered: Checksums of this tensor as it was delivered.

    Returns:
        The smaller groups; None if a group does not have the delivered values.
    """
    found = []
    for group in groups:
        rows = group.rows[np.argsort(given[group.rows], kind="stable")]
        places = group.places[np.argsort(delivered[group.places], kind="stable")]
        values = given[rows]
        if not np.array_equal(values, delivered[places]):
            return None
        ends = np.flatnonzero(values[1:] != values[:-1]) + 1
        pairs = zip(np.split(rows, ends), np.split(places, ends), strict=True)
        found += [Alike(np.sort(r), np.sort(p)) for r, p in pairs]
    return found


def settled(
    positions: Indices,
    groups: Sequence[Alike],
    compared: Sequence[Sequence[tuple[Indices, Indices]]],
) -> tuple[Indices, list[Alike]]:
    """Find out which sample is which by all tensors together.

    Args:
        positions: Position of each sample in the delivery, or a negative code.
        groups: Samples that look alike.
        compared: For each tensor that the loop uses, its checksums, ``(b,)``, and those
            of a delivered tensor, one for each sample; for each tensor that it may be.

    Returns:
        Positions, those of the samples that look alike included; and the groups of
        samples whose order remains unknown.
    """
    taken = set(positions[positions >= 0].tolist())
    left = list(_without_known(positions, groups, taken))
    known = np.flatnonzero(positions >= 0)
    for pairs in compared:
        if not any(len(group.rows) > 1 for group in left):
            break
        found = []
        for sums, before in pairs:
            if np.array_equal(sums[known], before[positions[known]]):
                parts = refined(left, sums, before)
                if parts is not None:
                    found.append((before, parts))
        if found and all(np.array_equal(found[0][0], before) for before, _ in found):
            left = found[0][1]
    positions = positions.copy()
    for group in left:
        positions[group.rows] = group.places
    return positions, [group for group in left if len(group.rows) > 1]


def _without_known(
    positions: Indices, groups: Sequence[Alike], taken: set[int]
) -> Iterator[Alike]:
    """Yield the groups without the samples that another input shows."""
    for group in groups:
        rows = group.rows[positions[group.rows] < 0]
        places = np.array([p for p in group.places.tolist() if p not in taken], int)
        if len(rows) and len(rows) == len(places):
            yield Alike(rows, places)


def rows_of_all(groups: Sequence[Alike]) -> Indices:
    """Return the positions of all samples of some groups, int64 ``(k,)``."""
    return np.concatenate([np.empty(0, np.int64), *(group.rows for group in groups)])


class OrderSoFar:
    """What a run has shown about whether its loop keeps the order of batches.

    Attributes:
        has_moved: Whether a sample was seen in another position than it was delivered.
        moves_in_place: Whether that was in the memory that was delivered.
        num_trusted: How many samples that look alike were taken to be in their places.
        num_copies_trusted: How many copies were, before the order was known to be kept.
        changes_some: Whether the loop was seen to change some samples in their places.
    """

    def __init__(self) -> None:
        self.has_moved = self.moves_in_place = self.changes_some = False
        self.num_trusted = self.num_copies_trusted = 0
        self._bits = 0.0

    @property
    def is_kept(self) -> bool:
        """Return whether a loop that permutes would have shown it by now."""
        return not self.has_moved and self._bits >= _ENOUGH

    @property
    def is_doubtful(self) -> bool:
        """Return whether samples were trusted by a loop that later moved some."""
        return self.has_moved and self.num_trusted > 0

    @property
    def are_copies_doubtful(self) -> bool:
        """Return whether copies were trusted by a loop that later moved samples."""
        return self.has_moved and self.num_copies_trusted > 0

    def saw(
        self, positions: Indices, alike: Sequence[Alike], *, size: int, in_place: bool
    ) -> None:
        """Note in which order a forward pass had the samples of a delivery.

        Args:
            positions: Position of each sample, or a negative code.
            alike: Groups of samples whose order is not known.
            size: The number of samples that were delivered.
            in_place: Whether they are in the memory that was delivered.
        """
        is_known = positions >= 0
        is_known[rows_of_all(alike)] = False
        known = positions[is_known]
        has_moved = bool((known[1:] <= known[:-1]).any())
        if len(positions) == size:
            has_moved |= bool((known != np.flatnonzero(is_known)).any())
            has_moved |= any((g.rows != g.places).any() for g in alike)
        if has_moved:
            self.has_moved = True
            self.moves_in_place |= in_place
        else:
            unclear = [len(group.rows) for group in alike]
            unclear.append(len(positions) - len(known) - sum(unclear))
            self._bits += _log2(len(positions)) - sum(map(_log2, unclear))


def _log2(num: int) -> float:
    """Return the logarithm of the number of orders of so many samples."""
    return math.lgamma(num + 1) / math.log(2)


class HasAlike(Protocol):
    """The part of a forward pass that ``charged`` looks at."""

    alike: tuple[Alike, ...]
    copies: tuple[Alike, ...]

    @property
    def num_samples(self) -> int | None:
        """Number of samples."""


@dataclass(frozen=True, eq=False)
class Charged:
    """What samples are charged, of which some are in an order that is not known.

    Args:
        norms: Their norms, or the largest of their group, ``(b,)``.
        differ: Whether a sample is a copy, and the norms of its group differ by more
            than rounding, bool ``(b,)``, on the device of the norms; None: there are no
            copies.
    """

    norms: Tensor
    differ: Tensor | None = None


def charged(norms: Tensor, passes: Sequence[HasAlike]) -> Charged:
    """Charge samples whose order is not known the largest of their norms.

    Args:
        norms: Norms of all samples, ``(b,)``.
        passes: The forward passes that the samples come from, in this order.

    Returns:
        The norms; the same tensor if there are no such samples. Nothing waits for an
        accelerator.
    """
    if not any(forward.alike or forward.copies for forward in passes):  # nearly always
        return Charged(norms)
    first_of, is_copy = np.arange(len(norms)), np.zeros(len(norms), np.bool_)
    copies = list(_in_all(passes, "copies"))
    for rows in (*copies, *_in_all(passes, "alike")):
        joint = first_of[rows]  # groups may overlap
        first_of[np.isin(first_of, joint)] = joint.min()
    for rows in copies:
        is_copy[rows] = True
    chosen = torch.from_numpy(first_of).to(norms.device)
    largest = norms.scatter_reduce(0, chosen, norms, "amax")[chosen]
    if not copies:
        return Charged(largest)
    smallest = norms.scatter_reduce(0, chosen, norms, "amin")[chosen]
    rounding = max(_ROUNDING, 4 * torch.finfo(norms.dtype).eps)
    differ = largest - smallest > rounding * largest + _ROUNDING_OF_ALL * norms.amax()
    return Charged(largest, differ & torch.from_numpy(is_copy).to(norms.device))


def alike_of(passes: Sequence[HasAlike]) -> Indices:
    """Return the positions of the samples whose order is not known, int64 ``(k,)``.

    Copies are not among them.

    Args:
        passes: Forward passes whose samples follow each other.
    """
    return np.concatenate([np.empty(0, np.int64), *_in_all(passes, "alike")])


def _in_all(
    passes: Sequence[HasAlike], kind: Literal["alike", "copies"]
) -> Iterator[Indices]:
    """Yield the positions of each group of samples, over all passes together."""
    start = 0
    for forward in passes:
        for group in getattr(forward, kind):
            yield start + group.rows
        start += forward.num_samples or 0
