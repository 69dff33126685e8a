"""Find out whether a loop multiplies the losses of a batch by one constant factor.

With ghost clipping the criterion is known, but the loop may multiply its result before
it calls ``backward``, drop examples from it, or divide it by a quantity of the batch.
The gradient that arrives at each example's loss is the factor of that loss. So the
smallest and the largest factor of every backward pass are noted.

*Guarantee.* A loop whose factors differ within a batch or between batches, by more than
one part in 10,000, is found. Nothing of the training is changed. On an accelerator the
factors are compared when the chain is read, so no update waits for them.

The same holds for gradient hooks that a loop has put on the model's outputs.

*What breaks it.* Gradients that are changed elsewhere between the losses and the
parameters, by hooks within the model or by functions with a gradient of their own.

>>> chain, losses = Chain(), torch.ones(3, requires_grad=True)
>>> factors = LossFactors(chain, is_mean=False)
>>> factors.watch(losses)
>>> (losses * torch.tensor([1.0, 2.0, 1.0])).sum().backward()
>>> [link.state for link in chain.custody().links if link.name == "loss"]
['unchecked']
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opacus_pi._torch_compat import gradient_hooks
from opacus_pi.custody.chain import Chain
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["LossFactors"]

_ALIKE = 1e-4  # relative difference that rounding may cause
_OWN_FACTORS = (
    "The training loop multiplied the losses of a batch by different factors after the "
    "criterion, or left some of them out. The recorded norms are right only if an "
    "example's factor depends on this example alone. A factor that depends on the "
    "others, such as a weight relative to the mean loss of the batch, is not covered "
    "by any accounting. Put the factors into the criterion."
)
_VARYING = (
    "The training loop multiplied one loss by {low:.4g} and another by "
    "{high:.4g}. That is right if the factor follows a schedule that does not depend "
    "on the data. One that depends on the batch, such as the inverse of its loss, is "
    "not covered by any accounting. Call loss.backward() without a factor."
)


_HOOKED = (
    "The model's outputs have a gradient hook of the training loop. If it scales "
    "gradients by a quantity of the whole batch, such as their norm, no gradient "
    "belongs to one example, and ghost clipping does not bound what an example "
    "contributes. The hook is harmless only if it returns nothing and changes nothing. "
    "Remove the hook."
)


def _none() -> None:
    """Return None, in place of a reference to outputs that are not one tensor."""


def _never() -> bool:
    """Return False: no backward pass is the second one of ghost clipping."""
    return False


class LossFactors:
    """The factors by which the examples' losses enter what is differentiated.

    Args:
        chain: The chain of custody of the run; its link "loss" is left unchecked if the
            factors differ.
        is_mean: Whether the loss of a batch is the mean of the examples' losses.
        is_second_backward: Returns whether the present backward pass is the second one
            of ghost clipping, whose factors are those of clipping.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        is_mean: bool,
        is_second_backward: Callable[[], bool] = _never,
    ) -> None:
        self._chain, self._is_mean = chain, is_mean
        self._is_second_backward = is_second_backward
        self._range: tuple[float, float] | None = None  # of the batches so far
        self._is_told = False
        self._late: tuple[Tensor, Tensor, Tensor] | None = None
        chain.on_read(self._report_late, can_break=False)

    def watch(self, losses: Tensor, outputs: Any = None) -> None:
        """Note the factors of losses when their backward pass has run.

        Args:
            losses: The losses of a batch, ``(b,)``, as the criterion returned them.
            outputs: The outputs of the model that the criterion was given.
        """
        if losses.requires_grad and losses.dim() == 1 and losses.numel():
            is_tensor = isinstance(outputs, Tensor)
            given = weakref.ref(outputs) if is_tensor else _none
            losses.register_hook(lambda factors: self._saw(factors, given()))

    def _saw(self, factors: Tensor, outputs: Tensor | None) -> None:
        """Note the gradient that arrived at the losses of a batch.

        Args:
            factors: The gradient.
            outputs: The outputs from which the losses were computed, if they exist.
        """
        if self._is_second_backward():
            return
        hooks = [] if outputs is None else gradient_hooks(outputs)
        # one of them reports the backward pass to the tracker
        if len(hooks) > 1 and not all(map(is_hook_of_opacus, hooks)):
            self._tell(_HOOKED)
        low, high = factors.detach().aminmax()
        size = factors.shape[0] if self._is_mean else 1
        if factors.is_cpu:
            self._compare(size * float(low), size * float(high))
        else:
            self._keep(size * low, size * high)

    def _keep(self, low: Tensor, high: Tensor) -> None:
        """Keep factors on their device, without waiting for it.

        Args:
            low: The smallest factor of a batch.
            high: The largest one.
        """
        spread = high - low
        if self._late is not None:
            before = self._late
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            spread = torch.maximum(spread, before[2])
        self._late = low, high, spread

    def _report_late(self) -> None:
        """Compare the factors that were kept on an accelerator."""
        if self._late is not None and not self._is_told:
            low, high, spread = torch.stack(self._late).tolist()
            if spread > _ALIKE * max(abs(low), abs(high)):
                self._tell(_OWN_FACTORS)
            else:
                self._compare(low, low)
                self._compare(high, high)

    def _compare(self, low: float, high: float) -> None:
        """Compare the factors of a batch with each other and with those before.

        Args:
            low: The smallest factor.
            high: The largest one.
        """
        if self._is_told or (low, high) == self._range:
            return
        before = self._range or (low, high)
        lowest, highest = self._range = min(before[0], low), max(before[1], high)
        if not _are_alike(low, high):
            self._tell(_OWN_FACTORS)
        elif not _are_alike(lowest, highest):
            self._tell(_VARYING.format(low=lowest, high=highest))

    def _tell(self, cause: str) -> None:
        """Leave the link "loss" unchecked, once."""
        if self._is_told:
            return
        self._is_told = True
        self._chain.leave_unchecked("loss", cause)


def _are_alike(low: float, high: float) -> bool:
    """Return whether two factors are equal up to rounding."""
    return high - low <= _ALIKE * max(abs(low), abs(high))
