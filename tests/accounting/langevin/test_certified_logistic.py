"""The certified benchmark's numbers on the embedded digits."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks.certified_logistic import METHODS, guarantee
from benchmarks.certified_steps import Problem, Setting, our_steps, published_steps
from benchmarks.common.binary_data import (
    BinaryData,
    digits_3_8,
    encoded_adult,
    encoded_digits,
)

SETTING = Setting(0.01, 0.03, 500)
PROBLEM = Problem(digits_3_8(), SETTING)
FORGET = np.arange(10)
EVERYONE = np.ones(PROBLEM.size, dtype=bool)
KEEP = ~np.isin(np.arange(PROBLEM.size), FORGET)


@pytest.fixture(scope="module")
def steps():
    return our_steps(PROBLEM, FORGET, 10) | published_steps(PROBLEM, 10)


def runs(num_steps, keep=KEEP, start=None):
    """A training and an unlearning run."""
    rng = np.random.default_rng(0)
    zero = np.zeros(PROBLEM.signed.shape[1])
    trained = PROBLEM.descend(zero, EVERYONE, SETTING.num_steps, rng)
    start = trained.end if start is None else start
    return trained, PROBLEM.descend(start, keep, num_steps, rng)


def test_ours_needs_fewer_steps_than_the_published_bounds(steps):
    assert set(steps) == set(METHODS)
    ours = [steps[name] for name in METHODS[:3]]
    assert max(ours) * 5 < min(steps[name] for name in METHODS[3:])
    assert steps["shifted, this set"] <= steps["shifted"]


def test_the_claim_is_certified_if_and_just_reached(steps):
    k = int(steps["shifted"])
    claim = guarantee(PROBLEM, FORGET, *runs(k))
    assert claim.kind == "certified if"
    assert not claim.unmet
    assert len(claim.declarations) == 3  # what no run can show, and no number
    assert 0.9 < claim.epsilon(1e-5) <= 1
    assert claim.reverse_epsilon(1e-5) == claim.epsilon(1e-5)
    assert guarantee(PROBLEM, FORGET, *runs(k - 1)).epsilon(1e-5) > 1


@pytest.mark.parametrize(
    ("changed", "unmet"),
    [
        ({"keep": EVERYONE}, "uses all rows but the set"),
        ({"start": np.ones(65)}, "starts at the trained weights"),
    ],
)
def test_a_run_that_did_something_else_is_not_certified(changed, unmet):
    claim = guarantee(PROBLEM, FORGET, *runs(5, **changed))
    assert claim.kind == "estimate"
    assert [unmet in a.statement for a in claim.unmet] == [True]


@pytest.mark.parametrize(
    ("field", "value", "unmet"),
    [
        ("noise_std", 0.0, "Every step adds"),
        ("learning_rate", 0.5, "Every step adds"),
        ("denominator", 276, "divided by n"),
        ("longest_row", 1.01, "No row is longer"),
    ],
)
def test_what_a_run_did_decides_the_kind(field, value, unmet):
    trained, unlearned = runs(5)
    claim = guarantee(PROBLEM, FORGET, trained, replace(unlearned, **{field: value}))
    assert claim.kind == "estimate"
    assert [unmet in a.statement for a in claim.unmet] == [True]


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


def test_a_planted_row_out_of_range_stays_within_the_bound():
    """The whole way from raw pixels: only the planted row's own gradient appears."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, (3, 8))
    raw, signs = images[chosen], np.where(labels[chosen] == 8, 1.0, -1.0)
    raw[5] = 1e3 * np.random.default_rng(0).normal(size=64)
    without = np.delete(np.arange(len(raw)), 5)
    encoded = encoded_digits(raw)
    np.testing.assert_array_equal(encoded[without], encoded_digits(raw[without]))
    problem = Problem(BinaryData("", (encoded, signs), (encoded, signs)), SETTING)
    rest = np.isin(np.arange(len(raw)), without)
    everyone = np.ones(len(raw), dtype=bool)
    rng, largest = np.random.default_rng(1), 0.0
    for _ in range(50):
        w = rng.normal(size=65) * rng.choice([0.1, 1.0])
        after = [
            problem.descend(w, keep, 1, np.random.default_rng(2)).end
            for keep in (everyone, rest)
        ]
        largest = max(largest, np.linalg.norm(after[0] - after[1]))
    bound = problem.shift(None, 1)
    assert 0.5 * bound < largest <= bound
    assert bound == Problem(digits_3_8(), SETTING).shift(None, 1) * 286 / len(raw)


def test_constants_do_not_depend_on_the_rows():
    x, y = PROBLEM.data.train
    other = np.random.default_rng(0).normal(size=x.shape)
    problem = Problem(BinaryData("", (other, -y), (x, y)), SETTING)
    assert problem.process == PROBLEM.process
    assert problem.shift(None, 3) == PROBLEM.shift(None, 3)


def test_rows_of_adult_are_encoded_one_by_one():
    categories = [["a", "b"]] * 8
    row = ["39", "a", "77516", "b", "13", "a", "b", "a", "b", "a", "9", "0", "40", "b"]
    fields = np.array([[*row, ">50K"], [*row, "<=50K"]])
    fields[1, [0, 1, 10]] = "1e9", "never listed", "1e12"
    both = encoded_adult(fields, categories)
    np.testing.assert_array_equal(both[:1], encoded_adult(fields[:1], categories))
    assert (np.linalg.norm(both, axis=1) <= 1).all()
    assert np.linalg.norm(both, axis=1) == pytest.approx(1)


def test_gradient_steps_contract_as_claimed():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.normal(size=(2, PROBLEM.signed.shape[1]))
        after = [
            PROBLEM.descend(w, EVERYONE, 1, np.random.default_rng(1)).end
            for w in (first, second)
        ]
        stretch = np.linalg.norm(after[0] - after[1]) / np.linalg.norm(first - second)
        assert stretch <= PROBLEM.process.lipschitz
