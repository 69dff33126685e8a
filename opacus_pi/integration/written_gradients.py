"""Detects gradients that the training loop changed between backward and step.

An optimizer of Opacus clips what backward passes have left at the parameters:
``p.grad_sample``, one gradient for each example, or, with ghost clipping, ``p.grad``,
the sum of gradients that were clipped already. Over several physical batches it adds up
clipped sums in ``p.summed_grad``. A loop can write to all three. So the tensors and
their counts of writes are noted when they have been computed, and compared when they
are used.

*Guarantee.* A tensor that was replaced, added, removed or moved to another parameter is
found, and so is every write that torch counts. Nothing is computed from the tensors:
the comparison costs less than a microsecond for each parameter, and no accelerator is
waited for.

*What breaks it.* Writes that torch does not count: to ``p.grad_sample.data``, through a
NumPy array or DLPack, and to tensors of ``torch.inference_mode``. ``engine.audit``
finds those that change norms. With ``grad_sample_mode="ew"`` and with ghost clipping,
gradients are noted when the whole backward pass has ended: hooks of the user that write
to them during the pass are not seen.
"""

import weakref
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

from opacus.grad_sample import AbstractGradSampleHooks, GradSampleHooksNoOp
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from opacus_pi._torch_compat import (
    at_end_of_backward,
    backward_hooks,
    count_of_writes,
    counts_of_writes,
    gradient_hooks,
    remove_hooks,
    with_gradient_hooks,
)
from opacus_pi.attribution import Tracker
from opacus_pi.custody import Chain
from opacus_pi.integration.fast import FastHooks
from opacus_pi.integration.held_weights import held_by
from opacus_pi.integration.opacus_compat import keep_handle, module_of
from opacus_pi.integration.reporting_hook import ReportingHook
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["NotedTensors", "SeenTensors", "WrittenGradients", "watch_gradients"]

_CHANGED = (
    "Per-example gradients (p.grad_sample) were replaced or changed in place between "
    "backward() and step(). The recorded norms are those of the changed gradients. "
    "They are right only if the change treats each example alone. A change that "
    "depends on the other examples of the batch, such as a division by the norm of all "
    "gradients, is not covered by any accounting. Put the change into the loss, so "
    "that it is applied to each example's own loss, or leave it out."
)
_SUM_CHANGED = (
    "A sum of clipped gradients ({name}) was replaced or changed in place before noise "
    "was added to it. That is fine if the change adds something that does not depend "
    "on the training data. Any other change may enlarge what an example contributes "
    "beyond max_grad_norm, and no accounting covers that. Put the change into the loss "
    "or leave it out."
)

_HOOKED = (
    "A parameter has a gradient hook of the training loop. With ghost clipping it runs "
    "when gradients have been clipped, and before noise is added. That is fine if the "
    "hook returns nothing and changes nothing. A hook that enlarges gradients enlarges "
    "what an example contributes beyond max_grad_norm. Remove the hook, or use "
    'grad_sample_mode="hooks", where it has no effect on the update.'
)

# A reference to a tensor, and its count of writes.
_Noted = tuple[weakref.ref[Tensor], int]


def watch_gradients(
    hooks: AbstractGradSampleHooks,
    optimizer: DPOptimizer,
    tracker: Tracker,
    chain: Chain,
) -> "WrittenGradients":
    """Note the gradients of a prepared model whenever they have been computed.

    Args:
        hooks: What Opacus made of the model.
        optimizer: What Opacus made of the optimizer.
        tracker: Reports the backward passes.
        chain: The chain of custody of the run.
    """
    is_ghost = isinstance(optimizer, DPOptimizerFastGradientClipping)
    written = WrittenGradients(held_by(optimizer), chain, is_ghost=is_ghost)
    module = module_of(hooks)
    if isinstance(hooks, FastHooks | GradSampleHooksNoOp):
        written.is_active = False
    elif is_ghost:  # FSDP moves gradients after the backward pass
        written.is_active = not isinstance(module, FSDPModule)
        tracker.saw_backward.append(written.backward_began)
    elif not _note_after_hooks(module, written):
        tracker.saw_backward.append(written.backward_began)
    return written


class NotedTensors:
    """Tensors, and how often they had been written to, at one moment.

    Args:
        tensors: The tensors.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self._tensors, self._writes = tensors, counts_of_writes(tensors)

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, not written to since."""
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and counts_of_writes(tensors) == self._writes
        )

    def seen_now(self) -> "SeenTensors":
        """Return references to the tensors as they are now, which do not keep them."""
        return SeenTensors(self._tensors)


class SeenTensors:
    """Weak references to tensors, and their counts of writes at one moment.

    Args:
        tensors: The tensors.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self._references = list(map(weakref.ref, tensors))
        self._writes = counts_of_writes(tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, not written to since.

        Args:
            tensors: Any tensors; without any, they are not.
        """
        return (
            0 < len(tensors) == len(self._references)
            and all(t is r() for t, r in zip(tensors, self._references, strict=True))
            and counts_of_writes(tensors) == self._writes
        )


NO_TENSORS = NotedTensors()


