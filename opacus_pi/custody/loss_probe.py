"""Find out whether a known criterion gives each example a loss of its own.

In training with ghost clipping the library is given the criterion. On the first batches
with at least two examples, and then on batches 4, 8, 16, 32 and so on and every 64th,
the criterion is evaluated again with other examples in the batch, and the losses are
compared with the loss of the batch
(:class:`~opacus_pi.models.own_losses.OwnLosses` does both, also for sweeps). If the
criterion is called only in the training loop, ``engine.audit(criterion)`` makes the
same comparison on request.

A loss of torch treats all batches alike, so three are enough. A criterion of the user
may couple examples in some batches only, such as one that drops an outlier. So for the
batches in between its link stays unchecked.

**Guarantee.** The criterion is copied, outputs are detached, and random states are
restored.

**What breaks it.** A criterion that couples examples only for certain values, on the
batches in between. In a single batch, too, it may go unnoticed: the mean over the
hardest half of a batch is seen in 95 % of the batches of 8 and in 26 % of those of 3.

>>> chain, outputs, labels = Chain(), torch.eye(3), torch.arange(3)
>>> LossProbe(torch.nn.CrossEntropyLoss(), chain).saw(outputs, labels)
>>> [link.state for link in chain.custody().links if link.name == "loss"]
['checked']
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opacus_pi.custody.chain import Chain
from opacus_pi.custody.finding import Finding
from opacus_pi.custody.function_copies import copied_if_possible
from opacus_pi.custody.looks import Looks
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.models.batches import map_tensors, num_examples
from opacus_pi.models.known_losses import is_known_loss
from opacus_pi.models.own_losses import CoupledLoss, Criterion, OwnLosses

__all__ = ["LossProbe"]

_NUM_BATCHES = 3

_CHECKED = (
    "The criterion was evaluated with other examples in the batch, and each loss "
    "depended on its own example only."
)
_SOMETIMES = (
    "The criterion is not one of torch's losses. It was evaluated with other examples "
    "in the first three batches, in batches 4, 8, 16 and so on, and in every 64th. "
    "There each loss depended on its own example only. For the other batches this is "
    "assumed: a criterion that drops the outliers of a batch, for example, couples "
    "examples only where there are any."
)
_COMPUTED = (
    "The criterion was given a tensor that the training loop computed from the "
    "model's outputs. It could not be checked whether this computation mixes the "
    "examples of the batch. Move the computation into the model or the criterion."
)
_NOT_EVALUATED = (
    "The criterion could not be evaluated a second time to check whether each example "
    "has a loss of its own: {error}. Call engine.audit(criterion), which compares "
    "gradients instead."
)


def _always(_: Tensor) -> bool:
    """Return True."""
    return True


class LossProbe:
    """A probe of a criterion on the first batches with at least two examples.

    Args:
        criterion: ``criterion(outputs, targets)``; copies of it are called.
        chain: The chain of custody of the run; gets the result as its link "loss".
        averages_each_example: As for ``OwnLosses``.
        is_output: Returns whether a tensor is an output of the model; default: all are.
    """

    def __init__(
        self,
        criterion: Criterion,
        chain: Chain,
        *,
        averages_each_example: bool = False,
        is_output: Callable[[Tensor], bool] = _always,
    ) -> None:
        self._is_output = is_output
        self._criterion, self._chain = criterion, chain
        self._averages_each_example = averages_each_example
        self._is_known = is_known_loss(criterion)
        self._looks, self._is_settled = Looks(), False

    def saw(self, outputs: Any, targets: Any) -> None:
        """Probe the criterion on a batch, unless enough batches were probed before.

        Args:
            outputs: The outputs that the criterion was given, ``(b, ...)``; only read.
            targets: Its targets: one tensor, or several in any nesting.
        """
        if isinstance(outputs, Tensor) and not self._is_output(outputs):
            self._chain.leave_unchecked("loss", _COMPUTED, warn=False)
        if self._is_settled or num_examples(targets) < 2:
            return
        is_looked_at, num = self._looks.count(), self._looks.num_past
        self._is_settled = self._is_known and num >= _NUM_BATCHES
        if num > _NUM_BATCHES and not is_looked_at:
            return
        finding = self._probe(outputs, targets)
        if finding.state != "checked":
            self._is_settled = True
        elif not self._is_known:
            self._chain.leave_unchecked("loss", _SOMETIMES, warn=False)
        finding.tell(self._chain, "loss")

    def _probe(self, outputs: Any, targets: Any) -> Finding:
        """Evaluate the criterion as ``OwnLosses`` does."""
        try:
            losses = OwnLosses(
                copied_if_possible(self._criterion),
                averages_each_example=self._averages_each_example,
            )
            with torch.no_grad():
                losses(map_tensors(Tensor.detach, outputs), targets)
            if not self._is_known:
                losses.compare_alone(outputs, targets)
        except CoupledLoss as error:
            return Finding("broken", str(error))
        except MODEL_ERRORS as error:
            lines = str(error).splitlines() or [""]
            what = f"{type(error).__name__}: {lines[0]}".rstrip(":. ")
            return Finding("unchecked", _NOT_EVALUATED.format(error=what))
        return Finding("checked", _CHECKED)
