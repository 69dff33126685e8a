"""Memory that a process uses now, and the most it has used: on the CPU or on a GPU."""

from collections.abc import Callable
from pathlib import Path

import torch

Task = Callable[[], object]


def peak_increase(task: Task, device: str = "cpu") -> float:
    """Return by how many MiB the memory rises at most during a call.

    On the CPU it is the resident memory of the process (Linux only), on a GPU the
    memory that tensors take.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    before = _resident("VmRSS")
    task()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Return this process's memory now (``VmRSS``) or at its peak (``VmHWM``), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
