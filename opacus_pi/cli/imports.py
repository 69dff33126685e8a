"""Objects of the user's own code, named ``package.module:name``.

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

_MOST = 12  # names in one message
_FROM = "The current directory is searched first: run from the root of your project."


@dataclass(frozen=True)
class Kind:
    """What an argument may name.

    Args:
        words: What is wanted, in words.
        fits: Whether an object is one.
        is_class: Whether a class is one of such objects.
    """

    words: str
    fits: Callable[[Any], bool]
    is_class: Callable[[type], bool]


def _is_data_set(found: Any) -> bool:
    """Whether an object has a length and positions."""
    return (
        not isinstance(found, type | nn.Module | str | bytes | Mapping)
        and hasattr(found, "__len__")
        and hasattr(found, "__getitem__")
    )


MODEL = Kind(
    "a torch.nn.Module",
    lambda found: isinstance(found, nn.Module),
    lambda found: issubclass(found, nn.Module),
)
DATA_SET = Kind(
    "a data set with a length and positions",
    _is_data_set,
    lambda found: hasattr(found, "__getitem__") and not issubclass(found, nn.Module),
)
CRITERION = Kind(
    "a loss criterion(outputs, targets)",
    lambda found: callable(found) and not isinstance(found, type),
    lambda found: issubclass(found, nn.Module),
)


def import_object(flag: str, path: str, kind: Kind) -> Any:
    """Import an object, or call what builds it.

    Args:
        flag: The argument that names it.
        path: ``package.module:name``; the name may have dots. This runs the module.
        kind: What is wanted; what is not of the kind is called without arguments, and
            must return one that is.

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
    module = _module(flag, module_name)
    found = _attribute(flag, module, name, kind)
    if not kind.fits(found) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise BadInput(
                f"{flag}: {path}() raised {type(error).__name__}: {one_line(error)}. "
                f"Name {kind.words}, or a function without arguments that returns one."
            ) from error
    if not kind.fits(found):
        raise BadInput(
            f"{flag}: {path} is {type(found).__name__}, not {kind.words}. "
            "Name one, or a function without arguments that returns one. "
            f"{_offer(module, name, kind)}"
        )
    return found


def closest_first(name: str, known: Sequence[str]) -> list[str]:
    """Known names in their order, but those that look like a given one first.

    Args:
        name: What was written.
        known: What could have been meant.

    >>> closest_first("trian_set", ["build", "train_set"])
    ['train_set', 'build']
    """
    close = difflib.get_close_matches(name, known, n=3)
    return close + [other for other in known if other not in close]


def _module(flag: str, name: str) -> ModuleType:
    """The user's module."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise BadInput(
            f"{flag}: importing {name} raised {type(error).__name__}: "
            f"{one_line(error)}. {_meant(name, error)}{_FROM}"
        ) from error


def _meant(name: str, error: Exception) -> str:
    """Modules of the current directory that look like one that was not found."""
    if not isinstance(error, ModuleNotFoundError) or str(error.name) not in name:
        return ""
    here = {p.stem for p in Path.cwd().iterdir() if p.suffix == ".py" or p.is_dir()}
    close = difflib.get_close_matches(name.split(".")[0], sorted(here), n=3)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _attribute(flag: str, module: ModuleType, name: str, kind: Kind) -> Any:
    """What the module calls by that name."""
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
    """What a module has of the kind that is wanted, likely names first."""
    public = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    named = sorted(n for n, value in public.items() if kind.fits(value))
    named += sorted(
        n for n, v in public.items() if not kind.fits(v) and _builds(v, module, kind)
    )
    if not named:
        return f"{module.__name__} has none, and nothing that could make one."
    shown = closest_first(name, named)[:_MOST]
    more = f", and {len(named) - _MOST} more" if len(named) > _MOST else ""
    return f"{module.__name__} has: {', '.join(shown)}{more}."


def _builds(value: Any, module: ModuleType, kind: Kind) -> bool:
    """Whether calling something of the module's own could give what is wanted."""
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
