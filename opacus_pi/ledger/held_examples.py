"""What a data set holds of its examples, and hashes of it.

A data set is recognised by what can be read without asking for an example: arrays that
it keeps in memory, names of files, the files themselves, and how its transforms
describe themselves. ``__getitem__`` is never called, so no augmentation and no download
runs, and no random state changes. All attributes of the object are looked at, and those
of data sets that it wraps, so the names of attributes do not matter. What is found this
way is compared by ``opacus_pi.ledger.same_data``.

*What breaks it:* an attribute that is neither an array, a table nor a list, such as an
open database, is not read, which is said. Of large inputs only some numbers are
compared, and of many files only some are opened.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._shown import stable_repr
from opacus_pi.ledger.file_contents import FileContent, content_of, is_file
from opacus_pi.ledger.held_settings import has_known_code, settings_of
from opacus_pi.ledger.stored_arrays import (
    MAX_NUMBERS,
    Places,
    as_array,
    evenly_spaced,
    hash_arrays,
    real_numbers,
    rows_of,
    sample_of,
    spread,
    strided,
)
from opacus_pi.ledger.tables import table_of

__all__ = ["held_parts", "is_subset"]

_MAX_ROWS = 1 << 17
_MAX_FILES = 1 << 11  # that are opened
_MAX_ENTRIES = 1 << 12  # of a list or dict whose entries are looked at
_MAX_DEPTH = 8  # of data sets that hold data sets
_PLAIN = (bool, int, float, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, range, str, bytes, os.PathLike)
_LABELS = ("targets", "labels")  # the attributes that the first part of a name hashes


def held_parts(
    data_set: Any, places: Places, *, labelled: bool, alone: bool = False
) -> dict[str, str]:
    """Return hashes of what a data set holds, by the letter of each part.

    Args:
        data_set: The data set.
        places: int64 ``(n,)``, the positions that count.
        labelled: Whether its labels are known under their usual names.
        alone: Whether to hash these examples as if there were no others: then a data
            set from which the others were removed has the same hashes.

    Returns:
        Hashes of what is found: ``"e"``, numbers of the inputs of every example;
        ``"s"``, the same of evenly spaced examples only; ``"o"``, orders; ``"y"``,
        other single numbers of each example, which may be labels; ``"n"``, the same
        if the labels are known; ``"p"``, names of files or other texts of all examples;
        ``"f"``, ends of the files of all examples; ``"w"``, their content; ``"v"``,
        the same of which only blocks were read; ``"g"``, ends of evenly spaced files;
        ``"a"``, settings; ``"b"``, settings of which some are not known; ``"t"``, the
        transforms.
    """
    found: dict[str, list[str]] = {}
    complete = {"e": True, "f": True, "w": True, "a": True}
    holders = [*_holders(data_set, places, _MAX_DEPTH)]
    if alone:
        holders = [(one, at) for one, at in holders if len(at) or is_subset(one)]
        if any(_is_shuffled(one) for one, _ in holders):  # rows may be of any example
            complete |= {"e": False, "f": False, "w": False}
    for depth, (holder, at) in enumerate(holders):
        table = table_of(holder)
        _add(found, "e", *table.inputs(at))
        _add(found, "y", *table.labels(at))
        complete["e"] &= table.is_whole(at)
        read = {id(inner) for inner in _wrapped(holder)}
        if labelled and not depth:
            read |= {id(getattr(holder, name, None)) for name in _LABELS} - {id(None)}
        for name, column in _columns(holder):
            if id(column) in read:
                continue
            chosen, here = _chosen(column, at) if alone else (column, at)
            hashes = _hashes_of(holder, name, chosen, here, labelled=labelled)
            for letter, texts, is_complete in hashes:
                _add(found, letter, *texts)
                complete[letter] = complete.get(letter, True) and is_complete
                read.add(id(column))
        if not has_known_code(holder):
            settings, known = settings_of(holder, read)
            found.setdefault("a", []).extend(settings)
            complete["a"] &= known
        if not (alone and is_subset(holder) and has_known_code(holder)):
            _add(found, "t", *_transforms(holder))
    return _named(found, complete)


def _hashes_of(
    holder: Any, name: str, column: Any, places: Places, *, labelled: bool
) -> Iterator[tuple[str, list[str], bool]]:
    """Yield hashes of a column, with the letter of their part; nothing if unreadable.

    Args:
        holder: The object that has it.
        name: The attribute.
        column: Its value, with one entry for each example.
        places: The positions that count.
        labelled: Whether the labels are known under their usual names.

    Yields:
        The letter, the hashes, and whether they depend on all examples that count.
    """
    texts = _texts_of(column)
    if texts is not None:
        yield "p", _relative(texts, places), True
        files = _files(holder, texts, places)
        is_complete = not files or len(files) == len(places)
        yield "f", [one.ends for one in files], is_complete
        yield "w", [one.content for one in files], all(one.is_whole for one in files)
    elif (numbers := _numbers(name, column, places)) is not None:
        yield "e", [hash_arrays(numbers)], len(numbers) == len(places)
    elif (single := _single_numbers(column, places)) is not None:
        letter = "o" if _is_order(single) else "n" if labelled else "y"
        yield letter, [hash_arrays(single)], True


def _named(found: dict[str, list[str]], complete: Mapping[str, bool]) -> dict[str, str]:
    """Return a hash of each part, under another letter if it is not complete.

    Args:
        found: Texts of each part.
        complete: Whether they depend on all examples that count.
    """
    if not complete["f"]:  # of some files only: what was read of them does not matter
        found.pop("w", None)
    parts = {letter: _hash_texts(texts) for letter, texts in found.items()}
    for whole, some in (("e", "s"), ("f", "g"), ("w", "v"), ("a", "b")):
        if whole in parts and not complete[whole]:
            parts[some] = parts.pop(whole)
    return parts


def _chosen(column: Any, places: Places) -> tuple[Any, Places]:
    """Return a column without the entries that do not count, and what to read of it.

    Of an order the ranks are kept: what remains of ``[0, 1, 2]`` without its second
    entry is ``[0, 1]``, as in a data set that never had it. Large arrays of numbers
    stay as they are, because every row is read by itself.

    Args:
        column: A list, an array or a table with one entry for each example.
        places: The positions that count.

    Returns:
        The column, and the positions in it that count.
    """
    everything = np.arange(len(places))
    if _permutation(column) is not None:
        numbers = as_array(column)[places]  # type: ignore[index]
        return np.argsort(np.argsort(numbers)), everything
    if hasattr(column, "iloc"):
        return column.iloc[places.tolist()], everything
    if not strided(column):
        return [column[i] for i in places.tolist()], everything
    is_small = column.ndim == 1 or getattr(column.dtype, "kind", "") in "UO"
    return (column[places.tolist()], everything) if is_small else (column, places)


def _permutation(column: Any) -> NDArray[Any] | None:
    """Return a column that has every position once; None if it is no such column."""
    if hasattr(column, "iloc"):
        return None
    numbers = _single_numbers(column, np.arange(len(column)))
    if numbers is None or not _is_order(numbers) or numbers.max() != len(numbers) - 1:
        return None
    return numbers


def _is_shuffled(holder: Any) -> bool:
    """Return whether an object holds all positions in another order than their own.

    Its other columns may be in that order, or not: then an example may be in any row.
    """
    orders = (_permutation(column) for _, column in _columns(holder))
    return any(one is not None and bool((np.diff(one) < 0).any()) for one in orders)


def is_subset(data_set: Any) -> bool:
    """Return whether this is a subset: positions of another data set."""
    return hasattr(data_set, "dataset") and hasattr(data_set, "indices")


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
        and not isinstance(value, (*_CONTAINERS, np.ndarray, np.generic))
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
        if not _is_column(value, size) and len(inside) < _MAX_ENTRIES:
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


def _files(holder: Any, texts: Sequence[str], places: Places) -> list[FileContent]:
    """Return what identifies the content of some files; empty if these are no files.

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
        if is_file(folder / first):
            chosen = evenly_spaced(places, _MAX_FILES).tolist()
            return [content_of(folder / texts[i].split("\0")[0]) for i in chosen]
    return []


