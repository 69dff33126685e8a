"""Differences, equivalence, correlations and budgets: statistics by brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks.common.set_ranges import set_apart, sets_along_range, windows
from benchmarks.reproduce.judging.budgets import gains, judge_gain, predicted_times
from benchmarks.reproduce.judging.contrasts import (
    betting,
    groups_differ,
    larger,
    shrinks,
)
from benchmarks.reproduce.judging.equivalence import alike, at_most
from benchmarks.reproduce.judging.examples import (
    Correlations,
    above,
    ahead,
    correlation,
    within_classes,
)
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    DESCRIBED,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
)

RNG = np.random.default_rng
LEVEL = 0.025


def trainings(*values, number=3):
    """The same values of the sets in each of several trainings."""
    return np.tile(np.array(values, dtype=float), (number, 1))


def test_groups_are_permuted_as_by_brute_force():
    first, second = trainings(1, 2, 3, 9), trainings(0, 0.5, 2.5, 1.5)
    pooled, size = [*first[0], *second[0]], 4
    sums = [sum(some) for some in itertools.combinations(pooled, size)]
    share = np.mean(np.array(sums) >= sum(first[0]))
    welch = stats.ttest_ind(first[0], second[0], equal_var=False, alternative="greater")
    found = groups_differ(first, second, "by")
    assert found.effect.p == pytest.approx(max(share, welch.pvalue))
    assert found.effect.side == "above" and found.effect.units == "4 against 4 sets"
    assert found.verdict == UNDECIDED
    assert groups_differ(trainings(5, 6, 7, 8), second, "by").verdict == BORNE_OUT
    assert groups_differ(second, trainings(5, 6, 7, 8), "by").verdict == NOT_BORNE_OUT
    assert groups_differ(trainings(5, 6, 7), second, "by").verdict == NOT_TESTABLE
    two = trainings(5, 6, 7, 8, number=2)
    assert groups_differ(two, second, "by").verdict == NOT_TESTABLE


def test_what_agrees_only_because_of_a_training_is_undecided():
    """All sets of a group are larger, but only in one of five trainings."""
    second = trainings(*np.linspace(0, 1, 8), number=5)
    once = np.zeros((5, 1))
    once[0] = 50.0
    for judge in (groups_differ, larger):
        assert judge(second + 10, second, "by").verdict == BORNE_OUT
        found = judge(second + once, second, "by")
        assert found.verdict == UNDECIDED and found.effect.trainings == 5


def test_values_that_are_not_finite_are_not_testable():
    good = trainings(*np.arange(8.0))
    bad = good.copy()
    bad[1, 2] = np.nan
    for judge in (groups_differ, larger, shrinks):
        for pair in ((bad, good), (good, bad)):
            found = judge(*pair, "by")
            assert found.verdict == NOT_TESTABLE and "1 of 24 values" in found.reason
    for found in (alike(bad, 1.0, ""), at_most(bad, np.ones((8, 10)), 1.5, "")):
        assert found.verdict == NOT_TESTABLE and "1 of 24 values" in found.reason
    assert at_most(good, np.full((8, 10), np.inf), 1.5, "").verdict == NOT_TESTABLE


@pytest.mark.parametrize("rare", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("number", [8, 20, 60])
def test_no_two_values_of_mean_zero_fool_the_bet(number, rare):
    """Exactly, over all counts of the rare value, -1; the other one makes the mean 0.

    The common value is above 0, so the mean seems positive unless -1 is drawn.
    """
    common = rare / (1 - rare)
    wrong = sum(
        stats.binom.pmf(count, number, rare)
        for count in range(number + 1)
        if betting([-1.0] * count + [common] * (number - count)) <= LEVEL
    )
    assert wrong <= LEVEL


def test_bets_multiply():
    assert betting([1.0, 0.5]) == pytest.approx(
        3 / (1.5 * 1.25 + 1.75 * 1.375 + 2 * 1.5)
    )
    assert betting([-1.0] * 9) == 1.0


def test_two_values_of_each_set_are_compared_over_sets_and_not_seeds():
    one_set_apart, none = np.zeros((9, 8)), np.zeros((9, 8))
    one_set_apart[:, 0] = 1.0
    assert larger(one_set_apart, none, "by").verdict == UNDECIDED
    assert larger(one_set_apart + 1, none, "by").verdict == BORNE_OUT
    assert larger(none, one_set_apart + 1, "by").verdict == NOT_BORNE_OUT
    assert larger(one_set_apart[:, :7], none[:, :7], "by").verdict == NOT_TESTABLE
    assert larger(one_set_apart[:2] + 1, none[:2], "by").verdict == NOT_TESTABLE


def test_rare_sets_still_fool_the_judges_of_groups_and_separations():
    """The page of results says so; a mean of 0 looks positive if they are not drawn."""
    rng, wrong = RNG(0), {"groups": 0, "separation": 0}
    for _ in range(200):
        first, flat, wide = (
            0.02 * (rng.normal(size=sets) + rng.normal(size=(5, sets)))
            for sets in (4, 20, 20)
        )
        first += np.where(rng.random(4) < 0.1, -0.9, 0.1)
        wide[:, 10:] += np.where(rng.random(10) < 0.05, -0.95, 0.05)
        found = groups_differ(first, flat[:, :4], ""), shrinks(wide, flat, "")
        for name, one in zip(wrong, found, strict=True):
            wrong[name] += one.verdict == BORNE_OUT
    assert min(wrong.values()) > 0.4 * 200


def test_alike_needs_every_pair_within_the_limit():
    level, rng = np.full((5, 12), 0.8), RNG(0)
    noise = rng.normal(size=(5, 12))
    assert alike(level + 0.001 * noise, 0.05, "").verdict == BORNE_OUT
    assert alike(level + 0.06 * noise, 0.05, "").verdict == UNDECIDED
    apart = level - 0.2 * (np.arange(12) > 5) + 0.001 * noise
    assert alike(apart, 0.05, "").verdict == NOT_BORNE_OUT
    one_bad = level - 0.2 * (np.arange(12) == 3) + 0.001 * noise
    assert alike(one_bad, 0.05, "").verdict == NOT_BORNE_OUT
    assert alike(level, 0.05, "").verdict == NOT_TESTABLE  # no error to be known
    assert alike(apart[:2], 0.05, "").verdict == NOT_TESTABLE
    assert alike(apart[:, :7], 0.05, "").verdict == NOT_TESTABLE


def test_the_largest_difference_is_that_of_the_worst_pair():
    values = RNG(1).normal(size=(6, 9))
    ends = []
    for i, j in itertools.combinations(range(9), 2):
        found = stats.ttest_1samp(values[:, i] - values[:, j], 0)
        ends.append(np.abs(found.confidence_interval(0.95)).max())
    assert alike(values, 0.1, "").effect.high == pytest.approx(max(ends))


def test_every_set_must_be_near_its_own_baseline():
    rng = RNG(0)
    own = np.linspace(0.1, 0.9, 8)
    pairs = own[:, None] * (1 + 0.05 * rng.normal(size=(8, 10)))
    noise = 0.002 * rng.normal(size=(5, 8))
    assert at_most(own + noise, pairs, 1.5, "").verdict == BORNE_OUT
    one_high = own * np.where(np.arange(8) == 7, 3.0, 1.0)
    assert at_most(one_high + noise, pairs, 1.5, "").verdict == NOT_BORNE_OUT
    one_low = own * np.where(np.arange(8) == 0, 3.0, 1.0)  # its own baseline is small
    assert at_most(one_low + noise, pairs, 1.5, "").verdict == UNDECIDED
    assert at_most(1.5 * own + noise, pairs, 1.5, "").verdict == UNDECIDED
    assert at_most(own + 200 * noise, pairs, 1.5, "").verdict == UNDECIDED
    assert at_most((own + noise)[:2], pairs, 1.5, "").verdict == NOT_TESTABLE


def test_separation_is_judged_in_both_directions():
    rng = RNG(0)
    wide, close = (
        scale * np.arange(10) + 0.1 * rng.normal(size=(3, 10)) for scale in (1.0, 0.05)
    )
    assert shrinks(wide, close, "area").verdict == BORNE_OUT
    assert shrinks(close, wide, "area").verdict == NOT_BORNE_OUT
    assert shrinks(wide, wide, "area").verdict == UNDECIDED
    assert shrinks(wide[:, :7], close[:, :7], "area").verdict == NOT_TESTABLE


def correlations(of_trainings, middle, spread=0.01, classes=10):
    of_classes = middle + spread * np.linspace(-1, 1, classes)
    return Correlations(np.array(of_trainings), of_classes)


def test_correlations_are_cut_and_no_narrower_with_more_seeds():
    few, many = (correlation(correlations([0.9] * n, 0.9, 0.09)) for n in (3, 300))
    assert few == pytest.approx(many) and few.low < 0.9 < few.high <= 1
    more = correlation(correlations([0.9] * 3, 0.9, 0.09, classes=100))
    assert few.low < more.low and more.high < few.high
    vary = correlation(correlations([0.8, 0.9, 0.95], 0.9, 0.09))
    assert vary.low < few.low and few.high < vary.high < 1


def test_correlations_are_judged_over_classes_and_trainings():
    high = [0.95, 0.96, 0.95]
    assert above(correlations(high, 0.95), 0.9).verdict == BORNE_OUT
    assert above(correlations([0.5, 0.6, 0.5], 0.55), 0.9).verdict == NOT_BORNE_OUT
    assert above(correlations(high, 0.9, 0.09), 0.9).verdict == UNDECIDED
    assert above(correlations([0.2, 0.99, 0.9], 0.95), 0.9).verdict == UNDECIDED
    assert above(correlations(high[:2], 0.95), 0.9).verdict == NOT_TESTABLE
    assert above(correlations(high, 0.95, classes=4), 0.9).verdict == NOT_TESTABLE
    assert above(correlations(high, np.nan), 0.9).verdict == NOT_TESTABLE
    none = above(Correlations(np.array(high), np.array([])), 0.9)
    assert none.verdict == NOT_TESTABLE and "without the classes" in none.reason
    better, worse = correlations(high, 0.95), correlations([0.9, 0.91, 0.9], 0.9)
    assert ahead(better, worse).verdict == BORNE_OUT
    assert ahead(worse, better).verdict == NOT_BORNE_OUT
    assert ahead(better, better).verdict == UNDECIDED


def test_a_lead_in_classes_near_one_is_no_lead_on_average():
    """The artanh of 0.999 minus that of 0.998 outweighs 0.4 minus 0.7."""
    trainings = np.array([0.95, 0.96, 0.95])
    better = np.array([0.999] * 9 + [0.4]) + 1e-5 * np.arange(10)
    worse = np.array([0.998] * 9 + [0.7]) + 1e-5 * np.arange(10)
    assert (np.arctanh(better) - np.arctanh(worse)).mean() > 0.2
    found = ahead(Correlations(trainings, better), Correlations(trainings, worse))
    assert found.verdict == UNDECIDED


def test_pairs_that_share_oracles_are_not_independent():
    """The limit on one set covers a baseline that is a sum of two oracles' parts."""
    left, right = np.triu_indices(5, 1)
    own = RNG(0).normal(size=(20_000, 5))
    pairs = own[:, left] + own[:, right]
    of_mean = pairs.var(1, ddof=1) * (2 / 3) * (9 / 10)
    assert of_mean.mean() == pytest.approx(pairs.mean(1).var(), rel=0.03)
    values, baseline = np.full((5, 8), 50.0), 100 + pairs[:8]
    limits = 50 - baseline.mean(1) + stats.t.isf(LEVEL, 4) * np.sqrt(of_mean[:8])
    found = at_most(values, baseline, 1.0, "barrier")
    assert found.effect.high == pytest.approx(limits.max())


