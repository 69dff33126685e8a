"""Import objects of the user's own code, named ``package.module:name``.

An object of the wanted kind is taken as it is; anything else that can be called without
arguments is called, and must return one. After a wrong name the error lists what the
module has of the kind, the most similar names first.

>>> import_object("--criterion", "torch.nn:CrossEntropyLoss", CRITERION)
CrossEntropyLoss()
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from opacus_pi.cli.errors import BadInput, one_line

_MAX_NAMES = 12  # in one message
_SEARCHED = (
    "The current directory is searched first: run from the root of your project."
)


@dataclass(frozen=True)
class Kind:
    """A kind of object that an argument may name.

    Args:
        description: The kind in words, for error messages.
        fits: Whether an object is of the kind.
        is_class: Whether the instances of a class are of the kind.
    """

    description: str
    fits: Callable[[Any], bool]
    is_class: Callable[[type], bool]


def _is_data_set(found: Any) -> bool:
    """Return whether an object has a length and can be indexed by position."""
    return (
        not isinstance(found, type | nn.Module | str | bytes | Mapping)
        and hasattr(found, "__len__")
        and hasattr(found, "__getitem__")
    )


def _takes_one(found: Any) -> bool:
    """Return whether an object can be called with one argument.

    A function that cannot is one that builds the object.
    """
    try:
        inspect.signature(found).bind(())
    except TypeError:
        return False
    except ValueError:  # has no signature
        return True
    return True


MODEL = Kind(
    "a torch.nn.Module",
    lambda found: isinstance(found, nn.Module),
    lambda found: issubclass(found, nn.Module),
)
DATA_SET = Kind(
    "a data set with __len__ and __getitem__",
    _is_data_set,
    lambda found: hasattr(found, "__getitem__") and not issubclass(found, nn.Module),
)
COLLATE = Kind(
    "a function that makes a batch of a list of items",
    lambda found: callable(found) and not isinstance(found, type) and _takes_one(found),
    lambda found: not issubclass(found, nn.Module),
)
CRITERION = Kind(
    "a loss function, called as criterion(outputs, targets)",
    lambda found: callable(found) and not isinstance(found, type),
    lambda found: issubclass(found, nn.Module),
)


def import_object(flag: str, path: str, kind: Kind) -> Any:
    """Import an object, or call the function or class that builds it.

    Args:
        flag: The argument that names the object.
        path: ``package.module:name``; the name may have dots. The module is run.
        kind: The kind of object that is wanted. An object of another kind is called
            without arguments and must return one of this kind.

    Returns:
        The object.

    Raises:
        BadInput: If the object cannot be imported or built, or is of another kind.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise BadInput(
            f"{flag}: {path} is not of the form package.module:name. "
            f"Write for example {flag} my_project.parts:build."
        )
    module = _module(flag, module_name)
    found = _attribute(flag, module, name, kind)
    if not kind.fits(found) and callable(found):
        try:
            found = found()
        except Exception as error:  # the user's code may raise anything
            raise BadInput(
                f"{flag}: {path}() raised {type(error).__name__}: {one_line(error)}. "
                f"Name {kind.description}, or a function without arguments that "
                "returns one."
            ) from error
    if not kind.fits(found):
        raise BadInput(
            f"{flag}: {path} is of type {type(found).__name__}, not "
            f"{kind.description}. Name one, or a function without arguments that "
            "returns one. "
            f"{_offer(module, name, kind)}"
        )
    return found


def closest_first(name: str, known: Sequence[str]) -> list[str]:
    """Sort known names: those similar to a given one first, the others in their order.

    Args:
        name: The name that was given.
        known: The names that exist.

    >>> closest_first("trian_set", ["build", "train_set"])
    ['train_set', 'build']
    """
    close = difflib.get_close_matches(name, known, n=3)
    return close + [other for other in known if other not in close]


def _module(flag: str, name: str) -> ModuleType:
    """Import the user's module, from the current directory first.

    An installed program does not search the current directory by itself, as ``python
    -m`` does. Importing runs the module's code, which may raise anything.

    Args:
        flag: The argument, for the message.
        name: The module's name, with dots.

    Raises:
        BadInput: If the import fails, with the error and with similar names.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:  # the user's code may raise anything
        raise BadInput(
            f"{flag}: importing {name} raised {type(error).__name__}: "
            f"{one_line(error)}. {_similar_modules(name, error)}{_SEARCHED}"
        ) from error


def _similar_modules(name: str, error: Exception) -> str:
    """Suggest modules of the current directory if a module was not found.

    Args:
        name: The name that was given.
        error: What the import raised. If it is about another module, which the user's
            module imports, the name was right and no suggestion helps.

    Returns:
        A question with a space after it, or an empty text.
    """
    if not isinstance(error, ModuleNotFoundError) or str(error.name) not in name:
        return ""
    here = {p.stem for p in Path.cwd().iterdir() if p.suffix == ".py" or p.is_dir()}
    close = difflib.get_close_matches(name.split(".")[0], sorted(here), n=3)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _attribute(flag: str, module: ModuleType, name: str, kind: Kind) -> Any:
    """Look up a name with dots in a module.

    Args:
        flag: The argument, for the message.
        module: The module.
        name: Such as ``build`` or ``Models.small``.
        kind: The kind that is wanted, to list what the module has of it.

    Raises:
        BadInput: If there is no such name.
    """
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise BadInput(
                f"{flag}: {module.__name__}:{name} does not exist. "
                f"{_offer(module, name, kind)}"
            )
        found = getattr(found, part)
    return found


def _offer(module: ModuleType, name: str, kind: Kind) -> str:
    """List what a module has of the kind that is wanted, similar names first.

    Objects of the kind come before functions and classes that could build one, because
    the latter are a guess. Names with an underscore are left out.

    Args:
        module: The module.
        name: The name that was given; names like it are listed first.
        kind: The kind that is wanted.
    """
    public = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    named = sorted(n for n, value in public.items() if kind.fits(value))
    named += sorted(
        n for n, v in public.items() if not kind.fits(v) and _builds(v, module, kind)
    )
    if not named:
        return (
            f"{module.__name__} has no such object, and no function that could return "
            "one."
        )
    shown = closest_first(name, named)[:_MAX_NAMES]
    more = f", and {len(named) - _MAX_NAMES} more" if len(named) > _MAX_NAMES else ""
    return f"{module.__name__} has: {', '.join(shown)}{more}."


def _builds(value: Any, module: ModuleType, kind: Kind) -> bool:
    """Return whether calling an object of the module could build what is wanted.

    The object is not called, because that could take long or have side effects. It must
    be defined in the module or below it, be callable without arguments, and, if it is a
    class, be a class of the wanted kind. What a function returns is not known.

    Args:
        value: The object.
        module: The module that has it.
        kind: The kind that is wanted.
    """
    home = f"{getattr(value, '__module__', '')}."
    if not callable(value) or not home.startswith(f"{module.__name__}."):
        return False
    if isinstance(value, type) and not kind.is_class(value):
        return False
    try:
        needed = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return False
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in optional for p in needed)
