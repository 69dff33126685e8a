"""What a data set holds of its examples, and hashes of it.

A data set is recognised by what can be read without asking for an example: arrays that
it keeps in memory, names of files, the files themselves, and how its transforms
describe themselves. ``__getitem__`` is never called, so no augmentation and no download
runs, and no random state changes. All attributes of the object are looked at, and those
of data sets that it wraps, so the names of attributes do not matter. What is found this
way is compared by ``opacus_pi.ledger.same_data``.

*What breaks it:* an attribute that is not an array, a table or a list of texts, such as
an open database, is not read. Of large inputs only some numbers are compared, and of
many files only some are opened.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._shown import stable_repr

__all__ = ["as_array", "hash_arrays", "held_parts", "is_subset"]

_MAX_NUMBERS = 1 << 22  # of the inputs of one attribute
_MAX_ROWS = 1 << 17
_MAX_FILES = 1 << 11  # that are opened
_BLOCK = 1 << 12  # bytes that are read at each end of a file
_MAX_DEPTH = 8  # of data sets that hold data sets
_PLAIN = (bool, int, float, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, str, bytes, os.PathLike, np.ndarray, np.generic)

Places = NDArray[np.int64]


def held_parts(data_set: Any, places: Places) -> dict[str, str]:
    """Return hashes of what a data set holds, by the letter of each part.

    Args:
        data_set: The data set.
        places: int64 ``(n,)``, the positions that count.

    Returns:
        Hashes of what is found: ``"e"``, numbers of the inputs of every example;
        ``"s"``, the same of evenly spaced examples only; ``"p"``, names of files or
        other texts of all examples; ``"f"``, the files of all examples; ``"g"``, files
        of evenly spaced examples; ``"t"``, the transforms.
    """
    found: dict[str, list[str]] = {}
    all_numbers = all_files = True
    for holder, at in _holders(data_set, places, _MAX_DEPTH):
        for name, column in _columns(holder):
            texts = _texts_of(column)
            if texts is not None:
                _add(found, "p", *_relative(texts, at))
                files = _files(holder, texts, at)
                _add(found, "f", *files)
                all_files = all_files and (not files or len(files) == len(at))
            elif (numbers := _numbers(name, column, at)) is not None:
                _add(found, "e", hash_arrays(numbers))
                all_numbers = all_numbers and len(numbers) == len(at)
        _add(found, "t", *_transforms(holder))
    parts = {letter: _hash_texts(texts) for letter, texts in found.items()}
    for whole, some, complete in (("e", "s", all_numbers), ("f", "g", all_files)):
        if whole in parts and not complete:
            parts[some] = parts.pop(whole)
    return parts


def is_subset(data_set: Any) -> bool:
    """Return whether this is a subset: positions of another data set."""
    return hasattr(data_set, "dataset") and hasattr(data_set, "indices")


def as_array(found: Any) -> NDArray[Any] | None:
    """Return the object as an array of numbers or strings, or None if it is not one."""
    if found is None or callable(found):
        return None
    if hasattr(found, "cpu"):
        found = found.detach().cpu()
    try:
        array = np.asarray(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.ndim >= 1 and array.dtype.kind in "biufU" else None


def hash_arrays(*arrays: NDArray[Any]) -> str:
    """Return sixteen hexadecimal digits that depend on values, not on their type."""
    wide = {"b": np.int64, "i": np.int64, "u": np.int64, "f": np.float64}
    digest = hashlib.sha256()
    for array in arrays:
        values = array.astype(wide.get(array.dtype.kind, array.dtype), order="C")
        digest.update(f"{values.dtype.str}{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def evenly_spaced(places: Places, most: int) -> Places:
    """Return at most so many of the positions, evenly spaced, first and last included.

    Args:
        places: int64 ``(n,)``.
        most: At least 1.
    """
    steps = np.linspace(0, len(places) - 1, min(most, len(places)))
    return places[steps.astype(np.int64)]


def strided(values: Any) -> bool:
    """Return whether these are numbers in memory: an array, or a dense torch tensor."""
    if isinstance(values, np.ndarray):
        return True
    if not (hasattr(values, "detach") and hasattr(values, "is_floating_point")):
        return False
    place = values.device.type
    return str(values.layout) == "torch.strided" and place != "meta"


def _add(found: dict[str, list[str]], letter: str, *texts: str) -> None:
    """Add texts to a part, which exists from its first text on."""
    if texts:
        found.setdefault(letter, []).extend(texts)


def _hash_texts(texts: Sequence[str]) -> str:
    """Return sixteen hexadecimal digits of texts and their order."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode(errors="surrogatepass")
        digest.update(f"{len(raw)}:".encode() + raw)
    return digest.hexdigest()[:16]


