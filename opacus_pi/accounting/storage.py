"""A safe file for arrays: safetensors, written in one piece, versioned, checksummed.

Pickle is never used, so opening a file runs no code. A file appears under its name
only when it is complete.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from opacus_pi._validate import expect

Arrays = dict[str, NDArray]
_AGAIN = "Record it again, or restore the file from a copy."


def write_arrays(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    arrays: Mapping[str, NDArray],
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
    name = os.fspath(path)
    try:
        with safe_open(name, framework="np") as file:
            header = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, TypeError) as error:
        raise ValueError(
            f"Expected path={name} to be a whole {kind} file: it is truncated, or "
            f"something else ({error}). {_AGAIN}"
        ) from error
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
    expect(
        header.pop("checksum", None) == _checksum(arrays, header),
        "path",
        name,
        "to match its checksum: it was edited or damaged",
        _AGAIN,
    )
    return arrays, header


def _checksum(arrays: Arrays, header: Mapping[str, str]) -> str:
    """SHA-256 over the header and every array's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Put the content under the name in one step; leave nothing behind on failure."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
