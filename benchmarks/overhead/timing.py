"""Clocks and ratios: contenders are timed in turn, and compared within a round.

``busy`` decides: CPU time of this thread, or on a GPU the time between two events of
its stream; ``wall`` stands beside it.
"""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.common.report import environment

Task = Callable[[], Any]
CLOCKS = ("busy", "wall")


def timed(task: Task, device: str = "cpu") -> dict[str, float]:
    """Seconds that a call takes, by clock, where its tensors are on ``device``."""
    if torch.device(device).type == "cuda":
        return _timed_by_events(task)
    busy, wall = time.thread_time(), time.perf_counter()
    task()
    return {"busy": time.thread_time() - busy, "wall": time.perf_counter() - wall}


def _timed_by_events(task: Task) -> dict[str, float]:
    """On the GPU: what was waiting before does not count, what is started does."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    begin.record()
    task()
    end.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return {"busy": 1e-3 * begin.elapsed_time(end), "wall": wall}


def interleaved(base: Task, other: Task, rounds: int) -> dict[str, Any]:
    """Time of ``other`` over that of ``base``, by clock: base, other, other, base."""
    found: dict[str, list[float]] = {name: [] for name in CLOCKS}
    spent: list[float] = []
    for _ in range(rounds):
        times = [timed(task) for task in (base, other, other, base)]
        spent += [times[0]["busy"], times[3]["busy"]]
        for name, ratios in found.items():
            first, second, third, fourth = (t[name] for t in times)
            ratios.append((second + third) / (first + fourth))
    result: dict[str, Any] = {n: spread(ratios) for n, ratios in found.items()}
    return {**result, "base_milliseconds": 1e3 * median(spent), "rounds": rounds}


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and range."""
    ordered = sorted(values)
    n = len(ordered)
    return {
        "ratio": median(ordered),
        "quartiles": [ordered[n // 4], ordered[(3 * n) // 4]],
        "range": [ordered[0], ordered[-1]],
    }


def surroundings() -> dict[str, Any]:
    """Versions and machine, and how busy it is: ratios at high load are noisy."""
    return {**environment(), "load_average": os.getloadavg()[0]}
