"""Safetensors files of NumPy arrays with a kind, a version and a checksum.

A file holds arrays by name and, in its header, short strings ("facts"). Pickle is never
used, so opening a file runs no code. A file appears under its name only when it is
complete, and a reader refuses a file that was damaged, edited, or written for another
purpose. The checksum covers every array and every fact; it does not detect a person who
edits a file and computes the checksum again.

Files larger than memory are read in parts (``check_file``, ``read_columns``), by plain
reads: the pages of a memory map would stay in memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from opacus_pi._validate import expect, require
from opacus_pi.files.atomic_file import replacing
from opacus_pi.files.kinds import KINDS, FileKind
from opacus_pi.files.regular_file import require_regular

Arrays = dict[str, NDArray[Any]]
_AGAIN = "Write the file again, or restore it from a copy."
_OWN_FACTS = {"kind", "version"}
# The length of a file proves the size of an array, unless the array has no entries:
# its other axes could then claim any length, and filling defaults would run out of
# memory.
_MAX_WIDTH = 1 << 24
_TYPES: dict[str, np.dtype[Any]] = {
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
# The parts of an array that a checksum covers: name, type, shape, and bytes in parts.
Described = tuple[str, str, tuple[int, ...], Iterable[bytes | memoryview]]


@dataclass(frozen=True)
class Layout:
    """The arrays and facts that a file of one kind holds.

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
    kind: FileKind,
    arrays: Mapping[str, NDArray[Any]],
    facts: Mapping[str, str],
) -> None:
    """Write arrays and facts to one file, atomically.

    The bytes go to a temporary file in the same directory, which is flushed to the
    disk and then renamed: a reader sees the old file or the new one, never a part.

    Args:
        path: The file's name.
        kind: The kind of file; its name and version are stored in the header.
        arrays: Arrays by name.
        facts: Strings by name; ``kind``, ``version`` and ``checksum`` are reserved.
    """
    contiguous = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    header = {**facts, "kind": kind.name, "version": str(kind.version)}
    header["checksum"] = checksum(_described(contiguous), header)
    with replacing(path) as file:
        file.write(_file_header(contiguous, header))
        for name in _in_file_order(contiguous):
            for part in _bytes_of(contiguous[name]):
                file.write(part)


def read_arrays(
    path: str | os.PathLike[str], kind: FileKind, layout: Layout | None = None
) -> tuple[Arrays, dict[str, str]]:
    """Read a file that ``write_arrays`` wrote, after checking it.

    Args:
        path: The file's name.
        kind: What the file must contain, and the version that this release reads.
        layout: The arrays and facts of such a file. Default: any.

    Returns:
        The arrays and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, edited, of another version, or not of this
            kind.
    """
    with opened(path, kind):
        pass
    # The file may have been replaced since: from here on only one handle is used.
    with open(path, "rb") as file:
        entries, start = _entries_of(file)
        header = entries.pop("__metadata__", {})
        arrays = {
            name: _read_whole(file, facts, start) for name, facts in entries.items()
        }
    _check_kind(os.fspath(path), header, kind)
    _check(path, header, arrays, layout)
    return arrays, header


