"""The base of hooks that report to an object without keeping it in memory.

A model outlives the run that put hooks on it, and it may be copied or pickled. So a
hook refers weakly to what it reports to, and its copies report to nothing.

>>> import copy
>>> class Seen(set):
...     pass
>>> class Hook(ReportingHook):
...     def __call__(self):
...         if self.owner is not None:
...             self.owner.add(self.about)
>>> seen = Seen()
>>> hook = Hook(seen, "layer")
>>> copy.deepcopy(hook)()
>>> sorted(seen)
[]
>>> hook()
>>> sorted(seen)
['layer']
>>> del seen
>>> hook.owner is None
True
"""

import weakref
from typing import Any

__all__ = ["ReportingHook"]


class ReportingHook:
    """A hook with an object to report to; copies and pickles of it do nothing.

    Args:
        owner: What it reports to; referred to weakly. None: nothing.
        about: What it reports about, such as a layer's name.
    """

    def __init__(self, owner: Any = None, about: Any = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self.about = about

    @property
    def owner(self) -> Any:
        """The object to report to; None if there is none, or it is gone."""
        return None if self._owner is None else self._owner()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
