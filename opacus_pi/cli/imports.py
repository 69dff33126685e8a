"""Objects of the user's own code, named ``package.module:name``.

>>> import_object("--criterion", "torch.nn:CrossEntropyLoss", is_criterion, "a loss")
CrossEntropyLoss()
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from opacus_pi.cli.errors import BadInput, one_line

_FROM = "The current directory is searched first: run from the root of your project."


def is_model(found: Any) -> bool:
    """Whether an object is a model."""
    return isinstance(found, nn.Module)


def is_data_set(found: Any) -> bool:
    """Whether an object is a data set with a length and positions."""
    return (
        not isinstance(found, type | nn.Module)
        and hasattr(found, "__len__")
        and hasattr(found, "__getitem__")
    )


def is_criterion(found: Any) -> bool:
    """Whether an object is a loss, not a class of losses."""
    return callable(found) and not isinstance(found, type)


def import_object(
    flag: str, path: str, fits: Callable[[Any], bool], wanted: str
) -> Any:
    """Import an object, or call what builds it.

    Args:
        flag: The argument that names it.
        path: ``package.module:name``; the name may have dots. This runs the module.
        fits: Whether an object is what is wanted; one that is not is called without
            arguments, and must return one that is.
        wanted: What is wanted, in words.

    Returns:
        The object.

    Raises:
        BadInput: If it cannot be imported or built, or is something else.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise BadInput(
            f"{flag}: {path} is not of the form package.module:name. "
            f"Write for example {flag} my_project.parts:build."
        )
    found = _attribute(flag, _module(flag, module_name), name, path)
    if not fits(found) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise BadInput(
                f"{flag}: {path}() raised {type(error).__name__}: {one_line(error)}. "
                f"Name {wanted}, or a function without arguments that returns one."
            ) from error
    if not fits(found):
        raise BadInput(
            f"{flag}: {path} is {type(found).__name__}, not {wanted}. "
            "Name one, or a function without arguments that returns one."
        )
    return found


def _module(flag: str, name: str) -> Any:
    """The user's module."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise BadInput(
            f"{flag}: importing {name} raised {type(error).__name__}: "
            f"{one_line(error)}. {_FROM}"
        ) from error


def _attribute(flag: str, module: Any, name: str, path: str) -> Any:
    """What the module calls by that name."""
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n in vars(module) if not n.startswith("_")]
            raise BadInput(
                f"{flag}: {path} does not exist. {module.__name__} has: "
                f"{', '.join(sorted(known)[:12]) or 'no public name'}."
            )
        found = getattr(found, part)
    return found
