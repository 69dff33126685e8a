"""The comparison with exact norms: what it computes, and that it can go on."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import observed_vs_exact as benchmark
from benchmarks.observed_vs_exact import CASES, Case, compare, compared, thinned
from opacus_pi import GradNormLedger, NoisySGD
from tests.benchmark_results import check_results

STEPS, EXAMPLES = 160, 12


def run(seed):
    """An observed and an exact ledger of gradients that shrink."""
    generator = np.random.default_rng(seed)
    own = generator.lognormal(size=EXAMPLES)
    norms = own * 0.98 ** np.arange(STEPS)[:, None]
    mechanism = NoisySGD(STEPS, 0.1, noise_std=2.0, max_grad_norm=1.5)
    exact = GradNormLedger(mechanism, np.arange(STEPS), norms)
    ends = np.arange(10, STEPS + 1, 10)
    drawn = generator.random((len(ends), EXAMPLES)) < 0.7
    drawn[-1] = True
    rows = np.where(drawn, norms[ends - 1], np.nan)
    observed = GradNormLedger(mechanism, ends, rows, source="observed")
    return observed, exact


def test_exact_rows_compared_with_themselves():
    _, exact = run(0)
    values = np.array([3.0, 1.0, 2.0])
    same = compare(values, values)
    assert same["spearman"] == pytest.approx(1)
    assert {v for k, v in same.items() if "ratio" in k} == {1.0}
    whole = thinned(exact, STEPS)
    np.testing.assert_array_equal(whole.grad_norms, exact.grad_norms[1:])


def test_ratios_say_who_is_charged_too_little_and_too_much():
    found = compare(np.array([1.0, 2.0, 9.0]), np.array([2.0, 1.0, 3.0]))
    assert (found["min_ratio"], found["max_ratio"]) == (0.5, 3.0)
    assert found["median_ratio"] == 2.0
    assert found["spearman"] == pytest.approx(stats.spearmanr([1, 2, 3], [2, 1, 3])[0])


def test_more_rows_are_closer_and_ranks_repair_the_worst():
    ways = compared(*run(1), order=8.0)
    least = [ways[f"swept, {n} rows"]["min_ratio"] for n in benchmark.NUM_ROWS]
    assert least[:4] == sorted(least[:4]) and min(least[4:]) > 0.7
    by_rank, by_next = ways["observed, gaps by rank"], ways["observed, right"]
    assert by_rank["min_ratio"] > by_next["min_ratio"]


def test_seeds_that_are_there_are_not_run_again(tmp_path, monkeypatch, capsys):
    done = []

    def ledgers(case, images, seed):
        done.append((case.order, seed))
        return run(seed)

    def call(*more):
        out = str(tmp_path / "results.json")
        arguments = ["", "--cases", "digits", "--out", out, *more]
        monkeypatch.setattr(sys, "argv", arguments)
        benchmark.main()

    monkeypatch.setattr(benchmark, "ledgers", ledgers)
    call("--seeds", "1")
    call("--seeds", "3")
    assert done == [(8.0, 0), (8.0, 1), (8.0, 2)]
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["cases"]["digits"]["seeds"]) == ["0", "1", "2"]
    table = (tmp_path / "results.md").read_text()
    assert "3 seeds" in table and "| swept, 75 rows | " in table
    assert table in capsys.readouterr().out
    monkeypatch.setitem(CASES, "digits", replace(CASES["digits"], order=4.0))
    call("--seeds", "1")  # another question is another result
    assert done[3:] == [(4.0, 0)]


def test_the_results_are_of_the_cases_as_they_are():
    check_results(benchmark, Case.settings)
