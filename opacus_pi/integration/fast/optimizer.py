"""Opacus's ``DPOptimizer``, clipping from a book; noise and scaling are its own."""

from collections.abc import Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor

from opacus_pi._class_swap import swap_class
from opacus_pi.gradients.clipping import Batch, clip_factors, joint_norms
from opacus_pi.integration.fast.hooks import FastHooks

_NOT_FORMED = (
    'grad_sample_mode="fast" forms no per-example gradients. Use '
    'grad_sample_mode="hooks" to read them.'
)
_NO_BATCH = (
    "No backward pass was made since the last optimizer.zero_grad(), through a model "
    "in training mode. Call model.train(), then loss.backward() before step()."
)


def clip_from_book(optimizer: DPOptimizer, hooks: FastHooks) -> DPOptimizer:
    """Have an optimizer clip what a model's book holds.

    Args:
        optimizer: A plain ``DPOptimizer``, changed in place.
        hooks: What was prepared of its model.

    Returns:
        The same object. ``per_sample_gradient_norms`` and ``batch_sizes`` are those of
        its last step, before clipping.
    """
    swap_class(optimizer, _from_book)
    optimizer._pi_hooks = hooks
    return optimizer


class _NotFormed(Sequence[Tensor]):
    """As many gradients as there are parameters, and none to be had."""

    def __init__(self, num_parameters: int) -> None:
        self._num_parameters = num_parameters

    def __len__(self) -> int:
        return self._num_parameters

    def __getitem__(self, place: Any) -> Any:
        raise AttributeError(_NOT_FORMED)


def _from_book(base: type) -> type:
    """An optimizer that clips without per-example gradients."""

    class Fast(base):
        _pi_hooks: FastHooks
        per_sample_gradient_norms: Tensor
        batch_sizes: list[int]

        @property
        def grad_samples(self) -> Sequence[Tensor]:
            """Their number; they themselves are never formed."""
            return _NotFormed(len(self.params))

        @property
        def accumulated_iterations(self) -> int:
            """Batches that enter the step."""
            return len(self._pi_hooks.book.batches)

        def clip_and_accumulate(self) -> None:
            """Add the clipped sum of the batches to ``p.summed_grad``."""
            batches = self._pi_hooks.book.batches
            if not batches:
                raise ValueError(_NO_BATCH)
            _check_processed_flag(batches)
            exact = torch.autocast(self.params[0].device.type, enabled=False)
            with torch.no_grad(), exact:  # also where the loop runs in half precision
                norms = [self._pi_clip(batch) for batch in batches]
                book, model = self._pi_hooks.book, self._pi_hooks._module
                book.require_all_heard(self.params, model)
            self.per_sample_gradient_norms = torch.cat(norms)
            self.batch_sizes = [batch.size for batch in batches]
            _mark_as_processed(batches)

        def _pi_clip(self, batch: Batch) -> Tensor:
            """Add one batch's clipped sum; return its norms from before."""
            hooks = self._pi_hooks
            scale = batch.size if hooks.loss_reduction == "mean" else 1
            found = batch.gradients(self.params, hooks._module)
            norms = scale * joint_norms(found.values())
            factors = scale * clip_factors(norms, self.max_grad_norm)
            for p, gradients in found.items():
                grad = gradients.weighted(factors).view(p.shape).to(p.dtype)
                weight: Any = p  # to which Opacus added an attribute
                before = weight.summed_grad
                weight.summed_grad = grad if before is None else before + grad
            batch.release()
            return norms

        def zero_grad(self, *args: Any, **options: Any) -> None:
            """Clear gradients, and forget the batches they are of."""
            self._pi_hooks.book.clear()
            super().zero_grad(*args, **options)

    return Fast
