"""Tell whether a copy of a model that was made earlier would be made the same way now.

A copy shares the weights with its model, but everything else is the copy's own: layers,
buffers, hooks and attributes. :func:`structure_of` describes all of these by values
that can be compared with ``==``: two equal descriptions, before and after, mean that a
new copy would differ from the old one only in the values of its buffers and of the
tensors among its attributes (:func:`take_values` copies them).

The guarantee: whatever ``copy.deepcopy`` would copy is described. Where that is not
known, as for tensors in lists, the description is ``None``, and the model counts as
changed. What breaks it: state that is not reachable
through attributes, such as a global variable that a forward method reads; a new copy
would read it, too.

>>> model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
>>> before = structure_of(model)
>>> model[1].p = 0.1
>>> before == structure_of(model)
False
"""

import enum
import itertools
import types
import weakref
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import (
    BACKWARD_HOOK_TABLES,
    FORWARD_HOOK_TABLES,
    compiled_module,
)
from opacus_pi.models.copies import added_by_opacus, is_hook_of_opacus

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, type),
    *(types.FunctionType, types.BuiltinFunctionType),
)
Place = tuple[int, str]  # a module's place in ``own_modules``, and an attribute's name
# Attributes of modules that an evaluation copy does not take from its model
_NOT_COPIED = {"training", *BACKWARD_HOOK_TABLES}


def structure_of(model: nn.Module, ignored: Collection[Place] = ()) -> Hashable | None:
    """Return a description of what a copy of a model depends on.

    Weights are described by where they are stored, not by their values, and buffers and
    other tensors among the attributes by their shapes. Modes and gradients are left
    out, and so is what Opacus and this package add to a model.

    Args:
        model: An unwrapped module.
        ignored: Attributes to be left out.

    Returns:
        A value to be compared with ``==``; ``None`` if the model contains an object
        that cannot be described.
    """
    try:
        return _Description(model, ignored).of(model)
    except _Unknown:
        return None


def take_values(
    copied: nn.Module, model: nn.Module, ignored: Collection[Place] = ()
) -> None:
    """Give a copy the values of the model's buffers and of tensors among attributes.

    Args:
        copied: A copy of a model of the same structure.
        model: The model.
        ignored: Attributes to be left as they are.
    """
    with torch.no_grad():
        for ours, theirs in zip(copied.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    modules = zip(own_modules(copied), own_modules(model), strict=True)
    for number, (our_module, their_module) in enumerate(modules):
        for name, value in vars(their_module).items():
            if isinstance(value, Tensor) and (number, name) not in ignored:
                needs_gradient = value.requires_grad and value.is_leaf
                own = value.detach().clone().requires_grad_(needs_gradient)
                vars(our_module)[name] = own


def own_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, without the wrappers of ``torch.compile``.

    A copy has the same modules in the same order.
    """
    return [m for m in model.modules() if compiled_module(m) is None]


class _Unknown(Exception):
    """An object cannot be described."""


class _Description:
    """Describes objects; an object that occurs again is described by its number.

    Args:
        model: The model that is described.
        ignored: Attributes to be left out.
    """

    def __init__(self, model: nn.Module, ignored: Collection[Place]) -> None:
        self._ignored = ignored
        self._places = {id(m): i for i, m in enumerate(own_modules(model))}
        attributes = [v for m in model.modules() for v in vars(m).values()]
        tensors = [v for v in attributes if isinstance(v, Tensor)]
        self._taken = {id(tensor) for tensor in (*model.buffers(), *tensors)}
        self._numbers: dict[int, int] = {}
        self._described: list[Any] = []  # kept, so that no id is used twice

    def of(self, value: Any) -> Hashable:
        """Return the description of a value.

        Raises:
            _Unknown: If there is none.
        """
        if isinstance(value, _CONSTANTS):
            return type(value), value
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        self._described.append(value)
        return type(value), self._contents(value)

    def _contents(self, value: Any) -> Hashable:
        """Return the description of an object that has parts."""
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (set, frozenset):
            return frozenset(map(self.of, value))
        return tuple(map(self.of, _parts(value)))

    def _module(self, module: nn.Module) -> Hashable:
        """Return the description of a module's attributes.

        Raises:
            _Unknown: If it copies itself, or its forward pass rescales its weights: a
                copy has weights of its own then.
        """
        rescales = getattr(module, "max_norm", None) is not None
        if rescales or hasattr(module, "__deepcopy__"):
            raise _Unknown
        found = []
        not_copied = _NOT_COPIED | added_by_opacus(module)
        place = self._places.get(id(module), -1)
        for name, attribute in vars(module).items():
            if (place, name) in self._ignored:
                continue
            if name in FORWARD_HOOK_TABLES:
                hooks = [h for h in attribute.values() if not is_hook_of_opacus(h)]
                found.append((name, self.of(hooks)))
            elif name not in not_copied and not _replaces_forward(name, attribute):
                found.append((name, self.of(attribute)))
        return tuple(found)

    def _tensor(self, tensor: Tensor) -> Hashable:
        """Return the description of a parameter, buffer or attribute.

        Raises:
            _Unknown: If it is none of these: its values may change unnoticed.
        """
        form = (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
        if id(tensor) in self._taken:
            return *form, tensor.is_leaf
        if type(tensor) is not nn.Parameter:
            raise _Unknown
        return form, tensor.stride(), tensor.data_ptr()


def _parts(value: Any) -> Iterable[Any]:
    """Return the parts of an object in a fixed order."""
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, weakref.ref):  # of recurrent layers; ``deepcopy`` keeps them
        return ()
    if type(value) in (dict, OrderedDict):
        return itertools.chain.from_iterable(value.items())
    return value if type(value) in (list, tuple) else _copied_parts(value)


def _copied_parts(value: Any) -> Iterable[Any]:
    """Return the parts that ``copy.deepcopy`` copies.

    Raises:
        _Unknown: If the object copies itself, or cannot be copied.
    """
    if hasattr(value, "__deepcopy__"):
        raise _Unknown
    try:
        parts = value.__reduce_ex__(4)  # what ``deepcopy`` calls
    except TypeError as error:
        raise _Unknown from error
    if isinstance(parts, str):
        return (parts,)
    items = [list(one) for one in parts[3:5] if one is not None]
    return (*parts[:3], *parts[5:], items)


def _replaces_forward(name: str, attribute: Any) -> bool:
    """Return whether an attribute is this package's replacement of ``forward``."""
    return name == "forward" and is_hook_of_opacus(attribute)
