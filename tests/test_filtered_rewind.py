"""The benchmark of filtered rewinds: it runs, and its committed table is its own."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import filtered_rewind as benchmark
from benchmarks.common.data import ImageData

ROOT = Path(__file__).parents[1]


def images(shape=(3, 32, 32), size=120):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, *shape, generator=generator)
    y = torch.arange(size) % 10
    return ImageData("cifar10", TensorDataset(x, y), TensorDataset(x[:40], y[:40]))


@pytest.mark.parametrize("start", ["public", "random"])
def test_a_tiny_training_is_measured(start):
    case = replace(
        benchmark.CASES[f"cifar10, {start}"],
        num_train=60,
        num_public=50,
        num_epochs=1,
        public_epochs=1,
        group_size=3,
    )
    found = benchmark.measure(case, 0, images())
    assert set(found["policies"]) == {"1", "2", "4", "8"}
    free = [found["policies"][e]["free"] for e in ("1", "2", "4", "8")]
    cost = [found["policies"][e]["cost"] for e in ("1", "2", "4", "8")]
    assert free == sorted(free) and cost == sorted(cost, reverse=True)
    for one in found["policies"].values():
        assert one["sparse_free"] <= one["free"] and one["sparse_cost"] >= one["cost"]
        assert 0 <= one["restart_accuracy"] <= 1
    assert "group_accuracy" in found["policies"]["4"]
    stored = {f"cifar10, {start}": {"settings": {}, "seeds": {"0": found}}}
    table = benchmark.table(stored)
    assert table.count(f"| cifar10, {start} |") == 5 and "None" not in table


def test_the_committed_results_are_those_of_the_command():
    out = ROOT / benchmark.OUT
    cases = json.loads(out.read_text())["cases"]
    for name, case in benchmark.CASES.items():
        assert cases[name]["settings"] == json.loads(json.dumps(asdict(case)))
        assert len(cases[name]["seeds"]) >= 3
    written = out.with_suffix(".md").read_text(encoding="utf-8")
    assert written == benchmark.table(cases)
