"""Whatever else a data set keeps, beside its examples: settings of ``__getitem__``.

A seed, an offset or the name of an order may decide which example a position names. So
all attributes of the object are described by texts that can be compared, as well as
those of its class, and the global and enclosing variables that its ``__getitem__``
names. Names of folders do not count, because a data set may move.

*What breaks it:* settings that other functions read, and objects that cannot be
described, such as a random generator or an open database. The latter are reported.
"""

import argparse
import contextlib
import dataclasses
import enum
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opacus_pi.ledger.stored_arrays import as_array, hash_arrays, sample_of, strided

__all__ = ["has_known_code", "settings_of"]

_KNOWN = ("torch", "torchvision", "builtins")  # their data sets index plainly
_PLAIN = (bool, int, float, complex, bytes, range, slice, enum.Enum, np.generic)
_MAX_ENTRIES = 1 << 12  # of a list that is described entry by entry
_MAX_DEPTH = 4


def has_known_code(holder: Any) -> bool:
    """Return whether the code of a data set is torch's or torchvision's."""
    return type(holder).__module__.split(".")[0] in _KNOWN


def settings_of(holder: Any, read: Collection[int]) -> tuple[list[str], bool]:
    """Describe what a data set keeps beside its examples.

    Args:
        holder: The data set.
        read: Identities of the objects that were compared in another way.

    Returns:
        One text for each setting, and whether all attributes could be described.
    """
    found, complete = [], True
    for name, value in sorted(getattr(holder, "__dict__", {}).items()):
        if _counts(name):
            text = _described(value, read, _MAX_DEPTH)
            complete = complete and text is not None
            found += [f"{name}={text}"] * bool(text)
    for name, value in _named_by_the_code(type(holder)):
        text = _described(value, read, _MAX_DEPTH)
        found += [f"{name}={text}"] * bool(text)
    return found, complete


def _counts(name: str) -> bool:
    """Return whether an attribute is a setting; transforms are compared elsewhere.

    The package ``datasets`` keeps a hash of how a data set was made. It is another one
    after any call, also after one that changes nothing, as a ``Trainer`` makes it.
    """
    lower = name.lower()
    if name == "_fingerprint":
        return False
    return not any(part in lower for part in ("cache", "transform", "augment"))


def _named_by_the_code(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield attributes of a class, and the variables that its ``__getitem__`` names.

    Args:
        kind: The class of a data set.
    """
    for one in kind.__mro__:
        if one.__module__.split(".")[0] not in (*_KNOWN, "typing", "abc"):
            for name, value in sorted(vars(one).items()):
                is_data = not callable(value) and not hasattr(value, "__get__")
                if is_data and not name.startswith("__") and _counts(name):
                    yield f"class.{name}", value
    for method in ("__getitem__", "__getitems__"):
        function = getattr(kind, method, None)
        code = getattr(function, "__code__", None)
        if function is None or code is None:
            continue
        known = function.__globals__
        yield from ((name, known[name]) for name in code.co_names if name in known)
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            with contextlib.suppress(ValueError):  # it has no value yet
                yield name, cell.cell_contents


def _described(value: Any, read: Collection[int], depth: int) -> str | None:
    """Return a text for a setting; empty if it does not count, None if there is none.

    Args:
        value: The setting.
        read: As for ``settings_of``.
        depth: How many more levels are followed.
    """
    if id(value) in read or callable(value) or isinstance(value, os.PathLike):
        return ""
    if isinstance(value, str):
        return "" if _is_place(value) else repr(value)
    if value is None or isinstance(value, _PLAIN) or _is_type_of_numbers(value):
        return f"{type(value).__name__}:{value!r}"
    if strided(value):
        array = sample_of(value)
        return None if array is None else hash_arrays(array)
    entries = _entries(value)
    return None if entries is None else _joined(entries, read, depth)


def _is_type_of_numbers(value: Any) -> bool:
    """Return whether this is a type or a place of numbers, of torch or NumPy."""
    named = type(value).__qualname__ in ("dtype", "device")
    return named or isinstance(value, np.dtype)


def _entries(value: Any) -> Sequence[Any] | None:
    """Return what a container holds, in a fixed order; None if this is none."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if dataclasses.is_dataclass(value) or isinstance(value, argparse.Namespace):
        return sorted(vars(value).items())
    return None


def _joined(values: Sequence[Any], read: Collection[int], depth: int) -> str | None:
    """Return one text for several settings; None if one of them has none."""
    if len(values) > _MAX_ENTRIES:
        array = as_array(values)
        return None if array is None else hash_arrays(array)
    if depth <= 0:
        return None
    texts = [_described(one, read, depth - 1) for one in values]
    known = [text for text in texts if text is not None]
    if len(known) < len(texts):
        return None
    return f"{len(known)}[{chr(0).join(known)}]"


def _is_place(text: str) -> bool:
    """Return whether a text names a place in the file system."""
    if os.sep in text or "/" in text:
        return True
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False
