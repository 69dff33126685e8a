"""A safe file for arrays: safetensors, written in one piece, versioned, checksummed.

Pickle is never used, so opening a file runs no code. A file appears under its name
only when it is complete.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from opacus_pi._validate import expect
from opacus_pi.atomic_file import replace_file

Arrays = dict[str, NDArray[Any]]
_TYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
_AGAIN = "Record it again, or restore the file from a copy."


def write_arrays(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    arrays: Mapping[str, NDArray[Any]],
    facts: Mapping[str, str],
) -> None:
    """Write arrays and facts to one file, atomically.

    The bytes go to a temporary file in the same directory, which is flushed to the
    disk and then renamed: a reader sees the old file or the new one, never a part.

    Args:
        path: The file's name.
        kind: What the file holds, e.g. ``"opacus_pi.GradNormLedger"``.
        version: Version of that layout.
        arrays: Arrays by name.
        facts: Strings by name; ``kind``, ``version`` and ``checksum`` are taken.
    """
    contiguous = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    header = {**facts, "kind": kind, "version": str(version)}
    header["checksum"] = _checksum(contiguous, header)
    replace_file(Path(path), save(contiguous, metadata=header))


def read_arrays(
    path: str | os.PathLike[str], kind: str, version: int
) -> tuple[Arrays, dict[str, str]]:
    """Read what ``write_arrays`` wrote, or refuse.

    Args:
        path: The file's name.
        kind: What the file must hold.
        version: The version of that layout which the caller understands.

    Returns:
        The arrays and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, foreign, of another version or edited.
    """
    with _opened(path, kind, version) as (file, header):
        arrays = {key: file.get_tensor(key) for key in file.keys()}
    _check(path, header, arrays)
    return arrays, header


def check_file(
    path: str | os.PathLike[str], kind: str, version: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Make the checks of ``read_arrays`` without holding the arrays in memory.

    Args:
        path: The file's name.
        kind: What the file must hold.
        version: The version of that layout which the caller understands.

    Returns:
        The arrays' shapes and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``read_arrays``.
    """
    with _opened(path, kind, version) as (_, header):
        on_disk = _on_disk(path)
    _check(path, header, on_disk)
    return {name: array.shape for name, array in on_disk.items()}, header


def read_columns(
    path: str | os.PathLike[str], columns: slice, names: Collection[str]
) -> Arrays:
    """Read a part of a file that ``check_file`` has checked.

    Args:
        path: The file's name.
        columns: Which part of the last axis.
        names: The arrays that have such an axis; the others are read whole.

    Returns:
        The arrays by name.
    """
    return {
        name: array.read(columns if name in names else slice(None))
        for name, array in _on_disk(path).items()
    }


@dataclass(frozen=True)
class _OnDisk:
    """An array in a file, read without mapping it: mapped pages would stay around."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def rows(self, columns: slice = slice(None)) -> Iterator[NDArray[Any]]:
        """The part of each row along the last axis, one after the other."""
        length, (start, stop) = self._length, self._span(columns)
        with open(self.path, "rb") as file:
            for row in range(math.prod(self.shape[:-1])):
                file.seek(self.offset + (row * length + start) * self.dtype.itemsize)
                yield np.fromfile(file, self.dtype, stop - start)

    def read(self, columns: slice) -> NDArray[Any]:
        """All rows' parts."""
        start, stop = self._span(columns)
        shape = (*self.shape[:-1], stop - start) if self.shape else ()
        return np.array(list(self.rows(columns)), self.dtype).reshape(shape)

    @property
    def _length(self) -> int:
        """Entries of a row."""
        return self.shape[-1] if self.shape else 1

    def _span(self, columns: slice) -> tuple[int, int]:
        """Where a part of a row starts and stops."""
        start, stop, _ = columns.indices(self._length)
        return start, stop


def _on_disk(path: str | os.PathLike[str]) -> dict[str, _OnDisk]:
    """The arrays of a safetensors file, from its header."""
    name = os.fspath(path)
    with open(name, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        key: _OnDisk(
            name,
            _TYPES[facts["dtype"]],
            tuple(facts["shape"]),
            8 + size + facts["data_offsets"][0],
        )
        for key, facts in header.items()
    }


@contextmanager
def _opened(
    path: str | os.PathLike[str], kind: str, version: int
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open file and its header, if they are of the right kind and version."""
    name = os.fspath(path)
    try:
        with safe_open(name, framework="np") as file:
            header = file.metadata() or {}
            _check_kind(name, header, kind, version)
            yield file, header
    except (SafetensorError, TypeError) as error:
        raise ValueError(
            f"Expected path={name} to be a whole {kind} file: it is truncated, or "
            f"something else ({error}). {_AGAIN}"
        ) from error


def _check_kind(name: str, header: Mapping[str, str], kind: str, version: int) -> None:
    """Refuse a file of another kind or version."""
    expect(
        header.get("kind") == kind,
        "path",
        name,
        f"to hold {kind}, not {header.get('kind', 'something else')}",
        "Pass a file that this class's save wrote.",
    )
    expect(
        header.get("version") == str(version),
        "path",
        name,
        f"in format version {version}, not {header.get('version')}",
        "Read it with the release of opacus_pi that wrote it.",
    )


def _check(
    path: str | os.PathLike[str],
    header: dict[str, str],
    arrays: Mapping[str, NDArray[Any] | _OnDisk],
) -> None:
    """Take the checksum out of the header, and refuse what does not match it."""
    expect(
        header.pop("checksum", None) == _checksum(arrays, header),
        "path",
        os.fspath(path),
        "to match its checksum: it was edited or damaged",
        _AGAIN,
    )


def _checksum(
    arrays: Mapping[str, NDArray[Any] | _OnDisk], header: Mapping[str, str]
) -> str:
    """SHA-256 over the header and every array's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        for part in array.rows() if isinstance(array, _OnDisk) else [array]:
            digest.update(np.asarray(part, order="C").tobytes())
    return digest.hexdigest()
