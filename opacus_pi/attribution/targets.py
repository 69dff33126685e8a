"""Check whether the targets of a loss belong to the samples given to the model.

Ghost clipping knows the criterion, so the targets of each loss can be compared with the
delivered batch. The forward pass says which delivered sample is in each position; the
targets must be those of the same samples. Targets that are one-hot or probabilities are
compared by their largest entry, too; then each class must have the same targets in all
batches, as constant label smoothing gives them.

*Guarantee.* Targets that are delivered values in the order of the samples are never
reported. The link "rows" is broken only if the targets are the values of the delivered
batch in another order, and if a consistent renaming of the values cannot explain this:
one value got two targets, the loop used delivered targets before, or more values than
one batch holds were seen and each batch kept its own.

*What breaks it.* Targets that the loop computed in another way, such as scaled ones,
cannot be compared, and leave the link unchecked. Equal targets may be exchanged without
notice, which changes no loss. On an accelerator, only the first three batches are
compared, because a comparison waits for the device.
"""

import weakref
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opacus_pi.attribution.delivery import Delivery, ForwardPass, Indices, sample_dim
from opacus_pi.attribution.lookalikes import refined, rows_of_all
from opacus_pi.attribution.samples import (
    DelayedChecksums,
    checksums_of_entries,
    is_dense,
)
from opacus_pi.attribution.tracker import Tracker
from opacus_pi.custody import Chain
from opacus_pi.models.batches import rows_of

__all__ = ["TargetOrder", "in_order_of_pass", "positions_in_delivery"]

_NUM_ON_ACCELERATOR = 3  # batches
_MAX_CODES = 4096  # values whose targets are remembered
_OTHER_ORDER = (
    "The criterion was given the targets of the delivered batch in another order than "
    "the model's inputs, so each loss depends on two examples and max_grad_norm bounds "
    "neither. Give the criterion the targets of the same samples, in the same order."
)
_UNCLEAR = (
    "The criterion was given the delivered batch's targets in other positions. Either "
    "the training loop relabelled the samples (for example exchanged two classes), or "
    "it moved targets to other samples. The first is assumed. Compute targets in the "
    "data set instead; their order can then be compared."
)
_COMPUTED = (
    "The training loop computed the targets that the criterion was given, so they are "
    "assumed to be in the order of the model's inputs, and each is assumed to be "
    "computed from one example. If a target was computed from several examples, such "
    "as by the mean of the batch, one example changes the losses of others, and "
    "max_grad_norm does not bound its influence. Compute targets in the data set "
    "instead; their order can then be compared."
)

Order = Literal["same", "other", "computed"]


class TargetOrder:
    """A comparison of each loss's targets with the samples of its forward pass.

    Args:
        tracker: The tracker of the forward passes; held by a weak reference.
        chain: The chain of custody; gets the result as its link "rows".
    """

    def __init__(self, tracker: Tracker, chain: Chain) -> None:
        self._tracker, self._chain = weakref.ref(tracker), chain
        self._num_seen = self._largest_batch = 0
        self._was_delivered = self._was_computed = self._is_broken = False
        # Of targets in another order: the target that each delivered value got.
        self._codes: dict[int, int] = {}
        self._of_classes: dict[int, int] = {}  # the targets that each class got

    def saw(self, targets: Any) -> None:
        """Compare the targets of a loss that was just computed.

        Args:
            targets: The targets that the criterion was given; only read.
        """
        tracker = self._tracker()
        if tracker is None or self._is_broken or not _are_comparable(targets):
            return
        self._num_seen += 1
        passes = tracker.awaiting_backward()
        for forward in passes:
            if forward.alike:
                _settle(forward, targets, tracker.batch_dim)
            if _is_delivered(forward, targets):
                self._was_delivered = True
                return
        if not targets.is_cpu and self._num_seen > _NUM_ON_ACCELERATOR:
            return
        found = [_Comparison(f, targets, tracker.batch_dim) for f in passes]
        self._judge([c for c in found if c.order is not None])

    def _judge(self, compared: list["_Comparison"]) -> None:
        """Tell the chain what the comparisons with the forward passes show.

        Args:
            compared: Those in which something could be compared.
        """
        same = [c for c in compared if c.order == "same"]
        if same or not compared:
            if not all(map(self._are_of_classes, same)):
                self._chain.leave_unchecked("rows", _COMPUTED)
            return
        if any(c.order == "computed" for c in compared):
            self._was_computed = True
            self._chain.leave_unchecked("rows", _COMPUTED)
        elif self._is_new_order(compared[0]):
            self._is_broken = True
            self._chain.break_link("rows", _OTHER_ORDER)
        else:
            self._chain.leave_unchecked("rows", _UNCLEAR)

    def _are_of_classes(self, comparison: "_Comparison") -> bool:
        """Return whether each class had the same targets whenever it was compared."""
        if len(self._of_classes) > _MAX_CODES:
            self._of_classes.clear()
        pairs = zip(
            comparison.delivered.tolist(), comparison.given.tolist(), strict=True
        )
        return all(self._of_classes.setdefault(c, given) == given for c, given in pairs)

    def _is_new_order(self, comparison: "_Comparison") -> bool:
        """Return whether the targets were moved, rather than their values renamed."""
        if self._was_delivered:
            return True
        self._largest_batch = max(self._largest_batch, len(comparison.given))
        delivered, given = comparison.delivered.tolist(), comparison.given.tolist()
        for value, target in zip(delivered, given, strict=True):
            if self._codes.setdefault(value, target) != target:
                return True
        is_large = self._largest_batch < len(self._codes) and not self._was_computed
        if len(self._codes) > _MAX_CODES:
            self._codes.clear()
        return is_large


