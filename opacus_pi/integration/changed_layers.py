"""Ghost clipping: find layers that do not compute what their norms are computed for.

Opacus computes norms by a formula for the layer's type, from the layer's inputs and the
gradients at its outputs. A forward hook that changes the output, or a ``forward`` that
was replaced on the layer, makes a layer compute something else. Its norms are then
those of the unchanged layer, while the second backward pass, which makes the update,
follows what was computed. So nothing is clipped to ``max_grad_norm``.

In a checked update, each layer that has a forward hook of the user, or a ``forward`` of
its own, is run again as its type defines it. From the gradients that reached its
outputs in the second backward pass follows what the gradients of its parameters should
be, and these are compared with those that the update has.

*Guarantee.* In a checked update, a gradient that differs by more than 1 % is found (up
to 6 % in half or mixed precision). Updates 1, 2, 4, 8, 16 and so on are checked, and
every 64th. Models without such hooks and methods are not run again.

*What breaks it.* A ``forward`` that was replaced in a class of torch. Layers on an
accelerator, for which the loop would have to wait, and FSDP are not compared. Layers
whose per-example gradients torch computes by repeating the whole call need no check.
"""

import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleHooks
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import backward_hooks, forward_hooks, remove_hooks
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks
from opacus_pi.gradients.clipping.completeness import autocast_rounding
from opacus_pi.gradients.fallback import MODEL_ERRORS, raise_if_out_of_memory
from opacus_pi.integration.opacus_compat import (
    clipped_norms,
    keep_handle,
    module_of,
    uses_opacus_gradients,
)
from opacus_pi.integration.reporting_hook import ReportingHook
from opacus_pi.models.batches import map_tensors
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["ChangedLayers"]

_CHANGED = (
    "{name} has a forward hook, or its method forward was replaced, and the "
    "gradient of its parameters is not that of a {kind}. Ghost clipping computes norms "
    "by the formula for this type of layer, but the update has the gradient of what "
    "was computed. So gradients were not clipped to max_grad_norm. Put the change of "
    "the output into a module of its own that follows the layer. Alternatively, use "
    'grad_sample_mode="fast", which measures what the layer computes.'
)
_NOT_REPEATED = (
    "{name} has a forward hook, or its method forward was replaced, and it "
    "could not be run again as a {kind}. Ghost clipping computes norms by the formula "
    "for this type of layer. So it is not known whether these are the norms of the "
    "gradients in the update. Put the change of the output into a module of its own "
    'that follows the layer. Alternatively, use grad_sample_mode="fast".'
)
_ALIKE = 0.01
_ROUNDINGS = 8
_LEAST = 1e-4  # of the largest clipped norm of an example


