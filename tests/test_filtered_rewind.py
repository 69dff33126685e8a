"""The benchmark of filtered rewinds: it runs, and its committed table is its own."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import filtered_rewind as benchmark
from benchmarks.common.data import ImageData

ROOT = Path(__file__).parents[1]


TINY = replace(
    benchmark.CASES["cifar10, public"],
    num_train=60,
    num_public=50,
    num_epochs=1,
    public_epochs=1,
    group_size=3,
    noise_multiplier=1.5,
)


def images(shape=(3, 32, 32), size=120):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, *shape, generator=generator)
    y = torch.arange(size) % 10
    return ImageData("cifar10", TensorDataset(x, y), TensorDataset(x[:40], y[:40]))


@pytest.mark.parametrize("start", ["public", "random"])
def test_a_tiny_training_is_measured(start):
    case = replace(TINY, start=start)
    found = benchmark.measure(case, 0, images())
    for epsilon, one in found["policies"].items():
        assert one["sparse_free"] <= one["filter_free"] <= one["free"] <= 1
        assert 0 <= one["cost"] <= one["filter_cost"] <= one["sparse_cost"] <= 1
        assert one["filter_cost"] <= found["exact_cost"] <= 1
        assert 0 <= one["restart_accuracy"] <= 1
        assert one["cost"] == 0 or found["worst_case_epsilon"] > float(epsilon)
    assert found["policies"]["1"]["cost"] > 0
    assert 0 < found["single_run_cost"] <= found["exact_run_cost"]
    assert found["free_run_cost"] == 0
    assert found["free_accuracy"] == found["group_trained"]
    stored = {f"cifar10, {start}": {"settings": {}, "seeds": {"0": found}}}
    table = benchmark.table(stored)
    assert table.count(f"| cifar10, {start} |") == 6 and "None" not in table


def test_shares_that_differ_from_the_plans_are_not_reported(monkeypatch):
    monkeypatch.setattr(benchmark.Trained, "by_filter", lambda *_: np.full(60, -1))
    case = replace(TINY, start="random")
    with pytest.raises(RuntimeError, match="plan differs"):
        benchmark.measure(case, 0, images())


def test_the_committed_results_are_those_of_the_command():
    out = ROOT / benchmark.OUT
    cases = json.loads(out.read_text())["cases"]
    for name, case in benchmark.CASES.items():
        assert cases[name]["settings"] == json.loads(json.dumps(asdict(case)))
        assert len(cases[name]["seeds"]) >= 5
    written = out.with_suffix(".md").read_text(encoding="utf-8")
    assert written == benchmark.table(cases)
