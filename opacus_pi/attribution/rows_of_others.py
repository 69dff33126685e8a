"""Find inputs of the model whose entries are those of other examples of the batch.

A loop may call the model twice for one loss: with the items of a batch, and with items
drawn from the same batch (``items[torch.randint(b, (b,))]``) as negatives. Or it mixes
each sample with another one for the second call. Then the gradient of an example
depends on others, which clipping does not bound. Where a sample is one number, such as
an id, it cannot be looked up: others have equal numbers by chance, and negatives that
are drawn from all items, independently of the batch, are as they should be. So entries
are also looked up in the batches before. Those that do not depend on the batch occur in
it as often as in any other.

*Guarantee.* An input is noted if, batch after batch, more of its different entries
belong to other samples of the batch than to any of the k batches before. The chance of
this is ``1 / (k + 1)`` in each batch, if every entry is computed from its own example
or from no example, and examples do not come in an order that depends on them. The input
is noted when the product of these chances is below 2^-24: after 11 batches of a run,
later after 6. Of the batches with such inputs, the first 47 are looked at, and 16 after
each power of two. So false alarms have a probability of about 10^-5 for each input of
a long run.

*What breaks it.* Fewer batches. A tensor with so few different values that most batches
have all of them. Entries that are computed from other examples, except for copies and
mixtures of two samples (:mod:`~opacus_pi.attribution.mixtures`). Samples of earlier
batches. An order of the data in which examples that belong together follow each other
may be noted wrongly.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from opacus_pi.attribution.causes import NOT_DELIVERED
from opacus_pi.attribution.delivery import Delivery, ForwardPass, Indices
from opacus_pi.attribution.mixtures import num_mixed
from opacus_pi.attribution.samples import DelayedChecksums

__all__ = ["RowsOfOthers"]

_GROUP = 16  # batches that are looked at after each power of two
_ENOUGH = 24.0  # bits: how improbable the entries must be
_MAX_ENTRIES = 4096  # parts of an input that are looked up
_MAX_WATCHED = 64  # inputs, passes over a batch, and delivered tensors together


class RowsOfOthers:
    """The inputs of a model, compared with the samples of recent batches.

    Args:
        dim: The dimension of the inputs along which the examples are.

    Attributes:
        are_found: Whether an input has entries of other examples.
    """

    def __init__(self, dim: int) -> None:
        self.are_found = False
        self._dim = dim
        # Evidence in bits, by input, pass over the batch, and delivered tensor.
        self._bits: dict[tuple[int, int, int], float] = {}
        self._delivery: Delivery | None = None
        self._num_batches = self._num_passes = 0

    def saw(
        self,
        forward: ForwardPass,
        given: Sequence[Tensor],
        recent: Sequence[Delivery],
        *,
        has_moved: bool,
    ) -> bool:
        """Look at the inputs of a forward pass.

        Args:
            forward: The pass.
            given: The dense tensors among its inputs.
            recent: Deliveries, the newest first.
            has_moved: Whether the loop has moved samples to other positions.

        Returns:
            Whether an input, in this pass or an earlier one, has entries of others.
        """
        if self.are_found or forward.is_whole_delivery or not recent:  # nearly always
            return self.are_found
        if len(given) == 1 and _is_recognised(forward):
            return False  # nothing else is there to be compared
        delivery = forward.delivery or recent[0]
        if not self._is_looked_at(delivery):
            return False
        positions = _positions(forward, delivery, has_moved=has_moved)
        if positions is None:
            return False
        for place, tensor in enumerate(given):
            has_rows = tensor.dim() > self._dim and tensor.numel() > 0
            if has_rows and tensor.shape[self._dim] == len(positions):
                rows = tensor.detach().movedim(self._dim, 0)
                before = [d for d in recent if d is not delivery]
                self._look(place, rows, positions, delivery, before)
        return self.are_found

    def _is_looked_at(self, delivery: Delivery) -> bool:
        """Count a pass, and return whether its batch is one that is looked at.

        Args:
            delivery: The batch.
        """
        self._num_passes += 1
        if delivery is not self._delivery:
            self._delivery, self._num_passes = delivery, 1
            self._num_batches += 1
        last_power = 1 << (self._num_batches.bit_length() - 1)
        return self._num_batches - last_power < _GROUP

    def _look(
        self,
        place: int,
        rows: Tensor,
        positions: Indices,
        delivery: Delivery,
        before: Sequence[Delivery],
    ) -> None:
        """Add the evidence of one input.

        Args:
            place: Which input it is.
            rows: The input, ``(b, ...)``.
            positions: Position in the batch of each sample.
            delivery: The batch.
            before: Other batches.
        """
        compared = {}
        for number, own in enumerate(_contents(delivery)):
            if own is not None and own.width and rows[0].numel() % own.width == 0:
                compared[number] = _Compared(rows, positions, own)
                if compared[number].is_own:
                    return
        for number, one in compared.items():
            key = place, self._num_passes, number
            if key not in self._bits and len(self._bits) >= _MAX_WATCHED:
                continue
            others = [c[number] for c in map(_contents, before) if len(c) > number]
            bits = one.bits(others)
            self._bits[key] = self._bits.get(key, 0.0) + bits if bits else 0.0
            self.are_found |= self._bits[key] >= _ENOUGH


class _Compared:
    """One input, compared with one tensor of the batches.

    Args:
        rows: The input with the samples along the first dimension, ``(b, ...)``.
        positions: int64 ``(b,)``: position in the batch of each sample.
        own: What the tensor of the delivered batch contains; each of its samples has as
            many entries as one of the input, or an integer fraction of them.

    Attributes:
        is_own: Whether each sample of the input is the one at its position.
    """

    def __init__(self, rows: Tensor, positions: Indices, own: DelayedChecksums) -> None:
        num_parts = rows[0].numel() // own.width
        num = max(1, min(len(rows), _MAX_ENTRIES // num_parts))
        self._own, self._positions = own, positions[:num]
        self._given = DelayedChecksums(rows[:num].reshape(-1, own.width), 0)
        self._are_whole = num_parts == 1
        sums = self._given.checksums.reshape(num, num_parts)
        is_own = sums == own.checksums[self._positions][:, None]
        self.is_own = bool(is_own.all())
        self._others = np.unique(sums[~is_own])

    def bits(self, before: Sequence[DelayedChecksums | None]) -> float:
        """Return how improbable it is that the batch has more of the input than others.

        Args:
            before: What this tensor contained in other batches.

        Returns:
            The logarithm of the number of batches; 0 unless this one has most.
        """
        num = self._num_in(self._own)
        if not num:
            return 0.0
        others = [c for c in before if c is not None and c.width == self._own.width]
        is_most = all(self._num_in(content) < num for content in others)
        return math.log2(len(others) + 1) if is_most else 0.0

    def _num_in(self, content: DelayedChecksums) -> int:
        """Count the different parts of the input that are samples of a batch, or mixed.

        Args:
            content: What this batch contains: the own one, without the samples at the
                same position, or another.
        """
        num = int(np.count_nonzero(np.isin(self._others, content.checksums)))
        if not self._are_whole:
            return num
        own = self._own.entries[self._positions]
        without = self._positions if content is self._own else None
        return num + num_mixed(self._given.entries, own, content.entries, without)


def _is_recognised(forward: ForwardPass) -> bool:
    """Return whether the samples of a pass are known, and each is there once."""
    indices = forward.indices
    if indices is None or not forward.is_recognised or forward.is_assumed is not None:
        return False
    return bool((indices >= 0).all()) and len(np.unique(indices)) == len(indices)


def _contents(delivery: Delivery) -> list[DelayedChecksums | None]:
    """Return what each tensor of a batch contains; None where it is not known."""
    return [tensor.content for tensor in delivery.tensors]


def _positions(
    forward: ForwardPass, delivery: Delivery, *, has_moved: bool
) -> Indices | None:
    """Return the position in its batch of each sample of a pass.

    Samples that are not known are taken to be in their places.

    Args:
        forward: The pass.
        delivery: The batch.
        has_moved: Whether the loop has moved samples to other positions.

    Returns:
        int64 ``(b,)``; None if it is not known.
    """
    by_index, indices = delivery.index_array, forward.indices
    if by_index is None or not len(by_index):
        return None
    places = np.arange(len(by_index))
    if indices is None:
        is_beside = forward.cause is NOT_DELIVERED and not has_moved
        return places if is_beside and forward.num_inputs == len(places) else None
    order = np.argsort(by_index, kind="stable")
    at = np.minimum(np.searchsorted(by_index[order], indices), len(order) - 1)
    found: Indices = order[at]
    is_known = (by_index[found] == indices) & (indices >= 0)
    if is_known.all():
        return found
    is_whole = len(indices) == len(places) and not has_moved
    return np.where(is_known, found, places) if is_whole else None
