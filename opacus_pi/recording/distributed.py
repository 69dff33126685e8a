"""Collectives that keep the recorded run identical on every process.

Each process observes its own examples. ``merge_`` gives all of them the observations of
all, so that their ledgers are equal, and equal to that of a single process that drew
the same batches. ``shared_sweep`` divides a sweep between the processes.

Everything here is collective: all processes must call it, in the same order, or they
wait for each other forever.

>>> from opacus_pi.recording.run import RecordedRun
>>> class Alone:
...     gather = staticmethod(lambda rows: [rows])
...     gather_texts = staticmethod(lambda text: [text])
...     sum = staticmethod(lambda values: values)
>>> run = RecordedRun("observed", 3, 0.5, "fixed", "toy")
>>> run.observe(np.array([2]), np.array([0.5], np.float32), steps=1)
>>> merge_(run, Alone()), run.observed, run.num_unmerged
('', array([nan, nan, 0.5], dtype=float32), 0)
"""

from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from opacus_pi.gradients.sweeps import Sweep, measured
from opacus_pi.models.batches import size_of
from opacus_pi.models.own_losses import Criterion
from opacus_pi.recording.run import RecordedRun

__all__ = ["Processes", "merge_", "shared_sweep"]

_MEASURED = ("grad_norms", "confidences", "errors", "correct")
_TWICE = (
    "Two processes drew example {index} for update {step}, so max_grad_norm does not "
    "bound what it contributes. Give each process its own part of the data set "
    "(DistributedSampler, or poisson_sampling=True) and resume it from its own "
    "checkpoint."
)


class Processes:
    """The processes of torch's default group.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        on_cpu = "gloo" in str(dist.get_backend()) or not torch.cuda.is_available()
        self._device = torch.device("cpu" if on_cpu else "cuda")

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Return each process's rows, in the order of their ranks.

        Args:
            rows: ``(k, c)`` on the CPU; k may differ from process to process.
        """
        length = torch.tensor([len(rows)], device=self._device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = int(torch.cat(lengths).max())
        padded = rows.new_zeros(longest, rows.shape[1], device=self._device)
        padded[: len(rows)] = rows.to(self._device)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        pairs = zip(gathered, lengths, strict=True)
        return [part[: int(length)].cpu() for part, length in pairs]

    def gather_texts(self, text: str) -> list[str]:
        """Return each process's text, in the order of their ranks."""
        texts = [""] * self.size
        dist.all_gather_object(texts, text)
        return texts

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes of values on the CPU, all of one shape."""
        total = values.to(self._device, copy=True)
        dist.all_reduce(total)
        return total.cpu()


def merge_(run: RecordedRun, processes: Processes) -> str:
    """Give every process the observations of all since the last merge.

    If several processes observed an example, the latest update stays, as in a
    single process.

    Args:
        run: What this process has recorded; changed in place.
        processes: The processes of the run; all of them must call this.

    Returns:
        Why the run has no ledger, the same in all processes; empty if it has one.
    """
    mine = np.flatnonzero(run.observed_at)
    table = np.stack([mine, run.observed_at[mine], run.observed[mine]], axis=1)
    rows = torch.cat(processes.gather(torch.from_numpy(table))).numpy()
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    index, step = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
    run.observed[index] = rows[:, 2]  # numpy: of equal indices the last one stays
    run.observed_at[:] = 0
    _merge_counts(run, processes)
    for rank, refusal in enumerate(processes.gather_texts(run.refusal)):
        if refusal:
            return refusal if refusal == run.refusal else f"Process {rank}: {refusal}"
    twice = (index[1:] == index[:-1]) & (step[1:] == step[:-1])
    if twice.any():
        first = twice.argmax()
        return _TWICE.format(index=index[first], step=step[first])
    return ""


def _merge_counts(run: RecordedRun, processes: Processes) -> None:
    """Give every process the participations that the others have counted."""
    if run.participations is not None:
        mine = run.participations.take_unmerged()
        run.participations.add_of_others((processes.sum(mine) - mine).numpy())


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
        processes: The processes that share the work; all of them must call this.
            None: this process measures everything.
        **options: Of ``sweep``.

    Returns:
        What ``sweep`` returns, of all examples, the same in all processes.

    Raises:
        ValueError: As ``sweep`` does.
    """
    if processes is None:
        return measured(model, criterion, data_set, **options)
    size = size_of(data_set)
    mine = range(processes.rank, size, processes.size)
    part = measured(model, criterion, Subset(data_set, mine), **options)
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
    """Return zeros and ones as truth values."""
    return None if correct is None else correct.bool()
