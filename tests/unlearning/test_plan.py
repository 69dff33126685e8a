"""Prediction from past runs, on cases worked by hand."""

import math

import pytest

from opacus_pi.unlearning.plan import percentile, predict_time


def test_percentile_counts_ties_half():
    assert percentile(2.0, [1.0, 2.0, 3.0, 4.0]) == 37.5
    assert percentile(9.0, [1.0, 2.0]) == 100
    assert percentile(0.0, [1.0, 2.0]) == 0


def test_prediction_is_exact_on_a_log_law():
    losses = [0.5, 1.0, 3.0, 20.0]
    times = [2 + 1.5 * math.log(v) for v in losses]
    for loss in (0.7, 5.0, 100.0):
        expected = 2 + 1.5 * math.log(loss)
        assert predict_time(loss, losses, times) == pytest.approx(expected)


def test_prediction_never_falls_with_difficulty_nor_below_zero():
    falling = [predict_time(v, [1.0, 2.0], [5.0, 1.0]) for v in (0.1, 1.0, 10.0)]
    assert falling == [pytest.approx(3.0)] * 3
    assert predict_time(1e-9, [1.0, 2.0], [1.0, 3.0]) == 0


@pytest.mark.parametrize(
    "losses, times",
    [([], []), ([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0]), ([1.0, 2.0], [1.0, math.inf])],
)
def test_too_little_to_fit(losses, times):
    assert predict_time(1.0, losses, times) is None
