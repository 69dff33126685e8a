"""Copies of a user's functions, so that extra calls leave their state as it is.

A ``collate_fn`` or a criterion may count its calls, keep a running mean in a buffer, or
draw from a generator of its own. An audit calls a copy of it.

*Guarantee.* A call of the copy changes neither the attributes of a callable object, nor
the variables that a function shares with the function around it, nor the global
variables that it assigns or changes in place.

*What breaks it.* State that functions further down reach through variables of their
own, class attributes, files and other processes. Data sets, loaders and optimizers that
the function holds are shared with the copy: they may be large.

>>> calls = []
>>> def count(items):
...     calls.append(len(items))
...     return len(calls)
>>> copied = copy_of_function(count)
>>> copied([1, 2]), copied([3]), calls
(1, 2, [])
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from opacus_pi.gradients.fallback import MODEL_ERRORS

__all__ = ["copied_if_possible", "copy_of_function"]

# Kinds of global variables that are copied: those that are changed in place and small.
_CHANGED_IN_PLACE = (list, dict, set, bytearray, torch.Generator)
_SHARED = (Dataset, DataLoader, Optimizer)  # not copied


def copy_of_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function with a state of its own.

    Args:
        function: A function, a method or a callable object.

    Raises:
        TypeError: If its state cannot be copied. Other errors of ``copy.deepcopy`` are
            passed on.
    """
    if not isinstance(function, FunctionType):
        holder = getattr(function, "__self__", function)  # of a method
        parts = getattr(holder, "__dict__", {}).values()
        copied: Callable[..., Any] = copy.deepcopy(function, _shared(parts))
        return copied
    names = set(_names_in(function.__code__))
    own_globals = {
        name: copy.deepcopy(value)
        if name in names and isinstance(value, _CHANGED_IN_PLACE)
        else value
        for name, value in function.__globals__.items()
    }
    twin = FunctionType(
        function.__code__,
        own_globals,
        function.__name__,
        copy.deepcopy(function.__defaults__),
        tuple(_copies_of(function.__closure__ or ())),
    )
    twin.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__)
    twin.__dict__.update(copy.deepcopy(vars(function)))
    return twin


def copied_if_possible(function: Any) -> Any:
    """Return a copy of a function with a state of its own, or the function itself.

    Args:
        function: As for ``copy_of_function``. The function itself is returned if its
            state cannot be copied, for example because it holds a lock or a file.
    """
    try:
        return copy_of_function(function)
    except (*MODEL_ERRORS, copy.Error):
        return function


def _copies_of(cells: tuple[CellType, ...]) -> Iterator[CellType]:
    """Yield copies of variables that a function shares with the one around it.

    Args:
        cells: The variables. One without a value, such as one that is assigned only if
            an option is set, stays without.
    """
    held = {}
    for cell in cells:
        with suppress(ValueError):  # it has no value yet
            held[id(cell)] = cell.cell_contents
    for cell in cells:
        if id(cell) in held:
            yield CellType(copy.deepcopy(held[id(cell)], _shared(held.values())))
        else:
            yield CellType()


def _shared(parts: Iterable[Any]) -> dict[int, Any]:
    """Return a memo for ``copy.deepcopy`` by which it does not copy some objects.

    Args:
        parts: What a function holds; data sets, loaders and optimizers are not copied.
    """
    return {id(part): part for part in parts if isinstance(part, _SHARED)}


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and the functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
