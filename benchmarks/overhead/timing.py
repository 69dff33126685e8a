"""Clocks and ratios: contenders are timed in turn, and compared within a round."""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.report import environment

Task = Callable[[], Any]
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}


def timed(task: Task) -> dict[str, float]:
    """Seconds that a call takes, by clock."""
    starts = {name: clock() for name, clock in CLOCKS.items()}
    task()
    return {name: clock() - starts[name] for name, clock in CLOCKS.items()}


def interleaved(base: Task, other: Task, rounds: int) -> dict[str, Any]:
    """Time of ``other`` over that of ``base``, by clock: base, other, other, base."""
    found: dict[str, list[float]] = {name: [] for name in CLOCKS}
    spent: list[float] = []
    for _ in range(rounds):
        times = [timed(task) for task in (base, other, other, base)]
        spent += [times[0]["cpu"], times[3]["cpu"]]
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
