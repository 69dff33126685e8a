"""Check that an optimizer's step uses the gradients that have noise, and no others.

Between the draw of noise and the new weights, code of the training loop may run: hooks
of the optimizer's step, and the step itself if the optimizer's class is the user's own.
The gradients are noted when they have noise, compared by a hook that is kept the last
one before the step, and, if the class is not one of torch's, compared again after it.
The code of such hooks and classes is searched for gradients without noise
(``raw_gradients``). Weak references to the gradients stay, so that a second step with
the same ones is recognised.

*Guarantee.* A hook that replaces a gradient, or writes to it so that torch counts it,
is found in every update. Torch's own optimizers are not compared after their step: some
write to gradients, and none has others to use.

*What breaks it.* Writes that torch does not count (through ``.data`` or NumPy) are
found in the updates 1, 2, 4, 8 and so on, and in every 64th, by 16 entries of each
gradient in host memory; on an accelerator they are not. An optimizer class of the
user's own that keeps another gradient and writes weights from it, without touching
``p.grad`` and without naming Opacus's attributes, is not found.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import step_hook_tables
from opacus_pi.custody import Chain
from opacus_pi.custody.looks import Looks
from opacus_pi.custody.weights import WeightSnapshot
from opacus_pi.integration.held_weights import held_by
from opacus_pi.integration.raw_gradients import (
    is_of_torch,
    raw_gradients_read_by,
    raw_gradients_read_in,
)
from opacus_pi.integration.written_gradients import (
    NO_TENSORS,
    NotedTensors,
    SeenTensors,
)

__all__ = ["CallLast", "NoisedSteps", "call_last", "is_called_last"]

_CHANGED = (
    "Gradients were changed after noise was added to them and before the weights were "
    "updated. That is fine if the new values were computed from the noised gradients "
    "alone. If they also depend on anything else that was computed from training data, "
    "the update is not private, and neither get_epsilon nor the ledger covers it."
)
_CHANGED_IN_STEP = (
    "The step of {owner}, which is not one of torch's optimizers, changed the "
    "gradients to which noise had been added. That is fine if the new values were "
    "computed from the noised gradients and the weights alone, as by weight decay. If "
    "they also depend on anything else that was computed from training data, the "
    "update is not private, and neither get_epsilon nor the ledger covers it."
)
_CLOSURE = (
    "A hook gave the optimizer's step a closure, which computes gradients without "
    "noise. If the step uses them, the update is not private, and neither get_epsilon "
    "nor the ledger covers it. Do not pass a closure."
)
_READS = (
    "{owner} reads p.{name}, {what}, when the optimizer steps. If what it reads enters "
    "the weights, the update is not private, and neither get_epsilon nor the ledger "
    "covers it. Use only p.grad there, which has noise."
)
_KINDS = {
    "grad_sample": "the gradients of single examples",
    "summed_grad": "the sum of clipped gradients without noise",
}


class NoisedSteps:
    """Gradients with noise, compared when the step is about to use them.

    Args:
        chain: The chain of custody of the run; its link "noise" gets the findings.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._noted = NO_TENSORS
        self._entries: WeightSnapshot | None = None  # of updates that are looked at
        self._used = SeenTensors()
        self._looks = Looks()
        self._searched: tuple[Any, ...] = ()  # numbers of hooks, step and class
        self._is_known = True  # neither hooks nor a class of the user's own

    def gradients_have_noise(self, optimizer: Optimizer) -> None:
        """Note the gradients of an optimizer that is about to step.

        Args:
            optimizer: The optimizer that will write the weights.
        """
        is_looked_at = self._looks.count()
        self._look_at(optimizer)
        gradients = _gradients(optimizer)
        self._noted, self._entries = NotedTensors(gradients), None
        if is_looked_at and not self._is_known:
            self._entries = WeightSnapshot()
            self._entries.watch(gradients)
            self._entries.take()

    def step_begins(
        self,
        optimizer: Optimizer,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        cause: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Leave the link unchecked if a step is about to use other gradients.

        Args:
            optimizer: As before.
            args: Positional arguments of ``step``, after the optimizer itself.
            kwargs: Keyword arguments of ``step``.
            cause: Returns what has changed the gradients, as a sentence, if it is
                known.
        """
        if not self._are_unchanged(optimizer):
            self._chain.leave_unchecked("noise", cause() or _CHANGED)
        if _has_closure(args, kwargs):
            self._chain.leave_unchecked("noise", _CLOSURE)

    def repeats_step(
        self, optimizer: Optimizer, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> bool:
        """Return whether a step is about to use the gradients of the last one again.

        If so, they are noted for a comparison after it.

        Args:
            optimizer: As before.
            args: As for ``step_begins``.
            kwargs: As for ``step_begins``.
        """
        gradients = _gradients(optimizer)
        if _has_closure(args, kwargs) or not self._used.are(gradients):
            return False
        self._noted, self._entries = NotedTensors(gradients), None
        return True

    def step_was_made(self, optimizer: Optimizer) -> None:
        """Compare the gradients after a step that is not torch's own, and forget them.

        Args:
            optimizer: The optimizer that has written the weights.
        """
        if self._noted and not is_of_torch(type(optimizer)):
            # a step may clear its gradients
            if _gradients(optimizer) and not self._are_unchanged(optimizer):
                text = _CHANGED_IN_STEP.format(owner=type(optimizer).__name__)
                self._chain.leave_unchecked("noise", text)
        self.forget()

    def forget(self) -> None:
        """Forget the gradients: their step has been made.

        Weak references stay, so that a second step with them is recognised.
        """
        if self._noted:
            self._used, self._noted = self._noted.seen_now(), NO_TENSORS

    def _are_unchanged(self, optimizer: Optimizer) -> bool:
        """Return whether the gradients are those that were noted."""
        if not self._noted.are(_gradients(optimizer)):
            return False
        return self._entries is None or not self._entries.has_changed()

    def _look_at(self, optimizer: Optimizer) -> None:
        """Search hooks and class for gradients without noise, if they are new."""
        tables = step_hook_tables(optimizer)
        cls, own = type(optimizer), vars(optimizer).get("step")
        now = (*map(tuple, tables), own, cls)
        if now == self._searched:
            return
        self._searched = now
        hooks = [h for table in tables for h in table.values() if not _is_ours(h)]
        self._is_known = not hooks and is_of_torch(cls)
        for function in (*hooks, own):
            self._report(_name_of(function), raw_gradients_read_by(function))
        self._report(cls.__name__, raw_gradients_read_in(cls))

    def _report(self, owner: str, name: str | None) -> None:
        """Leave the link unchecked if gradients without noise are read."""
        if name is not None:
            text = _READS.format(owner=owner, name=name, what=_KINDS[name])
            self._chain.leave_unchecked("noise", text)


def call_last(handle: RemovableHandle) -> None:
    """Have torch call a hook after all others of its table.

    Not to be called by a hook of the same table, over which torch iterates then.

    Args:
        handle: Of the hook.
    """
    table = handle.hooks_dict_ref()
    if table and handle.id in table and not is_called_last(handle):
        table.move_to_end(handle.id)


class CallLast:
    """A forward pre-hook of a module that has a hook of an optimizer called last.

    Hooks that were registered on the optimizer since its last step then come before it.
    Copies and pickles do nothing.

    Args:
        handle: Of the optimizer's hook.
    """

    def __init__(self, handle: RemovableHandle | None = None) -> None:
        self._handle = handle

    def __call__(self, *_: Any) -> None:
        """Move the hook, which no step is calling now."""
        if self._handle is not None:
            call_last(self._handle)

    def __reduce__(self) -> tuple[Any, ...]:
        return CallLast, ()


def is_called_last(handle: RemovableHandle) -> bool:
    """Return whether torch calls a hook after all others of its table.

    Args:
        handle: Of the hook.
    """
    table = handle.hooks_dict_ref()
    return table is not None and next(reversed(table), None) == handle.id


def _is_ours(hook: Any) -> bool:
    """Return whether a hook is of this package."""
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).split(".")[0] == __name__.split(".")[0]


def _name_of(function: Any) -> str:
    """Return how a message names a hook."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"A function ({name.replace('<locals>.', '')})"


def _has_closure(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a step was given a closure, which computes new gradients."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that an optimizer would use."""
    return [g for p in held_by(optimizer) if (g := p.grad) is not None]
