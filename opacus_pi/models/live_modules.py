"""Refuse to train a copy of a model that computes with the parameters of the original.

``copy.deepcopy`` does not copy functions. If a model reaches its layers through one (a
lambda that refers to ``self``, or a method that was replaced by a function that refers
to its layer), a copy of the model runs the layers of the original. Training the copy
would then leave these layers as they are, and put gradients into the original.

*Guarantee.* The first forward pass with gradients raises before a backward pass has
run, and hooks of Opacus on the original do not see this pass.

*What breaks it.* Layers of the original that only a later pass uses, or that are used
without gradients; a copy whose parts are called one by one.

>>> import copy, torch
>>> live = nn.Linear(2, 1)
>>> live.forward = lambda x: nn.functional.linear(x, live.weight)
>>> copied = copy.deepcopy(live)
>>> try:
...     with own_parameters_only(copied, LiveModules(live)):
...         print(copied(torch.ones(3, 2)).shape)
... except ValueError as error:
...     print(str(error).partition(",")[0])
A copy of the model still computes with the parameters of the original
"""

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import is_grad_enabled, nn

from opacus_pi._torch_compat import FORWARD_HOOK_TABLES
from opacus_pi.models.batches import floating
from opacus_pi.models.copies import (
    is_hook_of_opacus,
    require_own_parameters,
    unwrap,
)

__all__ = [
    "LiveModules",
    "ModelInCriterion",
    "hidden_from_opacus",
    "own_parameters_only",
    "uncalled_by_criterion",
]

_CALLED = (
    "The criterion calls the model, or a layer of it. An audit runs copies of both, so "
    "it cannot compare the gradients of such a call. Call the model in the training "
    "loop, and audit a criterion that is computed from its outputs: "
    "criterion(model(x), y)."
)


class ModelInCriterion(ValueError):
    """A criterion calls the model whose outputs it is given."""


class LiveModules:
    """The modules of a model that was copied, referred to weakly; pickles have none.

    Args:
        model: The original, plain or wrapped; None: no modules.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        found = () if model is None else unwrap(model).modules()
        self._modules = [weakref.ref(module) for module in found]

    def __iter__(self) -> Iterator[nn.Module]:
        for reference in self._modules:
            if (module := reference()) is not None:
                yield module

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveModules, ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all modules."""
        for module in self:
            yield from module.parameters(recurse=False)


@contextmanager
def own_parameters_only(copied: nn.Module, live: LiveModules) -> Iterator[None]:
    """Context in which the first forward pass of a copy is checked.

    Args:
        copied: The copy; it has no further hooks afterwards.
        live: The modules of the original.

    Raises:
        ValueError: In the pass, if the copy computes with parameters of the original.
    """
    hidden = ExitStack()

    def before(*_: Any) -> None:
        hidden.enter_context(hidden_from_opacus(live))

    def after(_: nn.Module, __: Any, outputs: Any = None) -> None:
        hidden.close()
        if any(one.grad_fn is not None for one in floating(outputs).values()):
            remove()
            require_own_parameters(outputs, live.parameters())

    def remove() -> None:
        for handle in handles:
            handle.remove()

    handles = [
        copied.register_forward_pre_hook(before),
        copied.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        hidden.close()  # after a pass that raised an error
        remove()


@contextmanager
def uncalled_by_criterion(model: nn.Module) -> Iterator[None]:
    """Context in which a criterion may hold a model, but must not call it.

    Copies of the criterion that are made in this context must not call their copy of
    the model either. Copies of the model itself, as ``copies`` makes them, may be
    called.

    Args:
        model: Plain or wrapped.

    Raises:
        ModelInCriterion: In a call of a layer of the model with gradients; a
            ValueError.
    """
    handles = [
        module.register_forward_pre_hook(_refuse_gradients)
        for module in unwrap(model).modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_gradients(*_: Any) -> None:
    """Raise in a pass with gradients; a hook that runs before a forward pass."""
    if is_grad_enabled():
        raise ModelInCriterion(_CALLED)


@contextmanager
def hidden_from_opacus(live: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which modules are run without the forward hooks of Opacus and ours.

    Args:
        live: The modules of a model that is trained. A copy of the model may run them.
    """
    changed: list[tuple[OrderedDict[int, Any], OrderedDict[int, Any]]] = []
    for module in live:
        for name in FORWARD_HOOK_TABLES:
            table: OrderedDict[int, Any] = getattr(module, name)
            added = [key for key, hook in table.items() if is_hook_of_opacus(hook)]
            if added:
                changed.append((table, OrderedDict(table)))
            for key in added:
                del table[key]
    try:
        yield
    finally:
        for table, hooks in changed:
            table.clear()
            table.update(hooks)
