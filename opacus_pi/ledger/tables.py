"""Data sets of the package ``datasets``: a table in a file, and an order of its rows.

``select``, ``shuffle`` and ``train_test_split`` leave the table as it is and change the
order. A ``Trainer`` removes the columns that its model does not use, so only columns
are compared that no training leaves out: the tokens of a text, and the label.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opacus_pi.ledger.stored_arrays import Places, evenly_spaced, hash_arrays

__all__ = ["Table", "table_of"]

_MAX_ROWS = 1 << 12  # that are read
_INPUTS, _LABELS = ("input_ids",), ("labels", "label")


@dataclass(frozen=True)
class Table:
    """The rows of such a data set.

    Attributes:
        columns: The columns that are compared, by name.
        order: The row of each example, int64 ``(n,)``; None: as they are.
    """

    columns: Mapping[str, Any]
    order: Places | None = None

    def is_whole(self, places: Places) -> bool:
        """Return whether all inputs at these positions are read.

        Args:
            places: int64 ``(m,)``.
        """
        return len(places) <= _MAX_ROWS or not set(_INPUTS) & set(self.columns)

    def inputs(self, places: Places) -> list[str]:
        """Return a hash of each column of inputs, of evenly spaced positions.

        Args:
            places: int64 ``(m,)``, the positions that count.
        """
        return self._hashes(_INPUTS, places)

    def labels(self, places: Places) -> list[str]:
        """Return a hash of each column of labels, as ``inputs`` does.

        Args:
            places: int64 ``(m,)``, the positions that count.
        """
        return self._hashes(_LABELS, places)

    def _hashes(self, names: tuple[str, ...], places: Places) -> list[str]:
        """Return a hash of each of these columns that there is."""
        chosen = evenly_spaced(places, _MAX_ROWS) if len(places) else places
        rows = chosen if self.order is None else self.order[chosen]
        found = []
        for name in names:
            if name in self.columns and len(rows):
                entries = self.columns[name].take(rows).to_pylist()
                found.append(hash_arrays(np.array([repr(entry) for entry in entries])))
        return found


def table_of(data_set: Any) -> Table:
    """Return the rows of a data set of the package ``datasets``; no columns of others.

    Args:
        data_set: Any data set.
    """
    held: dict[str, Any] = getattr(data_set, "__dict__", {})
    table: Any
    order: Any
    table, order = held.get("_data"), held.get("_indices")
    if not (hasattr(table, "column_names") and hasattr(table, "column")):
        return Table({})
    names = set(table.column_names) & {*_INPUTS, *_LABELS}
    columns = {name: table.column(name) for name in names}
    if order is None:
        return Table(columns)
    return Table(columns, order.column(0).to_numpy().astype(np.int64))
