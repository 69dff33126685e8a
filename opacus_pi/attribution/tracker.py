"""Follows batches from the loader through the model to the optimizer.

A loader reports each batch that it returns, with its data-set indices. A forward pass
of the model is matched to such a delivery, by storage, by content or, unverified, as
the latest batch; when its backward pass has run, its gradients wait for the optimizer.
When an optimizer reports how many samples its gradients come from, the tracker returns
the data-set index of each of them.

*Guarantee.* An index is given only where there is evidence for it; every other sample
is unattributed, counted, and explained once. The numbers of samples must agree: if the
passes that wait do not have the numbers of samples that the gradients have, all samples
of the update are unattributed.

*What breaks it.* Gradients that were computed from other tensors than the model's
inputs and outputs (layers called one by one), losses that combine several batches, and
whatever breaks the evidence itself (``evidence.py``).

>>> import torch
>>> tracker = Tracker()
>>> batch = torch.arange(6.0).reshape(3, 2)
>>> _ = tracker.delivered([7, 4, 9], batch)
>>> forward = tracker.bind((batch.clone()[[2, 0]],))
>>> tracker.mark_backward(forward)
>>> tracker.attribute([2])
array([9, 7])
>>> dict(tracker.counts)
{'by_storage': 0, 'by_content': 2, 'by_latest': 0, 'unattributed': 0}
"""

import copy
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from opacus_pi._errors import AccountingError
from opacus_pi.attribution.delivery import (
    UNATTRIBUTED,
    Delivery,
    ForwardPass,
    Indices,
    LoaderPass,
    describe_delivery,
)
from opacus_pi.attribution.evidence import by_content, by_latest, by_storage
from opacus_pi.attribution.item_fingerprints import ItemFingerprints
from opacus_pi.attribution.samples import tensors_in
from opacus_pi.custody import SampleCounts

__all__ = ["EVIDENCE", "Tracker", "indices_of"]

EVIDENCE = ("by_storage", "by_content", "by_latest", "unattributed")
# Deliveries that a forward pass may still be matched to. More would recognise batches
# that a loop keeps longer; each costs a comparison whenever storage does not match.
_MAX_RECENT = 16
# Forward passes whose gradients no optimizer has taken yet. Passes whose outputs are
# never used for a backward pass (a look at the training loss) are dropped this way.
_MAX_PENDING = 64
_NO_INDICES = np.empty(0, np.int64)
# Attributes of a tracker that its copies and pickles have.
_COPIED = ("verify", "strict", "batch_dim", "counts", "_explained")

_CAUSES = {
    "by_latest": "The model's inputs are neither the tensors that the data loader "
    "delivered nor copies of them, so samples are assumed to be in the order of the "
    "latest batch. If your loop reorders or mixes samples after loading, this is "
    "wrong. Transform inputs in the data set or in collate_fn instead.",
    "reordered": "The model's inputs cannot be traced to one delivered batch: the loop "
    "computed them while several batches were in use, from a part of a batch, or only "
    "for some batches. Transform inputs in the data set or in collate_fn.",
    "unseen": "No forward pass of the model in training mode was seen for these "
    "gradients. Call the model itself, not its layers.",
    "mismatch": "The gradients belong to another number of samples than the forward "
    "passes had. This happens, for example, if several batches enter one loss. Use "
    "one batch per loss.",
    "alike": "Some examples look alike, so copies of them cannot be distinguished. "
    "Give the model the tensors that the data loader delivered.",
    "indices": "The data loader's batches have no indices in the data set (an "
    "iterable data set, keys that are not whole numbers, or batches that your loop "
    "made itself). Use a map-style data set and the loader that make_private returned.",
}


