"""Models, data sets and methods of the user's own code, named ``MODULE:NAME``.

The name is an object of the wanted kind, or a function or class without arguments that
returns one. The current directory is searched first. The source file of a model or a
method enters the keys of stored results: an edited file is another model or method.
"""

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.imports import Kind, import_object
from opacus_pi.unlearning import Method


def _is_pair_of_data_sets(found: Any) -> bool:
    """Return whether an object is a tuple of two indexable objects with a length."""
    return (
        isinstance(found, tuple)
        and len(found) == 2
        and all(
            hasattr(one, "__len__") and hasattr(one, "__getitem__") for one in found
        )
    )


MODEL = Kind(
    "a function (image_shape, num_classes) that returns a torch.nn.Module",
    lambda found: callable(found) and not isinstance(found, nn.Module),
    lambda found: issubclass(found, nn.Module),
)
METHOD = Kind(
    "an opacus_pi.unlearning.Method",
    lambda found: isinstance(found, Method),
    lambda found: issubclass(found, Method),
)
DATA_SETS = Kind(
    "a tuple of two data sets, the training and the test set",
    _is_pair_of_data_sets,
    lambda found: False,
)


def is_own(name: str) -> bool:
    """Return whether a name is an import path, not one that the benchmarks define."""
    return ":" in name


def own(flag: str, name: str, kind: Kind) -> Any:
    """Import an object of the user's code.

    Args:
        flag: The argument that gives the name, for the message.
        name: ``MODULE:NAME``. The module is run.
        kind: ``MODEL``, ``METHOD`` or ``DATA_SETS``.

    Raises:
        ValueError: It cannot be imported or is of another kind; the message has the
            reason and what the module offers.
    """
    try:
        return import_object(flag, name, kind)
    except BadInput as error:
        raise ValueError(str(error)) from error


def source_digest(name: str) -> str:
    """Return a digest of the file that defines an own object; empty for other names."""
    if not is_own(name):
        return ""
    file = Path(str(import_module(name.split(":", 1)[0]).__file__))
    return hashlib.sha256(file.read_bytes()).hexdigest()[:24]
