"""Run units in many processes: joblib's, or a cluster that joblib knows."""

from collections.abc import Iterable
from dataclasses import replace

import joblib
from tqdm import tqdm

from benchmarks.reproduce.devices import own_device
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.units import Unit


def run_all(units: Iterable[Unit], lab: Lab, num_jobs: int = 1) -> None:
    """Run units and all they need, what is needed first; done ones are skipped.

    Args:
        units: What is wanted.
        lab: Where results go.
        num_jobs: Processes of joblib's default backend; another one is chosen around
            the call by ``joblib.parallel_config(backend="dask")``. They share the
            device, or the GPUs: see ``devices``.
    """
    for stage in stages(units):
        pool = joblib.Parallel(num_jobs, return_as="generator_unordered")
        done = pool(joblib.delayed(_run)(unit, lab) for unit in stage)
        names = sorted({type(unit).__name__.lower() for unit in stage})
        for _ in tqdm(done, total=len(stage), desc=" + ".join(names), unit="job"):
            pass


def stages(units: Iterable[Unit]) -> list[list[Unit]]:
    """Units and their needs, each once, in stages that need only earlier ones."""
    level: dict[Unit, int] = {}

    def place(unit: Unit) -> int:
        if unit not in level:
            level[unit] = 1 + max(map(place, unit.needs()), default=-1)
        return level[unit]

    for unit in units:
        place(unit)
    found: list[list[Unit]] = [[] for _ in range(1 + max(level.values(), default=-1))]
    for unit, stage in level.items():
        found[stage].append(unit)
    return found


def _run(unit: Unit, lab: Lab) -> None:
    """Run a unit for its stored result, on this process's device."""
    unit.run(replace(lab, device=own_device(lab.device)))
