"""Ghost clipping: compare the gradients of both backward passes.

Ghost clipping takes norms from a first backward pass, and sums the gradients of a
second one, in which each example's loss is multiplied by its clip factor. Both belong
together only if gradients flow back linearly and for each example alone: then what
reaches a layer in the second pass is what reached it in the first, times the factor. A
hook that normalises gradients by the whole batch, limits them, or does something else
in every call breaks this, and so does a function with such a gradient of its own.

The check keeps, for each call of a layer, the norm and the sum of each example's
gradient at the layer's output, and compares them.

*Guarantee.* In a checked update, a factor that differs from the clip factor by more
than 1 % of the largest gradient of a layer is found (up to 6 % in half or mixed
precision). Updates 1, 2, 4, 8, 16 and so on are checked, and every 64th; in between the
model has no additional hooks.

*What breaks it.* A batch in which no gradient is clipped, if the hooks also do the same
in both passes. Layers whose outputs do not have one row for each example, adaptive
clipping and FSDP are not compared, and neither are layers on an accelerator, for which
the loop would have to wait.
"""

import weakref
from collections import defaultdict
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleHooks
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import backward_hooks, remove_hooks
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks
from opacus_pi.gradients.clipping.completeness import autocast_rounding
from opacus_pi.integration.opacus_compat import (
    clipped_norms,
    keep_handle,
    module_of,
)
from opacus_pi.integration.reporting_hook import ReportingHook
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["TwoPasses"]

_DIFFERENT = (
    "Ghost clipping runs two backward passes, and the gradients that reached {name} in "
    "the second one were not those of the first one times the clip factors. So "
    "gradients were not clipped to max_grad_norm. Between the losses and this layer, "
    "gradients are changed in a way that depends on the other examples, on their size "
    "or on the call: by a hook on a tensor or a module, a function with a gradient of "
    "its own, a loop that mixes the model's outputs, or a criterion whose losses have "
    "the shape (b, 1) and not (b,). Remove this, or let hooks multiply gradients by a "
    "constant."
)
_ALIKE = 0.01
_ROUNDINGS = 8
_ROUNDED = 1e-5  # of the largest gradients of all layers
_ADDED = 1e-6  # by Opacus, to norms

# Norm and sum of each example's gradient, ``(b, 2)``, in the order of the calls.
_Facts = dict[str, list[Tensor]]


class TwoPasses:
    """Compares both backward passes of some updates.

    Args:
        hooks: What Opacus made of the model; referred to weakly.
        chain: The chain of custody of the run; its link "norm" breaks.
        is_mean: Whether the loss of a batch is the mean of the examples' losses.
    """

    def __init__(
        self, hooks: AbstractGradSampleHooks, chain: Chain, *, is_mean: bool
    ) -> None:
        self._hooks = weakref.ref(hooks)
        self._chain, self._is_mean = chain, is_mean
        self._batch_dim = 0 if hooks.batch_first else 1
        self._looks, self._rounding, self._size = Looks(), 0.0, 0
        self._found: str | None = None  # a layer whose gradients differ
        self._handles: list[RemovableHandle] = []
        self._facts: tuple[_Facts, _Facts] = (defaultdict(list), defaultdict(list))
        self._begin()

    def begins(self, losses: Tensor) -> None:
        """Note how many examples the backward passes that follow have.

        Args:
            losses: The losses of the examples, ``(b,)``.
        """
        if not self._handles:
            return
        self._size = len(losses) if losses.dim() else 0
        self._rounding = max(autocast_rounding(), torch.finfo(losses.dtype).eps)

    def ended(self) -> None:
        """Compare the passes that have ended, if they were noted."""
        self._looks.count()
        hooks = self._hooks()
        if self._handles and hooks is not None:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            with torch.no_grad():
                name = self._different(hooks)
            if name is not None:
                self._found = name
                return
        if self._looks.is_due:
            self._begin()

    def report(self) -> None:
        """Break the link "norm" if passes that have ended differ.

        To be called after the model was probed: a model that mixes the examples is a
        better reason.
        """
        found, self._found = self._found, None
        if found is not None:
            shown = f"the layer {found!r}" if found else "the model"
            self._chain.break_link("norm", _DIFFERENT.format(name=shown))

    def _begin(self) -> None:
        """Note from now on what reaches the outputs of layers."""
        hooks = self._hooks()
        if hooks is None:
            return
        self._facts = defaultdict(list), defaultdict(list)
        module = module_of(hooks)
        for name, layer in module.named_modules():
            table = backward_hooks(layer)
            remove_hooks(table, _Noting)
            if any(map(is_hook_of_opacus, table.values())):
                handle = layer.register_full_backward_hook(_Noting(self, name))
                self._handles.append(handle)
                keep_handle(module, handle)

    def note(self, name: str, grad: Tensor, batch_dim: int) -> None:
        """Note the gradient that reached the output of a layer.

        Args:
            name: The layer's.
            grad: The gradient, with the examples along one dimension.
            batch_dim: Which one, if examples are not along the first.
        """
        hooks = self._hooks()
        dim = min(self._batch_dim, batch_dim)
        if hooks is None or grad.dim() <= dim or grad.shape[dim] != self._size:
            return
        if not grad.numel() or grad.device.type != "cpu":
            return
        rows = grad.detach().movedim(dim, 0).reshape(self._size, -1).float()
        facts = torch.stack([rows.norm(dim=1), rows.sum(dim=1)], dim=1)
        self._facts[0 if hooks.hooks_enabled else 1][name].append(facts)

    def _different(self, hooks: AbstractGradSampleHooks) -> str | None:
        """Return a layer whose gradients differ, the one nearest to the loss."""
        first, second = self._facts
        self._facts = defaultdict(list), defaultdict(list)
        norms = clipped_norms(hooks)
        if norms is None or len(norms) != self._size or not self._size:
            return None
        factors = (hooks.max_grad_norm / (norms + _ADDED)).clamp(max=1.0).float()
        factors = factors * (self._size if self._is_mean else 1)
        compared: list[tuple[str, Tensor, Tensor]] = []
        for name, calls in first.items():
            if len(calls) == len(second[name]):
                expected = [factors.to(c.device)[:, None] * c for c in calls]
                pairs = zip(expected, second[name], strict=True)
                compared += [(name, one, other) for one, other in pairs]
        tolerance = max(_ALIKE, _ROUNDINGS * self._rounding)
        sizes = [float(one[:, 0].max()) for _, one, _ in compared]
        least = _ROUNDED * max(sizes, default=0.0)
        for (name, one, other), size in zip(compared, sizes, strict=True):
            if float((one - other).abs().max()) > tolerance * max(size, least):
                return name
        return None


class _Noting(ReportingHook):
    """The backward hook of a layer that notes its gradients for ``TwoPasses``."""

    def __call__(self, layer: nn.Module, _: Any, grads: Any) -> None:
        """Note the gradient at the first output, as Opacus uses it."""
        passes = self.owner
        grad = grads[0] if isinstance(grads, tuple) and grads else None
        if passes is not None and isinstance(grad, Tensor):
            # the layers inside of Opacus's recurrent layers have examples first
            passes.note(self.about, grad, 0 if isinstance(layer, RNNLinear) else 1)
