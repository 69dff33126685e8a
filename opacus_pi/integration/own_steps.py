"""What a loop does to an optimizer that a rewind does not do again.

A rewind makes the recorded updates again with a new optimizer. Hooks that the user has
put on the optimizer's steps are not on the new one, and a state that the loop cleared
is not cleared again. Both are noted here for the record of the run.

*Guarantee.* Hooks are found, whether they were there from the start or added later. A
cleared state is found if the optimizer changes the tensors of its state in place, as
those of torch do. A state that ``load_state_dict`` replaces does not count, because
this is how a run is resumed.

*What breaks it.* Writes to the tensors of the state, and a step that was replaced.

>>> weight = torch.nn.Parameter(torch.ones(1))
>>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
>>> watch = ClearedStates()
>>> for step in range(4):
...     weight.grad = torch.ones(1)
...     if step == 2:
...         optimizer.state.clear()
...     optimizer.step()
...     watch.saw(optimizer)
>>> watch.count
1
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from opacus_pi._torch_compat import step_hooks
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["ClearedStates", "has_own_step_hooks"]


def has_own_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether the user has put a hook on the steps of a plain optimizer."""
    return any(not is_hook_of_opacus(hook) for hook in step_hooks(optimizer))


class ClearedStates:
    """Counts how often the state of an optimizer was cleared between two updates.

    Attributes:
        count: How often so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first: weakref.ref[Tensor] | None = None
        self._is_kept = False  # whether an update has kept this tensor
        self._loads: weakref.ref[Optimizer] | None = None

    def saw(self, optimizer: Optimizer) -> None:
        """Look at the state after an update.

        Args:
            optimizer: A plain optimizer.
        """
        if self._loads is None or self._loads() is not optimizer:
            self._loads, self._first = weakref.ref(optimizer), None
            forget = _Forget(self)
            optimizer.register_load_state_dict_post_hook(forget)
        now = _first_tensor(optimizer)
        before = None if self._first is None else self._first()
        was_noted = self._first is not None
        is_same = now is not None and now is before
        if was_noted and self._is_kept and not is_same:
            self.count += 1
        self._is_kept = is_same
        self._first = None if now is None else weakref.ref(now)

    def forget(self) -> None:
        """Expect other tensors: a state was loaded."""
        self._first, self._is_kept = None, False


class _Forget:
    """A hook of an optimizer, which refers weakly to what it reports to."""

    def __init__(self, watch: ClearedStates | None = None) -> None:
        self._watch = None if watch is None else weakref.ref(watch)

    def __call__(self, *_: Any) -> None:
        watch = None if self._watch is None else self._watch()
        if watch is not None:
            watch.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forget, ()


def _first_tensor(optimizer: Optimizer) -> Tensor | None:
    """Return the first tensor in the state of the first parameter that has a state."""
    for state in optimizer.state.values():
        if isinstance(state, dict):
            return next((v for v in state.values() if torch.is_tensor(v)), None)
    return None
