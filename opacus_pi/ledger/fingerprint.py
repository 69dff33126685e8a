"""A short text that identifies a data set, computed without loading an example.

A ledger's columns are positions in a data set, so a ledger that is used with another
data set, or with the same examples in another order, gives wrong losses without an
error. The fingerprint detects this. It is not cryptographic evidence:
``opacus_pi.ledger.same_data`` says what two fingerprints compare and what they do not.

>>> class Digits:
...     targets = [0, 1, 1]
...
...     def __len__(self):
...         return 3
>>> fingerprint(Digits())
'Digits:3:8cc4e2b29a3c0356:ae3b0c44298fc1c14'
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect
from opacus_pi.ledger.erased_examples import ErasedExamples
from opacus_pi.ledger.held_examples import held_parts, is_subset
from opacus_pi.ledger.same_data import base_of
from opacus_pi.ledger.stored_arrays import (
    Places,
    as_array,
    evenly_spaced,
    hash_arrays,
    strided,
)

__all__ = ["fingerprint", "fingerprint_of_some"]

_MAX_NUMBERS = 1 << 20  # of inputs that are hashed as a whole


def fingerprint(data_set: Any, *, inputs: bool = True) -> str:
    """Return a name made of a data set's class, length and hashes of what it holds.

    Labels are taken from the attribute ``targets``, ``labels`` or the last of
    ``tensors``. Inputs are everything else that the object keeps with one entry for
    each example, under any name: arrays, tensors, tables, and lists of numbers or of
    texts such as the names of files. Files are recognised by their names within their
    common folder, by their sizes and by their content: files of up to 256 KiB are read
    as a whole, of larger ones both ends and 32 drawn blocks of 4 KiB. Data sets within
    this one, as in a ``Subset`` or a ``ConcatDataset``, are searched too. The
    transforms have a hash of their own, made of their ``repr``. So have the settings
    of a class that is not torch's or torchvision's: its other attributes, and the
    global variables that its ``__getitem__`` names.

    Of large inputs some numbers of each example are hashed, about four million in all,
    and of more than 2,048 files only evenly spaced ones are opened. ``__getitem__`` is
    never called and no random state is touched, so neither augmentation nor downloads
    run. What cannot be read in this way has no part in the name.

    Args:
        data_set: Anything with a length.
        inputs: Whether to include the parts beyond the labels.

    Returns:
        ``"Class:length:labels:xinputs:..."``, without the parts that are not found.
        Each part after the labels starts with a letter.

    Raises:
        ValueError: If the data set has no length.
    """
    if isinstance(data_set, ErasedExamples):
        return data_set.name if inputs else base_of(data_set.name)
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
    name = name if labels is None else f"{name}:{hash_arrays(labels)}"
    if not inputs or not size:
        return name
    places, labelled = np.arange(size), labels is not None
    return name + _inputs_part(data_set, places, labelled=labelled)


def fingerprint_of_some(data_set: Any, places: Places) -> str:
    """Return a name of some examples, as if the data set had no others.

    A data set from which all other examples were removed gets the same name, and so
    does one with anything at their positions. The class is no part of the name.

    Args:
        data_set: Anything with a length.
        places: int64 ``(m,)``, positions of the examples, sorted, at least one.

    Returns:
        ``"some:m:labels:xinputs:..."``, with the parts of ``fingerprint``.
    """
    if isinstance(data_set, ErasedExamples):
        data_set, places = data_set.remaining_set, data_set.rows[places]
    labels = _labels_of_some(data_set, places)
    name = f"some:{len(places)}"
    name = name if labels is None else f"{name}:{hash_arrays(labels)}"
    labelled = labels is not None
    return name + _inputs_part(data_set, places, labelled=labelled, alone=True)


def _inputs_part(
    data_set: Any, places: Places, *, labelled: bool, alone: bool = False
) -> str:
    """Return the parts of a name beyond the labels; each begins with a colon.

    Args:
        data_set: The data set.
        places: The positions that count.
        labelled: Whether its labels are known under their usual names.
        alone: Whether to hash these examples as if there were no others.
    """
    found = _inputs(data_set, places)
    parts = {"x": hash_arrays(*found)} if found else {}
    parts |= held_parts(data_set, places, labelled=labelled, alone=alone)
    return "".join(f":{letter}{part}" for letter, part in parts.items())


def _class_name(data_set: Any) -> str:
    """Return the class name; of a subset, with the class of the whole data set."""
    name = type(data_set).__qualname__
    return f"{name}[{_class_name(data_set.dataset)}]" if is_subset(data_set) else name


def _labels(data_set: Any) -> NDArray[Any] | None:
    """Return the label array, or None if there is none."""
    if is_subset(data_set):
        labels = _labels(data_set.dataset)
        return (
            None
            if labels is None
            else labels[np.asarray(data_set.indices, dtype=np.int64)]
        )
    for found in _label_attributes(data_set):
        labels = as_array(found)
        if labels is not None and len(labels) == len(data_set):
            return labels
    return None


def _label_attributes(data_set: Any) -> Iterator[Any]:
    """Yield what may be the labels, by their usual names."""
    for attribute in ("targets", "labels", "tensors"):
        found = getattr(data_set, attribute, None)
        yield found[-1] if attribute == "tensors" and found else found


def _labels_of_some(data_set: Any, places: Places) -> NDArray[Any] | None:
    """Return the labels of some examples, or None if there are none.

    The other labels are not read: in their places there may be anything.

    Args:
        data_set: The data set.
        places: Positions of the examples.
    """
    if is_subset(data_set):
        inner = np.asarray(data_set.indices, dtype=np.int64)[places]
        return _labels_of_some(data_set.dataset, inner)
    for found in _label_attributes(data_set):
        if isinstance(found, list | tuple) and len(found) == len(data_set):
            labels = as_array([found[i] for i in places.tolist()])
        else:
            labels = as_array(found)
            is_whole = labels is not None and len(labels) == len(data_set)
            labels = labels[places] if is_whole else None  # type: ignore[index]
        if labels is not None:
            return labels
    return None


def _inputs(data_set: Any, places: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return stored inputs of some of the examples at these positions.

    This is the part that ledgers of every release have. Only attributes of the object
    itself count, because a property might load or compute anything. The list is empty
    if no inputs are stored under the names ``tensors`` or ``data``.
    """
    if is_subset(data_set):
        return _inputs(data_set.dataset, np.asarray(data_set.indices)[places])
    held = getattr(data_set, "__dict__", {})
    stored = list(held.get("tensors") or ())[:-1] or [held.get("data")]
    arrays = [_some(values, places, len(data_set)) for values in stored]
    return [array for array in arrays if array is not None]


def _some(values: Any, places: NDArray[np.int64], size: int) -> NDArray[Any] | None:
    """Return inputs of evenly spaced examples, or None if there is no array of them."""
    shape = tuple(values.shape) if strided(values) else ()
    if shape[:1] != (size,):
        return None
    most = max(1, _MAX_NUMBERS // max(1, math.prod(shape[1:])))
    rows = values[evenly_spaced(places, most).tolist()]
    if hasattr(rows, "detach") and rows.is_floating_point():
        rows = rows.double()  # numpy has no bfloat16
    return as_array(rows)
