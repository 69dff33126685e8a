"""Arrays in a safetensors file that are read in parts, for files larger than memory."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect

_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class OnDisk:
    """An array in a file, read without mapping it: mapped pages would stay around."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def rows(self, columns: slice = slice(None)) -> Iterator[NDArray[Any]]:
        """The part of each row along the last axis, one after the other."""
        length, (start, stop) = self._length, self._span(columns)
        with open(self.path, "rb") as file:
            for row in range(math.prod(self.shape[:-1])):
                file.seek(self.offset + (row * length + start) * self.dtype.itemsize)
                yield np.fromfile(file, self.dtype, stop - start)

    def read(self, columns: slice) -> NDArray[Any]:
        """All rows' parts."""
        start, stop = self._span(columns)
        shape = (*self.shape[:-1], stop - start) if self.shape else ()
        return np.array(list(self.rows(columns)), self.dtype).reshape(shape)

    @property
    def _length(self) -> int:
        """Entries of a row."""
        return self.shape[-1] if self.shape else 1

    def _span(self, columns: slice) -> tuple[int, int]:
        """Where a part of a row starts and stops."""
        start, stop, _ = columns.indices(self._length)
        return start, stop


def arrays_on_disk(path: str | os.PathLike[str]) -> dict[str, OnDisk]:
    """The arrays of a safetensors file, from its header.

    Args:
        path: A file that safetensors itself can open.

    Returns:
        The arrays by name.

    Raises:
        ValueError: If one is of a type that no file of ours has.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for key, facts in header.items():
        expect(
            facts["dtype"] in _TYPES,
            "path",
            f"{facts['dtype']} in {name}",
            f"must hold {key!r} in one of {', '.join(_TYPES)}",
            "Record it again, or restore the file from a copy.",
        )
    return {
        key: OnDisk(
            name,
            _TYPES[facts["dtype"]],
            tuple(facts["shape"]),
            8 + size + facts["data_offsets"][0],
        )
        for key, facts in header.items()
    }
