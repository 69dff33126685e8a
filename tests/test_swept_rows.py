"""The benchmark of swept rows: what it computes, and what it stored."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import swept_rows as benchmark
from benchmarks.swept_rows import (
    CASES,
    COUNTS,
    NAMES,
    NUM_ROWS,
    compared,
    equivalent,
    error,
    settings_of,
    table,
)
from opacus_pi import GradNormLedger, NoisySGD


def test_an_error_is_relative():
    assert error(np.array([2.0, 0.5]), np.ones(2)) == pytest.approx(np.log(2))
    assert error(np.ones(3), np.ones(3)) == 0


def test_between_two_numbers_of_rows_errors_are_interpolated():
    counts, errors = [10, 20, 40], [0.4, 0.2, 0.1]
    assert equivalent(0.2, counts, errors) == pytest.approx(20)
    assert equivalent(0.1 * 2**0.5, counts, errors) == pytest.approx(20 * 2**0.5)
    assert equivalent(9.0, counts, errors) == pytest.approx(10)
    assert equivalent(0.01, counts, errors) == pytest.approx(40)
    assert equivalent(0.2, [10, 20, 30, 40], [0.4, 0.2, 0.3, 0.1]) == pytest.approx(20)


def test_rule_right_is_worth_its_own_rows():
    generator = np.random.default_rng(0)
    own = generator.lognormal(size=40) * 0.98 ** np.arange(150)[:, None]
    norms = own * generator.lognormal(0, 0.3, own.shape)
    mechanism = NoisySGD(150, 0.1, noise_std=2.0, max_grad_norm=2.0)
    found = compared(GradNormLedger(mechanism, np.arange(150) + 1, norms))
    assert NUM_ROWS in COUNTS and set(found) == {"order 2", "order 8", "order 32"}
    for rules in found.values():
        assert rules["right"]["worth"] == pytest.approx(NUM_ROWS)
        assert rules["smoothed"]["worth"] > NUM_ROWS


def test_the_results_are_of_the_cases_as_they_are():
    out = Path(__file__).parents[1] / benchmark.OUT
    found = json.loads(out.read_text())["cases"]
    assert set(found) == set(NAMES)
    for name, one in found.items():
        facts = json.loads(json.dumps(settings_of(CASES[name])))
        assert one["settings"] == facts and len(one["seeds"]) >= 2
    assert out.with_suffix(".md").read_text(encoding="utf-8") == table(found)