def _are_comparable(targets: Any) -> bool:
    """Return whether targets are a tensor whose samples have checksums."""
    if not isinstance(targets, Tensor) or not is_dense(targets):
        return False
    return bool(targets.dim()) and not targets.is_complex()


class _Comparison:
    """Targets compared with the samples of one forward pass.

    Attributes:
        order: None if nothing can be compared.
        delivered: Checksum of the delivered value of each sample, int64 ``(k,)``; of
            its class, if only the classes are the same; empty, if all is the same.
        given: Checksum of the value that the criterion was given for it.
    """

    def __init__(self, forward: ForwardPass, targets: Tensor, batch_dim: int) -> None:
        self.order: Order | None = None
        self.delivered = self.given = np.empty(0, np.int64)
        delivery, positions = forward.delivery, positions_in_delivery(forward)
        if delivery is None or positions is None or not delivery.tensors:
            return
        rows = _by_sample(targets, len(positions), batch_dim)
        known = positions >= 0
        known[rows_of_all(forward.alike)] = False  # either order is right
        if rows is None or np.count_nonzero(known) < 2:
            return
        content = DelayedChecksums(*rows, keeps_tensor=True)
        self._compare(content, delivery, positions, known)

    def _compare(
        self,
        content: DelayedChecksums,
        delivery: Delivery,
        positions: Indices,
        known: NDArray[np.bool_],
    ) -> None:
        """Find the order of the values; the same order with one tensor is enough."""
        if not content.width:
            return
        for tensor in delivery.tensors:
            if tensor.content is None or not tensor.content.width:
                continue
            if self.order is None:
                self.order = "computed"
            for before, now in _comparable(tensor.content, content):
                delivered, given = before[positions[known]], now[known]
                if np.array_equal(delivered, given):
                    whole = content.checksums[known]
                    is_whole = np.array_equal(given, whole)
                    self.order = "same"
                    self.delivered = delivered[:0] if is_whole else delivered
                    self.given = whole[:0] if is_whole else whole
                    return
                if np.array_equal(np.sort(delivered), np.sort(given)):
                    self.order, self.delivered, self.given = "other", delivered, given


def _is_delivered(forward: ForwardPass, targets: Tensor) -> bool:
    """Return whether the targets are an unchanged tensor of a batch that is used whole.

    This is what nearly every loop does.
    """
    if forward.distinct_indices() is None or forward.delivery is None:
        return False
    for delivered in forward.delivery.tensors:
        if delivered.dim < targets.ndim and delivered.is_whole(targets, delivered.dim):
            return True
    return False


