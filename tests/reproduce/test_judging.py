"""Judges can fail: simulated sizes, and statistics against brute force."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.common.set_ranges import set_apart, sets_along_range, windows
from benchmarks.reproduce.judging import __main__ as table
from benchmarks.reproduce.judging.budgets import gains, judge_gain, predicted_times
from benchmarks.reproduce.judging.contrasts import (
    alike,
    groups_differ,
    positive,
    shrinks,
)
from benchmarks.reproduce.judging.examples import above, correlation
from benchmarks.reproduce.judging.order import Runs, arrivals, judge_order
from benchmarks.reproduce.judging.ranks import rank_interval, rank_test
from benchmarks.reproduce.judging.simulated import SCENARIOS, rates, runs
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
)

SIZE = 0.05
RNG = np.random.default_rng


@pytest.mark.parametrize("row", table.stored()["rows"], ids=lambda row: row["scenario"])
def test_stored_sizes_are_at_most_five_percent(row):
    found = row["rates"]
    assert sum(found.values()) == pytest.approx(1)
    if row["effect"]:
        assert found[NOT_BORNE_OUT] <= SIZE
    else:
        assert found[BORNE_OUT] <= SIZE


def test_the_stored_table_is_of_the_present_scenarios():
    known = [(one.judge, one.name, one.effect) for one in SCENARIOS]
    rows = table.stored()["rows"]
    assert known == [(row["judge"], row["scenario"], row["effect"]) for row in rows]
    shown = (table.OUT / "judges.md").read_text(encoding="utf-8")
    assert shown == table.table(table.stored())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_judges_still_behave_as_the_table_says(scenario):
    draws, rows = 8, table.stored()["rows"]
    (row,) = (
        one
        for one in rows
        if (one["judge"], one["scenario"]) == (scenario.judge, scenario.name)
    )
    for kind, share in rates(scenario, draws).items():
        error = 4 * math.sqrt(max(share * (1 - share), 0.05) / draws)
        assert share == pytest.approx(row["rates"][kind], abs=error)


def test_five_strata_with_three_at_the_oracles_are_never_judged():
    """Whatever the other two do, and however many seeds there are."""
    rng = RNG(1)
    for _ in range(20):
        gaps = np.zeros((5, 5, 7))
        gaps[:, 3:] = -rng.random((5, 2, 7))
        found = judge_order(Runs(np.arange(5.0), gaps, np.zeros((5, 5))))
        assert found.verdict == NOT_TESTABLE and "there are 5" in found.reason


def test_seeds_of_the_same_sets_are_no_evidence():
    """Fifty seeds that repeat one random order of the sets decide nothing."""
    drawn = runs(RNG(3))
    many = Runs(
        drawn.difficulty, np.tile(drawn.gaps, (10, 1, 1)), np.tile(drawn.lost, (10, 1))
    )
    assert judge_order(many).reason == judge_order(drawn).reason


def test_permutation_p_is_the_share_of_orders_by_brute_force():
    rng = RNG(0)
    x, y = rng.random(6), rng.integers(0, 3, 6)
    rho = stats.spearmanr(x, y).statistic
    others = [
        stats.spearmanr(x, order).statistic for order in itertools.permutations(y)
    ]
    found = rank_test(x, y)
    assert found.rho == pytest.approx(rho)
    assert found.p_rising == pytest.approx(np.mean(np.array(others) >= rho - 1e-9))
    assert found.p_falling == pytest.approx(np.mean(np.array(others) <= rho + 1e-9))


@pytest.mark.parametrize("number", [5, 8, 20])
def test_intervals_stay_within_one_and_have_a_width(number):
    for rho in (-1.0, -0.5, 0.0, 0.99, 1.0):
        low, high = rank_interval(rho, number)
        assert -1 <= low <= rho <= high <= 1 and high - low > 1e-4


def test_the_interval_covers_the_correlation_of_normal_variables():
    rng, number = RNG(4), 12
    for rho in (0.0, 0.8):
        true = 6 / np.pi * np.arcsin(rho / 2)
        first, noise = rng.normal(size=(2, 600, number))
        second = rho * first + np.sqrt(1 - rho**2) * noise
        inside = [
            low <= true <= high
            for a, b in zip(first, second, strict=True)
            for low, high in [rank_interval(stats.spearmanr(a, b).statistic, number)]
        ]
        assert 0.92 < np.mean(inside) < 0.99


def test_never_is_above_every_time():
    assert rank_test([1, 2, 3, 4], [0, 1, 2, np.inf]).rho == pytest.approx(1)


def test_farther_is_said_apart_from_slower():
    farther = judge_order(runs(RNG(0), farther=0.6)).parts
    slower = judge_order(runs(RNG(0), slower=2.0)).parts
    texts = [
        {name.split(",")[0]: float(one.reason.split()[1].strip(",")) for name, one in p}
        for p in (list(farther.items())[:2], list(slower.items())[:2])
    ]
    assert texts[0]["farther"] > 0.8 > texts[0]["slower"]
    assert texts[1]["slower"] > 0.8 > texts[1]["farther"]


def test_arrival_counts_those_that_stay_at_kept_accuracy():
    gaps = np.zeros((1, 4, 4))
    gaps[0, :, 0] = -0.5
    gaps[0, 1] = [-0.5, 0.0, 0.4, 0.4]  # came, and went beyond
    gaps[0, 2] = -0.5  # never came
    lost = np.array([[0.0, 0.0, 0.0, 0.3]])
    found = arrivals(Runs(np.arange(4.0), gaps, lost), np.ones(4, dtype=bool))
    assert found == {"first": 0.75, "there": 0.5, "kept": 0.25, "overshot": 0.25}


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
    drawn = Runs(losses, np.tile(path, (3, 1, 1)), np.zeros((3, 10)))
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
