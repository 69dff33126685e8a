"""Every update is spoken for exactly once, by the rows around it."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.accounting.rules import (
    UpdateInterval,
    intervals,
    loss_under_rule,
    worst_case_over_epochs,
)
from tests.accounting.oracles import rows_around


@given(
    steps=st.sets(st.integers(0, 30), min_size=1, max_size=8).map(sorted),
    extra=st.integers(0, 5),
)
def test_intervals_cover_each_update_once(steps, extra):
    num_steps = steps[-1] + extra
    covered = []
    for interval in intervals(steps, num_steps):
        updates = range(interval.first, interval.last + 1)
        assert interval.num_updates == len(updates) > 0
        covered += updates
        for update in updates:
            assert (interval.right, interval.left) == rows_around(steps, update)
    assert covered == list(range(1, num_steps + 1))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("right", [3.0, 1.0]), ("left", [1, 2]), ("trapezoid", [2, 1.5]), ("max", [3, 2])],
)
def test_rules_choose_between_the_two_rows(rule, expected):
    losses = {0: np.array([1.0, 2.0]), 1: np.array([3.0, 1.0])}
    (interval,) = intervals([0, 4], 4)
    value = loss_under_rule(lambda _, row: losses[row], interval, rule)
    np.testing.assert_array_equal(value, expected)


def test_the_worst_case_over_epochs_against_a_list_of_all_epochs():
    """Epochs that several parts share, and epochs within one part, by brute force."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        sizes = rng.integers(1, 40, rng.integers(1, 12))
        rates = rng.choice([0.0, 0.01, 0.125, 0.5, 1.0], len(sizes))
        values = rng.choice([0.0, 1.0, 2.5, 7.0], len(sizes))
        ends = np.cumsum(sizes)
        parts = [
            UpdateInterval(int(end - size + 1), int(end), 0, 0)
            for size, end in zip(sizes, ends, strict=True)
        ]
        # Each update, the part of an epoch that it covers, in exact arithmetic.
        most, place = {}, Fraction(0)
        for part, rate, value in zip(parts, rates, values, strict=True):
            for _ in range(part.num_updates):
                after = place + Fraction(rate).limit_denominator(1000)
                for epoch in range(math.floor(place), math.ceil(after) * (rate > 0)):
                    most[epoch] = max(most.get(epoch, 0.0), value)
                place = after
        found = worst_case_over_epochs(parts, rates, values)
        assert found == pytest.approx(sum(most.values()))


def test_the_worst_case_over_epochs_of_a_very_long_run():
    part = UpdateInterval(1, 10**15, 0, 0)
    assert worst_case_over_epochs([part], [1.0], [2.0]) == pytest.approx(2e15)
