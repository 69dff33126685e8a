"""Prediction from past runs, and ties of a set, against slow oracles."""

import math
import warnings

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from opacus_pi import GradNormLedger, NoisySGD
from opacus_pi.accounting.guarantee import guarantee_of_run, observed
from opacus_pi.unlearning.plan import make_plan, percentile, predict_time


def test_percentile_counts_ties_half():
    assert percentile(2.0, [1.0, 2.0, 3.0, 4.0]) == 37.5
    assert percentile(9.0, [1.0, 2.0]) == 100
    assert percentile(sum([0.1] * 10) / 10, [0.1] * 10) == 50
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
    [([], []), ([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0]), ([1.0, 0.0], [1.0, 2.0])],
)
def test_too_little_to_fit(losses, times):
    assert predict_time(1.0, losses, times) is None


def predicted_by_hand(loss, losses, times, lengths):
    """a + b ln(loss) by a general solver with b ≥ 0, run by run."""
    rows = [[1.0, math.log(v)] for v in losses]
    counted = [n if t == math.inf else t for t, n in zip(times, lengths, strict=True)]
    found = lsq_linear(rows, counted, bounds=([-np.inf, 0], np.inf)).x
    return max(0.0, found[0] + found[1] * math.log(loss))


def test_runs_that_never_got_there_count_as_their_length():
    generator = np.random.default_rng(0)
    for _ in range(40):
        losses = generator.lognormal(0, 2, 6)
        lengths = generator.integers(5, 26, 6).astype(float)
        times = np.where(generator.random(6) < 0.4, np.inf, lengths / 3)
        loss = float(generator.lognormal(0, 2))
        found = predict_time(loss, losses, times, past_lengths=lengths)
        wanted = predicted_by_hand(loss, losses, times, lengths)
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_leaving_them_out_would_predict_less():
    losses, times = [1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 9.0, math.inf]
    without = predict_time(8.0, losses[:3], times[:3])
    counted = predict_time(8.0, losses, times, past_lengths=25)
    later = predict_time(8.0, losses, [*times[:3], 40.0])  # where it would have got
    assert without < counted < later


@pytest.mark.parametrize("lengths", [None, math.nan, [1.0, math.inf], -1.0])
def test_a_run_that_never_got_there_needs_its_length(lengths):
    with pytest.raises(
        ValueError,
        match="has the time inf .*and how long it ran is not known",
    ):
        predict_time(1.0, [1.0, 2.0], [1.0, math.inf], past_lengths=lengths)


@pytest.mark.parametrize("time", [math.nan, -1.0])
def test_times_that_are_none_are_refused(time):
    with pytest.raises(ValueError, match="past_times must be at least 0"):
        predict_time(1.0, [1.0, 2.0], [1.0, time])


def ledger_of(norms):
    mechanism = NoisySGD(2, sample_rate=0.1, noise_std=1.0, max_grad_norm=1.0)
    return GradNormLedger(mechanism, [1, 2], np.array([norms, norms]))


def plan_of(norms, forget, **options):
    return make_plan([ledger_of(norms)], forget, order=8.0, **options)


def test_a_plan_says_that_its_prediction_is_low():
    norms = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    past = [([0], 1.0), ([1], 2.0, 25.0), ([3], math.inf, 25.0)]
    plan = plan_of(norms, [5], past_runs=past)
    assert plan.num_unfinished == 1
    assert f"Steps: at least {plan.predicted_steps} (" in str(plan)
    assert "3 past runs; 1 of them ended before the set was forgotten" in str(plan)
    assert "at best a lower bound" in plan.prediction
    finished = plan_of(norms, [5], past_runs=past[:2])
    assert finished.num_unfinished == 0 and "at least" not in str(finished)
    with pytest.raises(ValueError, match=r"past_runs=\[\(forget_indices, inf, epochs"):
        plan_of(norms, [5], past_runs=[*past, ([4], math.inf)])


CLIPPED = [0.1, 0.2, 3.0, 4.0, 5.0, 6.0]  # the last four tie at the clip norm 1


@pytest.mark.parametrize(
    ("forget", "num_tied"),
    [
        ([3, 5], 2),
        ([1, 2, 4], 2),
        ([2, 3, 4, 5], 0),  # all that tie
        ([0, 1], 0),
        ([0, 2], 3),
        ([4], 3),
    ],
)
def test_a_plan_counts_ties_without_a_warning(forget, num_tied):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a request is not chosen by loss
        plan = plan_of(CLIPPED, forget)
    assert plan.num_tied == num_tied
    line = f"the forget set with the same loss as one inside it: {num_tied}.\n"
    assert (line in str(plan)) == (num_tied > 0)
    is_most = num_tied > len(CLIPPED) - len(forget) - num_tied
    assert ("percentile, because most" in str(plan)) == is_most
    assert (plan.percentile is None) == is_most
    if not is_most:
        assert f"above that of {plan.percentile:.1f} % of all" in str(plan)


@pytest.mark.parametrize(("divergence", "is_weak"), [(0.5, False), (60.0, True)])
def test_a_plan_says_that_a_bound_excludes_almost_nothing(divergence, is_weak):
    holds = observed("it was seen", "here")
    claim = guarantee_of_run("a method", [holds], [30.0], [divergence])
    text = plan_of(CLIPPED, [1]).claiming(claim).text(1e-5)
    assert ("excludes almost nothing" in text) == is_weak
    assert ("exact rewind has ε = 0" in text) == is_weak


@pytest.mark.parametrize(("met", "is_said"), [(True, True), (False, False)])
def test_a_plan_says_what_a_run_means_for_later_requests(met, is_said):
    holds = observed("it was seen", "here", met=met)
    claim = guarantee_of_run("a method", [holds], [30.0], [1.0])
    text = plan_of(CLIPPED, [1]).claiming(claim).text(1e-5)
    assert ("after this run gets no bound (empirical)" in text) == is_said
    assert "gets no bound" not in str(plan_of(CLIPPED, [1]))


def test_steps_that_are_not_predicted_have_their_reason():
    text = str(plan_of(CLIPPED, [1]))
    assert "Steps: not predicted, because a prediction needs two past runs" in text
    assert "An epoch has" in text
