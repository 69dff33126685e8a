"""The change from the batch's mean gradient to the gradient of the noisy mechanism."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from opacus_pi._validate import expect
from opacus_pi.attribution import NOBODY, UNKNOWN, Tracker
from opacus_pi.recording import Recorder

_UNCLEAR = (
    "Of update {step} it is not known how many examples its mean gradient was taken "
    "over, so the noise has no known size beside theirs. For each optimizer.step, pass "
    "one batch of the returned data loader through the model, once and in training "
    "mode, and transform inputs in the data set. Instead of accumulating gradients, "
    "use a larger batch size."
)
_NO_GRADIENTS = (
    "Update {step} had no gradients for the noise to be added to. Call backward for "
    "every batch, an empty one too."
)


class NoisyStep:
    """Σ_i ∇ℓ_i / E[B] + N(0, noise_std² I), just before the optimizer's step.

    Args:
        noise_std: Standard deviation of the noise on the mean gradient, above 0.
        mean_batch_size: E[B].
        recorder: Told where an update is not of that form.
        tracker: Knows the rows of the update.
        generator: Of the noise; None: torch's global one.
    """

    def __init__(
        self,
        noise_std: float,
        mean_batch_size: float,
        recorder: Recorder,
        tracker: Tracker,
        generator: torch.Generator | None = None,
    ) -> None:
        self.noise_std = noise_std
        self.mean_batch_size = mean_batch_size
        self.recorder = recorder
        self.tracker = tracker
        self.generator = generator

    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A pre-hook of ``Optimizer.step``; ``args`` starts with the optimizer."""
        _check_step(optimizer, args[1] if len(args) > 1 else kwargs.get("closure"))
        gradients = _gradients(optimizer)
        num_rows = _num_rows(self.tracker)
        if num_rows is None or not gradients:
            reason = _NO_GRADIENTS if not gradients else _UNCLEAR
            self.recorder.refuse(reason.format(step=self.recorder.num_steps + 1))
        for gradient in gradients:
            if num_rows == 0:
                gradient.zero_()  # the mean over no rows is NaN
            elif num_rows is not None and num_rows != self.mean_batch_size:
                gradient.mul_(num_rows / self.mean_batch_size)
            gradient.add_(self._noise_like(gradient))

    def _noise_like(self, gradient: Tensor) -> Tensor:
        """Independent N(0, noise_std²) for every entry."""
        return torch.normal(
            0.0,
            self.noise_std,
            gradient.shape,
            generator=self.generator,
            dtype=gradient.dtype,
            device=gradient.device,
        )


def _num_rows(tracker: Tracker) -> int | None:
    """Rows of the one batch behind the gradients of now; None if that is unclear."""
    batch = tracker.batch_behind() or tracker.latest  # a loop may be batches ahead
    if batch is None or batch.rows is None:
        return None
    rows = tracker.attribute([len(batch.rows)])
    if len(rows) and (rows == UNKNOWN).all():
        return None
    return int((rows != NOBODY).sum())


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that the step will use."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad for p in params if p.grad is not None]


def _check_step(optimizer: Optimizer, closure: Any) -> None:
    """Refuse steps that would not use the gradients as they are now."""
    expect(
        closure is None,
        "optimizer.step(closure)",
        closure,
        "to be called without a closure",
        "A closure computes the gradients again, without noise: call backward before "
        "step, or train with noise_std=0.",
    )
    expect(
        getattr(optimizer, "grad_scale", None) is None,
        "optimizer.grad_scale",
        "a loss scale",
        "to be None",
        "Noise belongs on unscaled gradients: call scaler.unscale_(optimizer) first.",
    )
