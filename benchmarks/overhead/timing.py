"""Clocks, and ratios of times that were measured in turn.

Two clocks are read. ``busy`` decides whether a target is met: on the CPU it is the CPU
time of this thread, on a GPU the time between two events of its stream. ``wall`` is
reported beside it. Tasks alternate within a round and are compared within the round, so
that a change in the machine's load affects both.
"""

import math
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.common.report import environment

Task = Callable[[], Any]
Times = list[dict[str, float]]  # of one task: seconds by clock, one dict per round
CLOCKS = ("busy", "wall")


def timed(task: Task, device: str | torch.device = "cpu") -> dict[str, float]:
    """Return the seconds that a call takes, by clock.

    Args:
        task: The function to time.
        device: Where its tensors are.
    """
    if torch.device(device).type == "cuda":
        return _timed_by_events(task)
    busy, wall = time.thread_time(), time.perf_counter()
    task()
    return {"busy": time.thread_time() - busy, "wall": time.perf_counter() - wall}


def _timed_by_events(task: Task) -> dict[str, float]:
    """Time a call on the GPU, with the kernels it starts and without earlier ones."""
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
    """Return the time of ``other`` divided by the time of ``base``, by clock.

    A round calls base, other, other, base: a load that changes linearly cancels.
    """
    found: dict[str, list[float]] = {name: [] for name in CLOCKS}
    spent: list[float] = []
    added: list[float] = []
    for _ in range(rounds):
        times = [timed(task) for task in (base, other, other, base)]
        busy = [t["busy"] for t in times]
        spent += [busy[0], busy[3]]
        added.append(1e6 * (busy[1] + busy[2] - busy[0] - busy[3]) / 2)
        for name, ratios in found.items():
            first, second, third, fourth = (t[name] for t in times)
            ratios.append((second + third) / (first + fourth))
    result: dict[str, Any] = {n: spread(ratios) for n, ratios in found.items()}
    return {
        **result,
        "added_microseconds": {"median": median(added), "interval": interval(added)},
        "base_milliseconds": 1e3 * median(spent),
        "rounds": rounds,
    }


def typical(times: Times, clock: str = "busy") -> float:
    """Return the median time, in seconds."""
    return median(one[clock] for one in times)


def ratios(times: Times, base: Times, clock: str) -> dict[str, Any]:
    """Return the spread of the ratios to a base, each within one round."""
    pairs = zip(times, base, strict=False)
    return spread([own[clock] / other[clock] for own, other in pairs])


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, its 95 % confidence interval, quartiles and range."""
    ordered = sorted(values)
    n = len(ordered)
    return {
        "ratio": median(ordered),
        "interval": interval(ordered),
        "quartiles": [ordered[n // 4], ordered[(3 * n) // 4]],
        "range": [ordered[0], ordered[-1]],
    }


def interval(values: list[float]) -> list[float]:
    """Return a 95 % confidence interval of the median of independent values.

    Its ends are order statistics: each value is above the median with probability 1/2,
    so that the number of those above is binomial. Of five values or fewer it is the
    range, which covers less.
    """
    ordered, n = sorted(values), len(values)
    k = max(0, math.floor((n - 1) / 2 - 0.98 * math.sqrt(n)))
    return [ordered[k], ordered[n - 1 - k]]


def surroundings() -> dict[str, Any]:
    """Return versions, machine and load; at a high load the ratios are noisy."""
    return {**environment(), "load_average": os.getloadavg()[0]}
