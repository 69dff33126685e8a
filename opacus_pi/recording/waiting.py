"""Reports that wait to be put down together.

Much of what a report costs does not grow with its size, and an accelerator that norms
are on is seldom waited for.

>>> reports = WaitingReports()
>>> reports.add(torch.tensor([1, 0]), torch.tensor([0.5, 0.25]), step=3)
>>> reports.add(torch.tensor([2]), torch.tensor([1.0]), step=4)
>>> [values.tolist() for values in reports.take()]
[[1, 0, 2], [0.5, 0.25, 1.0], [3, 3, 4]]
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = Tensor | NDArray[np.int64] | Sequence[int]

_MAX_WAITING = 256


class WaitingReports:
    """Norms of examples that entered updates, on whatever device they are."""

    def __init__(self) -> None:
        self._reports: list[tuple[Indices, Tensor, int]] = []

    @property
    def are_many(self) -> bool:
        """Whether it is time to fetch them."""
        return len(self._reports) >= _MAX_WAITING

    def add(self, indices: Indices, norms: Tensor, *, step: int) -> None:
        """Keep the norms ``(b,)`` of examples that enter an update, not copies."""
        self._reports.append((indices, norms, step))

    def take(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Indices, norms and updates ``(k,)`` on the CPU, as reported; None if none."""
        if not self._reports:
            return None
        indices, norms, steps = zip(*self._reports, strict=True)
        self._reports = []
        lengths = torch.tensor([len(i) for i in indices])
        return (
            torch.cat([torch.as_tensor(i, dtype=torch.int64).cpu() for i in indices]),
            torch.cat([n.to(torch.float32) for n in norms]).cpu(),
            torch.tensor(steps).repeat_interleave(lengths),
        )
