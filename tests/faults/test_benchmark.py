"""The main job, interrupted or killed: the same command ends with the same results."""

import dataclasses
import json
import os
import signal
import sys
import time

import pytest
from torch.utils.data import TensorDataset

from benchmarks import main_job
from benchmarks.common import data
from benchmarks.common.training import Recipe
from tests.faults.killing import ended, fork

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
TINY = main_job.Settings(
    "digits",
    num_train=0,
    recipe=Recipe("mlp", 4, 8, 0.1, noise_std=0.15),
    stratum_size=8,
    unlearn_epochs=2,
    num_oracles=2,
    dp_epochs=1,
)


def few_digits(*_):
    """Some of the digits, in both parts."""
    images = LOADED
    parts = {
        name: TensorDataset(*(t[:80] for t in getattr(images, name).tensors))
        for name in ("train", "test")
    }
    return dataclasses.replace(images, **parts)


LOADED = data.load("digits")


@pytest.fixture
def job(monkeypatch):
    """The main job on few digits, as one process; its settings are tiny."""
    monkeypatch.setitem(main_job.SETTINGS, "digits", TINY)
    monkeypatch.setattr(main_job.data, "load", few_digits)
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def run(out):
        command = ["main_job", "--seeds", "2", "--jobs", "1", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        main_job.main()

    return run


def results(out):
    content = json.loads((out / "results.json").read_text())
    return {name: content[name] for name in ("settings", "seeds", "rank_correlation")}


def reached(out, what):
    """Whether the job has come as far as a file."""
    return any(out.glob(what))


def test_interrupted_and_killed(tmp_path, job):
    whole, out = tmp_path / "whole", tmp_path / "out"
    job(whole)
    moments = [
        ("oracles/*.safetensors", signal.SIGKILL),
        ("seed_0.json", signal.SIGINT),
        ("seed_1.json", signal.SIGKILL),
    ]
    for what, how in moments:
        child = fork(lambda: job(out))
        while not reached(out, what):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
            time.sleep(0.005)
        os.kill(child, how)
        assert ended(child) in (70, -signal.SIGKILL, 0)
    job(out)
    assert results(out) == results(whole)
    assert {p.suffix for p in out.iterdir()} <= {"", ".json", ".png"} | {".tmp"}


def test_a_result_that_is_not_whole_is_made_again(tmp_path, job, capsys):
    job(tmp_path)
    wanted = results(tmp_path)
    path = tmp_path / "seed_0.json"
    path.write_bytes(path.read_bytes()[:-40])
    job(tmp_path)
    assert results(tmp_path) == wanted
    assert "seed_0.json" in capsys.readouterr().err
