"""Compares the gradient of the loop's loss with that of the mean of the criterion.

In monitored training the noise is compared with the gradients of single examples, which
sweeps measure by the criterion. That is right only if the training loop takes the mean
of this criterion over the batch. A loop that sums its losses, or multiplies gradients
after the backward pass, trains another mechanism: with a batch of 64, the sum has 64
times the gradient beside the same noise.

So in the first updates, and in one of 32 later ones, the gradient is computed again, by
a copy of the model in the same mode, with the random numbers of the forward pass. The
two are equal, or a multiple of each other (the link "noise" is broken), or different
(another loss, the link "loss" is unchecked). Two comparisons are at most 63 updates
apart, in the first 63 updates at most as many as were made before; a generator of this
file draws how many.

*What breaks it.* Another loss in k single updates after the first ones is missed with a
probability of (31/32)^k, and one that begins within the last 63 updates may be. Models
whose forward pass cannot be repeated, and batches without targets, are not compared.
Batches are kept in memory until a comparison is done, so after 100 updates in a row
that cannot be compared no further one is tried.
"""

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.attribution import Tracker
from opacus_pi.attribution.delivery import ForwardPass
from opacus_pi.attribution.targets import in_order_of_pass, positions_in_delivery
from opacus_pi.custody import Chain
from opacus_pi.models.backward_gradients import gradients_by_backward
from opacus_pi.models.batches import inputs_and_targets
from opacus_pi.models.copies import training_copy
from opacus_pi.models.forward_call import ForwardCall
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.models.own_losses import (
    CoupledLoss,
    Criterion,
    per_example_criterion,
)

__all__ = ["GradientScale"]

Gradients = list[Tensor | None]  # None where a parameter did not enter the loss

_NUM_FIRST = 2  # updates, all of which are compared
_LARGEST_GAP = 63  # updates; drawn from 1 to this, so 32 in the mean
_MAX_ATTEMPTS = 100  # updates
_TOLERANCE = 0.02  # relative; gradients in reduced precision differ by less
_SCALED = (
    "The gradient of an update was {ratio:.4g} times that of the mean of the criterion "
    "over the batch. So relative to the mean gradient, the noise did not have the "
    "standard deviation noise_std. Take the mean of the losses over the batch, and do "
    "not multiply gradients after the backward pass. To keep the updates of plain SGD "
    "on the sum over b examples, train on the mean, multiply the learning rate by b, "
    "and divide noise_std by b."
)
_ANOTHER_LOSS = (
    "The gradient of an update was not that of the criterion that make_monitored was "
    "given, so the norms are of another loss than the one that was trained. Pass the "
    "criterion that the loop uses, penalties included."
)
_SEVERAL = (
    "An update used the gradients of several forward passes, so it was not checked "
    "that its gradient is that of the criterion's mean over a batch. If the passes "
    "were of one batch, their gradients were added up, and were too large for the "
    "noise. Make one forward pass and one backward pass for each update."
)
_REPEATED = (
    "A forward pass had several samples of one example, so its gradient entered an "
    "update more than once, and is charged once. Give the model each sample of a "
    "batch once."
)
_SAME = (
    "The gradients of the first updates, and of one of 32 later ones, were those of "
    "the mean of the criterion."
)
_NOT_YET = " The last {num} updates were not compared."


