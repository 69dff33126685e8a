"""The accelerator of this process, and the states of its random generators.

Torch gives each kind of accelerator (CUDA, MPS, XPU, or one that an extension brings)
a module of its own with functions of the same names. This file asks torch which kind
is present, so that no other file has to name one. A process has at most one kind.

*Guarantee.* An accelerator that the process has not used yet is not started.

*What breaks it.* Extensions whose torch module lacks ``get_rng_state`` and
``set_rng_state``: the states of their generators are neither saved nor restored.

>>> import torch
>>> torch.accelerator.is_available() or kinds_in_use() == ("cpu",)
True
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "accelerator_in_use",
    "device_random_states",
    "has_float64",
    "kinds_in_use",
    "num_accelerators",
    "random_state_of",
    "set_device_random_states",
    "widened",
]


def accelerator_in_use() -> str | None:
    """Return the kind of accelerator that this process uses, such as ``"cuda"``."""
    try:
        device = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6 raises where later versions return None
        return None
    if device is None:
        return None
    module = torch.get_device_module(device)
    # MPS needs no start: it counts as in use wherever it is available.
    is_started = getattr(module, "is_initialized", torch.accelerator.is_available)
    return device.type if is_started() else None


def kinds_in_use() -> tuple[str, ...]:
    """Return the kinds of devices that this process uses, the CPU first."""
    kind = accelerator_in_use()
    return ("cpu",) if kind is None else ("cpu", kind)


def num_accelerators(kind: str) -> int:
    """Return how many devices of a kind there are; 0 if torch does not know the kind.

    Args:
        kind: The kind of device, such as ``"cuda"``.
    """
    try:
        return int(torch.get_device_module(kind).device_count())
    except (AttributeError, RuntimeError):
        return 0


def random_state_of(device: torch.device) -> Tensor | None:
    """Return the state of the global generator of a device, on the CPU.

    Args:
        device: The CPU or an accelerator.

    Returns:
        None if the torch module of an extension cannot say.
    """
    if device.type == "cpu":
        return torch.get_rng_state()
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "get_rng_state"):
        return None
    takes_device = int(module.device_count()) > 1  # the functions of MPS do not
    state: Tensor = module.get_rng_state(*((device,) if takes_device else ()))
    return state.cpu()


def device_random_states() -> list[Tensor]:
    """Return the random state of each accelerator; empty if none is used."""
    kind = accelerator_in_use()
    module: Any = None if kind is None else torch.get_device_module(kind)
    if not hasattr(module, "get_rng_state") or not hasattr(module, "set_rng_state"):
        return []
    count = int(module.device_count())
    if count == 1:  # the functions of MPS take no device
        return [module.get_rng_state()]
    return [module.get_rng_state(device) for device in range(count)]


def set_device_random_states(states: Sequence[Tensor]) -> None:
    """Set the random state of each accelerator, in their order.

    Args:
        states: What ``device_random_states`` returned. Devices that were added since
            keep their own states.
    """
    kind = accelerator_in_use() if states else None
    if kind is None:
        return
    module: Any = torch.get_device_module(kind)
    if int(module.device_count()) == 1:
        module.set_rng_state(states[0])
        return
    for device, state in enumerate(states):
        module.set_rng_state(state, device)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; in float32 on a device without float64, such as MPS.

    Args:
        tensor: A tensor of floating-point numbers.

    >>> widened(torch.ones(2)).dtype
    torch.float64
    """
    return tensor.double() if has_float64(tensor.device.type) else tensor.float()


@cache
def has_float64(kind: str) -> bool:
    """Return whether devices of a kind have float64.

    Args:
        kind: The kind of device, such as ``"mps"``.
    """
    try:
        torch.empty(1, dtype=torch.float64, device=kind)
    except TypeError:
        return False
    return True