class ChangedLayers:
    """Compares gradients in ghost clipping with those of layers as their types say.

    Args:
        hooks: What Opacus made of the model; referred to weakly.
        chain: Its link "norm" breaks.
    """

    def __init__(self, hooks: AbstractGradSampleHooks, chain: Chain) -> None:
        self._hooks, self._chain = weakref.ref(hooks), chain
        self._looks, self._rounding = Looks(), 0.0
        self._handles: list[RemovableHandle] = []
        # by name of the layer: arguments of its calls, gradients of the second pass
        self._calls: dict[str, list[Any]] = defaultdict(list)
        self._grads: dict[str, list[Tensor]] = defaultdict(list)
        self._begin()

    def begins(self, losses: Tensor) -> None:
        """Note the precision of a forward pass whose backward passes are to begin.

        Args:
            losses: The losses of the examples, ``(b,)``.
        """
        if self._handles:
            self._rounding = max(autocast_rounding(), torch.finfo(losses.dtype).eps)

    def ended(self) -> None:
        """Compare the gradients if the passes that have ended were noted."""
        self._looks.count()
        hooks = self._hooks()
        if self._handles and hooks is not None:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._compare(hooks)
            self._calls.clear()
            self._grads.clear()
        if self._looks.is_due:
            self._begin()

    def _begin(self) -> None:
        """Note from now on the calls of layers, and what reaches changed ones."""
        hooks = self._hooks()
        if hooks is None:
            return
        module = module_of(hooks)
        for name, layer in module.named_modules():
            remove_hooks(forward_hooks(layer), _NotingCall)
            remove_hooks(backward_hooks(layer), _NotingGrad)
            own = layer.parameters(recurse=False)
            if any(p.requires_grad for p in own) and uses_opacus_gradients(
                hooks, layer
            ):
                call, grad = _NotingCall(self, name), _NotingGrad(self, name)
                self._handles += [
                    layer.register_forward_hook(call, with_kwargs=True),
                    layer.register_full_backward_hook(grad),
                ]
        for handle in self._handles:
            keep_handle(module, handle)

    def note_call(self, name: str, call: Any) -> None:
        """Note the arguments of a call.

        Args:
            name: The layer's.
            call: Its positional arguments, and those by keyword.
        """
        self._calls[name].append(map_tensors(Tensor.detach, call))

    def note_grad(self, name: str, grad: Tensor) -> None:
        """Note the gradient at the output of a changed layer, in the second pass.

        Args:
            name: The layer's.
            grad: The gradient.
        """
        hooks = self._hooks()
        if hooks is not None and not hooks.hooks_enabled and grad.device.type == "cpu":
            self._grads[name].append(grad.detach())

    def _compare(self, hooks: AbstractGradSampleHooks) -> None:
        """Compare the gradients of changed layers with those of unchanged ones."""
        norms = clipped_norms(hooks) if self._grads else None
        if norms is None or not norms.numel():
            return
        layers = dict(module_of(hooks).named_modules())
        largest = min(float(hooks.max_grad_norm), float(norms.max()))
        expected: dict[nn.Parameter, Tensor] = {}
        names: dict[nn.Parameter, str] = {}
        for name, grads in self._grads.items():
            calls = self._calls[name]
            if len(calls) != len(grads):
                continue
            try:
                found = _gradients_by_type(layers[name], calls, grads[::-1])
            except MODEL_ERRORS as error:
                raise_if_out_of_memory(error)
                self._report(name, layers[name], is_known=False)
                continue
            for parameter, gradient in found.items():
                before = expected.get(parameter)
                expected[parameter] = gradient if before is None else before + gradient
                names[parameter] = name
        for parameter, gradient in expected.items():
            if self._differ(parameter, gradient, largest):
                self._report(names[parameter], layers[names[parameter]], is_known=True)

    def _differ(self, parameter: nn.Parameter, gradient: Tensor, most: float) -> bool:
        """Return whether a parameter's gradient is another one than expected."""
        if parameter.grad is None:
            return False
        held = parameter.grad.to_dense()
        tolerance = max(_ALIKE, _ROUNDINGS * self._rounding)
        size = max(float(held.norm()), float(gradient.norm()))
        gap = float((held - gradient).norm())
        return not gap <= max(tolerance * size, _LEAST * most)

    def _report(self, name: str, layer: nn.Module, *, is_known: bool) -> None:
        """Break the link, or leave it unchecked where nothing could be compared."""
        text = _CHANGED if is_known else _NOT_REPEATED
        shown = f"The layer {name!r}" if name else "The model"
        reason = text.format(name=shown, kind=type(layer).__name__)
        if is_known:
            self._chain.break_link("norm", reason)
        else:
            self._chain.leave_unchecked("norm", reason)


def is_changed(layer: nn.Module) -> bool:
    """Return whether a layer may compute something else than its type defines.

    Args:
        layer: A layer, whose hooks of Opacus and of this package change nothing.
    """
    if getattr(layer, "max_norm", None) is not None:
        return False  # a further run would write to the weights; refused elsewhere
    hooks = forward_hooks(layer).values()
    return "forward" in vars(layer) or not all(map(is_hook_of_opacus, hooks))


def _gradients_by_type(
    layer: nn.Module, calls: Sequence[Any], grads: Sequence[Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of a layer's parameters, if its type says what it computes.

    Args:
        layer: The layer; neither its hooks nor a replaced method is run.
        calls: The arguments of its calls.
        grads: The gradient at the output of each call.
    """
    trained = [p for p in layer.parameters(recurse=False) if p.requires_grad]
    total: dict[nn.Parameter, Tensor] = {}
    for (args, kwargs), grad in zip(calls, grads, strict=True):
        with torch.enable_grad():
            out = type(layer).forward(layer, *args, **kwargs)
        found = torch.autograd.grad(out, trained, grad.to(out.dtype), allow_unused=True)
        for parameter, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                before = total.get(parameter, torch.zeros_like(parameter))
                total[parameter] = before + gradient.to_dense()
    return total


class _NotingCall(ReportingHook):
    """A forward hook of a layer that notes its calls for ``ChangedLayers``."""

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Note a call of training, as Opacus does."""
        layers = self.owner
        if layers is not None and layer.training and torch.is_grad_enabled():
            layers.note_call(self.about, (args, kwargs))


class _NotingGrad(ReportingHook):
    """A backward hook of a layer that notes its gradients for ``ChangedLayers``."""

    def __call__(self, layer: nn.Module, _: Any, grads: Any) -> None:
        """Note the gradient at the first output, as Opacus uses it."""
        layers = self.owner
        if layers is not None and is_changed(layer) and grads[0] is not None:
            layers.note_grad(self.about, grads[0])
