"""Whose rows a model was given: storage, content, or the latest batch.

Pure functions from the recent deliveries and the model's inputs to a ``Forward``.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi.attribution.batch_rows import (
    SampledRows,
    StoredRows,
    row_checksums,
    tensors_in,
)

UNKNOWN = -1  # a row of an example that could not be told
NOBODY = -2  # a row that is no example: padding for an empty batch

Rows = NDArray[np.int64]


class Stream:
    """One pass over a loader; counts its batches that no forward pass has used.

    Args:
        source: What delivers, with its present pass as ``stream``; None: goes on.
    """

    def __init__(self, source: Any = None) -> None:
        self.unused = 0
        self._source = None if source is None else weakref.ref(source)

    def has_ended(self) -> bool:
        """Whether the pass was left for another one, or forgotten."""
        if self._source is None:
            return False
        return getattr(self._source(), "stream", None) is not self


@dataclass(eq=False)
class Delivery:
    """One physical batch that a loader handed to the loop: positions of its rows."""

    positions: list[int] | None
    stream: Stream
    stored: list[StoredRows] = field(default_factory=list)
    sampled: list[SampledRows] = field(default_factory=list)
    used: bool = False

    def __post_init__(self) -> None:
        known = self.positions or []
        lowest = min(known, default=UNKNOWN)
        self.are_distinct = lowest >= 0 and len(set(known)) == len(known)

    @cached_property
    def rows(self) -> Rows | None:
        """The positions as an array; None if they are not known."""
        known = self.positions
        return None if known is None else np.array(known, dtype=np.int64)

    @cached_property
    def checksums(self) -> dict[int, list[Rows]]:
        """Of the tensors that tell rows apart, by number of entries in a row."""
        found: dict[int, list[Rows]] = {}
        for sampled in self.sampled:
            sums = sampled.checksums()
            if _tells_rows_apart(sampled.width, sums):
                found.setdefault(sampled.width, []).append(sums)
        return found

    def use(self) -> None:
        """A forward pass was made of it."""
        if not self.used:
            self.stream.unused -= 1
        self.used = True

    def may_be_waiting(self) -> bool:
        """Whether a forward pass could still be made of it."""
        held = any(not stored.expired() for stored in self.stored)
        return not self.used and (held or not self.stream.has_ended())


class Forward:
    """One forward pass in training mode: whose rows, by which evidence.

    Args:
        rows: Positions of its rows; None: not known, or all of the delivery's.
        evidence: Which kind; empty: none.
        delivery: The batch that it was made of.
        cause: Why rows are uncertain.
    """

    def __init__(
        self,
        rows: Rows | None,
        evidence: str,
        delivery: Delivery | None = None,
        cause: str = "",
    ) -> None:
        self.evidence, self.delivery, self.cause = evidence, delivery, cause
        self.backward = 0  # when its backward pass came by; 0: not yet
        self.clipped = False  # whether the second pass of ghost clipping came by
        self._rows = rows

    @property
    def rows(self) -> Rows | None:
        """Positions of its rows; None: not known."""
        if self._rows is None and self.delivery is not None:
            return self.delivery.rows
        return self._rows

    @property
    def num_rows(self) -> int | None:
        """How many they are; None: not known."""
        known = self.examples()
        if known is not None:
            return len(known)
        return None if self.rows is None else len(self.rows)

    def examples(self) -> list[int] | None:
        """Its rows, if they are all of a delivery's and these distinct examples."""
        if self._rows is None and self.delivery is not None:
            return self.delivery.positions if self.delivery.are_distinct else None
        return None


def delivery_of(
    indices: Any, batch: Any, stream: Stream, *, batch_dim: int, verify: bool
) -> Delivery:
    """Note what a delivered batch can be recognised by later.

    Args:
        indices: What the sampler emitted for it: positions, or one position.
        batch: Tensors in any nesting.
        stream: The pass over a loader that it is of.
        batch_dim: The dimension that should run over the examples.
        verify: Whether to keep checksums.
    """
    tensors = list(tensors_in(batch))
    positions, single = _positions(indices)
    if positions is None:
        return Delivery(None, stream)
    if single:  # no collation: the item is the one row
        tensors = [t.unsqueeze(0) for t in tensors]
    if not positions and tensors and tensors[0].dim() and tensors[0].shape[0]:
        positions = [NOBODY] * tensors[0].shape[0]
    delivery, length = Delivery(positions, stream), len(positions)
    for tensor in tensors:
        dim = _dim_of_length(tensor, length, batch_dim)
        if dim is not None:
            delivery.stored.append(StoredRows(tensor, dim))
            if verify and tensor.numel() > length:  # labels are often alike
                delivery.sampled.append(SampledRows(tensor, dim))
    return delivery


def by_storage(tensors: list[Tensor], dim: int, recent: list[Delivery]) -> Forward:
    """Rows whose memory is a delivered row's.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the examples.
        recent: Deliveries, the newest first.

    Returns:
        A pass with the rows; cause ``"modified"`` if the memory was written to since
        the delivery; without evidence where nothing matched.
    """
    if len(tensors) == 1 and recent and recent[0].are_distinct:
        for stored in recent[0].stored:
            if stored.are_all_of(tensors[0], dim):  # nearly always
                cause = "modified" if stored.modified(tensors[0]) else ""
                return Forward(None, "by_storage", recent[0], cause)
    found, modified = [], False
    for tensor in tensors:
        for delivery, stored in ((d, s) for d in recent for s in d.stored):
            where = stored.positions(tensor, dim)
            if where is not None:
                found.append((delivery, cast(Rows, delivery.rows)[where]))
                modified |= stored.modified(tensor)
                break
    forward = _agreed(found, "by_storage")
    if modified and not forward.cause:
        forward.cause = "modified"
    return forward