def _holders(data_set: Any, places: Places, depth: int) -> Iterator[tuple[Any, Places]]:
    """Yield a data set and those that it wraps, with the positions that count in each.

    Args:
        data_set: The outermost data set.
        places: Positions in it.
        depth: How many more levels are followed.
    """
    if is_subset(data_set):
        yield data_set, places[:0]  # its transforms count, not the list of positions
        inner = np.asarray(data_set.indices, dtype=np.int64)[places]
        yield from _holders(data_set.dataset, inner, depth - 1)
        return
    yield data_set, places
    size = len(data_set)
    for name, value in sorted(getattr(data_set, "__dict__", {}).items()):
        if depth <= 0:
            return
        if name == "datasets" and isinstance(value, list | tuple):
            yield from _concatenated(value, places, size, depth)
        elif _is_data_set(value) and _size(value) == size:
            yield from _holders(value, places, depth - 1)


def _concatenated(
    parts: Sequence[Any], places: Places, size: int, depth: int
) -> Iterator[tuple[Any, Places]]:
    """Yield the parts of a concatenation, each with its own positions.

    Args:
        parts: Data sets, one after another.
        places: Positions in the whole.
        size: Length of the whole; parts of another total are something else.
        depth: As in ``_holders``.
    """
    sizes = [_size(part) for part in parts]
    known = [length for length in sizes if length is not None]
    ends = np.cumsum(known)
    if len(known) == len(parts) and sum(known) == size:
        for part, length, end in zip(parts, known, ends.tolist(), strict=True):
            start = end - length
            inside = places[(places >= start) & (places < end)] - start
            yield from _holders(part, inside, depth - 1)


def _is_data_set(value: Any) -> bool:
    """Return whether this looks like a data set with positions, and no plain value."""
    kind = type(value)
    return (
        hasattr(kind, "__len__")
        and hasattr(kind, "__getitem__")
        and not isinstance(value, _CONTAINERS)
        and not callable(value)
        and not hasattr(value, "detach")
        and not hasattr(value, "iloc")
    )


def _size(value: Any) -> int | None:
    """Return the length of an object, or None if it cannot say one."""
    try:
        return len(value)
    except (TypeError, ValueError, RuntimeError, OSError):
        return None


def _columns(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds with one entry for each example, by attribute.

    Attributes of the object itself count, because a property might load or compute
    anything. Those that are called a cache change while the data set is used.
    """
    size = len(holder)
    if isinstance(holder, list | tuple):
        yield "", list(holder)
    for name, value in sorted(getattr(holder, "__dict__", {}).items()):
        if "cache" in name.lower():
            continue
        inside: Sequence[Any] = ()
        if isinstance(value, dict):
            inside = [entry for _, entry in sorted(value.items(), key=str)]
        elif isinstance(value, list | tuple):
            inside = value
        if not _is_column(value, size) and len(inside) < _BLOCK:
            yield from ((f"{name}[]", one) for one in inside if _is_column(one, size))
        elif _is_column(value, size):
            yield name, value


def _is_column(value: Any, size: int) -> bool:
    """Return whether a value has one entry for each example."""
    if strided(value) or hasattr(value, "iloc"):
        return tuple(value.shape)[:1] == (size,)
    return isinstance(value, list | tuple) and len(value) == size


def _texts_of(column: Any) -> list[str] | None:
    """Return one text for each example, or None if these are not texts.

    Args:
        column: A list, an array or a table with one row for each example. Of a row with
            several entries all count.
    """
    if hasattr(column, "iloc"):
        return [_one_text(row) for row in column.to_numpy().tolist()]
    if isinstance(column, np.ndarray):
        if column.dtype.kind not in "UO" or column.ndim > 2:
            return None
        column = column.tolist()
    if not isinstance(column, list | tuple) or not len(column):
        return None
    first = column[0]
    rows = isinstance(first, list | tuple) and len(first) > 0
    if not isinstance(first[0] if rows else first, str | os.PathLike):
        return None
    plain = (*_PLAIN, os.PathLike)
    for row in column:
        entries = row if isinstance(row, list | tuple) else (row,)
        if not all(isinstance(entry, plain) for entry in entries):
            return None
    return [_one_text(row) for row in column]


def _one_text(row: Any) -> str:
    """Return the entries of a row as one text; the first entry comes first."""
    if isinstance(row, list | tuple):
        return "\0".join(_one_text(entry) for entry in row)
    return os.fspath(row) if isinstance(row, os.PathLike) else str(row)


def _relative(texts: Sequence[str], places: Places) -> list[str]:
    """Return texts without the folder that all have in common, with ``/`` in paths.

    A folder that was moved as a whole holds the same data set.
    """
    common = os.path.commonprefix([min(texts), max(texts)])
    start = max(common.rfind("/"), common.rfind(os.sep)) + 1
    return [texts[i][start:].replace(os.sep, "/") for i in places.tolist()]


def _files(holder: Any, texts: Sequence[str], places: Places) -> list[str]:
    """Return what describes the content of some files; empty if these are no files.

    Args:
        holder: The data set. Relative names are looked for in the folders that its
            attributes name, then in the working directory.
        texts: One text for each example, which begins with a file's name.
        places: The positions that count.
    """
    if not len(places):
        return []
    held = getattr(holder, "__dict__", {}).values()
    folders = [Path(one) for one in held if isinstance(one, str | os.PathLike)]
    first = texts[int(places[0])].split("\0")[0]
    for folder in (*folders, Path()):
        if _is_file(folder / first):
            chosen = evenly_spaced(places, _MAX_FILES).tolist()
            return [_content(folder / texts[i].split("\0")[0]) for i in chosen]
    return []


def _is_file(path: Path) -> bool:
    """Return whether this is a regular file; a text that cannot be a name is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _content(path: Path) -> str:
    """Return the size of a file and a hash of its first and last bytes."""
    if not _is_file(path):
        return "missing"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_BLOCK))
            file.seek(max(0, size - _BLOCK))
            digest.update(file.read(_BLOCK))
    except OSError:
        return "unreadable"
    return f"{size}:{digest.hexdigest()[:16]}"


