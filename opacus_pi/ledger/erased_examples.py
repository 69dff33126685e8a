"""A data set whose forgotten examples were erased, with the positions of the whole.

Positions name examples: in the ledger, in saved states and in deletion requests. Once
the files of forgotten examples are erased, the data set is shorter, or has nothing to
read at their positions. ``ErasedExamples`` keeps every remaining example at its old
position, and refuses to read an erased one.

*Guarantee.* ``DeletionRequests.erased`` returns one only if the remaining examples are
those in the deletion log, as far as fingerprints tell. *What breaks it:* making one by
hand, because then nothing was compared.

>>> photos = ErasedExamples(["a", "c"], np.array([0, -1, 1]), "Photos:3")
>>> len(photos), photos[2], photos.erased.tolist()
(3, 'c', [1])
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opacus_pi._validate import expect

__all__ = ["ErasedExamples", "erased_in", "not_erased"]


class ErasedExamples:
    """A data set with the positions of the training set, without erased examples.

    Args:
        remaining_set: The data set at hand.
        rows: int64 ``(n,)``, the position in ``remaining_set`` of each example of the
            training set; -1 for an erased one.
        name: Fingerprint of the training set, in the parts that were compared.
    """

    def __init__(self, remaining_set: Any, rows: NDArray[np.int64], name: str) -> None:
        self.remaining_set, self.rows, self.name = remaining_set, rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        place = int(position)
        if not -len(self) <= place < len(self):
            raise IndexError(f"position {place} is not in a data set of {len(self)}")
        row = int(self.rows[place])
        expect(
            row >= 0,
            "position",
            place % len(self),
            "must not be that of an erased example",
            "This example was forgotten, and its data may have been erased. Read "
            "positions that are not in data_set.erased.",
        )
        return self.remaining_set[row]

    @property
    def erased(self) -> NDArray[np.int64]:
        """Positions of the erased examples, sorted."""
        return np.flatnonzero(self.rows < 0)


def erased_in(data_set: Any) -> NDArray[np.int64]:
    """Return the positions whose examples cannot be read any more, sorted.

    Args:
        data_set: Any data set.
    """
    if not isinstance(data_set, ErasedExamples):
        return np.empty(0, dtype=np.int64)
    return data_set.erased


def not_erased(data_set: Any, positions: ArrayLike) -> NDArray[np.int64]:
    """Return the positions whose examples can still be read, in the same order.

    Args:
        data_set: Any data set.
        positions: ``(m,)``, positions in it.
    """
    places = np.asarray(positions, dtype=np.int64)
    if not isinstance(data_set, ErasedExamples):
        return places
    return places[data_set.rows[places] >= 0]
