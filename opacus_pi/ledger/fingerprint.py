"""A short text that identifies a data set, computed without loading an example.

A ledger's columns are positions in a data set, so a ledger that is used with another
data set gives wrong losses without an error. The fingerprint detects this. It is not
cryptographic evidence: data sets that differ only in inputs that are not hashed, or
that are loaded on demand, have the same fingerprint.

>>> class Digits:
...     targets = [0, 1, 1]
...
...     def __len__(self):
...         return 3
>>> fingerprint(Digits())
'Digits:3:8cc4e2b29a3c0356'
"""

import hashlib
import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect

__all__ = ["fingerprint"]

_MAX_NUMBERS = 1 << 20  # of inputs that are hashed
_INPUTS = re.compile(r":x[0-9a-f]{16}$")


def fingerprint(data_set: Any, *, inputs: bool = True) -> str:
    """Return a name made of a data set's class, length and hashes of labels and inputs.

    Labels are taken from the attribute ``targets``, ``labels`` or the last of
    ``tensors``; inputs from ``data`` or the other ``tensors``. For a ``Subset`` the
    whole data set is searched, at the positions in ``indices``. Of large inputs only
    evenly spaced examples are hashed, about a million numbers in all: differences in
    other examples are not noticed. ``__getitem__`` is never called and no random state
    is touched, so neither augmentation nor downloads run, and data sets that read files
    on demand have no hash of inputs. Without labels, the name is the class and the
    length.

    Args:
        data_set: Anything with a length.
        inputs: Whether to include the hash of inputs.

    Returns:
        ``"Class:length:labels:xinputs"``, without the parts that are not found.

    Raises:
        ValueError: If the data set has no length.
    """
    try:
        size = len(data_set)
    except TypeError:
        size = None
    expect(
        size is not None,
        "data_set",
        type(data_set).__qualname__,
        "must have a length",
        "Pass a map-style data set: a ledger needs positions of examples, which an "
        "iterable data set does not have.",
    )
    name = f"{_class_name(data_set)}:{size}"
    labels = _labels(data_set)
    name = name if labels is None else f"{name}:{_hash(labels)}"
    found = _inputs(data_set, np.arange(size)) if inputs and size else []
    return f"{name}:x{_hash(*found)}" if found else name


def same_data_set(one: str, other: str) -> bool:
    """Return whether two fingerprints agree in the parts that both of them have.

    Args:
        one: A fingerprint. Those of earlier releases have no part for inputs.
        other: Another, or any name that a user gave.
    """
    if _INPUTS.search(one) and _INPUTS.search(other):
        return one == other
    return _INPUTS.sub("", one) == _INPUTS.sub("", other)


def _is_subset(data_set: Any) -> bool:
    """Return whether this is a subset: positions of another data set."""
    return hasattr(data_set, "dataset") and hasattr(data_set, "indices")


def _class_name(data_set: Any) -> str:
    """Return the class name; of a subset, with the class of the whole data set."""
    name = type(data_set).__qualname__
    return f"{name}[{_class_name(data_set.dataset)}]" if _is_subset(data_set) else name


def _labels(data_set: Any) -> NDArray[Any] | None:
    """Return the label array, or None if there is none."""
    if _is_subset(data_set):
        labels = _labels(data_set.dataset)
        return None if labels is None else labels[np.asarray(data_set.indices)]
    for attribute in ("targets", "labels", "tensors"):
        found = getattr(data_set, attribute, None)
        if attribute == "tensors" and found:
            found = found[-1]
        labels = _as_array(found)
        if labels is not None and len(labels) == len(data_set):
            return labels
    return None


def _inputs(data_set: Any, places: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return stored inputs of some of the examples at these positions.

    Only attributes of the object itself count, because a property might load or compute
    anything. The list is empty if no inputs are stored.
    """
    if _is_subset(data_set):
        return _inputs(data_set.dataset, np.asarray(data_set.indices)[places])
    held = getattr(data_set, "__dict__", {})
    stored = list(held.get("tensors") or ())[:-1] or [held.get("data")]
    arrays = [_some(values, places, len(data_set)) for values in stored]
    return [array for array in arrays if array is not None]


def _some(values: Any, places: NDArray[np.int64], size: int) -> NDArray[Any] | None:
    """Return inputs of evenly spaced examples, or None if there is no array of them."""
    is_tensor = hasattr(values, "detach") and hasattr(values, "is_floating_point")
    shape = tuple(values.shape) if is_tensor or isinstance(values, np.ndarray) else ()
    if shape[:1] != (size,):
        return None
    most = max(1, _MAX_NUMBERS // max(1, math.prod(shape[1:])))
    steps = np.linspace(0, len(places) - 1, min(most, len(places))).astype(np.int64)
    rows = values[places[steps].tolist()]
    if is_tensor and rows.is_floating_point():
        rows = rows.double()  # numpy has no bfloat16
    return _as_array(rows)


def _as_array(found: Any) -> NDArray[Any] | None:
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


def _hash(*arrays: NDArray[Any]) -> str:
    """Return sixteen hexadecimal digits that depend on values, not on their type."""
    wide = {"b": np.int64, "i": np.int64, "u": np.int64, "f": np.float64}
    digest = hashlib.sha256()
    for array in arrays:
        values = array.astype(wide.get(array.dtype.kind, array.dtype), order="C")
        digest.update(f"{values.dtype.str}{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]
