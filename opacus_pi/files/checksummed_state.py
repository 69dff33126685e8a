"""State dicts that contain a checksum of their own content.

``torch.save`` does not check what it reads back: a damaged or edited checkpoint loads
like a good one. ``with_checksum`` adds a SHA-256 over all names, types and values, and
``verified_state`` refuses a state that no longer matches it. The checksum detects
damage and careless edits. It does not detect a person who edits the state and computes
the checksum again.

>>> import torch
>>> state = with_checksum({"steps": torch.tensor([1, 2]), "rate": 0.5})
>>> sorted(verified_state(state))
['rate', 'steps']
>>> verified_state({**state, "rate": 0.25})
Traceback (most recent call last):
    ...
ValueError: The saved state does not match its checksum. It was edited or damaged: resume from another checkpoint.
"""  # noqa: E501

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_pi._validate import require
from opacus_pi.files.weights_file import tensor_bytes

__all__ = ["verified_state", "with_checksum"]

_CHECKSUM = "checksum"  # the entry that holds it


def with_checksum(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a state dict with its checksum.

    Args:
        state: Tensors, numbers and strings by name.

    Returns:
        The same entries, and ``"checksum"``.
    """
    return {**state, _CHECKSUM: _digest(state)}


def verified_state(state: Any, where: str | None = None) -> dict[str, Any]:
    """Return the state that ``with_checksum`` was given, if it is unchanged.

    Args:
        state: What ``with_checksum`` returned, possibly after saving and loading.
        where: The file that it is from, if that is known; the message names it.

    Returns:
        The entries without ``"checksum"``.

    Raises:
        ValueError: If the state does not match its checksum.
    """
    found = state if isinstance(state, Mapping) else {}
    content = {name: value for name, value in found.items() if name != _CHECKSUM}
    plain = all(_is_plain(value) for value in content.values())
    if _CHECKSUM not in found:
        problem = "has no checksum"
    elif not plain:
        problem = "has values of a type that is never saved"
    else:
        problem = "does not match its checksum"
    require(
        plain and found.get(_CHECKSUM) == _digest(content),
        f"The saved state {f'in {where} ' if where else ''}{problem}.",
        "It was edited or damaged: resume from another checkpoint.",
    )
    return content


def _is_plain(value: Any) -> bool:
    """Return whether a value may be in a state, and cannot expand when it is read.

    A file may hold a tensor that repeats one number a million times, or lists within
    lists whose text is endless. Neither is ever saved.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            return False
        return value.nbytes <= value.untyped_storage().nbytes()
    return isinstance(value, bool | int | float | str | None)


def _digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all names, types and values, in order of name."""
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
