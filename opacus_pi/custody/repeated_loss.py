"""Find out whether a criterion gives the same batch the same losses later in a run.

A criterion may have weights, a prior or an average that the loop sets from each batch.
In every single call each example then has a loss of its own, but what multiplies it was
computed from the other examples, too. Such a criterion gives one batch other losses
with the state of one update than with that of another.

So a few examples of a batch, and their losses, are kept, and the criterion is evaluated
on them again with the state that it has at a later batch.

*Guarantee.* Criteria are compared in batches 1, 2, 4, 8 and so on, and in every 64th.
Copies of the criterion are called (``function_copies``), on detached copies of the
outputs, with the same random numbers, which are restored. On an accelerator the result
is read with the chain only.

*What breaks it.* A change that leaves the losses of the kept examples as they were, and
one that is undone at the compared batches. Whether the state was computed from batches
or follows a schedule is not known, so the link is left unchecked, and not broken.

>>> chain, criterion = Chain(), torch.nn.NLLLoss(torch.ones(3), reduction="none")
>>> repeated = RepeatedLoss(criterion, chain)
>>> outputs, labels = torch.eye(3), torch.arange(3)
>>> repeated.saw(outputs, labels)
>>> criterion.weight = torch.tensor([1.0, 2.0, 3.0])
>>> repeated.saw(outputs, labels)
>>> [link.state for link in chain.custody().links if link.name == "loss"]
['unchecked']
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opacus_pi.custody.chain import Chain
from opacus_pi.custody.function_copies import copied_if_possible
from opacus_pi.custody.looks import Looks
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.models.batches import map_tensors, num_examples, tensors_of
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.models.own_losses import Criterion

__all__ = ["RepeatedLoss"]

_NUM_EXAMPLES = 8
_NUM_ENTRIES = 2**20  # of the kept examples, where two do not have more
_ROUNDINGS = 8
_CHANGES = (
    "The criterion gave other losses to the same outputs and targets later in the run, "
    "so it has weights or other values that change. If these are computed from "
    "batches, such as class weights from the labels of a batch, a running prior or "
    "trained centres, removing one example changes the losses of others, and "
    "max_grad_norm does not bound what an example contributes. Compute them once, "
    "before training, from public data or with noise. If they follow a schedule that "
    "does not depend on the data, nothing needs to be done."
)


@dataclass(frozen=True)
class _Kept:
    """A few examples, and the losses that the criterion once gave them."""

    batch: Any
    losses: Tensor


class RepeatedLoss:
    """Evaluates a criterion again on examples that it had before.

    Args:
        criterion: ``criterion(outputs, targets)``.
        chain: The chain of custody of the run; its link "loss" is left unchecked if
            the losses differ.
    """

    def __init__(self, criterion: Criterion, chain: Chain) -> None:
        self._criterion, self._chain = criterion, chain
        self._looks, self._is_told = Looks(), False
        self._kept: _Kept | None = None
        self._late: Tensor | None = None  # whether losses differed, on an accelerator
        chain.on_read(self._report_late, can_break=False)

    def saw(self, outputs: Any, targets: Any) -> None:
        """Compare with an earlier batch, if this batch is one of those to be compared.

        Args:
            outputs: The outputs that the criterion was given, ``(b, ...)``; only read.
            targets: Its targets, length ``b``.
        """
        if self._looks.count():
            self.compare(outputs, targets)

    def compare(self, outputs: Any, targets: Any) -> None:
        """Compare with an earlier batch, and keep this one.

        Args:
            outputs: As for ``saw``.
            targets: As for ``saw``.
        """
        size = num_examples(targets)
        if self._is_told or not size:
            return
        try:
            kept = self._kept
            if kept is not None:
                self._tell_if(_differ(self._losses(kept.batch), kept.losses))
            batch = _examples_of((outputs, targets), size)
            self._kept = None if batch is None else _Kept(batch, self._losses(batch))
        except MODEL_ERRORS:
            self._kept = None  # the probe of the criterion says why it cannot run

    def _losses(self, batch: Any) -> Tensor:
        """Return the losses that the criterion gives now.

        Args:
            batch: Outputs and targets, which the criterion may write to.
        """
        own = map_tensors(Tensor.clone, batch)
        with torch.no_grad(), random_state_untouched():
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            return torch.as_tensor(copied_if_possible(self._criterion)(*own))

    def _tell_if(self, differ: Tensor) -> None:
        """Leave the link unchecked if losses differ, at once if they are at hand."""
        if not differ.is_cpu:
            self._late = differ if self._late is None else self._late | differ
        elif differ and not self._is_told:
            self._is_told, self._kept = True, None
            self._chain.leave_unchecked("loss", _CHANGES)

    def _report_late(self) -> None:
        """Report losses that differed on an accelerator."""
        late, self._late = self._late, None
        if late is not None:
            self._tell_if(late.cpu())


def _examples_of(batch: Any, size: int) -> Any:
    """Return copies of the first few examples; None if they are too large to keep.

    Args:
        batch: Outputs and targets.
        size: The number of examples.
    """
    entries = sum(tensor.numel() for tensor in tensors_of(batch))
    count = min(_NUM_EXAMPLES, size, _NUM_ENTRIES * size // max(1, entries))
    if not count:
        return None

    def first(tensor: Tensor) -> Tensor:
        is_by_example = tensor.dim() and len(tensor) == size
        return (tensor[:count] if is_by_example else tensor).detach().clone()

    return map_tensors(first, batch)


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Return whether losses differ by more than rounding, a tensor of one bool.

    Args:
        one: Losses.
        other: Earlier losses of the same examples.
    """
    if one.shape != other.shape:
        return torch.ones((), dtype=torch.bool)
    gap = torch.nan_to_num(one - other).abs()
    size = torch.nan_to_num(other).abs()
    kind = one.dtype if one.is_floating_point() else torch.float32
    return (gap > _ROUNDINGS * torch.finfo(kind).eps * size).any()
