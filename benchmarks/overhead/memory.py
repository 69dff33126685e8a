"""Peak memory of a sweep's batch over plain training, each in a process of its own."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead.norms import make
from benchmarks.overhead.peers import CONTENDERS
from benchmarks.overhead.table import Row

BAR = 1.1
NAMES = {"resnet18": "ResNet-18"}


def measure(case: str, device: str = "cpu") -> dict[str, Any]:
    """Peak memory of each contender above model and data, in MiB."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    for name in CONTENDERS:
        with context.Pool(1) as pool:
            found[name] = pool.apply(_peak, (case, name, device))
    return found


def _peak(case: str, name: str, device: str) -> float | str:
    """MiB above model and data at the peak of two measurements (Linux)."""
    torch.set_num_threads(1)
    batch = make(case, device)
    used = allocated if torch.device(device).type == "cuda" else resident
    try:
        task = CONTENDERS[name](*batch)
        used("VmHWM", restart=True)
        before = used("VmRSS")
        for _ in range(2):
            task()
    except Exception as error:  # a peer fails in its own ways
        return type(error).__name__
    return used("VmHWM") - before


def allocated(field: str, *, restart: bool = False) -> float:
    """What ``resident`` tells, of the GPU's memory that tensors take."""
    if restart:
        torch.cuda.reset_peak_memory_stats()
    peak = field == "VmHWM"
    read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
    return read() / 2**20


def resident(field: str, *, restart: bool = False) -> float:
    """This process's memory now (``VmRSS``) or at its peak (``VmHWM``), in MiB."""
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """The table's lines."""
    for case, peaks in found.items():
        shares = {
            name: peak / peaks["plain"]
            for name, peak in peaks.items()
            if not isinstance(peak, str) and name != "plain"
        }
        mine = shares.pop("ours")
        shown = (f"{name} {share:.1f}" for name, share in shares.items())
        path = f"peak memory of the {NAMES[case]} sweep over plain training"
        yield Row(path, BAR, mine, "; ".join(shown), form=".2f")
