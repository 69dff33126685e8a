"""Count the updates that drew each example, under fixed sampling.

A shuffled loader shows every example once an epoch, unless the loop leaves the epoch
early, starts it again, or goes through a list of batches several times. So the updates
that drew an example are counted for each row, and the accounting uses these counts.

>>> counts = Participations(3)
>>> counts.add(np.array([0, 1]))
>>> counts.close_row()
>>> counts.add(np.array([1]))
>>> counts.by_row(2)
array([[1, 1, 0],
       [0, 1, 0]], dtype=int32)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Participations", "has_whole_counts", "layout_of_counts"]

_BY_ROW, _OPEN, _UNKNOWN = "participations", "open_participations", "unknown_updates"
_UNMERGED, _REPORTED = "unmerged_participations", "counts_participations"
_SAVED = (_BY_ROW, _OPEN, _UNMERGED, _UNKNOWN, _REPORTED)


def has_whole_counts(state: Mapping[str, Any]) -> bool:
    """Return whether a saved state has all that ``Participations.state_dict`` saves.

    Args:
        state: The saved state of a run; that of an earlier release has none of it.
    """
    names = [name for name in _SAVED if name in state]
    if not names:
        return True
    types = type(state.get(_UNKNOWN)), type(state.get(_REPORTED))
    return len(names) == len(_SAVED) and types == (int, bool)


def layout_of_counts(
    state: Mapping[str, Any], num_rows: int, num_examples: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of the arrays of counts in a saved state.

    Args:
        state: The saved state of a run.
        num_rows: Its number of rows, N.
        num_examples: Its number of examples, n.

    Returns:
        By name, for the arrays that are there. None of their entries is below 0.
    """
    shapes = {_BY_ROW: (num_rows,), _OPEN: (), _UNMERGED: ()}
    return {
        name: (torch.int32, (*shape, num_examples))
        for name, shape in shapes.items()
        if name in state
    }


class Participations:
    """Counts the updates that each example was in.

    Args:
        num_examples: Number of examples, n.

    Attributes:
        num_unknown_updates: Updates that contained samples whose example is not known.
            Any example may have been in them.
        were_reported: Whether anything was counted.
    """

    def __init__(self, num_examples: int) -> None:
        self._open = np.zeros(num_examples, dtype=np.int32)
        self._closed: list[NDArray[np.int32]] = []
        # since the processes of a distributed run were merged last
        self._unmerged = np.zeros(num_examples, dtype=np.int32)
        self.num_unknown_updates = 0
        self.were_reported = False

    def add(self, indices: NDArray[np.int64]) -> None:
        """Count one participation for each index.

        Args:
            indices: int64 ``(b,)``; an example that occurs twice was in two updates.
        """
        self.were_reported = True
        counts = np.bincount(indices, minlength=len(self._open)).astype(np.int32)
        self._open += counts
        self._unmerged += counts

    def close_row(self) -> None:
        """Begin the interval of the next row."""
        self._closed.append(self._open)
        self._open = np.zeros_like(self._open)

    def by_row(self, num_rows: int) -> NDArray[np.int32]:
        """Return the counts of each row's interval.

        Args:
            num_rows: How many rows there are. If the updates since the last row have no
                row of their own, they belong to the last one.

        Returns:
            int32 ``(N, n)``.
        """
        rows = [*self._closed, self._open]
        if len(rows) > num_rows:
            rows[num_rows - 1 :] = [np.sum(rows[num_rows - 1 :], axis=0)]
        return np.stack(rows).astype(np.int32)

    def largest(self, by_row: NDArray[np.int32]) -> int:
        """Return the largest number of updates that may have drawn one example.

        Args:
            by_row: What ``by_row`` returned.
        """
        most = int(by_row.sum(axis=0, dtype=np.int64).max(initial=0))
        return most + self.num_unknown_updates

    def take_unmerged(self) -> torch.Tensor:
        """Return the counts since the last call, and reset them.

        Returns:
            int64 ``(n,)``.
        """
        unmerged, self._unmerged = self._unmerged, np.zeros_like(self._unmerged)
        return torch.from_numpy(unmerged.astype(np.int64))

    def add_of_others(self, counts: NDArray[np.int64]) -> None:
        """Add the counts of the other processes of a distributed run.

        Args:
            counts: int64 ``(n,)``.
        """
        self._open += counts.astype(np.int32)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as tensors."""
        shape = (len(self._closed), len(self._open))
        closed = np.stack(self._closed) if self._closed else np.zeros(shape, np.int32)
        return {
            _BY_ROW: torch.from_numpy(closed.astype(np.int32)),
            _OPEN: torch.from_numpy(self._open.copy()),
            _UNMERGED: torch.from_numpy(self._unmerged.copy()),
            _UNKNOWN: self.num_unknown_updates,
            _REPORTED: self.were_reported,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Participations | None":
        """Return the counts that ``state_dict`` saved.

        Args:
            state: The saved state of a run.

        Returns:
            None if updates were made that an earlier release did not count.
        """
        counts = cls(state["num_examples"])
        if _OPEN in state:
            counts._closed = list(state[_BY_ROW].cpu().numpy().copy())
            counts._open = state[_OPEN].cpu().numpy().copy()
            counts._unmerged = state[_UNMERGED].cpu().numpy().copy()
            counts.num_unknown_updates = int(state[_UNKNOWN])
            counts.were_reported = bool(state[_REPORTED])
        elif state["num_steps"]:
            return None
        return counts
