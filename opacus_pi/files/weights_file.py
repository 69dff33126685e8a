"""Safetensors files of torch tensors with a kind, a version and a checksum.

The counterpart of ``arrays_file`` for weights, with the same guarantees. It is a
separate module because it needs torch, and ledgers are read without torch.

>>> import tempfile
>>> path = tempfile.mkdtemp() + "/weights.safetensors"
>>> state = {"weight": torch.ones(2, dtype=torch.bfloat16)}
>>> toy = FileKind("toy", "a toy")
>>> write_weights(path, toy, state, {"num_steps": "3"})
>>> read_weights(path, toy)[1]["num_steps"]
'3'
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from opacus_pi._validate import require
from opacus_pi.files.arrays_file import (
    Described,
    checksum,
    opened,
    require_checksum,
)
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.kinds import KINDS, FileKind
from opacus_pi.files.regular_file import require_regular

__all__ = [
    "described",
    "read_plain_weights",
    "read_weights",
    "tensor_bytes",
    "tensors_from_bytes",
    "tensors_to_bytes",
    "write_weights",
]


def write_weights(
    path: str | os.PathLike[str],
    kind: FileKind,
    state: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Write a state dict and facts to one file, atomically.

    Args:
        path: The file's name.
        kind: The kind of file; its name and version are stored in the header.
        state: Tensors by name. Tied tensors are written once per name; entries that
            are not tensors (a module's extra state) are left out.
        facts: Strings by name; ``kind``, ``version`` and ``checksum`` are reserved.
    """
    tensors = {  # a clone each, because safetensors refuses tensors that share memory
        name: value.detach().cpu().contiguous().clone()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    header = {**facts, "kind": kind.name, "version": str(kind.version)}
    header["checksum"] = checksum(described(tensors), header)
    replace_file(Path(path), save(tensors, metadata=header))


def read_weights(
    path: str | os.PathLike[str], kind: FileKind
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that ``write_weights`` wrote, after checking it.

    Args:
        path: The file's name.
        kind: What the file must contain, and the version that this release reads.

    Returns:
        The tensors and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, edited, of another version, or not of this
            kind.
    """
    with opened(path, kind, framework="pt") as (file, header):
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    require_checksum(path, header, described(tensors))
    return tensors, header


def described(tensors: Mapping[str, Tensor]) -> Iterator[Described]:
    """Yield name, type, shape and bytes of each tensor, in order of name."""
    for name in sorted(tensors):
        tensor = tensors[name]
        yield name, str(tensor.dtype), tuple(tensor.shape), [tensor_bytes(tensor)]


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's entries, of any type, in memory order.

    Args:
        tensor: A tensor on any device.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def read_plain_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read any safetensors file of tensors, written by any program.

    If opacus_pi wrote the file, its checksum is compared.

    Args:
        path: The file's name.

    Returns:
        The tensors by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete safetensors file, or was edited or damaged.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        kind = KINDS.get(header.get("kind", ""))
        require(
            kind is not None or "checksum" not in header,
            f"{os.fspath(path)} has a checksum, but is of an unknown kind.",
            "It was edited or damaged, or a newer release of opacus_pi wrote it. Write "
            "it again, or restore it from a copy.",
        )
        if kind is not None:
            kind.read(Path(path))
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"path must be a whole safetensors file, got {os.fspath(path)} ({error}). "
            "Pass a file of safetensors.torch.save_file."
        ) from error


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file.

    Args:
        tensors: Tensors by name; no two of them share memory.
    """
    return save(dict(tensors))


def tensors_from_bytes(content: bytes) -> dict[str, Tensor]:
    """Return the tensors that ``tensors_to_bytes`` was given.

    Args:
        content: The bytes that it returned.

    Raises:
        ValueError: If these are not the bytes of a safetensors file.
    """
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(
            f"content must be the bytes of a safetensors file, got {len(content)} "
            f"bytes ({error}). Save the tensors again."
        ) from error
