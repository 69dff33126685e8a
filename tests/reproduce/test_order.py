"""Farther and slower are two claims, and neither is confirmed by noise or damage."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.reproduce.judging import ranks
from benchmarks.reproduce.judging.choices import choices
from benchmarks.reproduce.judging.order import (
    FARTHER,
    SLOWER,
    arrivals,
    by_claim,
    judge_farther,
    judge_order,
    judge_slower,
    rising,
    slower_by_first,
)
from benchmarks.reproduce.judging.ranks import rank_interval, rank_test
from benchmarks.reproduce.judging.runs import Runs
from benchmarks.reproduce.judging.simulated_runs import PLAIN, SLOW, draw_runs
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
)

RNG = np.random.default_rng


def drawn(truth=PLAIN, seed=0):
    return draw_runs(RNG(seed), truth)


def exact(gap, speed, seeds=5, epochs=12, together=False):
    """Return runs without any noise, of sets with these gaps and speeds."""
    elapsed = np.multiply.outer(speed, np.arange(epochs + 1))
    left = np.maximum(0, 1 - elapsed) if together else np.exp(-elapsed)
    path = -np.asarray(gap)[:, None] * left
    number = len(gap)
    return Runs(
        np.arange(float(number)),
        np.tile(path, (seeds, 1, 1)),
        np.zeros((seeds, number)),
        np.zeros((3, number)),
        np.zeros((seeds, number, epochs + 1)),
    )


RISING = np.linspace(0.1, 0.6, 20)


def test_sets_that_all_arrive_in_one_epoch_are_farther_and_not_slower():
    found = judge_order(exact(RISING, np.full(20, 1 / 12), together=True))
    assert found.parts[FARTHER].verdict == BORNE_OUT
    assert found.parts[SLOWER].verdict != BORNE_OUT


def test_hard_sets_that_are_faster_are_farther_and_not_slower():
    found = judge_order(exact(RISING, 0.04 * np.geomspace(1, 7, 20)))
    assert found.parts[FARTHER].verdict == BORNE_OUT
    assert found.parts[SLOWER].verdict == NOT_BORNE_OUT
    assert found.verdict == NOT_BORNE_OUT


def test_hard_sets_that_are_slower_are_slower_and_not_farther():
    found = judge_order(drawn(SLOW))
    assert found.parts[SLOWER].verdict == BORNE_OUT
    assert found.parts[FARTHER].verdict != BORNE_OUT


def test_gaps_are_signed_so_that_the_noise_of_oracles_is_no_gap():
    truth = PLAIN.but(start=0.0, gaps=0.0, oracle_noise=(0.01, 0.3))
    runs = drawn(truth)
    beyond = judge_farther(replace(runs, gaps=-np.abs(runs.gaps)))
    assert beyond.verdict == BORNE_OUT  # what distances without a sign would say
    assert judge_farther(runs).verdict != BORNE_OUT


def test_the_side_of_the_gap_is_that_on_which_unlearning_starts():
    runs = drawn(PLAIN.but(farther=0.5))
    lowered = replace(runs, gaps=-runs.gaps, oracles=-runs.oracles, toward=-1)
    assert judge_farther(lowered) == judge_farther(runs)
    assert judge_farther(replace(lowered, toward=1)).verdict == NOT_TESTABLE


def test_trainings_that_disagree_decide_nothing():
    """The mean of the trainings rises, but every other training falls."""
    slopes = np.array([1.0, -0.8, 1.2, -0.6, 0.9])
    values = slopes[:, None] * np.arange(20.0)
    assert rank_test(np.arange(20.0), values.mean(0)[None].repeat(5, 0)).rho > 0.99
    found = rank_test(np.arange(20.0), values)
    assert found.p_rising > 0.05 and found.low < 0


def test_sets_are_chosen_and_measured_by_different_trainings_and_oracles():
    runs = drawn()
    other = runs.gaps.copy()
    other[1:] += 7.0
    judged = runs.something_to_forget()
    assert (replace(runs, gaps=other).something_to_forget() == judged).all()
    first = runs.gaps.copy()
    first[0] += 7.0
    np.testing.assert_array_equal(
        replace(runs, gaps=first).rest().gaps, runs.rest().gaps
    )
    # metric minus the mean of the last two oracles, in the last four trainings
    expected = runs.gaps[1:] - runs.oracles[1:].mean(0)[:, None]
    np.testing.assert_allclose(runs.rest().gaps, expected)


def test_forgotten_images_share_movements_by_several_accounts():
    runs = drawn(PLAIN.but(moved=0.03, unseen=0.02))
    shared, alone, unseen = runs.accounts()
    np.testing.assert_array_equal(shared.gaps, runs.gaps - runs.moved)
    assert alone is runs
    further = runs.lost.mean(0)[:, None]  # errors, on unseen images
    np.testing.assert_allclose(unseen.to_go, runs.to_go + further)
    assert len(replace(runs, counts_errors=False).accounts()) == 2


@pytest.mark.parametrize(
    ("changes", "taken_for"),
    [
        ({"moved": -0.03, "alone": True}, BORNE_OUT),
        ({"moved": 0.03, "alone": True}, NOT_BORNE_OUT),
        ({"unseen": 0.03}, BORNE_OUT),
        ({"unseen": -0.03}, NOT_BORNE_OUT),
    ],
)
def test_points_that_all_sets_share_are_no_speed(changes, taken_for, monkeypatch):
    """They are a larger share of a small gap, so that one account is not enough."""
    truth = PLAIN.but(start=0.3, farther=0.44, gaps=0.0, speeds=0.0, seeds=6)
    truth = truth.but(oracle_noise=(0.002, 0.002), speed=0.2, epochs=10)
    runs = drawn(truth.but(**changes))
    runs = replace(runs, lost=np.full_like(runs.lost, truth.but(**changes).unseen))
    assert judge_slower(runs).verdict == UNDECIDED
    monkeypatch.setattr(Runs, "accounts", lambda self: [self.unlearned()])
    assert judge_slower(runs).verdict == taken_for


def test_one_set_that_overshoots_or_is_damaged_prevents_a_verdict():
    runs = drawn(SLOW)
    assert judge_slower(runs).verdict == BORNE_OUT
    gaps, lost = runs.gaps.copy(), runs.lost.copy()
    gaps[:, 4, 5] = 0.3
    lost[0, 4] = 0.06
    for changed, word in [
        (replace(runs, gaps=gaps), "overshot: 1 of 20 sets"),
        (replace(runs, lost=lost), "damaged: on 1 of 20 sets"),
    ]:
        found = judge_slower(changed)
        assert found.verdict == NOT_TESTABLE and word in found.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("difficulty", "privacy loss"),
        ("gaps", "gap"),
        ("lost", "lost test accuracy"),
        ("oracles", "metric of the oracles"),
        ("moved", "metric on retained images"),
    ],
)
def test_numbers_that_are_not_finite_prevent_a_verdict(field, word, bad):
    runs = drawn(SLOW.but(farther=0.5))
    values = getattr(runs, field).copy()
    values.flat[1] = bad
    found = judge_order(replace(runs, **{field: values}))
    for claim in (FARTHER, SLOWER):
        assert found.parts[claim].verdict == NOT_TESTABLE
        assert f"{word}: 1 of " in found.parts[claim].reason


def test_values_that_are_not_finite_do_not_rise():
    values = np.tile(np.arange(10.0), (5, 1))
    assert rising(np.arange(10.0), values).verdict == BORNE_OUT
    values[1, 2] = np.nan
    assert rising(np.arange(10.0), values).verdict == NOT_TESTABLE
    with pytest.raises(ValueError, match="finite"):
        rank_test(np.arange(10.0), values)


@pytest.mark.parametrize(
    ("change", "claims", "word"),
    [
        ({"sets": 5}, [FARTHER, SLOWER], "there are 5"),
        ({"oracles": 2}, [FARTHER, SLOWER], "2 oracles of each set; at least 3"),
        ({"seeds": 4}, [FARTHER, SLOWER], "4 trainings; at least 5"),
        ({"epochs": 7}, [SLOWER], "7 epochs of unlearning; at least 8"),
        ({"speed": 0.0}, [SLOWER], "too little was unlearned"),
        ({"speed": 2.0}, [SLOWER], "closed in the first epoch"),
        ({"start": 0.0}, [FARTHER, SLOWER], "to forget"),
    ],
)
def test_too_small_a_study_is_not_judged(change, claims, word):
    found = judge_order(drawn(SLOW.but(farther=0.0, **change)))
    for claim in (FARTHER, SLOWER):
        part = found.parts[claim]
        untested = part.verdict == NOT_TESTABLE
        assert untested == (claim in claims)
        assert not untested or word in part.reason


def test_seeds_of_the_same_sets_are_no_evidence():
    """Fifty trainings that repeat one random order of the sets decide nothing."""
    few = drawn()
    many = replace(
        few, gaps=np.tile(few.gaps, (10, 1, 1)), lost=np.tile(few.lost, (10, 1))
    )
    assert judge_farther(many).verdict == judge_farther(few).verdict != BORNE_OUT


def test_permutation_p_is_the_share_of_orders_by_brute_force(monkeypatch):
    """Without differences between trainings, and with equal variances."""
    monkeypatch.setattr(ranks, "_unequal", lambda *_: 1.0)
    rng = RNG(0)
    x, y = rng.random(6), rng.integers(0, 3, 6)
    rho = stats.spearmanr(x, y).statistic
    others = [
        stats.spearmanr(x, order).statistic for order in itertools.permutations(y)
    ]
    found = rank_test(x, [y, y])
    assert found.rho == pytest.approx(rho)
    assert found.p_rising == pytest.approx(np.mean(np.array(others) >= rho - 1e-9))
    assert found.p_falling == pytest.approx(np.mean(np.array(others) <= rho + 1e-9))


def test_values_that_vary_more_at_both_ends_need_more_than_random_orders():
    x, size = np.arange(12.0), np.abs(np.arange(12) - 5.5)
    values = np.where(np.arange(12) % 2, size, -size) + 0.5 * x
    found, ordered = (rank_test(x, [one] * 3) for one in (values, x))
    chance = [stats.spearmanr(x, RNG(k).permutation(12))[0] for k in range(2_000)]
    assert found.p_rising > 1.2 * np.mean(np.array(chance) >= found.rho)
    assert ordered.p_rising < 1e-4


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


def test_arrival_counts_those_that_stay_at_kept_accuracy():
    gaps = np.zeros((1, 4, 4))
    gaps[0, :, 0] = -0.5
    gaps[0, 1] = [-0.5, 0.0, 0.4, 0.4]  # came, and went beyond
    gaps[0, 2] = -0.5  # never came
    lost = np.array([[0.0, 0.0, 0.0, 0.3]])
    still = np.zeros_like(gaps)
    runs = Runs(np.arange(4.0), gaps, lost, np.zeros((3, 4)), still)
    found = arrivals(runs, np.ones(4, dtype=bool))
    assert found == {"first": 0.75, "there": 0.5, "kept": 0.25, "overshot": 0.25}


def test_both_claims_are_judged_over_all_measures():
    good, bad = judge_order(drawn(SLOW.but(farther=0.5))), judge_order(drawn(SLOW))
    found = by_claim({"UA": good, "MIA": bad})
    assert found.parts[SLOWER].verdict == BORNE_OUT
    assert found.parts[FARTHER].verdict != BORNE_OUT
    assert set(found.parts[FARTHER].parts) == {"UA", "MIA"}


def test_a_verdict_on_speeds_has_the_correlations_of_all_choices():
    runs = drawn(SLOW)
    (said,) = (one for one in judge_slower(runs).remarks if "all choices: " in one)
    found = [
        np.corrcoef(
            stats.rankdata(runs.difficulty[judged]),
            stats.rankdata(
                some.rest().only(judged).unlearned().slowness(), axis=1
            ).mean(0),
        )[0, 1]
        for (some,) in choices(runs)
        for judged in [some.something_to_forget()]
    ]
    shown = f"shared {min(found):.2f} to {max(found):.2f}; not shared "
    assert shown in said and "; as test images " in said


def test_the_effect_shown_is_the_median_of_the_choices_that_give_the_verdict():
    runs = drawn(SLOW.but(farther=0.5), seed=3)
    found = judge_slower(runs)
    each = [slower_by_first(some) for (some,) in choices(runs)]
    same = [one.effect.estimate for one in each if one.verdict == found.verdict]
    assert found.effect.estimate == sorted(same)[(len(same) - 1) // 2]
    assert len(set(same)) > 2
