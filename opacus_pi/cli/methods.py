"""Unlearning methods by name, their settings by ``NAME=VALUE``.

>>> make_method("langevin", ["noise_std=0.02", "max_grad_norm=1"])
Langevin(noise_std=0.02, max_grad_norm=1.0, projection_radius=None)
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from opacus_pi.cli.errors import BadInput, one_line
from opacus_pi.unlearning import (
    SCRUB,
    SSD,
    FineTune,
    L1Sparse,
    Langevin,
    Method,
    NegGradPlus,
    RandomLabels,
    SalUn,
)

METHODS: dict[str, type[Method]] = {
    "finetune": FineTune,
    "langevin": Langevin,
    "l1": L1Sparse,
    "neggrad": NegGradPlus,
    "random-labels": RandomLabels,
    "salun": SalUn,
    "scrub": SCRUB,
    "ssd": SSD,
}


def add_method(parser: argparse.ArgumentParser) -> None:
    """The method and its settings, listed at the end of the help text."""
    parser.epilog = f"{parser.epilog}\n\n{settings_help()}"
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="how to forget (default finetune); only finetune, langevin and l1 never "
        "look at the forget set, which a guarantee needs",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the method, may be repeated: see the list below",
    )


def settings_help() -> str:
    """Every method with its settings, for the end of a help text."""
    lines = ["methods and their settings (--set NAME=VALUE):"]
    for name, method in METHODS.items():
        shown = ", ".join(_shown(f) for f in fields(method))  # type: ignore[arg-type]
        lines.append(f"  {name:14}{shown or '(none)'}")
    return "\n".join(lines)


def make_method(name: str | None, settings: Sequence[str]) -> Method:
    """A method from its name and settings.

    Args:
        name: One of ``METHODS``; None: fine-tuning.
        settings: ``NAME=VALUE`` each.

    Raises:
        BadInput: If a setting is unknown, missing or outside its domain.
    """
    method = METHODS[name or "finetune"]
    known = {f.name: f for f in fields(method)}  # type: ignore[arg-type]
    given = dict(_parsed(setting, known) for setting in settings)
    missing = [n for n, f in known.items() if f.default is MISSING and n not in given]
    if missing:
        raise BadInput(
            f"--set: {name} needs {missing[0]}. Write --set {missing[0]}=VALUE."
        )
    try:
        return method(**given)
    except ValueError as error:
        raise BadInput(f"--set: {one_line(error)}") from error
    except TypeError as error:
        raise BadInput(
            f"--set: {' '.join(settings)} does not fit {name} ({one_line(error)}). "
            "The settings of each method are in --help."
        ) from error


def _parsed(setting: str, known: dict[str, Any]) -> tuple[str, Any]:
    """Name and value of one setting."""
    name, equals, value = setting.partition("=")
    if not equals or name not in known:
        raise BadInput(
            f"--set: {setting} is not NAME=VALUE with NAME one of "
            f"{', '.join(known) or 'none'}. The settings of each method are in --help."
        )
    try:
        number = _number(value)
    except ValueError:
        return name, value
    whole = isinstance(known[name].default, int)
    return name, number if whole or not isinstance(number, int) else float(number)


def _number(text: str) -> Any:
    """A value as JSON writes it, or a number as people do: .5, 1., +2."""
    try:
        return json.loads(text)
    except ValueError:
        return float(text)


def _shown(field: Any) -> str:
    """A setting with its default."""
    if field.default is MISSING:
        return f"{field.name} (required)"
    return f"{field.name}={field.default}"
