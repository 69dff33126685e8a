"""What changes between the updates of a private run without its engine's doing.

A changed sampler, or an update by the optimizer that ``make_private`` was given, makes
every number wrong: the ledger refuses. Weights that were written to may be in order (an
average, a projection, public data) or not (training data), so that is a warning.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from opacus_pi.integration.refusals import changed_schedule, schedule_of

_UNNOISED = (
    "The optimizer that make_private was given was stepped by itself: the weights took "
    "gradients that were neither clipped nor noised, and no accountant counted it. "
    "Step the optimizer that make_private returned."
)
_WRITTEN = (
    "Weights were changed between two updates, and not by the optimizer that "
    "make_private returned. If training data had a part in it, neither get_epsilon nor "
    "the ledger covers the model; an average, a projection or public data are fine."
)
# what the last make_private call hung on an optimizer, for the next one to replace
_HANDLES: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()


class OutsideChanges:
    """Follows the loader and the weights of one run.

    Args:
        loader: That is trained from; referred to weakly.
        refuse: Told why the run cannot be accounted any more.
    """

    def __init__(self, loader: DataLoader[Any], refuse: Callable[[str], None]) -> None:
        self._loader = weakref.ref(loader)
        self._schedule = schedule_of(loader)
        self._refuse = refuse
        self._parameters: Sequence[nn.Parameter] = ()
        self._versions: list[int] | None = None
        self._warned = self._noised = False

    def follow(self, optimizer: DPOptimizer, module: nn.Module) -> None:
        """Watch an optimizer's weights, and the optimizer within it.

        Args:
            optimizer: Opacus's.
            module: Whose weights it has; loading a state dict is no surprise.
        """
        self._parameters = optimizer.params
        inner, changes = optimizer.original_optimizer, weakref.ref(self)
        if handle := _HANDLES.pop(inner, None):
            handle.remove()

        def before_step(*_: Any) -> None:
            if (found := changes()) is not None:
                found._stepping()

        _HANDLES[inner] = inner.register_step_pre_hook(before_step)
        module.register_load_state_dict_post_hook(_Loaded(self))

    def loaded(self) -> None:
        """The weights were loaded, which is no surprise."""
        self._versions = None

    def noised(self, watched: bool = True) -> None:
        """The noise of an update was drawn; the weights are about to change.

        Args:
            watched: False if a later run has the engine, which says so itself.
        """
        self._noised = True
        if not watched:
            return
        loader = self._loader()
        reason = loader and changed_schedule(self._schedule, loader)
        if reason:
            self._refuse(reason)
        if self._versions is not None and self._versions != self._now():
            self._versions = None
            if not self._warned:
                self._warned = True
                warnings.warn(_WRITTEN, stacklevel=2)

    def updated(self) -> None:
        """The update was made; from now on the weights should stay as they are."""
        self._noised = False
        self._versions = self._now()

    def _now(self) -> list[int]:
        """How often each weight has been written to."""
        return [p._version for p in self._parameters]

    def _stepping(self) -> None:
        """The optimizer within Opacus's is about to step."""
        if not self._noised:
            self._refuse(_UNNOISED)


class _Loaded:
    """Tells of a state dict that a module loads; copies of the module tell nobody."""

    def __init__(self, changes: OutsideChanges | None = None) -> None:
        self._changes = None if changes is None else weakref.ref(changes)

    def __call__(self, *_: Any) -> None:
        found = None if self._changes is None else self._changes()
        if found is not None:
            found.loaded()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, ()
