"""The comparison with exact norms: what it computes, and that it can go on."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import observed_vs_exact as benchmark
from benchmarks.observed_vs_exact import (
    CASES,
    Case,
    compare,
    compared,
    merged,
    redrawn,
    thinned,
)
from opacus_pi import GradNormLedger, NoisySGD
from tests.benchmark_results import check_results

STEPS, EXAMPLES = 60, 80


def run(seed):
    """An observed and an exact ledger of gradients that shrink."""
    generator = np.random.default_rng(seed)
    own = generator.lognormal(size=EXAMPLES)
    norms = own * 0.95 ** np.arange(STEPS)[:, None]
    mechanism = NoisySGD(STEPS, 0.2, noise_std=2.0, max_grad_norm=1.5)
    exact = GradNormLedger(mechanism, np.arange(STEPS) + 1, norms)
    return redrawn(exact, seed), exact


def test_exact_rows_compared_with_themselves():
    _, exact = run(0)
    values = np.array([3.0, 1.0, 2.0])
    same = compare(values, values)
    assert same["spearman"] == pytest.approx(1)
    assert {v for k, v in same.items() if "ratio" in k} == {1.0}
    whole = thinned(exact, STEPS)
    np.testing.assert_array_equal(whole.grad_norms, exact.grad_norms)


def test_ratios_say_who_is_charged_too_little_and_too_much():
    found = compare(np.array([1.0, 2.0, 9.0]), np.array([2.0, 1.0, 3.0]))
    assert (found["min_ratio"], found["max_ratio"]) == (0.5, 3.0)
    assert found["total_ratio"] == 2.0
    assert found["spearman"] == pytest.approx(stats.spearmanr([1, 2, 3], [2, 1, 3])[0])


def test_merged_rows_hold_the_latest_norm():
    observed, exact = run(2)
    rows = merged(observed, 2.5)  # two updates a row
    assert rows.steps.tolist() == list(range(2, STEPS + 1, 2))
    first, second = observed.grad_norms[:2]
    latest = np.where(np.isnan(second), first, second)
    np.testing.assert_array_equal(rows.grad_norms[0], latest)
    seen = ~np.isnan(observed.grad_norms)
    np.testing.assert_array_equal(observed.grad_norms[seen], exact.grad_norms[seen])
    assert seen.mean() == pytest.approx(0.2, abs=0.02)


@pytest.fixture(scope="module")
def ways():
    return compared(*run(1))


def test_smoothed_ranks_repair_the_worst_and_limits_hold(ways):
    for asked in ("order 2", "order 8", "order 32", "epsilon"):
        found = ways[asked]
        smoothed, by_next = found["smoothed (default)"], found["next norm"]
        assert smoothed["min_ratio"] > by_next["min_ratio"]
        assert smoothed["total_ratio"] == pytest.approx(1, abs=0.3)
        assert found["limit"]["coverage"] > 0.9
        assert found["limit"]["coverage_redrawn"] > 0.9
        assert found["limit"]["median_ratio"] > 1
        assert found["swept, 35 rows"]["min_ratio"] > 0.85


def test_seeds_that_are_there_are_not_run_again(tmp_path, monkeypatch, capsys, ways):
    done = []

    def ledgers(case, images, seed):
        done.append((case.num_train, seed))
        return run(seed)

    def call(*more):
        out = str(tmp_path / "results.json")
        arguments = ["", "--cases", "digits, clipped at 1", "--out", out, *more]
        monkeypatch.setattr(sys, "argv", arguments)
        benchmark.main()

    monkeypatch.setattr(benchmark, "ledgers", ledgers)
    monkeypatch.setattr(benchmark, "compared", lambda *both: ways)
    call("--seeds", "1")
    call("--seeds", "3")
    assert done == [(0, 0), (0, 1), (0, 2)]
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["cases"]["digits, clipped at 1"]["seeds"]) == ["0", "1", "2"]
    table = (tmp_path / "results.md").read_text()
    assert "3 seeds" in table and "| swept, 35 rows | " in table
    assert table in capsys.readouterr().out
    other = replace(CASES["digits, clipped at 1"], num_train=99)
    monkeypatch.setitem(CASES, "digits, clipped at 1", other)
    call("--seeds", "1")  # another question is another result
    assert done[3:] == [(99, 0)]


def test_the_results_are_of_the_cases_as_they_are():
    check_results(benchmark, Case.settings)
