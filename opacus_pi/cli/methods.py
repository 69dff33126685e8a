"""Unlearning methods by name, with settings written as ``NAME=VALUE``.

The settings of a method are the fields of its dataclass, so a new method needs only its
name in ``METHODS``. Values are read as JSON (``null``, ``true``, numbers), otherwise as
numbers or as text.

>>> make_method("langevin", ["noise_std=0.02", "max_grad_norm=1"])
Langevin(noise_std=0.02, max_grad_norm=1.0, projection_radius=None)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from opacus_pi.cli.errors import BadInput, one_line

if TYPE_CHECKING:
    from opacus_pi.unlearning import Method

# The class of each method, by name only: the parser lists the methods without torch.
# The first three never use the forget set.
METHODS = {
    "finetune": "FineTune",
    "langevin": "Langevin",
    "l1": "L1Sparse",
    "neggrad": "NegGradPlus",
    "random-labels": "RandomLabels",
    "salun": "SalUn",
    "scrub": "SCRUB",
    "ssd": "SSD",
}
_DEFAULT = "finetune"


def make_method(name: str | None, settings: Sequence[str]) -> "Method":
    """Make a method from its name and settings.

    Args:
        name: One of ``METHODS``; None: fine-tuning.
        settings: ``NAME=VALUE`` each.

    Raises:
        BadInput: If a setting is unknown, missing or outside its domain.
    """
    name = name or _DEFAULT
    method = getattr(import_module("opacus_pi.unlearning"), METHODS[name])
    known = {field.name: field for field in fields(method)}
    given = dict(_parsed(setting, name, known) for setting in settings)
    missing = [n for n, f in known.items() if f.default is MISSING and n not in given]
    if missing:
        raise BadInput(
            f"--set: {name} needs {missing[0]}. Write --set {missing[0]}=VALUE."
        )
    try:
        made: Method = method(**given)
    except ValueError as error:
        raise BadInput(f"--set: {one_line(error)}") from error
    except TypeError as error:
        raise BadInput(
            f"--set: {' '.join(settings)} does not fit {name} ({one_line(error)}). "
            f"{_settings_of(name, known)}"
        ) from error
    return made


def _parsed(setting: str, method: str, known: Mapping[str, Any]) -> tuple[str, Any]:
    """Split one setting into its name and its value.

    Args:
        setting: ``NAME=VALUE``.
        method: Name of the method, for the message.
        known: The method's fields by name.

    Raises:
        BadInput: If there is no such field, or the text has another form.
    """
    name, equals, text = setting.partition("=")
    if not equals or name not in known:
        raise BadInput(
            f"--set: {setting} is not NAME=VALUE, or {method} has no such setting. "
            f"{_settings_of(method, known)}"
        )
    try:
        value = _number(text)
    except ValueError:
        return name, text
    if isinstance(value, int) and not isinstance(known[name].default, int):
        value = float(value)  # the settings that are not whole numbers are floats
    return name, value


def _number(text: str) -> Any:
    """Read a value: JSON, or a number as people write it, such as .5, 1. or +2.

    >>> _number("null"), _number("2"), _number(".5")
    (None, 2, 0.5)

    Raises:
        ValueError: If it is neither; the caller then takes it as text.
    """
    try:
        return json.loads(text)
    except ValueError:
        return float(text)


def _settings_of(method: str, known: Mapping[str, Any]) -> str:
    """Return a sentence that lists the settings of a method with their defaults.

    >>> from opacus_pi.unlearning import L1Sparse
    >>> _settings_of("l1", {f.name: f for f in fields(L1Sparse)})
    'Settings of l1: strength (required), schedule=linear.'

    Args:
        method: Its name on the command line.
        known: Its fields by name.
    """
    shown = [
        f"{name} (required)" if field.default is MISSING else f"{name}={field.default}"
        for name, field in known.items()
    ]
    return f"Settings of {method}: {', '.join(shown) or 'none'}."