def test_scores_that_only_tell_classes_apart_do_not_correlate_within_them():
    rng, labels = RNG(0), np.repeat(np.arange(5), 40)
    first, second = (100 * labels + rng.normal(size=200) for _ in range(2))
    assert stats.spearmanr(first, second).statistic > 0.9
    found = within_classes(first, second, labels)
    for k, one in enumerate(found):
        rows = labels == k
        known = stats.spearmanr(first[rows], second[rows]).statistic
        assert one == pytest.approx(known) and abs(one) < 0.5
    second[labels == 2] = 7.0
    assert list(np.isnan(within_classes(first, second, labels))) == [
        k == 2 for k in range(5)
    ]


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
    gaps, lost, oracles = np.tile(path, (5, 1, 1)), np.zeros((5, 10)), np.zeros((3, 10))
    drawn = Runs(losses, gaps, lost, oracles, np.zeros_like(gaps))
    assert gains(drawn, np.tile(arrive, (3, 1))).mean() > 0
    within = (np.abs(path) <= 0.05).argmax(1)  # five points of the oracles
    gain = gains(drawn, np.tile(within, (3, 1))).mean()
    said = judge_gain(drawn)  # no test has any power, so the gain is described only
    assert said.verdict == DESCRIBED
    assert "mean gain over 10 sets is too small to be tested" in said.reason
    assert said.effect.estimate == pytest.approx(gain)
    still = np.tile(path[:, :1], (5, 1, 12))
    idle = Runs(losses, still, lost, oracles, np.zeros_like(still))
    assert "too little was unlearned" in judge_gain(idle).reason


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