class Tracker:
    """Attributes the samples of physical batches to examples of the data set.

    Args:
        verify: Whether copies of the delivered tensors are recognised by content.
        strict: Whether a sample that is not attributed for certain is an error.
        batch_first: Whether samples are along the first dimension of the model's
            inputs; otherwise they are along the second.

    Attributes:
        counts: How many samples were attributed, by evidence.
    """

    def __init__(
        self, *, verify: bool = True, strict: bool = False, batch_first: bool = True
    ) -> None:
        self.verify, self.strict = verify, strict
        self.batch_dim = 0 if batch_first else 1
        self.counts = dict.fromkeys(EVIDENCE, 0)
        self._recent: deque[Delivery] = deque(maxlen=_MAX_RECENT)
        self._default_pass = LoaderPass()
        self._pending: deque[ForwardPass] = deque(maxlen=_MAX_PENDING)
        self._entered: list[Delivery] = []
        self._num_backward = 0
        self._explained: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: options and counts, and no batches.

        Batches are recognised by the memory that they are stored in, and nothing in a
        copy is stored there. Nor may torch's references to this memory be copied: each
        copy would free the same one.
        """
        blank = Tracker()
        for name in _COPIED:
            setattr(blank, name, copy.copy(getattr(self, name)))
        return vars(blank)

    @property
    def latest(self) -> Delivery | None:
        """The batch that was delivered last."""
        return self._recent[0] if self._recent else None

    # ------------------------------------------------------- what the loader reports
    def delivered(
        self,
        indices: Any,
        batch: Any,
        loader_pass: LoaderPass | None = None,
        *,
        item_fingerprints: ItemFingerprints | None = None,
    ) -> Delivery:
        """Note that a loader returns a batch to the training loop.

        Args:
            indices: What its sampler returned for it: indices, or one index.
            batch: Tensors in any nesting of lists, tuples and dicts.
            loader_pass: The pass over a loader that it belongs to; default: one that
                all such calls share.
            item_fingerprints: Of the items before ``collate_fn``, if they were made.

        Returns:
            What is known of the batch.
        """
        delivery = describe_delivery(
            indices,
            batch,
            loader_pass or self._default_pass,
            batch_dim=self.batch_dim,
            verify=self.verify,
        )
        delivery.item_fingerprints = item_fingerprints
        delivery.loader_pass.num_unused += 1
        self._recent.appendleft(delivery)
        return delivery

    # ------------------------------------------------------- what the model reports
    def bind(self, inputs: Any) -> ForwardPass:
        """Match a forward pass in training mode to a delivery.

        Args:
            inputs: The model's arguments, nested as they are.

        Returns:
            The pass, which waits for its backward pass and for an optimizer.
        """
        forward = self._match(inputs)
        if forward.delivery is not None:
            forward.delivery.use()
        self._pending.append(forward)
        return forward

    def _match(self, inputs: Any) -> ForwardPass:
        """Find the strongest evidence for which samples these inputs are.

        Storage comes first because it costs nothing and is certain. Content comes
        second: it reads the inputs back from a GPU. The latest batch is the last resort
        and never chosen if the inputs belong to a recognised batch.

        Args:
            inputs: The model's arguments, nested as they are.
        """
        dim, recent = self.batch_dim, list(self._recent)
        tensors = [t for t in tensors_in(inputs) if t.dim() > dim]
        stored = by_storage(tensors, dim, recent)
        if stored.evidence and stored.cause != "modified":
            return stored
        # Memory that was written to may hold other samples now, in which case their
        # content says which. If the content is not recognised, the loop has probably
        # transformed the batch in place, and the samples are where they were.
        copied = by_content(tensors, dim, recent) if self.verify else stored
        if copied.evidence:
            return copied
        if stored.evidence:
            return stored
        known = self.verify and self.counts["by_storage"] + self.counts["by_content"]
        return by_latest(tensors, dim, recent, usually_known=bool(known))

    def mark_backward(self, forward: ForwardPass, *, clipping: bool = False) -> None:
        """Note that the backward pass has reached the output of a forward pass.

        Args:
            forward: The forward pass.
            clipping: Whether it was the second backward pass of ghost clipping.
        """
        self._num_backward += 1
        forward.backward = self._num_backward
        forward.clipped |= clipping

    # --------------------------------------------------- what the optimizer reports
    def discard(self, *, clipped_only: bool = False) -> int:
        """Forget the passes whose gradients were cleared, as by ``zero_grad``.

        Passes whose backward pass has not run yet have no gradients, and stay.

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

    def take(self, *, clipped_only: bool = False) -> list[ForwardPass]:
        """Pop the forward passes whose backward pass has run, in backward order.

        Their deliveries enter the update that ``end_update`` completes.

        Args:
            clipped_only: Return only complete passes of ghost clipping; the others are
                forgotten.
        """
        done = sorted((f for f in self._pending if f.backward), key=_backward_order)
        self.discard()
        done = [f for f in done if f.clipped or not clipped_only]
        self._entered += [f.delivery for f in done if f.delivery is not None]
        return done

    def end_update(self) -> None:
        """Count one more update for each delivery that entered it, once for each."""
        entered, self._entered = self._entered, []
        for delivery in {id(delivery): delivery for delivery in entered}.values():
            delivery.num_updates += 1

    def delivery_of_gradients(self) -> Delivery | None:
        """Return the one batch that all present gradients are of; None if not one."""
        found = {id(f.delivery): f.delivery for f in self._pending if f.backward}
        return next(iter(found.values())) if len(found) == 1 else None

    def bind_gradients(self, gradients: Any) -> None:
        """Match per-example gradients that no backward pass has computed.

        A loop may compute them by hand. They are then assumed to be of the latest
        batch, like inputs that the loop computed anew.

        Args:
            gradients: A tensor ``(b, ...)`` with one gradient for each sample.
        """
        if not any(forward.backward for forward in self._pending):
            self.mark_backward(self.bind([gradients]))

    def awaits_second_backward(self) -> bool:
        """Whether a pass waits for the second backward pass of ghost clipping."""
        return any(f.backward and not f.clipped for f in self._pending)

    # --------------------------------------------------------------- what it answers
    def attribute(self, sizes: Sequence[int], *, clipped_only: bool = False) -> Indices:
        """Return the data-set indices of the samples that enter the update.

        Args:
            sizes: How many samples each backward pass since the last call had.
            clipped_only: Whether only complete passes of ghost clipping count.

        Returns:
            int64 ``(sum(sizes),)``; ``UNATTRIBUTED`` or ``LEFT_OUT`` in place of an
            index where there is none.

        Raises:
            AccountingError: If the tracker is strict and a sample is uncertain.
        """
        return indices_of(self.take_attributed(sizes, clipped_only=clipped_only))

    def take_attributed(
        self, sizes: Sequence[int], *, clipped_only: bool = False
    ) -> list[ForwardPass]:
        """Pop the passes whose samples enter the update, and count their samples.

        This is ``attribute`` without the array of indices: a pass over a whole batch,
        which is the usual case, has its indices as a list already.

        Args:
            sizes: How many samples each backward pass since the last call had.
            clipped_only: Whether only complete passes of ghost clipping count.

        Returns:
            One pass for each size, all with indices.

        Raises:
            AccountingError: If the tracker is strict and a sample is uncertain.
        """
        passes = _with_sizes(self.take(clipped_only=clipped_only), list(sizes))
        for forward in passes:
            known, unknown = _num_known(forward)
            self.counts["unattributed"] += unknown
            if known:
                self.counts[forward.evidence] += known
            if unknown:
                self._explain(forward.cause, f"{unknown} samples are unattributed.")
            elif known and forward.evidence == "by_latest":
                self._explain(
                    "by_latest", "Samples are attributed without verification."
                )
        return passes

    def sample_counts(self) -> SampleCounts:
        """Return how many samples entered updates, and of how many nothing is known."""
        causes = [cause for cause in self._explained if cause != "by_latest"]
        return SampleCounts(
            sum(self.counts.values()),
            self.counts["unattributed"],
            " ".join(_CAUSES[cause] for cause in sorted(causes)),
        )

    def _explain(self, cause: str, what: str) -> None:
        """Warn of a cause once, or raise if the tracker is strict.

        Args:
            cause: Why the samples are uncertain, a key of ``_CAUSES``.
            what: What follows for them, as a sentence.
        """
        message = f"{what} {_CAUSES[cause]}"
        if self.strict:
            raise AccountingError(message)
        if cause not in self._explained:
            self._explained.add(cause)
            warnings.warn(message, stacklevel=2)


