"""One record of what the processes of a distributed run have observed.

>>> from opacus_pi.recording.recorded_run import RecordedRun
>>> class Alone:
...     gather = staticmethod(lambda rows: [rows])
...     gather_texts = staticmethod(lambda text: [text])
>>> run = RecordedRun("observed", 3, 0.5, "fixed", "toy")
>>> run.observe(np.array([2]), np.array([0.5], np.float32), steps=1)
>>> merge_(run, Alone()), run.observed, run.num_unmerged
('', array([nan, nan, 0.5], dtype=float32), 0)
"""

import numpy as np
import torch

from opacus_pi.recording.processes import Processes
from opacus_pi.recording.recorded_run import RecordedRun

_TWICE = (
    "Two processes drew example {index} for update {step}, so max_grad_norm does not "
    "bound what it contributes. Give each process its own part of the data set "
    "(DistributedSampler, or poisson_sampling=True) and resume it from its own "
    "checkpoint."
)


def merge_(run: RecordedRun, processes: Processes) -> str:
    """Give every process the observations of all since the last merger.

    Of an example observed by several, the latest update stays, as in one process.

    Args:
        run: This process's record; changed in place.
        processes: Who takes part; all of them must call this.

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
    for rank, refusal in enumerate(processes.gather_texts(run.refusal)):
        if refusal:
            return refusal if refusal == run.refusal else f"Process {rank}: {refusal}"
    twice = (index[1:] == index[:-1]) & (step[1:] == step[:-1])
    if twice.any():
        first = twice.argmax()
        return _TWICE.format(index=index[first], step=step[first])
    return ""