class GradientScale:
    """Compares gradients in the first updates of a monitored training with noise.

    Args:
        module: The model that is trained; ``before_forward`` is a pre-hook of it.
        criterion: One loss per example, or a torch loss module.
        tracker: Keeps the delivered batches until the comparisons are done.
        chain: The chain of custody, which gets the results as "noise" and "loss".
    """

    def __init__(
        self, module: nn.Module, criterion: Criterion, tracker: Tracker, chain: Chain
    ) -> None:
        self._module, self._chain, self._tracker = module, chain, tracker
        self._criterion = per_example_criterion(criterion)
        self._draws = random.Random(0)  # no secret: it only spreads the comparisons
        self._num_updates = self._num_compared = self._num_attempts = 0
        self._last_right = 0  # update whose gradient was the expected one
        chain.on_read(self._say_last, can_break=False)
        self._next: float = 1  # update that is compared
        self._passes: list[ForwardCall] = []
        self._keep_batches()

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep the arguments and random states of a forward pass in training mode.

        Args:
            module: The model.
            args: Its arguments.
            kwargs: Its keyword arguments.
        """
        # The gradients of several passes are not compared: then two show that.
        is_needed = self._is_due and len(self._passes) < 2
        if is_needed and module.training and torch.is_grad_enabled():
            self._passes.append(ForwardCall.now(module, args, kwargs))

    def compare(self, parameters: list[nn.Parameter]) -> None:
        """Compare the gradients of the update that is about to be made.

        Args:
            parameters: Those that the optimizer updates, with their gradients.
        """
        if self._is_due:
            passes, self._passes = self._passes, []
            self._num_attempts += 1
            if self._compare(passes, parameters):
                self._num_compared += 1
                is_early = self._num_compared < _NUM_FIRST
                largest = min(_LARGEST_GAP, self._num_updates + 1)
                gap = 1 if is_early else self._draws.randint(1, largest)
                self._next, self._num_attempts = self._num_updates + 1 + gap, 0
            elif self._num_attempts >= _MAX_ATTEMPTS:
                self._next = math.inf
        self._num_updates += 1
        self._keep_batches()

    @property
    def _is_due(self) -> bool:
        """Whether the update under way is compared."""
        return self._next <= self._num_updates + 1

    def _keep_batches(self) -> None:
        """Have batches kept that are needed: a loop may get its next one early."""
        self._tracker.keeps_batches = self._next <= self._num_updates + 2

    def _compare(
        self, passes: list[ForwardCall], parameters: list[nn.Parameter]
    ) -> bool:
        """Compare the gradients, and return whether that was possible.

        Args:
            passes: The forward passes since the last update.
            parameters: As for ``compare``.
        """
        used = self._tracker.passes_of_gradients()
        if len(used) > 1:
            self._chain.leave_unchecked("loss", _SEVERAL)
        if len(used) != 1 or len(passes) != 1:
            return False
        if _has_repeated(used[0]):
            self._chain.break_link("rows", _REPEATED)
        targets = _targets_of(used[0])
        if targets is None:
            return False
        expected = self._gradients(passes[0], targets, parameters)
        if expected is None:
            return False
        given = [p.grad for p in parameters]
        self._report(_flat(given, parameters), _flat(expected, parameters))
        return True

    def _report(self, found: Tensor, expected: Tensor) -> None:
        """Tell the chain how two gradients, float64 ``(d,)``, compare."""
        size = float(expected.norm())
        if size == 0 or not bool(torch.isfinite(found).all()):
            return
        ratio = float(found @ expected) / size**2
        rest = float((found - ratio * expected).norm())
        if rest > _TOLERANCE * max(float(found.norm()), _TOLERANCE * size):
            self._chain.leave_unchecked("loss", _ANOTHER_LOSS)
        elif abs(ratio - 1) > _TOLERANCE:
            self._chain.break_link("noise", _SCALED.format(ratio=ratio))
        else:
            self._chain.check("loss", _SAME)
            self._last_right = self._num_updates + 1

    def _say_last(self) -> None:
        """Say how many updates there were since the last one that was compared."""
        num = self._num_updates - self._last_right
        if self._last_right and num:
            self._chain.check("loss", _SAME + _NOT_YET.format(num=num))

    def _gradients(
        self,
        forward: ForwardCall,
        targets: Any,
        parameters: list[nn.Parameter],
    ) -> Gradients | None:
        """Compute the mean criterion's gradients again; None if that is impossible."""
        model = training_copy(self._module)
        pairs = zip(self._module.parameters(), model.parameters(), strict=True)
        copies = {id(live): copy for live, copy in pairs}
        try:
            with random_state_untouched(), torch.enable_grad():
                with forward.surroundings():
                    outputs = model(*forward.args, **forward.kwargs)
                    losses = self._criterion(outputs, _beside(targets, outputs))
                wanted = [copies[id(p)] for p in parameters]
                found = gradients_by_backward(losses.mean(), wanted)
        except (CoupledLoss, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            return None
        return found


def _has_repeated(forward: ForwardPass) -> bool:
    """Return whether a pass has two samples of one example."""
    positions = positions_in_delivery(forward)
    known = [] if positions is None else positions[positions >= 0].tolist()
    return len(set(known)) < len(known)


def _targets_of(forward: ForwardPass) -> Any:
    """Return the delivered targets of the samples of a pass, in its order.

    Args:
        forward: The pass.

    Returns:
        None if they are not known.
    """
    delivery = forward.delivery
    if delivery is None or delivery.batch is None:
        return None
    try:
        _, targets = inputs_and_targets(delivery.batch)
    except ValueError:
        return None
    return in_order_of_pass(forward, targets)


def _beside(targets: Any, outputs: Any) -> Any:
    """Return targets on the device of the outputs, as the loop will have done."""
    if isinstance(targets, Tensor) and isinstance(outputs, Tensor):
        return targets.to(outputs.device)
    return targets


def _flat(gradients: Gradients, parameters: list[nn.Parameter]) -> Tensor:
    """Return gradients as one float64 vector on the CPU, with 0 where there is none."""
    pairs = zip(gradients, parameters, strict=True)
    parts = (torch.zeros_like(p) if g is None else g.detach() for g, p in pairs)
    dense = (
        part if part.layout is torch.strided else part.to_dense() for part in parts
    )
    return torch.cat([part.reshape(-1).cpu().double() for part in dense])
