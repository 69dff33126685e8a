"""Finds the delivered batches whose ignored labels would couple the examples.

``CrossEntropyLoss`` and ``NLLLoss`` with ``reduction="mean"`` divide by the number of
labels of a batch that are not ``ignore_index``. So the loss that an audit found to be
right couples the examples of batches in which some labels are ignored, however rare
these are. The labels of every batch are therefore looked at when it is delivered.

If they couple the examples, this does not show yet that the loop does so: it may leave
such examples out. So the update that uses the batch is to be compared with the
criterion (``loop_loss``). This is asked for the first three such batches, and one of
each of the periods of :mod:`~opacus_pi.custody.looks`.

*Guarantee.* Each update whose batch was not looked at, or should have been compared and
was not, leaves the link "loss" unchecked. No update waits for an accelerator: labels
that are delivered there are counted there, and read with the chain.

*What breaks it.* A loop that ignores labels which the loader delivers as others, and
one that leaves out the examples of the first such batches only.
"""

import random
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from opacus_pi.attribution.delivery import Delivery, ForwardPass
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks, few_updates
from opacus_pi.models.batches import inputs_and_targets
from opacus_pi.models.known_losses import LabelMean, are_classes, label_mean_of

__all__ = ["IgnoredLabels"]

_MAX_WAITS = 20  # updates until a batch that none uses is given up
_DIVIDES = (
    'With reduction="mean", {name} divides by the number of labels of the whole batch '
    "that are not ignore_index={index}. "
)
_REMEDY = (
    "If it does not leave such examples out of the batch, no example has a loss of its "
    'own: train with reduction="sum", or with the mean of one loss for each example.'
)
_NOT_COMPARED = (
    _DIVIDES + "In a batch that the loader delivered, some labels were ignored. The "
    "update that used it could not be compared with the criterion, so it is not known "
    "whether the training loop couples the examples of such batches. " + _REMEDY
)
_NOT_SEEN = (
    _DIVIDES + "It could not be seen whether labels were ignored in some updates since "
    "engine.audit, because their batches were delivered before it, or not by the "
    'prepared loader, or are neither a pair (x, y) nor a dict with "labels". It is '
    "assumed that none were."
)
_CHANGED = (
    "The settings of {name} were changed after engine.audit: it had "
    'reduction="mean" and ignore_index={index}. Call engine.audit(criterion) after '
    "each change."
)


class IgnoredLabels:
    """Looks at the labels of all batches since an audit.

    Args:
        criterion: What was audited.
        mean: How it reduces labels.
        chain: The chain of custody of the run; its link "loss" is left unchecked if
            batches were not looked at or not compared.
    """

    def __init__(self, criterion: Any, mean: LabelMean, chain: Chain) -> None:
        self._criterion, self._mean, self._chain = criterion, mean, chain
        self._looks = Looks(few_updates(random.Random(0)))  # no secret
        self._num_waits = 0
        self._awaited: list[Delivery] = []
        self._used: list[Delivery] = []
        self._late: Tensor | None = None  # whether labels coupled, on an accelerator
        chain.on_read(self._report_late, can_break=False)

    @property
    def is_waiting(self) -> bool:
        """Whether a batch was delivered whose update is to be compared."""
        return bool(self._awaited)

    def saw(self, delivery: Delivery, batch: Any) -> bool:
        """Look at the labels of a batch.

        Args:
            delivery: Its description; remembers that it was looked at.
            batch: What the loop receives.

        Returns:
            Whether the update that uses it is to be compared.
        """
        try:
            targets = inputs_and_targets(batch)[1]
        except ValueError:
            return False
        delivery.looked_at_by = self
        if not are_classes(targets) or len(targets) < 2:
            return False
        self._compare_settings()
        if not targets.is_cpu:
            couples = self._mean.couples(targets)
            self._late = couples if self._late is None else self._late | couples
            return False
        # NumPy is several times as fast as torch here, and this is done for each batch
        if not (targets.numpy() == self._mean.ignore_index).any():
            return False
        return bool(self._mean.couples(targets)) and self._is_chosen(delivery)

    def _is_chosen(self, delivery: Delivery) -> bool:
        """Return whether to compare the update of a batch with ignored labels."""
        if not self._looks.count():
            return False
        self._num_waits = 0
        self._awaited.append(delivery)
        return True

    def _compare_settings(self) -> None:
        """Leave the link unchecked if the loop has changed the criterion's settings."""
        criterion, mean = self._criterion, self._mean
        if isinstance(criterion, nn.Module) and (
            criterion.reduction != "mean" or criterion.ignore_index != mean.ignore_index
        ):
            self._say(_CHANGED)

    def coupling(self, targets: Any) -> str:
        """Say why no example has a loss of its own; empty if each has one.

        Args:
            targets: The targets of the samples of one forward pass.
        """
        mean = label_mean_of(self._criterion)  # with the weights that it has now
        return "" if mean is None else mean.coupling(targets)

    def entered(self, passes: Sequence[ForwardPass]) -> None:
        """Leave the link unchecked if the labels of a pass were not looked at.

        Args:
            passes: The forward passes that enter an update.
        """
        for forward in passes:
            delivery = forward.delivery
            if delivery is not None and delivery.looked_at_by is self:
                continue  # nearly always
            if delivery is None or delivery.may_have_label(self._mean.ignore_index):
                self._say(_NOT_SEEN, warn=False)

    def compared(
        self, passes: Sequence[ForwardPass], judged: Collection[ForwardPass]
    ) -> None:
        """Note which passes were compared with the criterion.

        Args:
            passes: Those that enter an update.
            judged: Those of them that were compared.
        """
        for forward in passes:
            if forward.delivery in self._awaited:
                self._used.append(forward.delivery)
                if forward not in judged:
                    self._say(_NOT_COMPARED)

    def update_was_made(self) -> None:
        """Wait no longer for batches that an update has used, or that none uses."""
        self._num_waits += 1
        if self._num_waits > _MAX_WAITS:
            self._awaited = []
        self._awaited = [one for one in self._awaited if one not in self._used]
        self._used = []

    def _say(self, cause: str, *, warn: bool = True) -> None:
        """Leave the link unchecked.

        Args:
            cause: A text with places for the name and the label that is ignored.
            warn: Whether to warn.
        """
        mean = self._mean
        text = cause.format(name=mean.name, index=mean.ignore_index)
        self._chain.leave_unchecked("loss", text, warn=warn)

    def _report_late(self) -> None:
        """Report labels that were ignored in a batch on an accelerator."""
        late, self._late = self._late, None
        if late is not None and bool(late):
            self._say(_NOT_COMPARED)
