r"""Turn a batch's mean gradient into the gradient of the noisy mechanism.

The training loop computes the mean gradient over the b samples that were drawn. Before
the optimizer's step it is multiplied by b / E[B], and noise is added:

.. math:: \frac{1}{E[B]} \sum_i \nabla\ell_i + N(0, \text{noise\_std}^2 I)

**Why.** Dividing by b would give one example more weight in a small batch than in a
large one. Divided by the constant E[B], an example contributes its own gradient over
E[B] in every update, so the ratio of its norm to the noise is known.

**What breaks it.** b must be known. It is not where gradients of several batches were
accumulated, or where the model was given a part of a batch or tensors that cannot be
traced to one. Training then goes on, with noise, and the ledger is refused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from opacus_pi._validate import expect
from opacus_pi.attribution import LEFT_OUT, UNATTRIBUTED, Tracker
from opacus_pi.custody import Chain
from opacus_pi.integration.drawn_noise import is_drawn_again, repeated_noise
from opacus_pi.integration.held_weights import held_by
from opacus_pi.integration.monitor.gradient_scale import GradientScale
from opacus_pi.integration.noised_steps import NoisedSteps, is_called_last
from opacus_pi.recording import Recorder

__all__ = ["NoiseHook"]

_UNKNOWN_BATCH_SIZE = (
    "It is not known over how many examples update {step} averaged its gradients, so "
    "the effect of the noise on one example is not known either. For each "
    "optimizer.step(), pass one batch of the returned data loader through the model, "
    "once and in training mode. Transform inputs in the data set, and use a larger "
    "batch size instead of accumulating gradients."
)
_NO_GRADIENTS = (
    "Update {step} had no gradients to which noise could be added. Call backward for "
    "every batch, including an empty one."
)
_LATE_HOOK = (
    "A hook was registered on the optimizer's step between a forward pass and the "
    "step, so it was not checked that the hook leaves the gradients with noise as they "
    "are. Register hooks before the training loop."
)


class NoiseHook:
    """A pre-hook of ``Optimizer.step`` that scales the gradients and adds noise.

    Args:
        noise_std: Standard deviation of the noise on the mean gradient, above 0.
        mean_batch_size: E[B], the expected number of examples in a batch.
        recorder: Has the number of the update.
        chain: Its link "noise" is broken if an update does not have this form.
        tracker: Identifies the samples behind the update.
        scale: Compares the gradients with those of the criterion; None: it does not.
        generator: Draws the noise; None: torch's global generator.

    Attributes:
        steps: Compares the gradients that a step uses with those that have noise.
        last_hook: Of the hook that compares them: no other should come after it.
    """

    def __init__(
        self,
        noise_std: float,
        mean_batch_size: float,
        recorder: Recorder,
        chain: Chain,
        tracker: Tracker,
        scale: GradientScale | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.noise_std = noise_std
        self.mean_batch_size = mean_batch_size
        self.recorder, self.chain = recorder, chain
        self.tracker, self.scale = tracker, scale
        self.generator = generator
        self.steps = NoisedSteps(chain)
        self.last_hook: RemovableHandle | None = None

    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Change the gradients in place; torch calls this before each step.

        Args:
            optimizer: The optimizer that is about to step.
            args: Positional arguments of ``step``, after the optimizer itself.
            kwargs: Keyword arguments of ``step``.

        Raises:
            ValueError: If the step would not use the gradients as they are now.
        """
        _check_step(optimizer, args[1] if len(args) > 1 else kwargs.get("closure"))
        parameters = held_by(optimizer)
        if self.scale is not None and not self.chain.is_broken("draw"):
            self.scale.compare(parameters)
        for p in parameters:  # an entry without a gradient gets noise, too
            if p.grad is not None and p.grad.layout is not torch.strided:
                p.grad = p.grad.to_dense()
        gradients = [p.grad for p in parameters if p.grad is not None]
        batch_size = _batch_size(self.tracker)
        if batch_size is None or not gradients:
            reason = _NO_GRADIENTS if not gradients else _UNKNOWN_BATCH_SIZE
            step = self.recorder.num_steps + 1
            self.chain.break_link("noise", reason.format(step=step))
        if gradients and is_drawn_again(
            self.recorder, self.generator, gradients[0].device, self.chain
        ):
            self.chain.break_link("noise", repeated_noise(self.recorder))
        for gradient in gradients:
            if batch_size == 0:
                gradient.zero_()  # the mean over no samples is NaN
            elif batch_size is not None and batch_size != self.mean_batch_size:
                gradient.mul_(batch_size / self.mean_batch_size)
            gradient.add_(self._noise_like(gradient))
        self.steps.gradients_have_noise(optimizer)
        if self.last_hook is not None and not is_called_last(self.last_hook):
            self.chain.leave_unchecked("noise", _LATE_HOOK)

    def _noise_like(self, gradient: Tensor) -> Tensor:
        """Draw an independent N(0, noise_std²) for every entry."""
        return torch.normal(
            0.0,
            self.noise_std,
            gradient.shape,
            generator=self.generator,
            dtype=gradient.dtype,
            device=gradient.device,
        )


def _batch_size(tracker: Tracker) -> int | None:
    """Return b, the number of examples in the batch that the gradients come from.

    Returns:
        None if the gradients are not those of exactly one whole batch. Padding that
        stands in for an empty Poisson batch is not counted.
    """
    # The loader may be ahead of the training loop by some batches, so the batch whose
    # backward pass was seen comes before the latest one.
    batch = tracker.delivery_of_gradients() or tracker.latest
    if batch is None or batch.index_array is None:
        return None
    samples = tracker.attribute([len(batch.index_array)])
    if len(samples) and (samples == UNATTRIBUTED).all():
        return None
    return int((samples != LEFT_OUT).sum())


def _check_step(optimizer: Optimizer, closure: Any) -> None:
    """Raise if the step would not use the gradients as they are now."""
    expect(
        closure is None,
        "optimizer.step(closure)",
        closure,
        "must be called without a closure",
        "A closure computes the gradients again, without noise. Call backward before "
        "step, or train with noise_std=0.",
    )
    expect(
        getattr(optimizer, "grad_scale", None) is None,
        "optimizer.grad_scale",
        "a loss scale",
        "must be None",
        "Noise must be added to unscaled gradients. Call scaler.unscale_(optimizer) "
        "first.",
    )
