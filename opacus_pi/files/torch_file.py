"""Read files of ``torch.save`` without running code from them.

``torch.load`` can unpickle any object, and so run any code. With ``weights_only=True``
it accepts tensors, containers, numbers and strings only. Programs often save a NumPy
number or their parsed arguments together with the weights. So a few types that cannot
run code are accepted as well (``_HARMLESS``), and so are the types that the user has
allowed by ``torch.serialization.add_safe_globals``.

*Guarantee.* No code from a file is run. *What breaks it*: a type or function that the
user allowed.

>>> import datetime, io
>>> file = io.BytesIO()
>>> torch.save({"accuracy": np.float64(0.5), "when": datetime.date(2024, 1, 1)}, file)
>>> _ = file.seek(0)
>>> read_torch_file(file)
Traceback (most recent call last):
    ...
opacus_pi.files.torch_file.OtherObjects: path: The open file cannot be read without running code from it, because it holds datetime.date. Save tensors, numbers and texts.
"""  # noqa: E501

import argparse
import errno
import os
import pathlib
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import IO, Any, cast

import numpy as np
import torch

from opacus_pi.files.regular_file import require_regular

__all__ = ["OtherObjects", "read_torch_file", "require_bounded"]

Source = str | os.PathLike[str] | IO[bytes]

# NumPy pickles its numbers and arrays by two functions that have no public name; they
# moved between NumPy 1 and 2, and files of both are read.
_NUMPY = {
    "scalar": np.float64(0).__reduce__()[0],
    "_reconstruct": np.empty(0).__reduce__()[0],
}
_HARMLESS: list[Any] = [
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in _NUMPY.items()
        for core in ("core", "_core")
    ),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.WindowsPath,
]
_SAFETENSORS = ".safetensors"  # torch would not read its own format under this name
_MAX_PICKLE = 1 << 24  # bytes, without the tensors, which are members of their own
# Types that a pickle can create with any length; torch itself never pickles them.
_OF_ANY_LENGTH = re.compile(r".*(bytearray|Tensor|[Tt]ypedStorage)")
# What a damaged pickle can raise besides UnpicklingError.
_DAMAGED = (
    struct.error,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    RecursionError,
)


# What torch says of options that do not fit a file, which is not damaged.
_OF_OPTIONS = ("map_location", "mmap", "device")
_LOCATION = "data location"  # of the option, or else of the file


class OtherObjects(ValueError):
    """The file is not damaged, but holds objects that only unpickling can load."""


def read_torch_file(
    source: Source,
    *,
    remedy: str = "Save tensors, numbers and texts.",
    **options: Any,
) -> Any:
    """Return what ``torch.save`` wrote, if it can be read without running code.

    Args:
        source: A file's name, or an open file. If reading fails, an open file is set
            back to the position that it had.
        remedy: One sentence: what the caller can do about a file with other objects.
        **options: Options of ``torch.load``, except ``weights_only``.

    Raises:
        OtherObjects: If it holds objects of other types; the message names them.
        ValueError: If the file is empty, cut short or damaged, or no regular file.
        RuntimeError, OSError: As ``torch.load``, if an option does not fit the file, or
            the file cannot be opened.
    """
    is_open = not isinstance(source, (str, os.PathLike))
    if not is_open:
        require_regular(cast(str, source))
        if os.fspath(cast(str, source)).endswith(_SAFETENSORS):
            with open(cast(str, source), "rb") as file:
                return _read(file, source, remedy, options | {"mmap": False})
    return _read(source, "The open file" if is_open else source, remedy, options)