def indices_of(passes: list[ForwardPass]) -> Indices:
    """Return the indices of several passes, one after another; of one pass no copy."""
    parts = [cast(Indices, forward.indices) for forward in passes]
    return parts[0] if len(parts) == 1 else np.concatenate([_NO_INDICES, *parts])


def _num_known(forward: ForwardPass) -> tuple[int, int]:
    """Count the attributed and the unattributed samples of a pass."""
    distinct = forward.distinct_indices()
    if distinct is not None:
        return len(distinct), 0
    indices = cast(Indices, forward.indices)
    unknown = np.count_nonzero(indices == UNATTRIBUTED)
    return int(np.count_nonzero(indices >= 0)), int(unknown)


def _backward_order(forward: ForwardPass) -> int:
    """Return when the backward pass reached a forward pass; a key for sorting."""
    return forward.backward


def _with_sizes(done: list[ForwardPass], sizes: list[int]) -> list[ForwardPass]:
    """Match forward passes to the gradients that an optimizer has.

    Usually each pass left the gradients of one batch. Passes over the same samples
    count once if there are more passes than gradients: a loss of two views of a batch
    leaves one gradient for each sample. A pass whose samples are not known is taken to
    have as many samples as the gradients at its position.

    Args:
        done: Passes whose backward pass has run, in backward order.
        sizes: How many samples each backward pass left gradients of, in the same order.

    Returns:
        One pass for each size, with indices. If numbers or sizes disagree, it is not
        known which gradient belongs to which pass, and all samples are unattributed.
    """
    passes = done if len(done) == len(sizes) else _without_repeats(done)
    if len(passes) == len(sizes):
        pairs = list(zip(passes, sizes, strict=True))
        if all(f.num_samples in (None, size) for f, size in pairs):
            return [
                _unattributed(size, f.cause) if f.num_samples is None else f
                for f, size in pairs
            ]
    causes = [f.cause for f in done if f.indices is None]
    cause = causes[0] if causes else "mismatch" if done else "unseen"
    return [_unattributed(size, cause) for size in sizes]


def _unattributed(size: int, cause: str) -> ForwardPass:
    """Return a pass of which no sample is attributed."""
    return ForwardPass(np.full(size, UNATTRIBUTED), "unattributed", None, cause)


def _without_repeats(passes: list[ForwardPass]) -> list[ForwardPass]:
    """Drop passes over the same samples as the pass before: two views of one batch."""
    kept: list[ForwardPass] = []
    for forward in passes:
        if not (kept and _are_same_samples(kept[-1].indices, forward.indices)):
            kept.append(forward)
    return kept


def _are_same_samples(one: Indices | None, other: Indices | None) -> bool:
    """Whether two passes have the same known samples, in the same order."""
    if one is None or other is None or UNATTRIBUTED in other:
        return False
    return np.array_equal(one, other)
