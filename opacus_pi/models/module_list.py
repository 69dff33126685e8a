"""What the modules of a model are: names, types and settings, as text.

The names and shapes of weights do not tell a model with ReLU from one with GELU, or a
rate of dropout from another. A list of the modules does. It is stored with the saved
states of a training, so that a rewind does not train another model.

*Guarantee.* Two models with equal lists have the same modules, as far as the names of
their classes and their ``extra_repr`` say. Wrappers of Opacus and torch, devices and
``inplace``, which change no number, do not count. *What breaks it:* code inside a
module, such as that of ``forward``, of which the list says nothing.

>>> one, other = (
...     nn.Sequential(nn.Linear(2, 1), nn.ReLU()),
...     nn.Sequential(nn.Linear(2, 1), nn.GELU()),
... )
>>> difference(module_list(one), module_list(other))
'1: GELU(approximate=none), in the training ReLU()'
"""

import re

from torch import nn

from opacus_pi._class_swap import plain_class
from opacus_pi.models.copies import unwrap

__all__ = ["difference", "module_list"]

_NO_SETTING = re.compile(r"(, )?inplace(=\w+)?|\s+at 0x[0-9a-fA-F]+|['\"]")
# They describe tensors, with the device, which the weights say without it.
_OF_TENSORS = (nn.ParameterList, nn.ParameterDict)


def module_list(model: nn.Module) -> str:
    """Return a line for each module of a model: name, type and settings.

    Args:
        model: A module, plain or wrapped.
    """
    lines = []
    for name, module in unwrap(model).named_modules():
        inner = unwrap(module)
        if inner is not module and name:
            continue  # a wrapper, such as a compiled layer; the layer itself follows
        place = name.replace("._orig_mod", "").replace("_orig_mod.", "")
        lines.append(f"{place}: {plain_class(module).__name__}({_settings(module)})")
    return "\n".join(lines)


def _settings(module: nn.Module) -> str:
    """Return what a module says of itself, in one line; empty if it says nothing."""
    if isinstance(module, _OF_TENSORS):
        return ""
    try:
        shown = str(module.extra_repr())
    except Exception:
        return ""
    return " ".join(_NO_SETTING.sub("", shown).split()).removeprefix(", ")


def difference(training: str, here: str) -> str:
    """Return the first module in which two lists differ; empty if they do not.

    Args:
        training: The list of the model that was trained.
        here: The list of the model at hand.
    """
    ours, theirs = here.split("\n"), training.split("\n")
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            (name, what), (known, was) = mine.split(": ", 1), other.split(": ", 1)
            where = "" if name == known else f"{known}: "
            return f"{name or 'model'}: {what}, in the training {where}{was}"
    if len(ours) != len(theirs):
        return f"{len(ours)} modules, in the training {len(theirs)}"
    return ""
