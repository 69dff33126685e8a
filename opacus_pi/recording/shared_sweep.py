"""A sweep that the processes of a distributed run share."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from opacus_pi.gradients.sweeps import Sweep, sweep
from opacus_pi.models.batches import size_of
from opacus_pi.models.losses import Criterion
from opacus_pi.recording.processes import Processes

_MEASURED = ("grad_norms", "confidences", "errors", "correct")


def shared_sweep(
    model: nn.Module,
    criterion: Criterion,
    data_set: Dataset[Any],
    *,
    processes: Processes | None,
    **options: Any,
) -> Sweep:
    """Measure every example of a data set once, each process every size-th of them.

    Args:
        model: As for ``sweep``, with equal weights in all processes; may be wrapped
            for data parallel training.
        criterion: As for ``sweep``.
        data_set: As for ``sweep``, the same in all processes.
        processes: Who shares the work; all of them must call this. None: alone.
        **options: Of ``sweep``.

    Returns:
        What ``sweep`` returns, of all examples and the same in all processes.

    Raises:
        ValueError: As ``sweep`` does.
    """
    if processes is None:
        return sweep(model, criterion, data_set, **options)
    size = size_of(data_set)
    mine = range(processes.rank, size, processes.size)
    part = sweep(model, criterion, Subset(data_set, mine), **options)
    columns = [getattr(part, name) for name in _MEASURED]
    flags = [column is None for column in columns]
    missing = processes.sum(torch.tensor(flags).double()) > 0
    table = torch.zeros(len(columns), size, dtype=torch.float64)
    for row, column in zip(table, columns, strict=True):
        if column is not None:
            row[mine.start :: mine.step] = column.double()
    whole = processes.sum(table)
    grad_norms, confidences, errors, correct = (
        None if absent else row for row, absent in zip(whole, missing, strict=True)
    )
    return Sweep(cast(Tensor, grad_norms), confidences, errors, _whether(correct))


def _whether(correct: Tensor | None) -> Tensor | None:
    """Zeros and ones as truth values."""
    return None if correct is None else correct.bool()
