"""Opacus's ``DPOptimizer``, clipping from the per-batch cache.

Clipping needs two things from a batch: the norm of each example's whole gradient, and
the sum of all gradients, each times its clip factor min(1, C / norm). Both follow from
the inputs and output gradients of the layers, which the cache holds, so that no
per-example gradient is formed: first the norms, then one weighted sum per parameter.

Two methods are replaced: clipping, and the loop that adds noise. The noise is drawn by
the same calls of the same generator, so noise and gradients are Opacus's to the bit.
Scaling and skipped steps stay Opacus's own, and so does noise in ``secure_mode`` or
where ``add_noise`` is another method than Opacus's.

The clipped sum is the one of hooks mode up to rounding, or an error is raised: the
taps check that they have seen every gradient that autograd computed. What breaks it
is listed in :mod:`opacus_pi.gradients.clipping.training_taps`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from opacus_pi._class_swap import swap_class
from opacus_pi.gradients.clipping import BatchCache, clip_factors, example_norms
from opacus_pi.integration.fast.model import FastHooks
from opacus_pi.integration.opacus_compat import (
    draws_shipped_noise,
    mark_as_processed,
    module_of,
    require_unprocessed,
)

__all__ = ["clip_from_cache"]

_NOT_FORMED = (
    'grad_sample_mode="fast" forms no per-example gradients. Use '
    'grad_sample_mode="hooks" to read them.'
)
_NO_BATCH = (
    "No backward pass has run through the model in training mode since the last "
    "optimizer.zero_grad(). {remedy}, then loss.backward() before step()."
)
_EVALUATING = "The model is in evaluation mode now. Call model.train(), then the model"
_NOT_CALLED = (
    "The model is in training mode now. Call the model itself, and not its layers one "
    "by one"
)


def clip_from_cache(optimizer: DPOptimizer, hooks: FastHooks) -> DPOptimizer:
    """Have an optimizer clip what the per-batch cache of its model holds.

    Args:
        optimizer: A plain ``DPOptimizer``, changed in place.
        hooks: What ``prepare_model`` returned for the optimizer's model.

    Returns:
        The same object. Its ``per_sample_gradient_norms`` (before clipping) and
        ``batch_sizes`` are those of its last step.
    """
    swap_class(optimizer, _clipping_from_cache)
    optimizer._pi_hooks = hooks
    return optimizer


class _NotFormed(Sequence[Tensor]):
    """A sequence of one entry per parameter whose entries cannot be read.

    Opacus asks for the number of per-example gradients in places where it does not
    need the gradients themselves.
    """

    def __init__(self, num_parameters: int) -> None:
        self._num_parameters = num_parameters

    def __len__(self) -> int:
        return self._num_parameters

    def __getitem__(self, index: Any) -> Any:
        raise AttributeError(_NOT_FORMED)


def _clipping_from_cache(base: type[DPOptimizer]) -> type:
    """Return a subclass of an optimizer class that clips from the cache."""
    return type(base.__name__, (_ClippingFromCache, base), {})


class _ClippingFromCache(DPOptimizer):
    """A ``DPOptimizer`` whose clipping reads the per-batch cache of its model.

    Opacus's ``step`` calls ``clip_and_accumulate`` once, after all backward passes of
    the update, and then ``add_noise``, which sets ``p.grad`` to ``p.summed_grad`` plus
    noise. The parameters have no ``grad_sample``.

    Attributes:
        per_sample_gradient_norms: Norms before clipping of all samples of the last
            step, float64 ``(b,)``, in the order of the backward passes.
        batch_sizes: How many samples each of these backward passes had.
    """

    _pi_hooks: FastHooks
    per_sample_gradient_norms: Tensor
    batch_sizes: list[int]

    @property
    def grad_samples(self) -> Sequence[Tensor]:
        """The number of per-example gradients; they themselves are not formed."""
        return _NotFormed(len(self.params))

    @property
    def accumulated_iterations(self) -> int:
        """Number of batches in the step; Opacus counts them by ``grad_sample``."""
        return len(self._pi_hooks.taps.caches)

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradient sum of the batches to ``p.summed_grad``.

        Raises:
            ValueError: If no backward pass has run, the batches were clipped before, or
                a parameter's gradients are not known completely.
        """
        taps, model = self._pi_hooks.taps, module_of(self._pi_hooks)
        caches = taps.caches
        if not caches:
            remedy = _NOT_CALLED if model.training else _EVALUATING
            raise ValueError(_NO_BATCH.format(remedy=remedy))
        require_unprocessed(caches)
        # Norms and sums are not taken in half precision, even if the loop is.
        no_autocast = torch.autocast(self.params[0].device.type, enabled=False)
        sums: dict[Any, Tensor] = {}  # Any: parameters with Opacus's summed_grad
        with torch.no_grad(), no_autocast:
            norms = [self._pi_clip(cache, sums) for cache in caches]
            # Known only now: clipping may have formed gradients of parameters that
            # have no taps.
            taps.require_complete(self.params, model)
            # Added last, so that a batch that failed leaves nothing behind.
            for p, total in sums.items():
                if p.summed_grad is None:
                    p.summed_grad = total
                else:
                    # In place, as in Opacus: a new tensor would lose the mark that an
                    # update was made of this sum, and the next one would contain it.
                    p.summed_grad += total
        self.per_sample_gradient_norms = torch.cat(norms)
        self.batch_sizes = [cache.size for cache in caches]
        # The mark stays until ``zero_grad`` drops the caches: a second step without a
        # backward pass in between would add the same sum again.
        mark_as_processed(caches)

    def _pi_clip(self, cache: BatchCache, sums: dict[Any, Tensor]) -> Tensor:
        """Add one batch's clipped gradients to sums by parameter.

        Args:
            cache: Of the batch; is released.
            sums: The sums of earlier batches; changed in place.

        Returns:
            The norms before clipping, ``(b,)``.
        """
        hooks = self._pi_hooks
        # A mean loss divided every example's gradient by the batch size.
        scale = cache.size if hooks.loss_reduction == "mean" else 1
        found = cache.gradients(self.params, module_of(hooks))
        norms = scale * example_norms(found.values())
        # Scaled again: the cache holds the gradients of the loss as it was.
        factors = scale * clip_factors(norms, self.max_grad_norm)
        for p, gradients in found.items():
            grad = gradients.weighted_sum(factors).view(p.shape).to(p.dtype)
            sums[p] = sums[p] + grad if p in sums else grad
        cache.release()  # inputs and output gradients are the bulk of the memory
        return norms

    def add_noise(self) -> None:
        """Set ``p.grad`` to ``p.summed_grad`` plus noise, Opacus's to the bit.

        For every parameter Opacus makes a tensor of zeros that it needs in secure mode
        only, the noise, and the sum of noise and gradient. Here the gradient is added
        to the noise in place, so that one tensor is made. ``torch.normal`` is called
        as Opacus calls it, and a + b = b + a holds for floating-point numbers, too.

        Opacus's own method runs in secure mode, if a derived class or other code has
        replaced it, and if a sum is not a plain tensor.
        """
        parameters: list[Any] = self.params  # Opacus adds the attribute summed_grad
        if (
            self.secure_mode
            or not draws_shipped_noise(super().add_noise)
            or not all(_is_plain(p.summed_grad) for p in parameters)
        ):
            super().add_noise()
            return
        for p in parameters:
            total = p.summed_grad
            require_unprocessed(total)
            # read for each parameter, as in Opacus: a derived class may compute it
            std = self.noise_multiplier * self.max_grad_norm
            if std == 0:
                noise = torch.zeros_like(total)
            else:
                noise = torch.normal(
                    mean=0,
                    std=std,
                    size=total.shape,
                    device=total.device,
                    generator=self.generator,
                    dtype=total.dtype,
                )
            p.grad = noise.add_(total).view_as(p)
            mark_as_processed(total)

    def zero_grad(self, *args: Any, **options: Any) -> None:
        """Clear the gradients and the caches of the batches that they belong to."""
        self._pi_hooks.taps.clear()
        super().zero_grad(*args, **options)


def _is_plain(total: Any) -> bool:
    """Return whether a sum in place has the type, layout and history of a new one.

    Args:
        total: The sum of clipped gradients of a parameter; None if it has none.
    """
    return (
        type(total) is Tensor
        and total.layout is torch.strided
        and total.is_contiguous()
        and not total.requires_grad
    )
