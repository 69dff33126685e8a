"""A safe file for weights: safetensors of torch tensors, versioned and checksummed.

>>> import tempfile
>>> path = tempfile.mkdtemp() + "/weights.safetensors"
>>> state = {"weight": torch.ones(2, dtype=torch.bfloat16)}
>>> write_weights(path, "toy", 1, state, {"num_steps": "3"})
>>> read_weights(path, "toy", 1)[1]["num_steps"]
'3'
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.storage import (
    Described,
    checksum,
    opened,
    require_checksum,
)

__all__ = ["described", "read_weights", "tensor_bytes", "write_weights"]


def write_weights(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    state: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Write a state dict and facts to one file, atomically.

    Args:
        path: The file's name.
        kind: What the file holds.
        version: Version of that layout.
        state: Tensors by name. Tied tensors are written once per name; entries that
            are no tensors (a module's extra state) are left out.
        facts: Strings by name; ``kind``, ``version`` and ``checksum`` are taken.
    """
    tensors = {  # a clone each, because safetensors refuses tensors that share memory
        name: value.detach().cpu().contiguous().clone()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    header = {**facts, "kind": kind, "version": str(version)}
    header["checksum"] = checksum(described(tensors), header)
    replace_file(Path(path), save(tensors, metadata=header))


def read_weights(
    path: str | os.PathLike[str], kind: str, version: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what ``write_weights`` wrote, or refuse.

    Args:
        path: The file's name.
        kind: What the file must hold.
        version: The version of that layout which the caller understands.

    Returns:
        The tensors and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, foreign, of another version or edited.
    """
    with opened(path, kind, version, framework="pt") as (file, header):
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    require_checksum(path, header, described(tensors))
    return tensors, header


def described(tensors: Mapping[str, Tensor]) -> Iterator[Described]:
    """Name, type, shape and bytes of each tensor, in order of name."""
    for name in sorted(tensors):
        tensor = tensors[name]
        yield name, str(tensor.dtype), tuple(tensor.shape), [tensor_bytes(tensor)]


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's entries, of any type, as they are in memory.

    Args:
        tensor: On any device.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
