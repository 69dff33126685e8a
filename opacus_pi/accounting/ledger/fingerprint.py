"""A short text that tells one data set from another without reading an example.

>>> class Digits:
...     targets = [0, 1, 1]
...
...     def __len__(self):
...         return 3
>>> fingerprint(Digits())
'Digits:3:8cc4e2b29a3c0356'
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect

__all__ = ["fingerprint"]


def fingerprint(data_set: Any) -> str:
    """Name a data set by its class, its length and a hash of its labels.

    The labels are looked for where data sets keep them: ``targets``, ``labels``, the
    last of ``tensors``, and through a subset's ``dataset`` and ``indices``. No example
    is ever read and no random state is touched, so augmentation and downloads do not
    run. Without labels the class and the length must do.

    Args:
        data_set: Anything with a length.

    Returns:
        ``"Class:length:hash"``, or ``"Class:length"`` where no labels are found.

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
        "to have a length",
        "Per-example records need a map-style data set, not an iterable one.",
    )
    name = f"{_class_name(data_set)}:{size}"
    labels = _labels(data_set)
    return name if labels is None else f"{name}:{_hash(labels)}"


def _is_subset(data_set: Any) -> bool:
    """Whether this is a choice of positions in another data set."""
    return hasattr(data_set, "dataset") and hasattr(data_set, "indices")


def _class_name(data_set: Any) -> str:
    """The class, with the class of what it is a subset of."""
    name = type(data_set).__qualname__
    return f"{name}[{_class_name(data_set.dataset)}]" if _is_subset(data_set) else name


def _labels(data_set: Any) -> NDArray[Any] | None:
    """The label array, or None where there is none."""
    if _is_subset(data_set):
        labels = _labels(data_set.dataset)
        return None if labels is None else labels[np.asarray(data_set.indices)]
    for attribute in ("targets", "labels", "tensors"):
        found = getattr(data_set, attribute, None)
        if attribute == "tensors" and found:
            found = found[-1]
        labels = _as_labels(found)
        if labels is not None and len(labels) == len(data_set):
            return labels
    return None


def _as_labels(found: Any) -> NDArray[Any] | None:
    """An attribute as an array of numbers, or None if it is not one."""
    if found is None or callable(found):
        return None
    if hasattr(found, "cpu"):
        found = found.detach().cpu()
    try:
        array = np.asarray(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.ndim >= 1 and array.dtype.kind in "biufU" else None


def _hash(labels: NDArray[Any]) -> str:
    """Sixteen hexadecimal digits of the values, whatever type stores them."""
    wide = {"b": np.int64, "i": np.int64, "u": np.int64, "f": np.float64}
    values = labels.astype(wide.get(labels.dtype.kind, labels.dtype), order="C")
    digest = hashlib.sha256(f"{values.dtype.str}{values.shape}".encode())
    digest.update(values.tobytes())
    return digest.hexdigest()[:16]
