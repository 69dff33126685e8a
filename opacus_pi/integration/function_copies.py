"""Copies of a user's functions, so that extra calls leave their state as it is.

A ``collate_fn`` may count its calls, or draw from a generator of its own. An audit
calls a copy of it.

*Guarantee.* A call of the copy changes neither the attributes of a callable object, nor
the variables that a function shares with the function around it, nor the global
variables that it assigns or changes in place.

*What breaks it.* State that functions further down reach through variables of their
own, class attributes, files and other processes.

>>> calls = []
>>> def count(items):
...     calls.append(len(items))
...     return len(calls)
>>> copied = copy_of_function(count)
>>> copied([1, 2]), copied([3]), calls
(1, 2, [])
"""

import copy
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

import torch

__all__ = ["copy_of_function"]

# Kinds of global variables that are copied: those that are changed in place and small.
_CHANGED_IN_PLACE = (list, dict, set, bytearray, torch.Generator)


def copy_of_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function with a state of its own.

    Args:
        function: A function, a method or a callable object.

    Raises:
        TypeError: If its state cannot be copied. Other errors of ``copy.deepcopy`` are
            passed on.
    """
    if not isinstance(function, FunctionType):
        copied: Callable[..., Any] = copy.deepcopy(function)
        return copied
    names = set(_names_in(function.__code__))
    own_globals = {
        name: copy.deepcopy(value)
        if name in names and isinstance(value, _CHANGED_IN_PLACE)
        else value
        for name, value in function.__globals__.items()
    }
    cells = function.__closure__ or ()
    twin = FunctionType(
        function.__code__,
        own_globals,
        function.__name__,
        copy.deepcopy(function.__defaults__),
        tuple(CellType(copy.deepcopy(cell.cell_contents)) for cell in cells),
    )
    twin.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__)
    twin.__dict__.update(copy.deepcopy(vars(function)))
    return twin


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and the functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
