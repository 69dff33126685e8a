"""Time and memory of the steps of one task, in the process that calls."""

import os
import time

from benchmarks.overhead.process_memory import peak_increase
from benchmarks.scale.tasks import TASKS

__all__ = ["Measured", "measured"]

Measured = dict[str, dict[str, float]]


def measured(name: str, size: int) -> Measured:
    """Return time and memory of each step of a task, in this process."""
    found = {}
    for step, run in TASKS[name].prepare(size).items():
        wall, busy = time.perf_counter(), time.process_time()
        memory = peak_increase(run)
        found[step] = {
            "seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - busy,
            "mebibytes": memory,
            "load": os.getloadavg()[0],
        }
    return found
