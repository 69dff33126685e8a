"""Data sets of well-known classes, whose item ``i`` is always made of example ``i``.

A data set may augment its items at random. Then its items alone do not show whether it
also changes their order. The classes of torch, torchvision and Hugging Face do not:
their ``__getitem__`` reads the stored example at the index that it was given, and only
then applies the transforms. Neither does a list.

>>> indexes_plainly([3, 1, 2])
True
>>> class Shuffled(list):
...     def __getitem__(self, i):
...         return super().__getitem__(-i)
>>> indexes_plainly(Shuffled([3, 1, 2]))
False
"""

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

__all__ = ["indexes_plainly", "loads_batches"]

_MAX_DEPTH = 8  # of data sets that hold data sets
_STORED = (list, tuple, np.ndarray, Tensor, TensorDataset)
_HOLDERS = {Subset: "dataset", ConcatDataset: "datasets", StackDataset: "datasets"}
_LIBRARIES = ("torchvision.datasets.", "datasets.arrow_dataset")


def indexes_plainly(data_set: Any) -> bool:
    """Return whether each index is known to stand for one stored example.

    A subclass that defines ``__getitem__`` or ``__getitems__`` itself is not known.
    Whether stored examples were exchanged from outside is not looked at; a data set's
    fingerprint shows that.

    Args:
        data_set: Any data set. Of a subset or a concatenation, those that it holds are
            looked at, too.
    """
    return _is_plain(data_set, _MAX_DEPTH)


def loads_batches(data_set: Any) -> bool:
    """Return whether a data set has its own ``__getitems__``, which returns a batch.

    The order of its items is then the data set's own.

    Args:
        data_set: As for ``indexes_plainly``.
    """
    for _ in range(_MAX_DEPTH):
        owner = _owner(type(data_set), "__getitems__")
        if owner is not Subset:
            return owner is not None and not _is_known(owner)
        data_set = data_set.dataset
    return False


def _is_plain(data_set: Any, depth: int) -> bool:
    """Do the same as ``indexes_plainly``, so many levels deep."""
    names = ("__getitem__", "__getitems__")
    owners = {_owner(type(data_set), name) for name in names} - {None}
    if depth <= 0 or len(owners) != 1:
        return False
    owner: Any = owners.pop()
    if owner not in _HOLDERS:
        is_stored = owner in [_owner(kind, "__getitem__") for kind in _STORED]
        return is_stored or _is_known(owner)
    held = getattr(data_set, _HOLDERS[owner])
    parts = [held] if owner is Subset else held
    parts = parts.values() if isinstance(parts, dict) else parts
    return all(_is_plain(part, depth - 1) for part in parts)


def _is_known(owner: type) -> bool:
    """Return whether a class is one of the libraries that are known."""
    return f"{owner.__module__}.".startswith((*_LIBRARIES, "torch.utils.data."))


def _owner(kind: type, name: str) -> type | None:
    """Return the class in whose body a method of a class is defined."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)
