"""A safe file for arrays: safetensors, written in one piece, versioned, checksummed.

Pickle is never used, so opening a file runs no code. A file appears under its name
only when it is complete.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from opacus_pi._validate import expect
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.files.on_disk import OnDisk, arrays_on_disk

Arrays = dict[str, NDArray[Any]]
_AGAIN = "Record it again, or restore the file from a copy."
_OWN_FACTS = {"kind", "version"}
_MAX_WIDTH = 1 << 24  # of an array without entries, whose size no file length proves


@dataclass(frozen=True)
class Layout:
    """What a file of one kind holds.

    Args:
        arrays: Type of each array that must be there, e.g. ``"<f8"``.
        facts: Names of the strings that must be there.
        more_arrays: Type of each array that may be there.
        more_facts: Names of the strings that may be there.
    """

    arrays: Mapping[str, str]
    facts: Collection[str] = ()
    more_arrays: Mapping[str, str] = field(default_factory=dict)
    more_facts: Collection[str] = ()


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
    header["checksum"] = checksum(_described(contiguous), header)
    replace_file(Path(path), save(contiguous, metadata=header))


def read_arrays(
    path: str | os.PathLike[str], kind: str, version: int, layout: Layout | None = None
) -> tuple[Arrays, dict[str, str]]:
    """Read what ``write_arrays`` wrote, or refuse.

    Args:
        path: The file's name.
        kind: What the file must hold.
        version: The version of that layout which the caller understands.
        layout: What such a file holds. Default: any arrays and facts.

    Returns:
        The arrays and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, foreign, of another version or edited.
    """
    with opened(path, kind, version) as (file, header):
        arrays = {key: file.get_tensor(key) for key in file.keys()}
    _check(path, header, arrays, layout)
    return arrays, header


def check_file(
    path: str | os.PathLike[str], kind: str, version: int, layout: Layout | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Make the checks of ``read_arrays`` without holding the arrays in memory.

    Args:
        path: The file's name.
        kind: What the file must hold.
        version: The version of that layout which the caller understands.
        layout: As of ``read_arrays``.

    Returns:
        The arrays' shapes and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``read_arrays``.
    """
    with opened(path, kind, version) as (_, header):
        on_disk = arrays_on_disk(path)
    _check(path, header, on_disk, layout)
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
        for name, array in arrays_on_disk(path).items()
    }


def read_array(path: str | os.PathLike[str], name: str) -> NDArray[Any]:
    """Read one array of a file that ``check_file`` has checked.

    Args:
        path: The file's name.
        name: The array's.

    Returns:
        All of it.
    """
    return arrays_on_disk(path)[name].read(slice(None))


@contextmanager
def opened(
    path: str | os.PathLike[str], kind: str, version: int, framework: str = "np"
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The open file and its header, if they are of the right kind and version.

    Args:
        path: The file's name.
        kind: What the file must hold.
        version: The version of that layout which the caller understands.
        framework: Of the tensors, as in ``safetensors.safe_open``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, foreign or of another version.
    """
    name = os.fspath(path)
    try:
        with safe_open(name, framework=framework) as file:
            header = file.metadata() or {}
            _check_kind(name, header, kind, version)
            for key in file.keys():
                _check_shape(name, key, file.get_slice(key).get_shape())
            yield file, header
    except (SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(
            f"path must be a whole {kind} file, got {name} ({error}). It is truncated, "
            f"or another kind of file. {_AGAIN}"
        ) from error


def _check_shape(path: str, name: str, shape: Sequence[int]) -> None:
    """Refuse a shape that claims more than the file's length proves."""
    expect(
        math.prod(shape) > 0 or max(shape, default=0) <= _MAX_WIDTH,
        "path",
        f"shape {list(shape)} in {path}",
        f"must hold entries in {name!r}",
        _AGAIN,
    )


def _check_kind(name: str, header: Mapping[str, str], kind: str, version: int) -> None:
    """Refuse a file of another kind or version."""
    expect(
        header.get("kind") == kind,
        "path",
        f"{header.get('kind', 'something else')} in {name}",
        f"must hold {kind}",
        "Pass a file that this class's save wrote.",
    )
    expect(
        header.get("version") == str(version),
        "path",
        f"version {header.get('version')} in {name}",
        f"must be in format version {version}",
        "Read it with the release of opacus_pi that wrote it.",
    )


def _check(
    path: str | os.PathLike[str],
    header: dict[str, str],
    arrays: Mapping[str, NDArray[Any] | OnDisk],
    layout: Layout | None,
) -> None:
    """Take the checksum out of the header, and refuse what does not match it."""
    require_checksum(path, header, _described(arrays))
    if layout is not None:
        _check_layout(path, layout, header, {n: a.dtype.str for n, a in arrays.items()})


def require_checksum(
    path: str | os.PathLike[str], header: dict[str, str], arrays: Iterable["Described"]
) -> None:
    """Take the checksum out of a header, and refuse the file if it does not match.

    Args:
        path: The file's name.
        header: What the file says; changed in place.
        arrays: What it holds.

    Raises:
        ValueError: If it was edited or damaged.
    """
    expect(
        header.pop("checksum", None) == checksum(arrays, header),
        "path",
        os.fspath(path),
        "must match its checksum",
        f"It was edited or damaged. {_AGAIN}",
    )


def _check_layout(
    path: str | os.PathLike[str],
    layout: Layout,
    facts: Mapping[str, str],
    dtypes: Mapping[str, str],
) -> None:
    """Refuse a file that holds too little, too much, or another type of numbers."""
    needed, known = set(layout.facts), {*layout.facts, *layout.more_facts, *_OWN_FACTS}
    types = {**layout.more_arrays, **layout.arrays}
    odd = [
        *(needed - set(facts)),
        *(set(facts) - known),
        *(set(layout.arrays) - set(dtypes)),
        *(name for name, dtype in dtypes.items() if types.get(name) != dtype),
    ]
    expect(
        not odd,
        "path",
        os.fspath(path),
        f"must hold what it should in {', '.join(map(repr, sorted(odd)))}",
        f"Something is missing, unknown, or of another type. {_AGAIN}",
    )


Described = tuple[str, str, tuple[int, ...], Iterable[bytes]]


def _described(arrays: Mapping[str, NDArray[Any] | OnDisk]) -> Iterator[Described]:
    """Name, type, shape and bytes of each array, in order of name."""
    for name in sorted(arrays):
        array = arrays[name]
        parts = array.rows() if isinstance(array, OnDisk) else [array]
        content = (np.asarray(part, order="C").tobytes() for part in parts)
        yield name, array.dtype.str, array.shape, content


def checksum(arrays: Iterable[Described], header: Mapping[str, str]) -> str:
    """SHA-256 over a header and every array's name, type, shape and bytes.

    Args:
        arrays: Name, type, shape and bytes (in parts) of each, in order of name.
        header: Strings by name.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, dtype, shape, content in arrays:
        digest.update(f"\0{name}\0{dtype}\0{shape}\0".encode())
        for part in content:
            digest.update(part)
    return digest.hexdigest()
