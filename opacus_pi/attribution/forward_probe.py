"""Hooks that report every forward pass of a model in training mode to a tracker.

A forward hook on the model sees its inputs, and a hook on each of its outputs sees the
backward pass. The hooks change nothing. Passes in evaluation mode or without gradients,
and passes inside ``vmap`` or ``grad``, leave no gradients for an optimizer and are not
reported.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import (
    forward_hooks,
    is_functorch_wrapped_tensor,
    storage_address,
)
from opacus_pi.attribution.samples import tensors_in
from opacus_pi.attribution.tracker import Tracker

__all__ = ["ForwardProbe", "probe"]

# What is called with the positional inputs of a forward pass, its inputs by keyword,
# and its outputs.
SawPass = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


def _none() -> None:
    """Return None, in place of a weak reference that a probe does not have."""


def _never() -> bool:
    """Return False: without ghost clipping no backward pass is its second one."""
    return False


class ForwardProbe:
    """A forward hook that reports to a tracker; copies and pickles of it do nothing.

    Attributes:
        handle: Removes the hook, once ``probe`` has registered it.
    """

    def __init__(self) -> None:
        self._tracker: Callable[[], Tracker | None] = _none
        # functions, each with a reference to its object
        self._saw_pass: list[tuple[Callable[[], Any], Callable[..., None]]] = []
        self._is_second_backward: Callable[[], bool] = _never
        self.handle: Any = None

    @property
    def tracker(self) -> Tracker | None:
        """The tracker that passes are reported to, while it exists."""
        return self._tracker()

    def report_to(
        self,
        tracker: Tracker,
        is_second_backward: Callable[[], bool] = _never,
        saw_pass: Sequence[SawPass] = (),
    ) -> None:
        """Report to this tracker from now on.

        Args:
            tracker: The tracker of the run; held by a weak reference.
            is_second_backward: Called during each backward pass; returns whether it is
                the second one of ghost clipping, which computes the clipped gradient.
            saw_pass: Methods that are called with the inputs and outputs of each pass;
                their objects are held by weak references.
        """
        self._tracker = weakref.ref(tracker)
        methods: Any = saw_pass
        self._saw_pass = [(weakref.ref(m.__self__), m.__func__) for m in methods]
        self._is_second_backward = is_second_backward

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Report a pass: ``register_forward_hook(..., with_kwargs=True)`` calls this.

        Args:
            module: The model.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            out: Its outputs; a hook is put on each tensor in them.
        """
        tracker = self._tracker()
        if tracker is None or not (module.training and is_grad_enabled()):
            return
        inputs: Any = (args, kwargs) if kwargs else args
        given, outputs = tensors_in(inputs), tensors_in(out)
        if any(map(is_functorch_wrapped_tensor, given + outputs)):
            return  # within vmap or grad: no storage, and no backward pass will follow
        forward = tracker.bind_tensors(given)
        tracker.saw_call(forward, given, args, kwargs)
        if tracker.keeps_outputs or len(outputs) > 1:
            forward.output_storages = [
                storage_address(tensor.untyped_storage()) for tensor in outputs
            ]
        if tracker.saw_pass is not None:
            tracker.saw_pass(forward, out)
        for reference, saw_pass in self._saw_pass:
            if (owner := reference()) is not None:
                saw_pass(owner, args, kwargs, out)
        to_tracker, is_second_backward = self._tracker, self._is_second_backward

        def mark_backward(_: Tensor) -> None:
            tracker = to_tracker()
            if tracker is not None:
                tracker.mark_backward(forward, clipping=is_second_backward())

        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(mark_backward)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardProbe, ()


def probe(
    module: nn.Module,
    tracker: Tracker,
    *,
    is_second_backward: Callable[[], bool] = _never,
    saw_pass: Sequence[SawPass] = (),
) -> RemovableHandle:
    """Report a model's forward passes to a tracker.

    Args:
        module: The model; not a wrapper of it, whose hooks might be skipped.
        tracker: The tracker of the run; held by a weak reference. A second call
            replaces the tracker of the first.
        is_second_backward: As for ``ForwardProbe.report_to``.
        saw_pass: As for ``ForwardProbe.report_to``.

    Returns:
        The handle that removes the hook.
    """
    hooks = forward_hooks(module)
    for key in [k for k, hook in hooks.items() if isinstance(hook, ForwardProbe)]:
        if hooks[key].handle is None:  # the module is a copy of a prepared one
            del hooks[key]
            continue
        # prepared before
        earlier = hooks[key].tracker
        if earlier is not None and earlier is not tracker:
            earlier.is_taken_over = True
        hooks[key].report_to(tracker, is_second_backward, saw_pass)
        handle: RemovableHandle = hooks[key].handle
        return handle
    forward_probe = ForwardProbe()
    forward_probe.report_to(tracker, is_second_backward, saw_pass)
    handle = module.register_forward_hook(forward_probe, with_kwargs=True)
    forward_probe.handle = handle
    return handle