def by_content(tensors: list[Tensor], dim: int, recent: list[Delivery]) -> Forward:
    """Rows whose checksums are a delivered row's.

    The widest inputs that are recognised decide. Of the deliveries, those count that
    explain the most of them; rows about which they disagree (examples that are alike)
    stay unknown.
    """
    sums: dict[int, list[Rows]] = {}
    for width, values in (row_checksums(t, dim) for t in tensors):
        sums.setdefault(width, []).append(values)
    for width in sorted(sums, reverse=True):
        found = [
            (d, *_explained(sums[width], d.checksums[width], cast(Rows, d.rows)))
            for d in recent
            if width in d.checksums
        ]
        most = max((len(inputs) for _, inputs, _ in found), default=0)
        if len(set().union(*(inputs for _, inputs, _ in found))) > most:
            return Forward(None, "unattributed", None, "mismatch")
        best = [
            (d, r) for d, inputs, r in found if r is not None and len(inputs) == most
        ]
        forward = _agreed(best, "by_content")
        if forward.rows is not None and (forward.rows != UNKNOWN).any():
            return forward
    return Forward(None, "")


def by_latest(
    tensors: list[Tensor], dim: int, recent: list[Delivery], *, usually_known: bool
) -> Forward:
    """The latest batch, if it is the only one that these inputs can be made of.

    Args:
        tensors: The model's inputs.
        dim: Their dimension that runs over the examples.
        recent: Deliveries, the newest first.
        usually_known: Whether this loop's inputs were recognised before, so that
            inputs which are not are a surprise.
    """
    latest = recent[0] if recent else None
    if latest is None or latest.rows is None:
        return Forward(None, "unattributed", None, "indices")
    others = [d for d in recent if d.stream is not latest.stream]
    waiting = latest.stream.unused + sum(d.may_be_waiting() for d in others)
    only = waiting == (0 if latest.used else 1)
    surprising = usually_known and bool(latest.checksums)
    fits = any(t.shape[dim] == len(latest.rows) for t in tensors)
    if surprising or not only or not fits:
        return Forward(None, "unattributed", None, "reordered")
    return Forward(latest.rows, "by_latest", latest)


def _positions(indices: Any) -> tuple[list[int] | None, bool]:
    """Sampler output as positions, and whether it was a single one."""
    if isinstance(indices, Tensor | np.ndarray):
        indices = indices.tolist()
    single = not isinstance(indices, list | tuple)
    listed = [indices] if single else list(indices)
    if set(map(type, listed)) - {int}:  # rare: NumPy's numbers, or no positions
        if any(isinstance(i, bool) or not hasattr(i, "__index__") for i in listed):
            return None, single
        listed = [int(i) for i in listed]
    return listed, single


def _dim_of_length(tensor: Tensor, length: int, preferred: int) -> int | None:
    """The dimension (of the first two) that runs over the examples."""
    for dim in (preferred, 1 - preferred):
        if tensor.dim() > dim and tensor.shape[dim] == length:
            return dim
    return None


def _tells_rows_apart(width: int, sums: Rows) -> bool:
    """Whether checksums are evidence; masks and single numbers are often alike."""
    return width > 1 and len(sums) > 0 and (len(sums) == 1 or (sums != sums[0]).any())


def _explained(
    inputs: list[Rows], delivered: list[Rows], rows: Rows
) -> tuple[set[int], Rows | None]:
    """Which inputs consist of a delivery's rows, and of which rows."""
    pairs = {
        (i, j): (given, known)
        for i, given in enumerate(inputs)
        for j, known in enumerate(delivered)
        if len(given) and given[0] in known and np.isin(given, known).all()
    }
    if len({len(given) for given, _ in pairs.values()}) != 1:
        return set(), None
    explained = {i for i, _ in pairs}
    if all(np.array_equal(given, known) for given, known in pairs.values()):
        return explained, rows
    found = np.stack([_look_up(given, known, rows) for given, known in pairs.values()])
    top = found.max(axis=0)
    agree = ((found == top) | (found == UNKNOWN)).all(axis=0)
    return explained, np.where(agree, top, UNKNOWN)


def _look_up(sums: Rows, delivered: Rows, rows: Rows) -> Rows:
    """The rows with these checksums; UNKNOWN where several are alike."""
    values, first, counts = np.unique(delivered, return_index=True, return_counts=True)
    place = np.searchsorted(values, sums)
    _, back, given = np.unique(sums, return_inverse=True, return_counts=True)
    alone = (counts[place] == 1) & (given[back] == 1)
    return np.where(alone, rows[first[place]], UNKNOWN)


def _agreed(found: Iterable[tuple[Delivery, Rows]], evidence: str) -> Forward:
    """What all findings agree on; where they disagree, UNKNOWN."""
    findings = list(found)
    if not findings:
        return Forward(None, "")
    delivery, rows = findings[0]
    if any(len(other) != len(rows) for _, other in findings):
        return Forward(None, "unattributed", None, "mismatch")
    for _, other in findings[1:]:
        rows = np.where(other == rows, rows, UNKNOWN)
    cause = "alike" if UNKNOWN in rows else ""
    return Forward(rows, evidence, delivery, cause)
