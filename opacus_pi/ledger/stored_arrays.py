"""Numbers in memory: which objects are arrays, samples of them, and their hashes.

>>> hash_arrays(np.arange(3)) == hash_arrays(np.arange(3, dtype=np.uint8))
True
"""

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_NUMBERS",
    "as_array",
    "evenly_spaced",
    "hash_arrays",
    "real_numbers",
    "rows_of",
    "sample_of",
    "spread",
    "strided",
]

MAX_NUMBERS = 1 << 22  # that are read of one array
Places = NDArray[np.int64]


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


def sample_of(values: Any) -> NDArray[Any] | None:
    """Return evenly spaced numbers of an array or a tensor, flat; None if it has none.

    Args:
        values: What ``strided`` accepts. An array of objects has no numbers.
    """
    flat = values.reshape(-1)
    return as_array(real_numbers(flat[spread(len(flat), MAX_NUMBERS)]))


def rows_of(values: Any, places: Places, most: int = MAX_NUMBERS) -> Any:
    """Return evenly spaced numbers of some rows of an array or a tensor.

    Args:
        values: ``(n, ...)``, what ``strided`` accepts, with at least one number a row.
        places: int64 ``(m,)``, at least one.
        most: How many numbers are returned at most, if that is at least one a row.
    """
    width = math.prod(values.shape[1:])
    columns = spread(width, most // len(places))
    rows = values.reshape(values.shape[0], width)[:, columns][places.tolist()]
    return as_array(real_numbers(rows))


def real_numbers(values: Any) -> Any:
    """Return a tensor's numbers in a type that NumPy has: it lacks bfloat16."""
    is_real = hasattr(values, "is_floating_point") and values.is_floating_point()
    return values.double() if is_real else values


def spread(width: int, most: int) -> slice:
    """Return a slice of at most so many evenly spaced columns, around the middle."""
    step = max(1, -(-width // max(1, most)))
    return slice((width - 1) % step // 2, width, step)
