"""Every update is spoken for exactly once, by the rows around it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.accounting.rules import intervals, loss_under_rule
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
