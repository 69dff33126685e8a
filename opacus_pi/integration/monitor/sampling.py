"""Sample rates: of a data loader, and of one update, which may use several batches.

The sample rate of a loader is known before it draws anything. An update may use the
accumulated gradients of several batches, and then an example had as many chances to
enter it. :class:`BatchCounter` counts these batches by following each one from the
loader through the model, so that the recorded rate is that of the whole update.

The count is never too small: a forward pass whose batch cannot be identified counts as
a batch of its own. It is too large where several such passes came from one batch, for
example from parts of it that were transformed in the training loop; a warning says so.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from opacus.data_loader import DPDataLoader
from torch import Tensor
from torch.utils.data import DataLoader

from opacus_pi.attribution import Tracker
from opacus_pi.attribution.delivery import Delivery, ForwardPass, Indices
from opacus_pi.attribution.evidence import assumed, recognised
from opacus_pi.models.batches import size_of

__all__ = ["BatchCounter", "BatchTracker", "SamplingScheme", "sampling_scheme"]

_UNKNOWN_BATCHES = (
    "An update used the gradients of {num_passes} forward passes. The batches of "
    "{unknown} of them could not be identified, so each counts as a batch of its own. "
    "If several came from one batch, the recorded sample rate and every loss are too "
    "large, and never too small: an error on the safe side. Transform inputs in the "
    "data set, or give the model whole batches."
)


@dataclass(frozen=True)
class SamplingScheme:
    """The sampling scheme of a loader, as the accounting needs it.

    Args:
        sample_rate: Probability, or share of the updates, with which an example is in
            the batch.
        mean_batch_size: Expected number of examples in a batch, E[B]; known before
            anything is drawn, so it does not depend on the draw.
        sampling: ``"poisson"``, or ``"fixed"`` for any other schedule.
    """

    sample_rate: float
    mean_batch_size: float
    sampling: Literal["poisson", "fixed"]


def sampling_scheme(loader: DataLoader[Any]) -> SamplingScheme:
    """Return how a loader will sample, from its settings alone.

    Opacus's Poisson loader draws ``sample_rate * n`` examples in expectation; this is
    not rounded. For any other loader, each example is assumed to be in one of the
    ``len(loader)`` batches of a pass, as with shuffling.

    >>> sampling_scheme(DataLoader(range(10), batch_size=4))
    SamplingScheme(sample_rate=0.3333333333333333, mean_batch_size=4.0, sampling='fixed')

    Args:
        loader: A torch ``DataLoader`` of a data set with a length.

    Returns:
        Sample rate, expected batch size and kind of sampling.
    """  # noqa: E501
    num_examples = size_of(loader.dataset)
    if isinstance(loader, DPDataLoader):
        rate = loader.sample_rate
        return SamplingScheme(rate, rate * num_examples, "poisson")
    rate = 1 / len(loader)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    # a batch_size above n still delivers n examples
    size = min(size or num_examples * rate, num_examples)
    return SamplingScheme(rate, float(size), "fixed")


class BatchTracker(Tracker):
    """Identifies the batch of a forward pass, whichever of its samples are in it.

    The examples themselves need not be known to count batches, so less evidence is
    enough than for attribution: it takes the cheapest that leads to an unused batch.
    """

    def _match(self, inputs: list[Tensor]) -> ForwardPass:
        dim, recent = self.batch_dim, self._recent
        tensors = [t for t in inputs if t.ndim > dim]
        found = recognised(tensors, dim, recent, verify=False)
        if found is None or found.delivery is None:
            found = assumed(tensors, dim, recent, is_view=True)
        # Without a batch, or with one that an earlier pass used already, the inputs
        # may be copies of another batch. Content is compared last, as it costs most.
        if found.delivery is None or found.delivery.num_forward_passes:
            copied = recognised(tensors, dim, recent, verify=True)
            if copied is not None and copied.delivery is not None:
                return copied
        return found


class BatchCounter:
    """Counts the batches whose gradients were used in an update.

    A batch that was passed in parts, or several times, counts once. Batches whose
    gradients were cleared before the update are counted with it too.

    >>> import torch
    >>> tracker = BatchTracker()
    >>> for indices in ([0, 1], [2, 3]):
    ...     batch = torch.randn(2, 3)
    ...     _ = tracker.delivered(indices, batch)
    ...     for part in batch.chunk(2):
    ...         tracker.mark_backward(tracker.bind((part,)))
    >>> count_batches = BatchCounter(tracker)
    >>> count_batches()
    2
    >>> count_batches()
    1

    Args:
        tracker: Follows the loader's batches through the model.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._warned = False
        self._passes: list[ForwardPass] = []

    def __call__(self) -> int:
        """Return the number of batches whose gradients made the latest update.

        Returns:
            At least 1: an update without a forward pass in training mode is assumed to
            be based on one batch.
        """
        passes = self._passes = self._tracker.take()
        known = {id(p.delivery) for p in passes if p.delivery is not None}
        unknown = sum(p.delivery is None for p in passes)
        # A single unidentified pass is one batch in any case: nothing to warn of.
        if unknown and len(passes) > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                _UNKNOWN_BATCHES.format(num_passes=len(passes), unknown=unknown),
                stacklevel=2,
            )
        return max(1, len(known) + unknown)

    def examples_of(self, batches: Sequence[Delivery]) -> list[Indices]:
        """Return the examples of each batch that the latest update used.

        These are all of them, unless each forward pass is known to have had only
        certain samples of its batch.

        Args:
            batches: The batches whose gradients made the update.

        Returns:
            int64 ``(k,)`` for each batch whose indices are known, each index once.
        """
        found = []
        for batch in batches:
            whole = batch.index_array
            if whole is None:
                continue
            own = [p for p in self._passes if p.delivery is batch]
            used = [p.indices for p in own if p.distinct_indices() is None]
            known = [indices for indices in used if indices is not None]
            is_known = len(known) == len(own) > 0
            if is_known and all(indices.min(initial=0) >= 0 for indices in known):
                whole = np.unique(np.concatenate(known))
            found.append(whole)
        self._passes = []
        return found