def check_file(
    path: str | os.PathLike[str], kind: FileKind, layout: Layout | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Make the checks of ``read_arrays`` without holding the arrays in memory.

    Args:
        path: The file's name.
        kind: What the file must contain, and the version that this release reads.
        layout: As for ``read_arrays``.

    Returns:
        The arrays' shapes and the facts, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``read_arrays``.
    """
    with opened(path, kind) as (_, header):
        on_disk = arrays_on_disk(path)
    _check(path, header, on_disk, layout)
    return {name: array.shape for name, array in on_disk.items()}, header


def read_columns(
    path: str | os.PathLike[str], columns: slice, names: Collection[str]
) -> Arrays:
    """Read a part of a file that ``check_file`` has checked.

    Args:
        path: The file's name.
        columns: The slice of the last axis to read.
        names: Names of the arrays to slice; the others are read whole.

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
        name: The array's name.

    Returns:
        The whole array.
    """
    return arrays_on_disk(path)[name].read(slice(None))


@dataclass(frozen=True)
class ArrayOnDisk:
    """The place of an array in a file, from which parts are read."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def rows(self, columns: slice = slice(None)) -> Iterator[NDArray[Any]]:
        """Yield the chosen columns of each row, one row after the other."""
        length, (start, stop, step) = self._length, columns.indices(self._length)
        with open(self.path, "rb") as file:
            for row in range(math.prod(self.shape[:-1])):
                file.seek(self.offset + (row * length + start) * self.dtype.itemsize)
                yield np.fromfile(file, self.dtype, stop - start)[::step]

    def read(self, columns: slice) -> NDArray[Any]:
        """Return the chosen columns of all rows."""
        count = len(range(*columns.indices(self._length)))
        shape = (*self.shape[:-1], count) if self.shape else ()
        return np.array(list(self.rows(columns)), self.dtype).reshape(shape)

    @property
    def _length(self) -> int:
        """Return the number of entries of a row."""
        return self.shape[-1] if self.shape else 1


def arrays_on_disk(path: str | os.PathLike[str]) -> dict[str, ArrayOnDisk]:
    """Return the places of all arrays of a safetensors file, from its header.

    Args:
        path: A file that safetensors itself can open.

    Returns:
        The arrays by name.

    Raises:
        ValueError: If an array has a type that opacus_pi never writes.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        entries, start = _entries_of(file)
    entries.pop("__metadata__", None)
    return {
        key: ArrayOnDisk(
            name,
            _TYPES[facts["dtype"]],
            tuple(facts["shape"]),
            start + facts["data_offsets"][0],
        )
        for key, facts in entries.items()
    }


def _entries_of(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of an open safetensors file, and where the data begins."""
    size = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(size))
    for key, facts in entries.items():
        expect(
            key == "__metadata__" or facts["dtype"] in _TYPES,
            "path",
            f"{facts.get('dtype')} in {file.name}",
            f"must contain {key!r} in one of {', '.join(_TYPES)}",
            _AGAIN,
        )
    return entries, 8 + size


def _read_whole(file: BinaryIO, facts: Mapping[str, Any], start: int) -> NDArray[Any]:
    """Return an array of an open file, read-only; memory holds it once."""
    file.seek(start + facts["data_offsets"][0])
    whole = np.fromfile(file, _TYPES[facts["dtype"]], math.prod(facts["shape"]))
    whole.resize(facts["shape"], refcheck=False)  # a reshaped view would own no data
    whole.flags.writeable = False
    return whole


