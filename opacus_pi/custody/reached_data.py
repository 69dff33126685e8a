"""Find out whether a function can read the training set.

A ``collate_fn`` that is given the items of a batch may add others to them, such as
negatives that it draws from the whole data set. Their gradients are then in the rows of
the items. Collating items again does not show it, because such a function draws the
same negatives from the same random numbers. But to read the data set, the function must
refer to it: by a variable, an argument that is set in advance, or an attribute of its
object. These references are followed through the bytecode of the function.

*Guarantee.* Nothing is called, and no attribute is computed.

*What breaks it.* Copies of the data, files, and references that are not written as
names and attributes: entries of other containers, ``getattr``, functions of other
modules that hold the data set in variables of their functions' objects. A reference
does not mean that examples are read.

>>> from torch.utils.data import TensorDataset
>>> data = TensorDataset(torch.randn(4, 2))
>>> reaches_data(lambda items: torch.stack(items), data)
False
>>> reaches_data(lambda items: torch.stack([*items, data[0][0]]), data)
True
"""

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from opacus_pi._torch_compat import storage_address

__all__ = ["reaches_data"]

_MAX_DEPTH = 5  # of functions that call functions, and of data sets in data sets
_LIBRARIES = ("torch", "numpy", "builtins")  # whose functions hold no data set
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_Names = Mapping[str, Any]


def reaches_data(function: Callable[..., Any], data_set: Any) -> bool:
    """Return whether a function refers to a data set, or to what it stores.

    Args:
        function: A function, a method, a partial function or a callable object.
        data_set: The training set.
    """
    stored = set(_stored_in(data_set, _MAX_DEPTH))
    return any(_key_of(found) in stored for found in _referred(function, set(), 0))


def _key_of(part: Any) -> tuple[str, int]:
    """Return what two references to the same data have in common.

    Args:
        part: Any object; of tensors and arrays it is the memory.
    """
    if isinstance(part, Tensor):
        if part.layout is torch.strided and not part.is_meta:
            return "memory", storage_address(part.untyped_storage())
    elif isinstance(part, np.ndarray):
        while isinstance(part.base, np.ndarray):
            part = part.base
        return "memory", int(part.ctypes.data)
    return "object", id(part)


def _stored_in(data_set: Any, depth: int) -> Iterator[tuple[str, int]]:
    """Yield the keys of a data set, and of the data in its attributes.

    Args:
        data_set: A data set, or what one stores.
        depth: How many levels of them are looked at.
    """
    yield _key_of(data_set)
    if not depth:
        return
    is_list = isinstance(data_set, list | tuple) and len(data_set) <= _MAX_DEPTH
    parts = list(data_set) if is_list else []
    if isinstance(data_set, Dataset):
        parts = list(getattr(data_set, "__dict__", {}).values())
    for part in parts:
        if isinstance(part, Tensor | np.ndarray | Dataset | list | tuple | dict):
            yield from _stored_in(part, depth - 1)


def _referred(function: Any, seen: set[int], depth: int) -> Iterator[Any]:
    """Yield the objects to which a function and those that it names refer.

    Args:
        function: Any object; one that is not called yields nothing.
        seen: Ids of the objects that were followed already.
        depth: How many functions lie between this one and the first.
    """
    if id(function) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        yield from _referred(function.func, seen, depth)
        return
    own: Any = None
    if isinstance(function, MethodType):
        own, function = function.__self__, function.__func__
    elif not isinstance(function, FunctionType) and not inspect.isclass(function):
        own = function
        function = inspect.getattr_static(type(function), "__call__", None)
    if not isinstance(function, FunctionType) or _is_of_library(function):
        return
    names = _names_of(function, own)
    for found in _objects_in(function.__code__, function.__globals__, names):
        yield found
        yield from _referred(found, seen, depth + 1)


def _is_of_library(function: FunctionType) -> bool:
    """Return whether a function is one of torch's or NumPy's."""
    return (function.__module__ or "").split(".")[0] in _LIBRARIES


def _names_of(function: FunctionType, own: Any) -> dict[str, Any]:
    """Return the values that its local names have before a function is called.

    Args:
        function: The function.
        own: The object that it is a method of; None: it is no method.
    """
    code, cells = function.__code__, function.__closure__ or ()
    names = dict(function.__kwdefaults__ or {})
    defaults = function.__defaults__ or ()
    last = code.co_varnames[: code.co_argcount][-len(defaults) or code.co_argcount :]
    names |= dict(zip(last, defaults, strict=True))
    for name, cell in zip(code.co_freevars, cells, strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # it has no value yet
            continue
    if own is not None and code.co_argcount:
        names[code.co_varnames[0]] = own
    return names


def _objects_in(
    code: CodeType, of_module: _Names, local: _Names, *, is_inside: bool = False
) -> Iterator[Any]:
    """Yield the objects that code loads by names and attributes.

    Args:
        code: The code of a function.
        of_module: The values of global names.
        local: The values of other names.
        is_inside: Whether it is the code of a function inside of the function, whose
            own arguments may have the same names.
    """
    steps = list(dis.get_instructions(code))
    for place, step in enumerate(steps):
        kind = step.opname
        if not kind.startswith("LOAD_") or kind in _ATTRIBUTES:
            continue
        if is_inside and kind.startswith("LOAD_FAST"):
            continue
        names = of_module if kind in ("LOAD_GLOBAL", "LOAD_NAME") else local
        loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        for name in (n for n in loaded if isinstance(n, str) and n in names):
            is_last = name == loaded[-1]
            yield _with_attributes(names[name], steps[place + 1 :] if is_last else ())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function or a comprehension inside
            yield from _objects_in(constant, of_module, local, is_inside=True)


def _with_attributes(found: Any, steps: Sequence[dis.Instruction]) -> Any:
    """Return the object of which code takes no further attribute.

    Args:
        found: The object that it has loaded.
        steps: What it does next.
    """
    for step in steps:
        if step.opname not in _ATTRIBUTES:
            break
        found = _attribute(found, step.argval)
    return found


def _attribute(found: Any, name: str) -> Any:
    """Return an attribute without computing it; methods are bound.

    Args:
        found: Any object.
        name: The attribute's name.
    """
    if isinstance(found, ModuleType):
        return vars(found).get(name)
    value = inspect.getattr_static(found, name, None)
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, FunctionType) and not inspect.isclass(found):
        return MethodType(value, found)
    return value
