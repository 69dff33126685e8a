"""Find code of a training loop that reads gradients without noise at an optimizer step.

Opacus leaves the per-example gradients and their clipped sum at the parameters
(``p.grad_sample``, ``p.summed_grad``) until they are cleared. A hook of the inner
optimizer, or an optimizer class of the user's own, can read both and use them in place
of ``p.grad``. So the code of such functions is searched for the two names, once for
each function: an attribute that is read, or a string constant (``getattr``).

*Guarantee.* A function that names one of them is found, also if it is a lambda, a
method, a ``functools.partial`` or within another function, and so are functions and
methods that it calls by their global name or on its own object.

*What breaks it.* Names that are put together at run time, compiled extensions, and
functions that are reached in other ways, such as through a dict. Writing or deleting
the attributes is not reported: it frees memory.
"""

import dis
from collections.abc import Iterator
from functools import partial
from inspect import getattr_static
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch.optim import Optimizer

__all__ = ["is_of_torch", "raw_gradients_read_by", "raw_gradients_read_in"]

_NAMES = ("grad_sample", "summed_grad")
_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_CONST")
_LIBRARIES = ("torch", "opacus", "opacus_pi", "numpy")  # their code is known
_MOST = 200  # functions that are searched for one hook


def is_of_torch(cls: type) -> bool:
    """Return whether a class is one of torch's own optimizers.

    Args:
        cls: The class of an optimizer.

    >>> import torch
    >>> is_of_torch(torch.optim.Adam)
    True
    """
    return cls.__module__.startswith("torch.optim")


def raw_gradients_read_in(cls: type[Optimizer]) -> str | None:
    """Return the name of the raw gradients that an optimizer class reads.

    Args:
        cls: The class; those of torch that it derives from are not searched.

    Returns:
        ``"grad_sample"``, ``"summed_grad"``, or None if it names neither.
    """
    own = (c for c in cls.__mro__ if c is not object and not is_of_torch(c))
    for owner in own:
        for value in vars(owner).values():
            found = raw_gradients_read_by(value, cls)
            if found is not None:
                return found
    return None


def raw_gradients_read_by(function: Any, owner: type | None = None) -> str | None:
    """Return the name of the raw gradients that a function reads.

    Args:
        function: Anything that can be called; other objects have no code.
        owner: The class whose methods it may call on its first argument.

    Returns:
        ``"grad_sample"``, ``"summed_grad"``, or None if it names neither.
    """
    waiting: list[tuple[Any, type | None]] = [(function, owner)]
    seen: set[FunctionType] = set()
    while waiting and len(seen) < _MOST:
        found, owner = _unwrapped(*waiting.pop())
        if not isinstance(found, FunctionType) or found in seen or _is_known(found):
            continue
        seen.add(found)
        names: set[str] = set()
        for code in _codes(found.__code__):
            read = _read_in(code)
            if read is not None:
                return read
            names.update(code.co_names)
        waiting += _called(found, owner, names)
    return None


def _unwrapped(function: Any, owner: type | None) -> tuple[Any, type | None]:
    """Return the plain function behind a callable, and the class that it belongs to."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    if isinstance(function, MethodType):
        return function.__func__, type(function.__self__)
    if not isinstance(function, FunctionType | type) and callable(function):
        return getattr_static(type(function), "__call__", None), type(function)
    return function, owner


def _called(
    function: FunctionType, owner: type | None, names: set[str]
) -> Iterator[tuple[Any, type | None]]:
    """Yield what a function may call: globals, methods, and what it has enclosed."""
    for name in names:
        yield function.__globals__.get(name), None
        yield getattr_static(owner, name, None), owner
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents, owner
        except ValueError:  # not assigned yet
            continue


def _is_known(function: FunctionType) -> bool:
    """Return whether a function is of a library whose code is known."""
    return (function.__module__ or "").split(".")[0] in _LIBRARIES


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and those of the functions that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _read_in(code: CodeType) -> str | None:
    """Return the first of the names that a code object reads, not only writes."""
    known = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    if known.isdisjoint(_NAMES):
        return None
    for instruction in dis.get_instructions(code):
        if instruction.argval in _NAMES and instruction.opname in _READS:
            return str(instruction.argval)
    return None
