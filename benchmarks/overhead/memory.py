"""Peak memory of a norm sweep's batch, compared with plain training.

Each contender is measured in a process of its own, so that none profits from memory
that another has already allocated. The other libraries are measured for one model.
"""

import multiprocessing
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.overhead.norms import SHOWN, make
from benchmarks.overhead.peers import CONTENDERS, OWN, Unsupported, rejections
from benchmarks.overhead.process_memory import peak_increase
from benchmarks.overhead.table import Row

TARGET = 1.25
COMPARED = ("resnet18",)  # cases in which the other libraries are measured, too


def measure(case: str, device: str = "cpu") -> dict[str, Any]:
    """Return the peak memory of the contenders above model and data, in MiB.

    A contender that cannot measure the model has the reason instead.
    """
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    for name in CONTENDERS if case in COMPARED else OWN:
        with context.Pool(1) as pool:
            found[name] = pool.apply(_peak, (case, name, device))
    return found


def _peak(case: str, name: str, device: str) -> float | str:
    """Return the peak of two measurements, or why there is none."""
    torch.set_num_threads(1)
    batch = make(case, device)
    try:
        with rejections(name):
            task = CONTENDERS[name](*batch)

            def twice() -> None:
                task()
                task()

            return peak_increase(twice, device)
    except Unsupported as reason:
        return str(reason)


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    for case, peaks in found.items():
        shares = {
            name: peak / peaks["plain"]
            for name, peak in peaks.items()
            if not isinstance(peak, str) and name != "plain"
        }
        mine = shares.pop("ours")
        shown = (f"{name} {share:.1f}" for name, share in shares.items())
        quantity = f"peak memory of the sweep, {SHOWN[case]}, over plain training"
        yield Row(quantity, TARGET, mine, "; ".join(shown), form=".2f")
