"""A state dict with a checksum, because the files of ``torch.save`` are not checked.

>>> import torch
>>> state = sealed({"steps": torch.tensor([1, 2]), "rate": 0.5})
>>> sorted(unsealed(state))
['rate', 'steps']
>>> unsealed({**state, "rate": 0.25})
Traceback (most recent call last):
    ...
ValueError: the saved state must match its checksum, got ['checksum', 'rate', 'steps']. It was edited or damaged: resume from another checkpoint.
"""  # noqa: E501

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opacus_pi._validate import expect
from opacus_pi.files.weights_file import tensor_bytes

__all__ = ["sealed", "unsealed"]

_SEAL = "checksum"


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its checksum.

    Args:
        state: Tensors, numbers and strings by name.

    Returns:
        The same, and ``"checksum"``.
    """
    return {**state, _SEAL: _digest(state)}


def unsealed(state: Any) -> dict[str, Any]:
    """The state that ``sealed`` was given.

    Args:
        state: What it returned.

    Raises:
        ValueError: If it was edited or damaged.
    """
    found = state if isinstance(state, Mapping) else {}
    content = {name: value for name, value in found.items() if name != _SEAL}
    expect(
        found.get(_SEAL) == _digest(content),
        "the saved state",
        sorted(map(str, found)),
        "must match its checksum",
        "It was edited or damaged: resume from another checkpoint.",
    )
    return content


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over names, types and contents."""
    digest = hashlib.sha256()
    for name in sorted(state, key=str):
        value = state[name]
        if isinstance(value, Tensor):
            digest.update(f"{name!r}:{value.dtype}{tuple(value.shape)}:".encode())
            digest.update(tensor_bytes(value))
        else:
            digest.update(f"{name!r}:{type(value).__name__}:{value!r}".encode())
        digest.update(b"\0")
    return digest.hexdigest()
