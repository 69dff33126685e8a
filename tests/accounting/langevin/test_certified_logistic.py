"""The certified benchmark's numbers on the embedded digits."""

import numpy as np
import pytest

from benchmarks.certified_logistic import METHODS, guarantee
from benchmarks.certified_steps import Problem, Setting, our_steps, published_steps
from benchmarks.common.binary_data import digits_3_8

PROBLEM = Problem(digits_3_8(), Setting(0.01, 0.03, 500))
FORGET = np.arange(10)


@pytest.fixture(scope="module")
def steps():
    return our_steps(PROBLEM, FORGET, 10) | published_steps(PROBLEM, 10)


def test_ours_needs_fewer_steps_than_the_published_bounds(steps):
    assert set(steps) == set(METHODS)
    ours = [steps[name] for name in METHODS[:3]]
    assert max(ours) * 5 < min(steps[name] for name in METHODS[3:])
    assert steps["shifted, this set"] <= steps["shifted"]


def test_the_claim_is_certified_and_just_reached(steps):
    k = int(steps["shifted, this set"])
    claim = guarantee(PROBLEM, FORGET, k)
    assert claim.kind == "certified if"  # made by the caller of the library
    assert claim.epsilon(PROBLEM.delta) <= 1.01  # fewer orders than the search
    assert guarantee(PROBLEM, FORGET, k - 1).epsilon(PROBLEM.delta) > 1


def test_no_step_of_training_moves_further_than_the_bound():
    """Two coupled runs, with and without the set: their maps differ by at most d."""
    rng = np.random.default_rng(0)
    bound = PROBLEM.shift(FORGET, 10)
    assert bound <= PROBLEM.shift(None, 10)
    rows = PROBLEM.signed[FORGET].toarray()
    for _ in range(100):
        w = rng.normal(size=rows.shape[1]) * rng.choice([0.1, 1, 10])
        slope = rows.T @ (1 / (1 + np.exp(rows @ w)))
        moved = PROBLEM.learning_rate * np.linalg.norm(slope) / PROBLEM.size
        assert moved <= bound


def test_gradient_steps_contract_as_claimed():
    rng = np.random.default_rng(0)
    everyone = np.ones(PROBLEM.size, dtype=bool)
    for _ in range(20):
        first, second = rng.normal(size=(2, PROBLEM.signed.shape[1]))
        after = [
            PROBLEM.descend(w, everyone, 1, np.random.default_rng(1))
            for w in (first, second)
        ]
        stretch = np.linalg.norm(after[0] - after[1]) / np.linalg.norm(first - second)
        assert stretch <= PROBLEM.process.lipschitz
