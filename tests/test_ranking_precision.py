"""Norms in bfloat16: what the benchmark computes, and that its results are its own."""

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import ranking_precision as benchmark
from benchmarks.ranking_precision import CASES, agreement, compared, in_own_process
from tests.benchmark_results import check_results


def test_agreement_by_hand():
    exact = np.arange(1.0, 21.0)
    assert agreement(exact, exact) == {
        "spearman": pytest.approx(1),
        "hardest_tenth": 1.0,
        "median_error": 0.0,
        "p99_error": 0.0,
        "max_error": 0.0,
    }
    rough = exact.copy()
    rough[[17, 18]] = rough[[18, 17]]  # the second and the third of the hardest
    found = agreement(rough, exact)
    assert found["hardest_tenth"] == 0.5
    assert found["max_error"] == pytest.approx(1 / 18)
    assert 0.99 < found["spearman"] < 1


def test_bfloat16_is_told_from_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    before = copy.deepcopy(model.state_dict())
    found = compared(model, torch.randn(40, 8), torch.randint(4, (40,)))
    low, plain = found["bfloat16"], found["float32"]
    assert plain["max_error"] < 1e-5 < 1e-4 < low["median_error"] < 0.05
    assert low["spearman"] > 0.99
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_a_case_trains_and_measures_the_first_examples():
    case = CASES["MLP, digits"]
    short = replace(
        case, recipe=replace(case.recipe, num_epochs=1), num_train=200, num_measured=50
    )
    found = short.measure(0, None)
    assert found["bfloat16"]["spearman"] > 0.99
    assert found == short.measure(0, None)
    assert found != short.measure(1, None)


def test_another_process_is_held_to_the_instructions(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert in_own_process("AVX2", os.getenv, "ONEDNN_MAX_CPU_ISA") == "AVX2"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert in_own_process("AVX2", os.getpid) != os.getpid()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "SSE41"


def test_times_are_ratios_of_the_same_batch():
    found = benchmark.time_ratios({"mlp": 1}, seed=0)
    assert found["mlp"]["rounds"] == 1 and 0.01 < found["mlp"]["busy"]["ratio"] < 100
    assert found["bfloat16"] == benchmark.instructions()


def test_the_results_are_of_the_cases_as_they_are():
    check_results(benchmark)