def _read(source: Source, name: Any, remedy: str, options: dict[str, Any]) -> Any:
    """Return the content of a file, as ``read_torch_file``.

    Args:
        source: As for ``read_torch_file``.
        name: What messages call the file.
        remedy: As for ``read_torch_file``.
        options: Options of ``torch.load``.
    """
    is_open = not isinstance(source, (str, os.PathLike))
    start = cast(IO[bytes], source).tell() if is_open else 0
    try:
        with _harmless_types():
            return torch.load(source, **options, weights_only=True)
    except UnpicklingError as error:
        if found := _other_types(source, start):
            raise OtherObjects(
                f"path: {name} cannot be read without running code from it, because "
                f"it holds {', '.join(found)}. {remedy}"
            ) from error
        raise ValueError(
            f"path: {name} is damaged, or cannot be read without running code from it "
            f"({_cause(error)}). {remedy}"
        ) from error
    except (OSError, EOFError, RuntimeError, *_DAMAGED) as error:
        if not _is_damage(error, options):
            raise
        what = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(
            f"path must be a complete file of torch.save, got {name} "
            f"({type(error).__name__}: {what}). Restore it from a copy."
        ) from error


def _is_damage(error: Exception, options: dict[str, Any]) -> bool:
    """Return whether an error means that a file is damaged.

    A file that cannot be opened is another matter, and so is an option that does not
    fit, for which torch raises ``RuntimeError`` as well.

    Args:
        error: What ``torch.load`` has raised.
        options: Its options.
    """
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL  # of an archive that was cut
    if isinstance(error, RecursionError) or not isinstance(error, RuntimeError):
        return True
    is_placed = options.get("map_location") is not None
    words = (*_OF_OPTIONS, _LOCATION) if is_placed else _OF_OPTIONS
    return not any(word in str(error) for word in words)


@contextmanager
def _harmless_types() -> Iterator[None]:
    """Context in which torch accepts the harmless types as well.

    Types that the user has allowed stay allowed afterwards.
    """
    known = set(torch.serialization.get_safe_globals())
    more = [one for one in _HARMLESS if one not in known]
    with torch.serialization.safe_globals(more):
        yield


def require_bounded(path: Path) -> None:
    """Refuse an archive that needs much more memory than its size when it is read.

    ``torch.save`` stores every member of the zip archive once and uncompressed, so an
    undamaged archive is at least as large as its content. A few pickled bytes could
    still ask for an object of any length: the types that allow that are refused as
    well.

    Args:
        path: A file that begins like an archive.

    Raises:
        ValueError: If it is not such an archive.
    """
    try:
        is_bounded = _is_bounded(path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, *_DAMAGED) as error:
        raise ValueError(
            f"{path.name} is cut short or damaged, or torch.save did not write it"
        ) from error
    if not is_bounded:
        raise ValueError(
            f"{path.name} is not an archive of torch.save: it is compressed, or asks "
            "for more memory than the file has bytes"
        )


def _is_bounded(path: Path) -> bool:
    """Return whether reading an archive takes about as much memory as its length."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        if size > path.stat().st_size:
            return False
        pickles = [one for one in members if one.filename.endswith("data.pkl")]
        return (
            all(one.compress_type == zipfile.ZIP_STORED for one in members)
            and all(one.file_size <= _MAX_PICKLE for one in pickles)
            and not any(_has_sized_type(archive.read(one)) for one in pickles)
        )


def _has_sized_type(content: bytes) -> bool:
    """Return whether a pickle names a type that could be made with any length."""
    named = (name for op, name, _ in genops(content) if op.name == "GLOBAL")
    return any(_OF_ANY_LENGTH.fullmatch(str(name)) for name in named)


def _other_types(source: Source, start: int) -> list[str]:
    """Return the names of the types in a file that are not accepted, if it has any.

    Args:
        source: The file.
        start: The position at which the file begins, if it is open; it is restored.
    """
    is_open = not isinstance(source, (str, os.PathLike))
    try:
        if is_open:
            cast(IO[bytes], source).seek(start)
        with _harmless_types():
            found = torch.serialization.get_unsafe_globals_in_checkpoint(
                cast(Any, source)
            )
    except (UnpicklingError, RuntimeError, OSError, *_DAMAGED):  # an older format
        return []
    finally:
        if is_open:
            cast(IO[bytes], source).seek(start)
    return sorted(found)


def _cause(error: BaseException) -> str:
    """Return the part of torch's message that says what it did not accept."""
    text = " ".join(str(error).split())
    _, _, cause = text.rpartition("WeightsUnpickler error:")
    return (cause or text).strip().split(". ")[0].split(" Check the")[0]
