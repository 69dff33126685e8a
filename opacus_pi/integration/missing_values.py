"""Refuse values that are missing, with the name of the argument and what to pass.

Opacus accepts ``None`` for every argument of ``make_private`` and fails later, with an
error that does not name the argument. What can never work is refused at the call. A
noise multiplier or a clip norm may still be set on the optimizer before the first
update, and training then works with Opacus. So these two are checked where an update
uses them.

>>> require_given("make_private", {"module": None})
Traceback (most recent call last):
    ...
TypeError: module must be the model to train, got None. Pass make_private(module=...).
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["number_in", "require_given", "require_noise"]

_NEEDED = {
    "module": "the model to train",
    "optimizer": "the optimizer of the model's parameters",
    "data_loader": "the DataLoader of the training set",
    "target_epsilon": "a number above 0",
    "target_delta": "a number between 0 and 1, below 1 / (number of examples)",
    "epochs": "the number of epochs that will be trained",
}
_GHOST = "ghost"  # what the names of the modes with ghost clipping begin with
_REMEDIES = {
    "noise_multiplier": "Pass make_private(noise_multiplier=1.0) for example, or 0 to "
    "train without noise; make_private_with_epsilon chooses it for a target ε.",
    "max_grad_norm": "Pass make_private(max_grad_norm=1.0) for example, the norm to "
    'which each example\'s gradient is clipped. A list is for clipping="per_layer".',
}


def require_given(method: str, options: Mapping[str, Any]) -> None:
    """Raise if an argument without which nothing can be prepared is ``None``.

    Args:
        method: The method that was called.
        options: Its arguments by name. What is not among them is refused by Python.

    Raises:
        TypeError: If one is ``None``; in the ghost modes, whose model keeps the clip
            norm, also if ``max_grad_norm`` is no number.
    """
    for name, what in _NEEDED.items():
        counts_steps = name == "epochs" and options.get("steps") is not None
        if name in options and options[name] is None and not counts_steps:
            raise TypeError(
                f"{name} must be {what}, got None. Pass {method}({name}=...)."
            )
    mode, clipping = options.get("grad_sample_mode"), options.get("clipping")
    is_ghost = isinstance(mode, str) and mode.startswith(_GHOST)
    if is_ghost and clipping != "per_layer":  # which Opacus refuses
        _number("max_grad_norm", options.get("max_grad_norm", 1.0))


def number_in(optimizer: Any, name: str) -> float:
    """Return a setting of a private optimizer that must be a number.

    Args:
        optimizer: The optimizer that ``make_private`` returned.
        name: ``"noise_multiplier"`` or ``"max_grad_norm"``.

    Raises:
        TypeError: If it is ``None``, a text or a list.
    """
    value = getattr(optimizer, name)
    return value if type(value) is float else _number(name, value)  # in each update


def require_noise(optimizer: Any, noise_std: float) -> None:
    """Raise if no noise of this standard deviation can be drawn.

    Args:
        optimizer: The optimizer that ``make_private`` returned.
        noise_std: The product of its ``noise_multiplier`` and ``max_grad_norm``.

    Raises:
        ValueError: If the product is NaN or below 0. The message names the setting.
    """
    if noise_std >= 0:
        return
    values = {name: number_in(optimizer, name) for name in _REMEDIES}
    name = next((n for n, v in values.items() if not v >= 0), "noise_multiplier")
    raise ValueError(
        f"{name} must be a number of at least 0, got {values[name]}. {_REMEDIES[name]}"
    )


def _number(name: str, value: Any) -> float:
    """Return a value as a float; refuse anything else, also a number written as text.

    Args:
        name: The name of the argument.
        value: Also a tensor or an array with one number.

    Raises:
        TypeError: If it is no number.
    """
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number, got {value!r}. {_REMEDIES[name]}")
