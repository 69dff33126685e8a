"""Differences, means and budgets: statistics against brute force."""

import itertools

import numpy as np
import pytest

from benchmarks.common.set_ranges import set_apart, sets_along_range, windows
from benchmarks.reproduce.judging.budgets import gains, judge_gain, predicted_times
from benchmarks.reproduce.judging.contrasts import (
    alike,
    groups_differ,
    positive,
    shrinks,
)
from benchmarks.reproduce.judging.examples import above, correlation
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
)

RNG = np.random.default_rng


def test_groups_are_permuted_as_by_brute_force():
    first, second = [[1.0, 2.0, 3.0, 9.0]], [[0.0, 0.5, 2.5, 1.5]]
    pooled, size = first[0] + second[0], 4
    sums = [sum(some) for some in itertools.combinations(pooled, size)]
    share = np.mean(np.array(sums) >= sum(first[0]))
    found = groups_differ(first, second, "by")
    assert f"permutation p = {share:.4f}" in found.reason
    assert found.verdict == UNDECIDED
    assert groups_differ([[5.0, 6, 7, 8]], second, "by").verdict == BORNE_OUT
    assert groups_differ(second, [[5.0, 6, 7, 8]], "by").verdict == NOT_BORNE_OUT
    assert groups_differ([[5.0, 6, 7]], second, "by").verdict == NOT_TESTABLE


def test_means_over_sets_use_sets_and_not_seeds():
    one_set_apart = np.zeros((9, 8))
    one_set_apart[:, 0] = 1.0
    assert positive(one_set_apart, "by").verdict == UNDECIDED
    assert positive(one_set_apart + 1, "by").verdict == BORNE_OUT
    assert positive(-one_set_apart - 1, "by").verdict == NOT_BORNE_OUT
    assert positive(one_set_apart[:, :7], "by").verdict == NOT_TESTABLE


def test_alike_needs_an_interval_within_the_limit():
    level, rng = np.full((3, 12), 0.8), RNG(0)
    assert alike(level + 0.001 * rng.normal(size=12), 0.05, "").verdict == BORNE_OUT
    noisy = level + 0.06 * rng.normal(size=12)
    assert alike(noisy, 0.05, "").verdict == UNDECIDED
    apart = level - 0.2 * (np.arange(12) > 5) + 0.001 * rng.normal(size=12)
    assert alike(apart, 0.05, "").verdict == NOT_BORNE_OUT


def test_separation_is_judged_in_both_directions():
    rng = RNG(0)
    wide, close = (
        [scale * np.arange(10) + 0.1 * rng.normal(size=10)] for scale in (1.0, 0.05)
    )
    assert shrinks(wide, close, "area").verdict == BORNE_OUT
    assert shrinks(close, wide, "area").verdict == NOT_BORNE_OUT
    assert shrinks(wide, wide, "area").verdict == UNDECIDED


def test_correlations_over_examples_are_cut_and_no_narrower_with_more_seeds():
    few, many = (correlation([0.9] * seeds, 100) for seeds in (3, 300))
    assert few == pytest.approx(many) and few.low < 0.9 < few.high <= 1
    assert above([0.95, 0.96, 0.95], 10_000, 0.9).verdict == BORNE_OUT
    assert above([0.5, 0.6, 0.5], 10_000, 0.9).verdict == NOT_BORNE_OUT
    assert above([0.95, 0.96, 0.95], 20, 0.9).verdict == UNDECIDED
    assert above([0.95, 0.96], 10_000, 0.9).verdict == NOT_TESTABLE


def test_no_set_helps_to_predict_itself():
    losses = np.exp(np.arange(8.0))
    times = np.tile(np.arange(8.0), (3, 1))
    changed = times.copy()
    changed[:, 3] = 100.0
    before, after = (predicted_times(losses, one, 100) for one in (times, changed))
    assert after[3] == before[3] and not np.allclose(after[4:], before[4:])


def test_budgets_that_fit_leave_less_at_equal_cost():
    """Gaps that fall linearly, at times that the loss predicts exactly."""
    losses = np.exp(np.arange(10.0))
    arrive = 1.0 + np.arange(10)
    epochs = np.arange(12)
    path = -(np.maximum(0, 1 - epochs / arrive[:, None]) ** 4)
    gaps, lost, oracles = np.tile(path, (3, 1, 1)), np.zeros((3, 10)), np.zeros((3, 10))
    drawn = Runs(losses, gaps, lost, oracles)
    assert gains(drawn, np.tile(arrive, (3, 1))).mean() > 0
    assert judge_gain(drawn).verdict != NOT_TESTABLE


def test_windows_are_disjoint_and_leave_room_for_the_search():
    for number, size, count in [(10_000, 200, 20), (400, 20, 8), (1_437, 60, 20)]:
        found = windows(number, size, count)
        places = [place for one in found for place in one]
        assert len(set(places)) == size * count
        assert found[0].start == 0 and found[-1].stop == number
        scores = RNG(0).random(number)
        sets = sets_along_range(scores, size, count)
        means = [scores[one].mean() for one in sets]
        assert means == sorted(means)
        if number > 2 * size * count:
            apart = set_apart(scores, size, count)
            assert len(set(apart)) == size and not set(apart) & set(np.hstack(sets))
            assert scores[apart].min() > np.quantile(scores, 0.55)
    with pytest.raises(ValueError, match="3 disjoint sets of 40 .* got 100 examples"):
        windows(100, 40, 3)
