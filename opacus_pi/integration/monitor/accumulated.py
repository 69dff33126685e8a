"""How many batches of the loader an update of a plain loop was made from.

>>> import torch
>>> tracker = BatchTracker()
>>> for indices in ([0, 1], [2, 3]):
...     batch = torch.randn(2, 3)
...     _ = tracker.delivered(indices, batch)
...     for part in batch.chunk(2):
...         tracker.reached(tracker.bind((part,)))
>>> BatchesBehind(tracker)()
2
>>> BatchesBehind(tracker)()
1
"""

import warnings
from typing import Any

from opacus_pi.attribution import Tracker
from opacus_pi.attribution.batch_rows import tensors_in
from opacus_pi.attribution.evidence import Forward, by_content, by_latest, by_storage

_UNKNOWN = (
    "An update took the gradients of {num_passes} forward passes, and for {unknown} it "
    "is not known of which batch they were: each counts as a batch. If they were of "
    "one, the sample rate on record, and with it every loss, is too large; it is never "
    "too small. Transform inputs in the data set, or give the model whole batches."
)


class BatchTracker(Tracker):
    """Finds the batch of a pass, whichever its rows: by the cheapest evidence."""

    def _match(self, inputs: Any) -> Forward:
        dim, recent = self.batch_dim, list(self._recent)
        tensors = [t for t in tensors_in(inputs) if t.dim() > dim]
        found = by_storage(tensors, dim, recent)
        if found.delivery is None:
            found = by_latest(tensors, dim, recent, usually_known=False)
        if found.delivery is None or found.delivery.used:  # not the loop's next one
            copied = by_content(tensors, dim, recent)
            found = found if copied.delivery is None else copied
        return found


class BatchesBehind:
    """Counts the batches whose gradients entered an update.

    A batch that was passed in parts, or several times, counts once. Where gradients
    were cleared again before the update their batches count too.

    Args:
        tracker: Follows the loader's batches through the model.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._warned = False

    def __call__(self) -> int:
        """Count, for the update that was just made, and begin again.

        Returns:
            At least 1: where no forward pass in training mode was seen, it is taken
            for an update on one batch.
        """
        passes = self._tracker.take()
        known = {id(p.delivery) for p in passes if p.delivery is not None}
        unknown = sum(p.delivery is None for p in passes)
        if unknown and len(passes) > 1 and not self._warned:
            self._warned = True
            told = _UNKNOWN.format(num_passes=len(passes), unknown=unknown)
            warnings.warn(told, stacklevel=2)
        return max(1, len(known) + unknown)
