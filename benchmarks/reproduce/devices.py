"""Several jobs at once on one GPU, or on several: who is where, and how many pay.

Every process opens its own context on its GPU, keeps to it, and waits for nobody.
joblib's workers are started afresh, never forked, as CUDA needs. Without NVIDIA's MPS
daemon the kernels of different processes take turns and only the time between them is
won; with it they overlap.
"""

import multiprocessing
import os
import re

import torch

JOBS_PER_GPU = 3  # a guess: small models wait for the processor; not measured on a GPU


def default_jobs(device: str) -> int:
    """Processes to use: one a core, on GPUs at most ``JOBS_PER_GPU`` each."""
    cores = os.cpu_count() or 1
    if not device.startswith("cuda"):
        return cores
    num_gpus = torch.cuda.device_count() if device == "cuda" else 1
    return max(1, min(cores, JOBS_PER_GPU * num_gpus))


def own_device(device: str) -> str:
    """This process's device: of several GPUs the one of the worker's number."""
    if device != "cuda":
        return device
    name = multiprocessing.current_process().name
    return device_of_worker(name, torch.cuda.device_count())


def device_of_worker(name: str, num_gpus: int) -> str:
    """The GPU of a process, in turn.

    >>> [device_of_worker(f"LokyProcess-{k}", 2) for k in (1, 2, 3)]
    ['cuda:0', 'cuda:1', 'cuda:0']
    >>> device_of_worker("MainProcess", 2)
    'cuda:0'
    """
    number = re.search(r"\d+$", name)
    turn = int(number.group()) - 1 if number else 0
    return f"cuda:{turn % max(1, num_gpus)}"