class WrittenGradients:
    """What backward passes left at parameters, compared when the optimizer uses it.

    Args:
        parameters: Those that the optimizer updates.
        chain: The chain of custody of the run.
        is_ghost: Whether a backward pass leaves clipped sums.

    Attributes:
        is_active: Whether gradients are noted and compared. The fast mode keeps none at
            the parameters, and the loop itself computes those of ``"no_op"``.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], chain: Chain, *, is_ghost: bool
    ) -> None:
        self._parameters = list(parameters)
        self._keys = [(id(parameter), parameter) for parameter in self._parameters]
        self._chain, self._is_ghost = chain, is_ghost
        self._gradients: dict[int, list[_Noted]] = {}
        self._sums = NO_TENSORS
        self.is_active = True

    def follow(self, parameters: list[nn.Parameter]) -> bool:
        """Watch these parameters from now on.

        Args:
            parameters: Those that the optimizer updates now.

        Returns:
            Whether they are not those that were watched before.
        """
        before = self._parameters
        if len(parameters) == len(before) and all(map(is_, parameters, before)):
            return False
        self._parameters = parameters
        self._keys = [(id(parameter), parameter) for parameter in parameters]
        return True

    # --------------------------------------------------- what backward passes report
    def backward_began(self, *, is_second: bool) -> None:
        """Note the gradients when the backward pass that runs now has ended.

        Args:
            is_second: Whether it is the second pass of ghost clipping, which computes
                the clipped gradient.
        """
        if is_second or not self._is_ghost:
            at_end_of_backward(self._note_all)

    def _note_all(self) -> None:
        """Note the gradients of all parameters."""
        if not self._is_ghost:
            self.note(self._parameters)
            return
        noted = self._gradients
        for key, parameter in self._keys:
            grad = parameter.grad
            if grad is not None:
                noted[key] = [(weakref.ref(grad), count_of_writes(grad))]

    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note the per-example gradients that were just written.

        Opacus makes a list of the gradients of several backward passes. A layer that is
        used several times writes its gradients at the last use.

        Args:
            parameters: Those of the layer whose gradients were computed.
        """
        for parameter in parameters:
            held: Any = getattr(parameter, "grad_sample", None)
            is_list = type(held) is list
            newest = held[-1] if is_list else held
            if newest is None:
                continue
            key = id(parameter)
            noted = self._gradients.get(key)
            if noted and noted[-1][0]() is newest:
                continue
            entry = weakref.ref(newest), count_of_writes(newest)
            self._gradients[key] = [*noted, entry] if is_list and noted else [entry]

    # -------------------------------------------------------- what the optimizer asks
    def require_unchanged(self) -> None:
        """Leave the chain's link unchecked if gradients are not those noted."""
        if not self.is_active:
            return
        if self._is_ghost and any(
            map(_is_hooked, with_gradient_hooks(self._parameters))
        ):
            self._chain.leave_unchecked("norm", _HOOKED)
        try:
            is_changed = self._has_changed()
        except RuntimeError:  # torch counts no writes to a tensor of inference mode
            is_changed = True
        if is_changed and self._is_ghost:
            self._chain.leave_unchecked("norm", _SUM_CHANGED.format(name="p.grad"))
        elif is_changed:
            self._chain.leave_unchecked("loss", _CHANGED)

    def _has_changed(self) -> bool:
        """Return whether gradients are not those noted.

        In every update each parameter is looked at, so nothing else is called here.
        """
        noted, name = self._gradients, "grad" if self._is_ghost else "grad_sample"
        for key, parameter in self._keys:
            entries = noted.get(key)
            if entries is None and not parameter.requires_grad:
                continue  # frozen since: what it still holds enters no update
            held: Any = getattr(parameter, name, None)
            if held is None or entries is None:
                if held is not None or entries is not None:
                    return True
                continue
            if held is entries[0][0]():  # nearly always; a list is no tensor
                if count_of_writes(held) != entries[0][1] or entries[1:]:
                    return True
                continue
            tensors = held if type(held) is list else (held,)
            if len(tensors) != len(entries):
                return True
            for tensor, (reference, count) in zip(tensors, entries, strict=True):
                if reference() is not tensor or count_of_writes(tensor) != count:
                    return True
        return False

    def note_sums(self) -> None:
        """Note the sums to which the next physical batch, or noise, is added."""
        self._sums = NotedTensors(_sums_at(self._parameters))

    def require_unchanged_sums(self) -> None:
        """Leave the link "norm" unchecked if the sums are not those noted."""
        if not self._sums:
            return
        noted, self._sums = self._sums, NO_TENSORS
        if not noted.are(_sums_at(self._parameters)):
            text = _SUM_CHANGED.format(name="p.summed_grad")
            self._chain.leave_unchecked("norm", text)

    def forget(self, *, sums: bool) -> None:
        """Forget the gradients: the optimizer has cleared them.

        Args:
            sums: Whether it has cleared the sums, too.
        """
        self._gradients.clear()
        if sums:
            self._sums = NO_TENSORS


class _NoteAfterLayer(ReportingHook):
    """The backward hook of a layer that reports its parameters."""

    def __call__(self, *_: Any) -> None:
        """Note what Opacus's hook, which has run before, has written."""
        if (written := self.owner) is not None:
            written.note(self.about)


def _note_after_hooks(module: nn.Module, written: WrittenGradients) -> bool:
    """Note gradients right after Opacus's hooks have written them.

    Args:
        module: The user's module.
        written: Notes the gradients.

    Returns:
        Whether there are such hooks.
    """
    has_hooks = False
    for layer in module.modules():
        table = backward_hooks(layer)
        remove_hooks(table, _NoteAfterLayer)
        if any(is_hook_of_opacus(hook) for hook in table.values()):
            has_hooks = True
            hook = _NoteAfterLayer(written, tuple(layer.parameters()))
            keep_handle(module, layer.register_full_backward_hook(hook))
    return has_hooks


def _is_hooked(parameter: nn.Parameter) -> bool:
    """Return whether a hook that is not Opacus's runs at a parameter's gradient."""
    return not all(map(is_hook_of_opacus, gradient_hooks(parameter)))


def _sums_at(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the sums of clipped gradients that Opacus keeps at parameters."""
    found = [getattr(parameter, "summed_grad", None) for parameter in parameters]
    return [tensor for tensor in found if tensor is not None]
