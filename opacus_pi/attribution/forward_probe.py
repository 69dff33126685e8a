"""Tells a tracker of every forward pass of a model in training mode."""

import weakref
from collections.abc import Callable
from typing import Any, cast

from opacus.grad_sample import AbstractGradSampleHooks, GradSampleModuleNoOp
from torch import Tensor, is_grad_enabled, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from opacus_pi.attribution.batch_rows import tensors_in
from opacus_pi.attribution.tracker import Tracker


def _nobody() -> None:
    """The reference of a probe that has nobody to tell."""


class ForwardProbe:
    """A forward hook on the root module; copies and pickles of it are inert."""

    def __init__(self) -> None:
        self._tracker: Callable[[], Tracker | None] = _nobody
        self._model: Callable[[], Any] = _nobody
        self.handle: Any = None

    def report_to(self, tracker: Tracker, model: Any) -> None:
        """From now on, tell this tracker."""
        self._tracker, self._model = weakref.ref(tracker), weakref.ref(model)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """The hook: ``nn.Module.register_forward_hook(..., with_kwargs=True)``."""
        tracker = self._tracker()
        if tracker is None or not (module.training and is_grad_enabled()):
            return
        if any(map(is_functorch_wrapped_tensor, tensors_in((args, kwargs, out)))):
            return  # within vmap or grad: no storage, and no backward pass will come
        forward = tracker.bind((args, kwargs))
        told, model = weakref.ref(tracker), self._model

        def reached(_: Tensor) -> None:
            tracker = told()
            if tracker is not None:  # ghost clipping's second pass disables the hooks
                enabled = getattr(model(), "hooks_enabled", True)
                tracker.reached(forward, clipping=not enabled)

        for tensor in tensors_in(out):
            if tensor.requires_grad:
                tensor.register_hook(reached)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardProbe, ()


def probe(model: nn.Module | AbstractGradSampleHooks, tracker: Tracker) -> Any:
    """Have a model tell a tracker of its forward passes.

    Args:
        model: A plain module, or what ``make_private`` returned for one (a wrapper, or
            its hooks; removing its hooks removes the probe).
        tracker: Whom to tell; referred to weakly. A second call replaces it.

    Returns:
        The handle that removes the probe.
    """
    prepared = isinstance(model, AbstractGradSampleHooks)
    prepared &= not isinstance(model, GradSampleModuleNoOp)  # it skips the inner hooks
    root = cast(nn.Module, model._module if prepared else model)
    for hook in root._forward_hooks.values():
        if isinstance(hook, ForwardProbe):  # prepared before, maybe for another engine
            hook.report_to(tracker, model)
            return hook.handle
    forward_probe = ForwardProbe()
    forward_probe.report_to(tracker, model)
    handle = root.register_forward_hook(forward_probe, with_kwargs=True)
    forward_probe.handle = handle
    # Expanded weights and no_op keep no list of handles: there the probe outlives
    # them, without effect once the tracker is gone.
    getattr(root, "autograd_grad_sample_hooks", []).append(handle)
    return handle
