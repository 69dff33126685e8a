"""The summary of a gap, against sums by hand and by brute force."""

import math

import numpy as np
import pytest

from opacus_pi.evaluation import UnlearningTrace, gap_path, gap_summary

UA, TA = "unlearning_accuracy", "test_accuracy"


def run(values, accuracy=None):
    metrics = {UA: values}
    if accuracy is not None:
        metrics[TA] = accuracy
    return UnlearningTrace(list(range(len(values))), metrics)


def summary(values, oracle, **options):
    return gap_summary(run(values), oracle, metric=UA, **options)


def test_area_is_the_sum_of_trapezoids_and_is_relative_to_nothing_done():
    rng = np.random.default_rng(0)
    values, oracle = rng.random(7), rng.random(3)
    found = summary(values, oracle)
    gap = [abs(value - sum(oracle) / 3) for value in values]
    area = sum((a + b) / 2 for a, b in zip(gap, gap[1:], strict=False))
    assert found.area == pytest.approx(area)
    assert found.relative_area == pytest.approx(area / gap[0] / 6)
    assert found.closed == pytest.approx((gap[0] - gap[-1]) / gap[0])
    assert (found.initial, found.final) == pytest.approx((gap[0], gap[-1]))
    assert summary([0.25] * 4, 0.75).relative_area == 1


def test_the_area_uses_the_times_of_the_evaluations():
    trace = UnlearningTrace([0, 1, 4], {UA: [0.0, 0.5, 0.5]})
    assert gap_summary(trace, 1.0, metric=UA).area == pytest.approx(0.75 + 1.5)


@pytest.mark.parametrize(
    ("values", "first", "settled"),
    [
        ([0.0, 0.5, 0.0, 0.5, 0.5], 1, 3),
        ([0.5, 0.5, 0.5], 0, 0),
        ([0.5, 0.9, 0.9], 0, math.inf),  # moved away again
        ([0.0, 0.1, 0.2], math.inf, math.inf),
        ([0.0, 0.0, 0.5], 2, 2),
    ],
)
def test_settled_is_from_when_on_it_stays(values, first, settled):
    found = summary(values, 0.5)
    assert (found.first_time, found.settled_time) == (first, settled)


def test_settled_only_at_kept_utility():
    oracle = {UA: [0.5], TA: [0.8, 0.9]}

    def settled(accuracy):
        trace = run([0.0, 0.5, 0.5, 0.5], accuracy)
        return gap_summary(trace, oracle, metric=UA, utility=TA).settled_time

    assert settled([0.9, 0.5, 0.81, 0.9]) == 2
    assert settled([0.9, 0.9, 0.9, 0.5]) == math.inf
    assert settled([0.1, 1.0, 1.0, 1.0]) == 1  # better than the oracle is kept


@pytest.mark.parametrize(
    ("values", "overshot"),
    [([0.0, 0.9], True), ([0.0, 0.54], False), ([0.9, 0.4], True), ([0.0, 0.2], False)],
)
def test_overshot_is_beyond_the_oracle(values, overshot):
    assert summary(values, 0.5).overshot is overshot


def test_without_an_initial_gap_there_is_no_fraction():
    found = summary([0.5, 0.6], 0.5)
    assert math.isnan(found.closed) and math.isnan(found.relative_area)
    assert found.area == pytest.approx(0.05)


def test_the_path_has_a_sign():
    np.testing.assert_allclose(
        gap_path(run([0.0, 1.0]), [0.2, 0.4], metric=UA), [-0.3, 0.7]
    )


def test_a_trace_without_a_start_or_of_one_evaluation_is_refused():
    for trace in (UnlearningTrace([1, 2], {UA: [0.0, 1.0]}), run([0.0])):
        with pytest.raises(ValueError, match="trace must have an evaluation at time 0"):
            gap_summary(trace, 0.5, metric=UA)
