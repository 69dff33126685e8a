import joblib
import pytest
import torch

from benchmarks.reproduce import pool
from benchmarks.reproduce.pool import (
    default_jobs,
    device_of_worker,
    own_device,
    run_all,
)
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace


@pytest.fixture
def machine(monkeypatch):
    """A machine with 16 cores and 4 GPUs."""
    monkeypatch.setattr(pool.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize(
    ("device", "jobs"), [("cpu", 16), ("cuda", 12), ("cuda:1", 3), ("mps", 16)]
)
def test_default_number_of_processes(machine, device, jobs):
    assert default_jobs(device) == jobs


def test_no_more_processes_than_cores(machine, monkeypatch):
    monkeypatch.setattr(pool.os, "cpu_count", lambda: 2)
    assert default_jobs("cuda") == 2


def test_only_the_plain_name_is_shared_out(machine):
    assert own_device("cpu") == "cpu"
    assert own_device("cuda:3") == "cuda:3"
    assert own_device("cuda") == "cuda:0"  # this process is no worker


def test_workers_get_the_gpus_in_turn():
    names = [f"LokyProcess-{k}" for k in range(1, 7)]
    found = [device_of_worker(name, 3) for name in names]
    assert found == [f"cuda:{k}" for k in (0, 1, 2, 0, 1, 2)]
    assert {device_of_worker(name, 1) for name in names} == {"cuda:0"}


def _name_of_this_process(_):
    import multiprocessing
    import time

    time.sleep(0.3)
    return multiprocessing.current_process().name


def test_joblibs_workers_are_told_apart_and_keep_their_number():
    pool = joblib.Parallel(2)
    calls = [joblib.delayed(_name_of_this_process)(k) for k in range(4)]
    placed = {device_of_worker(name, 2) for name in pool(calls)}
    assert placed == {"cuda:0", "cuda:1"}


class Where(Unit):
    """Tells on which device it ran."""

    def facts(self):
        return {}

    def compute(self, workspace):
        return workspace.device


def test_a_job_runs_on_the_device_of_its_process(tmp_path, machine):
    workspace = Workspace(tmp_path, device="cuda")
    run_all([Where()], workspace)
    assert Where().run(workspace) == "cuda:0"
