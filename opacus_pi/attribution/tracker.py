"""Follows batches from the loader through the model to the optimizer.

>>> import torch
>>> tracker = Tracker()
>>> batch = torch.arange(6.0).reshape(3, 2)
>>> _ = tracker.delivered([7, 4, 9], batch)
>>> forward = tracker.bind((batch.clone()[[2, 0]],))
>>> tracker.reached(forward)
>>> tracker.attribute([2])
array([9, 7])
>>> dict(tracker.counts)
{'by_storage': 0, 'by_content': 2, 'by_latest': 0, 'unattributed': 0}
"""

import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from opacus_pi._errors import AccountingError
from opacus_pi.attribution.batch_rows import tensors_in
from opacus_pi.attribution.evidence import (
    UNKNOWN,
    Delivery,
    Forward,
    Rows,
    Stream,
    by_content,
    by_latest,
    by_storage,
    delivery_of,
)

EVIDENCE = ("by_storage", "by_content", "by_latest", "unattributed")
_HISTORY = 16  # deliveries that a forward pass may still belong to
_MAX_PENDING = 64  # forward passes that wait for an optimizer
_NO_ROWS = np.empty(0, np.int64)

_CAUSES = {
    "by_latest": "The model's inputs are neither the tensors that the data loader "
    "delivered nor copies of them, so rows are believed to be those of the latest "
    "batch, in its order. Where rows are re-ordered or mixed after loading this is "
    "wrong. Transform inputs in the data set or in collate_fn instead.",
    "reordered": "The model's inputs cannot be traced to one delivered batch: they "
    "were computed in the loop while several batches were in use, from a part of a "
    "batch, or only sometimes. Transform inputs in the data set or in collate_fn.",
    "unseen": "No forward pass of the model in training mode was seen for these "
    "gradients. Call the model itself, not its layers.",
    "mismatch": "The rows with gradients are not the rows of the forward passes, as "
    "when several batches enter one loss. Use one batch per loss.",
    "alike": "Some examples look alike, and copies of them cannot be told apart. Give "
    "the model the tensors that the data loader delivered.",
    "indices": "The data loader's batches have no positions in the data set (an "
    "iterable data set, keys that are no whole numbers, or batches made elsewhere). "
    "Use a map-style data set and the loader that make_private returned.",
}


