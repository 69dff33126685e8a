"""Tell the links that watch a model that a state dict was loaded into it.

Loading writes to weights and buffers. If it brought back what was there, as after an
evaluation with averaged weights, nothing has changed, and the links accept it.

>>> class Heard:
...     def state_dict_was_loaded(self):
...         print("loaded")
>>> model, link = nn.Linear(2, 1), Heard()
>>> handle = watch_loading(model, link)
>>> _ = model.load_state_dict(model.state_dict())
loaded
>>> handle.remove()
"""

import weakref
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from opacus_pi._torch_compat import load_hooks, remove_hooks

__all__ = ["watch_loading"]


class _Link(Protocol):
    """What wants to know that a state dict was loaded."""

    def state_dict_was_loaded(self) -> None:
        """Accept the write if it changed nothing."""


class _LoadHook:
    """A hook for loaded state dicts; copies and pickles of it do nothing.

    Modules are copied and pickled together with their hooks, and a copy's weights are
    not those of the run.

    Args:
        *links: Told that a state dict was loaded; referred to weakly.
    """

    def __init__(self, *links: _Link) -> None:
        self._links = list(map(weakref.ref, links))

    def __call__(self, *_: Any) -> None:
        for reference in self._links:
            link = reference()
            if link is not None:
                link.state_dict_was_loaded()

    def __reduce__(self) -> tuple[Any, ...]:
        return _LoadHook, ()


def watch_loading(module: nn.Module, *links: _Link) -> RemovableHandle:
    """Tell links that a state dict was loaded into a module.

    Args:
        module: The user's module. Hooks of an earlier call, and of a module that this
            one is a copy of, are removed.
        *links: Told after each loading; referred to weakly.

    Returns:
        Removes the hook.
    """
    remove_hooks(load_hooks(module), _LoadHook)
    handle: RemovableHandle = module.register_load_state_dict_post_hook(
        _LoadHook(*links)
    )
    return handle
