import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import pytest

from benchmarks.reproduce.figures import FIGURES
from benchmarks.reproduce.pool import run_all, stages
from benchmarks.reproduce.scales import SCALES
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace


@dataclass(frozen=True)
class Job(Unit):
    """Writes its name; may kill its process the first time."""

    name: str
    required: tuple = field(default=())
    kill: bool = False

    def needs(self):
        return list(self.required)

    def facts(self):
        return {"name": self.name}

    def compute(self, workspace: Workspace):
        for one in self.required:
            assert (workspace.directory / f"{one.name}.done").exists()
        died = workspace.directory / f"{self.name}.died"
        if self.kill and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(workspace.directory / f"{self.name}.done", "a") as file:
            file.write("x")
        return self.name


A, B = Job("a"), Job("b")
C = Job("c", (A,))
D = Job("d", (C, B))


def test_stages_need_only_earlier_ones_and_hold_each_job_once():
    assert stages([D, C, A]) == [[A, B], [C], [D]]
    assert stages([]) == []


def test_every_job_runs_once_after_what_it_needs(tmp_path):
    workspace = Workspace(tmp_path)
    for _ in range(2):
        run_all([D, C], workspace)
    assert {p.name: p.read_text() for p in tmp_path.glob("*.done")} == {
        f"{name}.done": "x" for name in "abcd"
    }


@pytest.fixture(scope="module")
def cluster():
    """Two workers, each a process, which joblib uses as long as this lasts."""
    distributed = pytest.importorskip("distributed")
    root = str(Path(__file__).parents[2])
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        ) as workers,
        distributed.Client(workers),
        joblib.parallel_config(backend="dask"),
    ):
        yield workers


def test_a_job_that_kills_its_worker_runs_again_on_another(tmp_path, cluster):
    jobs = [Job(f"job{k}", (A,), kill=k == 1) for k in range(4)]
    run_all(jobs, Workspace(tmp_path))
    assert (tmp_path / "job1.died").exists()
    assert {p.name: p.read_text() for p in tmp_path.glob("*.done")} == {
        f"{name}.done": "x" for name in ("a", *(f"job{k}" for k in range(4)))
    }


def test_smoke_on_a_cluster_that_loses_a_worker_in_the_middle(tmp_path, cluster):
    workspace, scale, figure = Workspace(tmp_path), SCALES["smoke"], FIGURES["fig5"]
    killed = []

    def kill_one():
        while not list(tmp_path.glob("oracle/*.json")):
            time.sleep(0.05)
        nanny = next(iter(cluster.workers.values()))
        killed.append(nanny.pid)
        os.kill(nanny.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    run_all(figure.units(scale), workspace)
    killer.join(timeout=10)
    assert killed
    assert figure.result(scale, workspace)["gaps"]
    assert all(
        json.loads(path.read_text())["result"] for path in tmp_path.glob("*/*.json")
    )
