"""Run units in many processes of joblib, or on a cluster that joblib supports.

With ``--device cuda`` several processes share each GPU. Every process opens its own
context on its GPU and stays there. joblib starts its workers afresh instead of forking
them, as CUDA requires. The kernels of different processes alternate unless NVIDIA's MPS
daemon runs.
"""

import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Iterable
from dataclasses import replace

import joblib
import torch
from tqdm import tqdm

from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace

JOBS_PER_GPU = 3  # small models wait for the processor; not measured on a GPU


def run_all(
    units: Iterable[Unit],
    workspace: Workspace,
    num_jobs: int = 1,
    minutes: float = math.inf,
) -> bool:
    """Run units and everything they need, in that order; stored results are reused.

    Args:
        units: The units whose results are wanted.
        workspace: Where results are stored.
        num_jobs: Number of processes of joblib's default backend. To choose another
            backend, call this inside ``joblib.parallel_config(backend="dask")``.
        minutes: No job is started after this time; those that run are finished.

    Returns:
        Whether all jobs are finished.
    """
    deadline = time.time() + 60 * minutes
    for stage in stages(units):
        pool = joblib.Parallel(num_jobs, return_as="generator_unordered")
        done = pool(joblib.delayed(_run)(unit, workspace, deadline) for unit in stage)
        names = sorted({type(unit).__name__.lower() for unit in stage})
        bar = tqdm(done, total=len(stage), desc=" + ".join(names), unit="job")
        if not all(list(bar)):
            return False
    return True


def stages(units: Iterable[Unit]) -> list[list[Unit]]:
    """Return units and their needs, once each; a stage needs only earlier stages.

    Units with the same facts are one job, even if their experiments differ in a field
    that does not affect the result, such as the number of oracles for a training.
    """
    level: dict[str, tuple[Unit, int]] = {}
    keys: dict[Unit, str] = {}

    def place(unit: Unit) -> int:
        if unit not in keys:
            facts = [unit.kind(), unit.facts()]
            keys[unit] = json.dumps(facts, sort_keys=True)
        key = keys[unit]
        if key not in level:
            level[key] = unit, 1 + max(map(place, unit.needs()), default=-1)
        return level[key][1]

    for unit in units:
        place(unit)
    last = max((stage for _, stage in level.values()), default=-1)
    found: list[list[Unit]] = [[] for _ in range(1 + last)]
    for unit, stage in level.values():
        found[stage].append(unit)
    return found


def _run(unit: Unit, workspace: Workspace, deadline: float) -> bool:
    """Run a unit on the device of this process; return False if it is too late."""
    if time.time() >= deadline:
        return False
    unit.run(replace(workspace, device=own_device(workspace.device)))
    return True


def default_jobs(device: str) -> int:
    """Return the number of processes: one a core, at most ``JOBS_PER_GPU`` a GPU."""
    cores = os.cpu_count() or 1
    if not device.startswith("cuda"):
        return cores
    num_gpus = torch.cuda.device_count() if device == "cuda" else 1
    return max(1, min(cores, JOBS_PER_GPU * num_gpus))


def own_device(device: str) -> str:
    """Return the device of this process; with several GPUs, by the worker's number."""
    if device != "cuda":
        return device
    name = multiprocessing.current_process().name
    return device_of_worker(name, torch.cuda.device_count())


def device_of_worker(name: str, num_gpus: int) -> str:
    """Return the GPU of a worker; workers take the GPUs in turn.

    >>> [device_of_worker(f"LokyProcess-{k}", 2) for k in (1, 2, 3)]
    ['cuda:0', 'cuda:1', 'cuda:0']
    >>> device_of_worker("MainProcess", 2)
    'cuda:0'
    """
    number = re.search(r"\d+$", name)
    turn = int(number.group()) - 1 if number else 0
    return f"cuda:{turn % max(1, num_gpus)}"