@contextmanager
def opened(
    path: str | os.PathLike[str], kind: FileKind, framework: str = "np"
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a file and read its header, if kind and version are right.

    Args:
        path: The file's name.
        kind: What the file must contain, and the version that this release reads.
        framework: The library whose tensors are returned, as in
            ``safetensors.safe_open``.

    Yields:
        The open file and the facts of its header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, of another kind or version, or not a
            regular file.
    """
    name = os.fspath(path)
    require_regular(name)
    try:
        with safe_open(name, framework=framework) as file:
            header = file.metadata() or {}
            _check_kind(name, header, kind)
            for key in file.keys():
                _check_shape(name, key, file.get_slice(key).get_shape())
            yield file, header
    except (SafetensorError, TypeError, AttributeError) as error:
        what = f"{name} ({error}). It is truncated, or another kind of file. {_AGAIN}"
        if kind.from_archive and _is_archive(name):
            what = f"{name}, which is a file of torch.save. {kind.from_archive}"
        raise ValueError(
            f"path must be a whole file with {kind.words}, got {what}"
        ) from error


def _is_archive(name: str) -> bool:
    """Return whether a file begins as those of ``torch.save`` do."""
    with open(name, "rb") as file:
        return file.read(2) == b"PK"


def named_kind(path: str | os.PathLike[str]) -> str | None:
    """Return the kind that a safetensors file names in its header.

    Args:
        path: The file's name.

    Returns:
        The kind's name, which may be unknown; empty if the header names none; None if
        the file cannot be opened.
    """
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            return str((file.metadata() or {}).get("kind", ""))
    except (SafetensorError, OSError):
        return None


def _check_shape(path: str, name: str, shape: Sequence[int]) -> None:
    """Refuse an empty array that claims a length which the file cannot prove."""
    require(
        math.prod(shape) > 0 or max(shape, default=0) <= _MAX_WIDTH,
        f"{path} has an entry {name!r} without values, of shape {list(shape)}.",
        _AGAIN,
    )


def _check_kind(name: str, header: Mapping[str, str], kind: FileKind) -> None:
    """Refuse a file of another kind or version."""
    written = header.get("kind", "something else")
    found = KINDS[written].words if written in KINDS else written
    expect(
        header.get("kind") == kind.name,
        "path",
        f"{found} in {name}",
        f"must contain {kind.words}",
        f"Pass the name of a file with {kind.words}.",
    )
    readable = [str(version) for version in kind.readable_versions]
    expect(
        header.get("version") in readable,
        "path",
        f"version {header.get('version')} in {name}",
        f"must be in format version {' or '.join(readable)}",
        "Read it with the release of opacus_pi that wrote it.",
    )


def _check(
    path: str | os.PathLike[str],
    header: dict[str, str],
    arrays: Mapping[str, NDArray[Any] | ArrayOnDisk],
    layout: Layout | None,
) -> None:
    """Check a file's checksum, take it out of the header, and check the layout."""
    require_checksum(path, header, _described(arrays))
    if layout is not None:
        _check_layout(path, layout, header, {n: a.dtype.str for n, a in arrays.items()})


def require_checksum(
    path: str | os.PathLike[str], header: dict[str, str], arrays: Iterable["Described"]
) -> None:
    """Take the checksum out of a header, and refuse the file if it does not match.

    Args:
        path: The file's name.
        header: The strings in the file's header; changed in place.
        arrays: The arrays of the file.

    Raises:
        ValueError: If the file was edited or damaged.
    """
    require(
        header.pop("checksum", None) == checksum(arrays, header),
        f"{os.fspath(path)} does not match its checksum.",
        f"It was edited or damaged. {_AGAIN}",
    )


def _check_layout(
    path: str | os.PathLike[str],
    layout: Layout,
    facts: Mapping[str, str],
    dtypes: Mapping[str, str],
) -> None:
    """Refuse a file that lacks an array or string, or holds an unexpected one."""
    needed, known = set(layout.facts), {*layout.facts, *layout.more_facts, *_OWN_FACTS}
    types = {**layout.more_arrays, **layout.arrays}
    unexpected = [
        *(needed - set(facts)),
        *(set(facts) - known),
        *(set(layout.arrays) - set(dtypes)),
        *(name for name, dtype in dtypes.items() if types.get(name) != dtype),
    ]
    require(
        not unexpected,
        f"{os.fspath(path)} has entries that are missing, unknown or of another type: "
        f"{', '.join(map(repr, sorted(unexpected)))}.",
        _AGAIN,
    )


def _described(arrays: Mapping[str, NDArray[Any] | ArrayOnDisk]) -> Iterator[Described]:
    """Yield what the checksum covers of each array, in order of name."""
    for name in sorted(arrays):
        array = arrays[name]
        parts = array.rows() if isinstance(array, ArrayOnDisk) else [array]
        content = (view for part in parts for view in _bytes_of(part))
        yield name, array.dtype.str, array.shape, content


def _bytes_of(array: NDArray[Any]) -> Iterator[memoryview]:
    """Yield the bytes of an array without copying them, if it is contiguous."""
    if array.size:
        yield np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def _in_file_order(arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Return the names in the order of the file, as safetensors itself writes them.

    The types come in the reverse order of ``_TYPES``, so every array is aligned.
    """
    places = {dtype: place for place, dtype in enumerate(_TYPES.values())}
    return sorted(arrays, key=lambda name: (-places[arrays[name].dtype], name))


def _file_header(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, str]) -> bytes:
    """Return what a safetensors file has before the arrays' bytes.

    Args:
        arrays: The arrays by name.
        facts: Strings by name.
    """
    names = {dtype: name for name, dtype in _TYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(facts)}
    start = 0
    for name in _in_file_order(arrays):
        array = arrays[name]
        end = start + array.nbytes
        entries[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    return len(text).to_bytes(8, "little") + text


def checksum(arrays: Iterable[Described], header: Mapping[str, str]) -> str:
    """Return the SHA-256 of a header and of every array's name, type, shape and bytes.

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