class Tracker:
    """Attributes the rows of physical batches to examples of the data set.

    Args:
        verify: Whether copies of the delivered tensors are recognised by content.
        strict: Whether a row that is not attributed for certain is an error.
        batch_first: Whether examples are along the first dimension of the model's
            inputs, else the second.
    """

    def __init__(
        self, *, verify: bool = True, strict: bool = False, batch_first: bool = True
    ) -> None:
        self.verify, self.strict = verify, strict
        self.batch_dim = 0 if batch_first else 1
        self.counts = dict.fromkeys(EVIDENCE, 0)
        self._recent: deque[Delivery] = deque(maxlen=_HISTORY)
        self._stream = Stream()
        self._pending: deque[Forward] = deque(maxlen=_MAX_PENDING)
        self._clock = 0
        self._warned: set[str] = set()

    @property
    def latest(self) -> Delivery | None:
        """The batch that was delivered last."""
        return self._recent[0] if self._recent else None

    def delivered(
        self, indices: Any, batch: Any, stream: Stream | None = None
    ) -> Delivery:
        """A loader hands a batch to the loop.

        Args:
            indices: What its sampler emitted for it: positions, or one position.
            batch: Tensors in any nesting of lists, tuples and dicts.
            stream: The pass over a loader that it is of.

        Returns:
            What is known of the batch; ``rows`` are its positions in the data set.
        """
        delivery = delivery_of(
            indices,
            batch,
            stream or self._stream,
            batch_dim=self.batch_dim,
            verify=self.verify,
        )
        delivery.stream.unused += 1
        self._recent.appendleft(delivery)
        return delivery

    def bind(self, inputs: Any) -> Forward:
        """A forward pass starts its way to the optimizer.

        Args:
            inputs: The model's arguments, nested as they are.
        """
        forward = self._match(inputs)
        if forward.delivery is not None:
            forward.delivery.use()
        self._pending.append(forward)
        return forward

    def _match(self, inputs: Any) -> Forward:
        """The strongest evidence for whose rows these inputs are."""
        dim, recent = self.batch_dim, list(self._recent)
        tensors = [t for t in tensors_in(inputs) if t.dim() > dim]
        stored = by_storage(tensors, dim, recent)
        if stored.evidence and stored.cause != "modified":
            return stored
        copied = by_content(tensors, dim, recent) if self.verify else stored
        if copied.evidence:
            return copied
        if stored.evidence:
            return stored
        known = self.verify and self.counts["by_storage"] + self.counts["by_content"]
        return by_latest(tensors, dim, recent, usually_known=bool(known))

    def reached(self, forward: Forward, *, clipping: bool = False) -> None:
        """The backward pass came by a forward pass's output.

        Args:
            forward: The pass.
            clipping: Whether it was the second backward pass of ghost clipping.
        """
        self._clock += 1
        forward.backward = self._clock
        forward.clipped |= clipping

    def discard(self, *, clipped_only: bool = False) -> int:
        """Gradients were cleared: forget passes whose backward pass has come by.

        Args:
            clipped_only: Forget only those whose clipped gradient was complete.

        Returns:
            How many passes were forgotten.
        """
        gone = [
            forward
            for forward in self._pending
            if forward.clipped or (forward.backward and not clipped_only)
        ]
        for forward in gone:
            self._pending.remove(forward)
        return len(gone)

    def take(self) -> list[Forward]:
        """Forward passes whose backward pass came by, in that order; forgets them."""
        done = sorted((f for f in self._pending if f.backward), key=_when)
        self.discard()
        return done

    def batch_behind(self) -> Delivery | None:
        """The one batch whose passes' backward passes came by; None if not one."""
        behind = {id(f.delivery): f.delivery for f in self._pending if f.backward}
        return next(iter(behind.values())) if len(behind) == 1 else None

    def follow_rows(self, rows: Any) -> None:
        """Rows enter the update; if no backward pass was seen, they were made by hand.

        Args:
            rows: A tensor with one row for each example, such as their gradients.
        """
        if not any(forward.backward for forward in self._pending):
            self.reached(self.bind([rows]))

    def is_half_clipped(self) -> bool:
        """Whether a pass waits for the second backward pass of ghost clipping."""
        return any(f.backward and not f.clipped for f in self._pending)

    def attribute(self, sizes: Sequence[int], *, clipped_only: bool = False) -> Rows:
        """Positions in the data set of the rows that enter the update.

        Args:
            sizes: How many rows each backward pass since the last call left.
            clipped_only: Whether only complete passes of ghost clipping count.

        Returns:
            int64 ``(sum(sizes),)``; ``UNKNOWN`` or ``NOBODY`` where no example.

        Raises:
            AccountingError: If the tracker is strict and a row is uncertain.
        """
        return rows_of(self.passes(sizes, clipped_only=clipped_only))

    def passes(
        self, sizes: Sequence[int], *, clipped_only: bool = False
    ) -> list[Forward]:
        """The forward passes of the rows that enter the update; see ``attribute``."""
        done = [f for f in self.take() if f.clipped or not clipped_only]
        passes = _rows_behind(done, list(sizes))
        for forward in passes:
            known, unknown = _num_known(forward)
            self.counts["unattributed"] += unknown
            if known:
                self.counts[forward.evidence] += known
            if unknown:
                self._tell(forward.cause, f"{unknown} rows are unattributed.")
            elif known and forward.evidence == "by_latest":
                self._tell("by_latest", "Rows are attributed without verification.")
        return passes

    def _tell(self, cause: str, what: str) -> None:
        """Warn of a cause once, or raise if strict."""
        message = f"{what} {_CAUSES[cause]}"
        if self.strict:
            raise AccountingError(message)
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, stacklevel=2)


def rows_of(passes: list[Forward]) -> Rows:
    """Rows of several passes, one after another; of one pass not a copy."""
    parts = [cast(Rows, forward.rows) for forward in passes]
    return parts[0] if len(parts) == 1 else np.concatenate([_NO_ROWS, *parts])


def _num_known(forward: Forward) -> tuple[int, int]:
    """How many rows are examples, and how many of unknown ones."""
    examples = forward.examples()
    if examples is not None:
        return len(examples), 0
    rows = cast(Rows, forward.rows)
    return int(np.count_nonzero(rows >= 0)), int(np.count_nonzero(rows == UNKNOWN))


def _when(forward: Forward) -> int:
    """When its backward pass came by."""
    return forward.backward


def _rows_behind(done: list[Forward], sizes: list[int]) -> list[Forward]:
    """The passes behind gradients of these many rows each, with their rows."""
    passes = done if len(done) == len(sizes) else _distinct(done)
    if len(passes) == len(sizes):
        pairs = list(zip(passes, sizes, strict=True))
        if all(f.num_rows in (None, size) for f, size in pairs):
            return [_unknown(n, f.cause) if f.num_rows is None else f for f, n in pairs]
    unknown = [f.cause for f in done if f.rows is None]
    cause = unknown[0] if unknown else "mismatch" if done else "unseen"
    return [_unknown(size, cause) for size in sizes]


def _unknown(size: int, cause: str) -> Forward:
    """A pass over rows that are nobody's."""
    return Forward(np.full(size, UNKNOWN), "unattributed", None, cause)


def _distinct(passes: list[Forward]) -> list[Forward]:
    """Passes over the same rows, one after another, count once: views of a batch."""
    kept: list[Forward] = []
    for forward in passes:
        same = (
            bool(kept)
            and kept[-1].rows is not None
            and forward.rows is not None
            and UNKNOWN not in forward.rows
            and np.array_equal(kept[-1].rows, forward.rows)
        )
        if not same:
            kept.append(forward)
    return kept