def _numbers(name: str, column: Any, places: Places) -> NDArray[Any] | None:
    """Return some numbers of each example, or None if the column has none.

    Columns of single numbers are left out unless they are known to be inputs: a data
    set may count or note something there while it is used.

    Args:
        name: The attribute; it ends with ``[]`` inside of a list or a dict.
        column: An array, or a list of arrays or of tuples with them.
        places: The positions that count.
    """
    chosen = evenly_spaced(places, _MAX_ROWS)
    if not len(chosen):
        return None
    if not strided(column):
        return _numbers_of_items(column, chosen)
    shape = tuple(column.shape)
    if len(shape) == 1 and not (name == "data" or name.endswith("[]")):
        return None
    width = math.prod(shape[1:])
    if not width:
        return None
    columns = _spread(width, _MAX_NUMBERS // len(chosen))
    rows = column.reshape(shape[0], width)[:, columns][chosen.tolist()]
    if hasattr(rows, "is_floating_point") and rows.is_floating_point():
        rows = rows.double()  # numpy has no bfloat16
    return as_array(rows)


def _numbers_of_items(
    items: Sequence[Any], chosen: Places
) -> NDArray[np.float64] | None:
    """Return a hash of each item as a number, or None if items are no arrays.

    Args:
        items: One item for each example: an array, or a tuple with arrays.
        chosen: The positions to read.
    """
    most = max(1, _MAX_NUMBERS // len(chosen))
    hashes = np.empty(len(chosen))
    for i, place in enumerate(chosen.tolist()):
        item = items[place]
        parts = item if isinstance(item, list | tuple) else [item]
        if not any(strided(part) for part in parts):
            return None
        found = []
        for part in parts:
            if strided(part):
                flat = part.reshape(-1)
                flat = flat[_spread(len(flat), most)]
                is_real = hasattr(flat, "is_floating_point") and (
                    flat.is_floating_point()
                )
                array = as_array(flat.double() if is_real else flat)
                found.append(np.empty(0) if array is None else array)
            elif isinstance(part, int | float):
                found.append(np.array([part], dtype=np.float64))
        hashes[i] = int(hash_arrays(*found)[:12], 16)  # below 2^53: exact
    return hashes


def _spread(width: int, most: int) -> slice:
    """Return a slice of at most so many evenly spaced columns, around the middle."""
    step = max(1, -(-width // max(1, most)))
    return slice((width - 1) % step // 2, width, step)


def _transforms(holder: Any) -> list[str]:
    """Return how the callables that an object holds describe themselves.

    Addresses and the modules of classes are left out, so that two processes get the
    same text. The list begins with a fixed entry if the code of the class is known.
    """
    module = type(holder).__module__.split(".")[0]
    found = ["known"] if module in ("torch", "torchvision", "builtins") else []
    for name, value in sorted(getattr(holder, "__dict__", {}).items()):
        named = "transform" in name.lower() or "augment" in name.lower()
        if named or callable(value):
            found.append(f"{name}={stable_repr(value)}")
    return found
