"""Compare the weights in the forward passes of training with those after an update.

``custody/weights.py`` compares weights before each update. A loop may change them
before its forward pass and put them back before the update, as sharpness-aware
minimisation (SAM) does. The gradients are then those of other weights, which may depend
on the whole batch. So the weights are compared when the model has been called, too.

*Guarantee.* In every pass, a write that torch counts is found, which takes some
microseconds. In the passes 1, 2, 4, 8, 16 and so on, and in every 64th, weights are
compared as before an update, so that a replaced memory is found, and a write to
``.data`` in host memory.

*What breaks it.* Such a write in another pass, or to an accelerator's memory, if it is
undone before the update. Passes before the first update, and distributed runs.

>>> import torch
>>> weight, snapshot = torch.zeros(3), WeightSnapshot()
>>> snapshot.watch([weight])
>>> snapshot.take()
>>> passes = WeightsInPasses(snapshot)
>>> kept, weight.data = weight.data, torch.ones(3)
>>> passes.saw((), {}, weight)
>>> passes.backward_began()
>>> weight.data = kept
>>> passes.were_others(), passes.were_others()
(True, False)
"""

from typing import Any

from opacus_pi.custody.looks import Looks
from opacus_pi.custody.weights import WeightSnapshot

__all__ = ["WeightsInPasses"]


class WeightsInPasses:
    """Notes passes whose weights are not those that the last update has left.

    Args:
        snapshot: Of the weights, taken after each update.
    """

    def __init__(self, snapshot: WeightSnapshot) -> None:
        self._snapshot = snapshot
        self._looks = Looks()
        self._awaits = False  # a pass with other weights has had no backward pass yet
        self._is_latest = False  # the latest backward pass was of such a pass
        self._found = False  # a backward pass whose gradients no update has used yet

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        """Compare the weights in a forward pass of training.

        Args:
            args: The positional inputs of the model; not used.
            kwargs: Its inputs by keyword; not used.
            outputs: Its outputs; not used.
        """
        self._is_latest = False
        is_short = not self._looks.count()
        self._awaits |= self._snapshot.has_changed_in_pass(counts_only=is_short)

    def backward_began(self, *, is_second: bool = False) -> None:
        """Note that there are gradients of the passes so far.

        Args:
            is_second: Not used: both passes of ghost clipping have the same weights,
                and Opacus clears the gradients of the first one.
        """
        if self._awaits:
            self._awaits, self._is_latest = False, True
        self._found |= self._is_latest

    def gradients_were_cleared(self) -> None:
        """Forget passes whose gradients no update will use."""
        self._found = False

    def forget(self) -> None:
        """Forget all passes: the weights that they had were those of the training.

        So it is if the loop itself has made the step of an update.
        """
        self._awaits = self._is_latest = self._found = False

    def were_others(self) -> bool:
        """Return whether an update has gradients of other weights; forget it."""
        found, self._found = self._found, False
        return found