def _numbers(name: str, column: Any, places: Places) -> NDArray[Any] | None:
    """Return some numbers of each example, or None if the column has none.

    Columns of single numbers are left out unless they are known to be inputs: a data
    set may count or note something there while it is used.

    Args:
        name: The attribute; it ends with ``[]`` inside of a list or a dict.
        column: An array, or a list of arrays or of tuples or dicts with them.
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
    if not all(shape[1:]):
        return None
    return as_array(rows_of(column, chosen))


def _single_numbers(column: Any, places: Places) -> NDArray[Any] | None:
    """Return a column with one number for each example, or None if it is no such one.

    Args:
        column: A list, an array or a tensor with one entry for each example.
        places: The positions that count.
    """
    if strided(column):
        numbers = sample_of(column) if column.ndim == 1 else None
    else:
        numbers = as_array(column)
    if numbers is None or numbers.shape != (len(column),) or numbers.dtype.kind == "U":
        return None
    return numbers[places]


def _is_order(numbers: NDArray[Any]) -> bool:
    """Return whether these may be positions: whole numbers from 0, all different."""
    whole = numbers.dtype.kind in "iu" and len(numbers) > 1 and numbers.min() >= 0
    return bool(whole) and len(np.unique(numbers)) == len(numbers)


def _wrapped(holder: Any) -> Iterator[Any]:
    """Yield the attributes that hold the data sets which are looked at themselves."""
    size = len(holder)
    for name, value in getattr(holder, "__dict__", {}).items():
        if name == "datasets" and isinstance(value, list | tuple):
            sizes = [length for part in value if (length := _size(part)) is not None]
            if len(sizes) == len(value) and sum(sizes) == size:
                yield value
        elif _is_data_set(value) and _size(value) == size:
            yield value
    if is_subset(holder):
        yield from (holder.dataset, holder.indices)


def _numbers_of_items(
    items: Sequence[Any], chosen: Places
) -> NDArray[np.float64] | None:
    """Return a hash of each item as a number, or None if items are no arrays.

    Args:
        items: One item for each example: an array, or a tuple or a dict with arrays.
        chosen: The positions to read.
    """
    most = max(1, MAX_NUMBERS // len(chosen))
    hashes = np.empty(len(chosen))
    for i, place in enumerate(chosen.tolist()):
        item = items[place]
        parts = _parts_of(item)
        if not any(strided(part) for part in parts):
            return None
        found = []
        for part in parts:
            if strided(part):
                flat = part.reshape(-1)
                flat = flat[spread(len(flat), most)]
                array = as_array(real_numbers(flat))
                found.append(np.empty(0) if array is None else array)
            elif isinstance(part, int | float):
                found.append(np.array([part], dtype=np.float64))
        hashes[i] = int(hash_arrays(*found)[:12], 16)  # below 2^53: exact
    return hashes


def _parts_of(item: Any) -> Sequence[Any]:
    """Return the entries of a tuple, or of a dict in the order of their names."""
    if isinstance(item, dict):
        return [entry for _, entry in sorted(item.items(), key=str)]
    return item if isinstance(item, list | tuple) else [item]


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