def _settle(forward: ForwardPass, targets: Tensor, batch_dim: int) -> None:
    """Distinguish samples that look alike by their targets.

    Args:
        forward: A pass with such samples.
        targets: The targets that the criterion was given.
        batch_dim: The dimension that should run over the samples.
    """
    delivery, positions = forward.delivery, positions_in_delivery(forward)
    if delivery is None or positions is None:
        return
    rows = _by_sample(targets, len(positions), batch_dim)
    if rows is None:
        return
    given = DelayedChecksums(*rows, keeps_tensor=True)
    clear = positions >= 0
    clear[rows_of_all(forward.alike)] = False
    contents = [t.content for t in delivery.tensors if t.content and t.content.width]
    for content in contents if given.width else []:
        for before, now in _comparable(content, given):
            if np.array_equal(before[positions[clear]], now[clear]):
                groups = refined(forward.alike, now, before)
                if groups is not None:
                    forward.settle(groups)
                    return


def positions_in_delivery(forward: ForwardPass) -> Indices | None:
    """Return where each sample of a pass is in its delivery; -1: not known.

    Args:
        forward: The pass.

    Returns:
        int64 ``(b,)``; None if nothing is known.
    """
    distinct, delivery = forward.distinct_indices(), forward.delivery
    if distinct is not None:
        return np.arange(len(distinct))
    if forward.indices is None or delivery is None or delivery.indices is None:
        return None
    places: dict[int, int] = {}
    for place, index in enumerate(delivery.indices):
        places[index] = -1 if index in places or index < 0 else place
    return np.array([places.get(i, -1) for i in forward.indices.tolist()], np.int64)


def in_order_of_pass(
    forward: ForwardPass, values: Any, dim: int = 0, *, as_delivered: bool = False
) -> Any | None:
    """Return the rows of a delivered value that belong to the samples of a pass.

    Args:
        forward: The pass.
        values: Tensors of its delivery in any nesting, such as the targets.
        dim: The dimension along which their examples are, as in ``rows_of``.
        as_delivered: Whether to keep the rows in the order of the delivery.

    Returns:
        The rows in the order of the samples; None if it is not known which they are.
    """
    positions, delivery = positions_in_delivery(forward), forward.delivery
    if positions is None or delivery is None or not len(positions):
        return None
    if positions.min() < 0:
        return None
    if as_delivered:
        positions = np.sort(positions)
    return rows_of(values, positions.tolist(), len(delivery.indices or ()), dim)


def _by_sample(
    targets: Tensor, num_samples: int, batch_dim: int
) -> tuple[Tensor, int] | None:
    """Return targets with a dimension that runs over the samples, and which it is.

    Targets of all tokens may be in one row, those of a sample next to each other.
    """
    dim = sample_dim(targets, num_samples, batch_dim)
    if dim is not None:
        return targets, dim
    if targets.dim() == 1 and num_samples and not len(targets) % num_samples:
        return targets.reshape(num_samples, -1), 0
    return None


def _comparable(
    before: DelayedChecksums, now: DelayedChecksums
) -> list[tuple[Indices, Indices]]:
    """Return the checksums by which two tensors can be compared, ``(b,)`` each."""
    pairs = []
    if before.width == now.width:
        pairs.append((before.best_checksums, now.checksums_like(before)))
    classes_before, classes_now = _classes(before), _classes(now)
    if classes_before is not None and classes_now is not None:
        pairs.append((classes_before, classes_now))
    entries, width = before.entries, now.width
    if 1 < width < before.width == entries.shape[1]:  # tokens shifted by one, say
        for part in (entries[:, -width:], entries[:, :width]):
            sums = checksums_of_entries(np.ascontiguousarray(part))
            pairs.append((sums, now.checksums))
    return pairs


def _classes(content: DelayedChecksums) -> Indices | None:
    """Return checksums of the classes, ``(b,)``, of labels or probabilities."""
    if content.width == 1:
        return content.checksums
    entries = content.entries
    if entries.shape[1] != content.width or (entries < 0).any():
        return None
    if not np.allclose(entries.sum(axis=1), 1.0, atol=1e-3):
        return None
    largest = torch.from_numpy(entries).argmax(dim=1, keepdim=True)
    return checksums_of_entries(largest.float().numpy())
