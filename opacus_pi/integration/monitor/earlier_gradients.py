"""Find gradients of an earlier update that a later one uses again.

Torch adds the gradients of a backward pass to those that are in ``p.grad``. A loop that
does not clear them trains each update on all batches since they were cleared, so an
example is in many more updates than those of its own batches.

One parameter is followed, the last one that the update had a gradient of. If the next
backward pass begins while this gradient is the same tensor, with the same count of
writes and an entry that is not 0, it was not cleared. It must still be there when the
optimizer steps: another loss may have come in between, after which the loop cleared it.

*Guarantee.* A gradient that was not touched between two updates is found, and nothing
waits for an accelerator unless there is such a gradient. Nothing is written.

*What breaks it.* A loop that changes the gradients in place before the next backward
pass, and so keeps a part of them. Models whose layers are called one by one, whose
backward passes are not seen. A parameter with a sparse gradient is not followed.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import num_writes
from opacus_pi.custody import Chain

__all__ = ["EarlierGradients"]

_NOT_CLEARED = (
    "An update used gradients of an earlier one, which were still in p.grad. So a "
    "batch entered more updates than are counted, and its gradients were those of "
    "other weights than the recorded norms. In every update, call zero_grad() "
    "before the first backward pass."
)


class EarlierGradients:
    """Follows the gradient of one parameter from an update to the next one.

    Args:
        chain: Its link "draw" is broken if an update used gradients of an earlier one.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._is_over = False  # a finding is reported once
        self._forget()

    def _forget(self) -> None:
        """Follow no gradient until the next update."""
        self._parameter: nn.Parameter | None = None
        self._gradient: weakref.ref[Tensor] | None = None
        self._num_writes = 0
        self._is_left: Tensor | None = None  # of a backward pass since; not read yet

    def update_was_made(self, parameters: Iterable[nn.Parameter]) -> None:
        """Follow a gradient that the update has used.

        Args:
            parameters: Those that the optimizer holds.
        """
        self._report()  # a closure computes the gradients within the step
        self._forget()
        if self._is_over:
            return
        for parameter in reversed(list(parameters)):
            gradient = parameter.grad
            if gradient is not None and gradient.layout is torch.strided:
                self._parameter = parameter
                self._gradient = weakref.ref(gradient)
                self._num_writes = num_writes(gradient)
                return

    def backward_began(self, *, is_second: bool = False) -> None:
        """Look whether the gradient is still there.

        Args:
            is_second: Not used: there is one backward pass.
        """
        gradient = self._present()
        if gradient is None:
            return
        is_first = self._is_left is None
        is_written = num_writes(gradient) != self._num_writes
        if is_first and is_written:  # cleared in place
            self._forget()
        elif is_first or is_written:
            is_left = gradient.detach().any()
            before, self._num_writes = self._is_left, num_writes(gradient)
            self._is_left = is_left if before is None else before & is_left

    def update_begins(self) -> None:
        """Break the link "draw" if the optimizer is about to use the gradient again.

        Called before a step without a closure.
        """
        gradient = self._present()
        if gradient is not None and self._is_left is None:
            # no backward pass was seen since: it may have been left as it was
            if num_writes(gradient) == self._num_writes:
                self._is_left = gradient.detach().any()
        self._report()
        self._forget()

    def _report(self) -> None:
        """Break the link if the gradient that is followed was not cleared."""
        is_left = self._is_left
        if is_left is not None and self._present() is not None and bool(is_left):
            self._chain.break_link("draw", _NOT_CLEARED)
            self._is_over = True

    def _present(self) -> Tensor | None:
        """Return the gradient that is followed, if the parameter still has it."""
        if self._parameter is None or self._gradient is None:
            return None
        gradient = self._parameter.grad
        if gradient is None or gradient is not self._gradient():
            self._forget()
            return None
        return gradient
