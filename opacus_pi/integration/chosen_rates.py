"""Notice that a training loop chooses learning rates from batch to batch.

The noise that an update adds to the weights is multiplied by the learning rate. A loop
that sets ``group["lr"]`` to 0.1 over the norm of the batch's gradient, or in proportion
to the number of its samples, shows in the size of this noise who was drawn. Weight
decay and momentum act on the weights without noise of their own. Schedulers set the
same entries of the same groups. So who sets them is not looked at, but how: schedules
seldom turn (:mod:`~opacus_pi.attribution.turning_points`).

*Guarantee.* If a learning rate, weight decay or momentum of a parameter group turns as
often, from update to update, as a quantity of random batches does, the link "noise" is
left unchecked. This takes about ten updates with different values.

*What breaks it.* Everything that ``turning_points`` cannot tell: a single change, a
choice between two values, an average that varies slowly, a sum over all batches so far.
Entries of groups with other names. A learning rate that the loop sets after the noise
was drawn is counted in the next update. Tensors on an accelerator are copied there when
they change, 512 times at most, and read when the ledger is.
"""

from typing import Any

from torch import Tensor

from opacus_pi._torch_compat import num_writes
from opacus_pi.attribution.turning_points import TurningPoints
from opacus_pi.custody import Chain

__all__ = ["ChosenRates"]

_NAMES = ("lr", "weight_decay", "momentum")
_MAX_WAITING = 512  # values of tensors on an accelerator
_CHOSEN = (
    "optimizer.param_groups[{group}][{name!r}] rises and falls from update to update, "
    "as numbers that are computed from batches do, and schedules of learning rates do "
    "not. If it was computed from gradients, losses or examples, the weights and the "
    "size of their noise show who is in the batch, and neither get_epsilon nor the "
    "ledger covers that: choose it without the training data. If it follows from the "
    "number of the update, from random numbers or from public data, nothing needs to "
    "be done."
)
_Place = tuple[int, str]


class ChosenRates:
    """The learning rates of an optimizer's groups in successive updates.

    Args:
        chain: The chain of custody of the run.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._turns: dict[_Place, TurningPoints] = {}
        self._latest: list[Any] = []
        self._is_found = False
        self._waiting: list[tuple[_Place, Tensor]] = []
        self._marks: dict[_Place, tuple[int, int]] = {}
        chain.on_read(self._read_waiting, can_break=False)

    def update_is_made(self, optimizer: Any) -> None:
        """Note the values with which an update is made.

        Args:
            optimizer: The optimizer, which is about to add noise.
        """
        if self._is_found:
            return
        groups = optimizer.param_groups
        present = [group.get(name) for group in groups for name in _NAMES]
        before, self._latest = self._latest, present
        if len(before) != len(present):
            before = [None] * len(present)
        for number, (value, last) in enumerate(zip(present, before, strict=True)):
            are_tensors = isinstance(value, Tensor) or isinstance(last, Tensor)
            if are_tensors or value != last:
                group, name = divmod(number, len(_NAMES))
                self._note((group, _NAMES[name]), value)

    def _note(self, place: _Place, value: Any) -> None:
        """Note one value; one that is on an accelerator is read later.

        Args:
            place: The number of the group, and the name of the entry.
            value: A number, a tensor, or None if the group has no such entry.
        """
        if isinstance(value, Tensor) and value.device.type != "cpu":
            mark = (id(value), num_writes(value))
            if self._marks.get(place) != mark and len(self._waiting) < _MAX_WAITING:
                self._marks[place] = mark
                self._waiting.append((place, value.detach().clone()))
        elif isinstance(value, (int, float)) or (
            isinstance(value, Tensor) and value.numel() == 1
        ):
            self._add(place, float(value))

    def _add(self, place: _Place, value: float) -> None:
        """Add a value to those of its place, and say if they turn too often."""
        turns = self._turns.setdefault(place, TurningPoints())
        turns.add(value)
        if turns.are_many() and not self._is_found:
            self._is_found = True
            group, name = place
            text = _CHOSEN.format(group=group, name=name)
            self._chain.leave_unchecked("noise", text)

    def _read_waiting(self) -> None:
        """Read the values of tensors on an accelerator."""
        waiting, self._waiting = self._waiting, []
        for place, value in waiting:
            self._add(place, float(value))
