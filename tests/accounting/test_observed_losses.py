"""Losses from observed norms: against quadrature, the truth, and their own limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from opacus_pi import AccountingError, GradNormLedger, NoisySGD
from opacus_pi.accounting import (
    epsilon_limits,
    epsilons,
    loss_limits,
    per_step_losses,
    privacy_losses,
    standard_errors,
    tightest_losses,
    worst_case_loss,
)
from opacus_pi.accounting.predicted_losses import PredictedNorms
from opacus_pi.accounting.uncertainty import _quantile_of_mean
from opacus_pi.ledger.custody import BROKEN, CHECKED, LINKS, Custody, Link
from tests.ledger.test_smoothed_ranks import trajectories

NAN = np.nan
ORDERS = (1.5, 2, 4, 8, 16, 32)


def runs(num_rows=60, rate=0.1, clip=0.5, seed=0, num_examples=300, **options):
    """An observed ledger with a row for each update, and the exact one."""
    norms, drawn = trajectories(num_rows, num_examples, seed, share_drawn=rate)
    facts = {"noise_std": clip, "max_grad_norm": clip, **options}
    mechanism = NoisySGD(num_rows, rate, **facts)
    steps = np.arange(1, num_rows + 1)
    rows = np.where(drawn, norms, NAN)
    observed = GradNormLedger(mechanism, steps, rows, source="observed")
    return observed, GradNormLedger(mechanism, steps, norms)


def merged(ledger, size):
    """The same record with a row for every ``size`` updates: the latest norms."""
    rows = ledger.grad_norms.reshape(-1, size, ledger.num_examples)
    latest = rows[:, 0]
    for row in rows.transpose(1, 0, 2)[1:]:
        latest = np.where(np.isnan(row), latest, row)
    steps = ledger.steps[size - 1 :: size]
    return GradNormLedger(ledger.mechanism, steps, latest, source="observed")


def test_the_table_is_the_quadrature():
    observed, _ = runs(clip=5.0)
    predicted = PredictedNorms.of(observed)
    for row in (0, 31):
        for loss in (np.square, np.sqrt, lambda norms: np.minimum(norms, 0.1) ** 2):
            direct = predicted.direct(row, loss)
            seen = observed.grad_norms[row].astype(float)
            table = predicted.losses(row, seen, loss)
            unseen = np.isnan(seen)
            errors = np.abs(table / direct - 1)[unseen]
            assert np.median(errors) < 5e-3 and errors.max() < 0.1
            np.testing.assert_allclose(table[~unseen], loss(seen[~unseen]))


@pytest.mark.parametrize("clip", [0.5, 5.0])
def test_the_total_is_right_and_nobody_is_forgotten(clip):
    totals, least, of_next = [], [], []
    for seed in range(4):
        observed, exact = runs(clip=clip, seed=seed)
        truth = privacy_losses(exact, 8, hoelder_p=math.inf)
        found = privacy_losses(observed, 8, hoelder_p=math.inf)
        totals.append(found.sum() / truth.sum())
        least.append((found / truth).min())
        by_next = privacy_losses(observed, 8, hoelder_p=math.inf, gaps="next")
        of_next.append((by_next / truth).min())
    assert np.mean(totals) == pytest.approx(1, abs=0.05)
    assert min(least) > 20 * min(of_next)


def test_rows_of_several_updates_cost_little():
    observed, exact = runs()
    truth = privacy_losses(exact, 8, hoelder_p=math.inf)
    errors = [
        np.abs(np.log(privacy_losses(run, 8, hoelder_p=math.inf) / truth)).mean()
        for run in (observed, merged(observed, 4))
    ]
    assert errors[1] < 1.3 * errors[0]


def test_a_subset_has_the_losses_of_the_whole():
    observed, _ = runs()
    chosen = [7, 3, 200]
    part = observed.subset(chosen)
    for reading in (
        lambda run: privacy_losses(run, 8),
        lambda run: privacy_losses(run, 8, tolerance=1e-4),
        lambda run: per_step_losses(run, 8)[4],
        # The default tolerance depends on the number of norms.
        lambda run: epsilons(run, 1e-5, tolerance=0),
        lambda run: epsilons(run, 1e-5, tolerance=1e-3),
        lambda run: loss_limits(run, 8),
        lambda run: standard_errors(run, 8),
    ):
        np.testing.assert_allclose(reading(part), reading(observed)[chosen], rtol=1e-12)


def test_a_row_in_which_all_were_charged_is_charged_in_full():
    observed, _ = runs(num_rows=6, num_examples=40)
    norms = observed.grad_norms.copy()
    norms[2] = 0.5  # as a recorder that charges unattributed samples writes it
    run = merged(observed, 1)
    charged = GradNormLedger(run.mechanism, run.steps, norms, source="observed")
    worst = worst_case_loss(run.mechanism, 8) / 6
    np.testing.assert_allclose(
        per_step_losses(charged, 8, hoelder_p=math.inf)[2], worst
    )


def test_several_runs_of_the_same_norms_are_one():
    observed, _ = runs()
    one = privacy_losses(observed, 4, hoelder_p=200.0)
    two = privacy_losses([observed, observed], 4, hoelder_p=200.0)
    np.testing.assert_allclose(two, one, rtol=0.04)  # direct, and from tables
    other, _ = runs(seed=1)
    mixed = privacy_losses([observed, other], 4, hoelder_p=200.0)
    apart = one, privacy_losses(other, 4, hoelder_p=200.0)
    assert (mixed >= np.minimum(*apart) * 0.98).all()
    assert (mixed <= sum(apart)).all()
    assert tightest_losses([observed, other, observed], 4.0).shape == (300,)


def test_fixed_sampling_needs_no_prediction():
    generator = np.random.default_rng(0)
    norms = generator.lognormal(size=(12, 40))
    counts = np.zeros((12, 40), dtype=np.int32)
    for epoch in range(3):  # four updates an epoch, each example in one of them
        update = 4 * epoch + generator.integers(4, size=40)
        counts[update, np.arange(40)] = 1
    mechanism = NoisySGD(
        12,
        0.25,
        noise_std=1.0,
        max_grad_norm=1.0,
        sampling="fixed",
        max_participations=3,
    )
    run = GradNormLedger(
        mechanism,
        np.arange(1, 13),
        np.where(counts, norms, NAN),
        source="observed",
        participations=counts,
    )
    clipped = np.minimum(norms.astype(np.float32), 1.0)
    exact = (8 * clipped**2 / 2 * counts).sum(axis=0)
    np.testing.assert_allclose(
        privacy_losses(run, 8, hoelder_p=math.inf), exact, rtol=1e-6
    )
    limits = loss_limits(run, 8)
    with_hoelder = privacy_losses(run, 8)
    np.testing.assert_allclose(limits, with_hoelder, rtol=1e-9)
    assert (standard_errors(run, 8) == 0).all()


# ----------------------------------------------------------------------------- limits
def test_for_two_values_the_limit_is_that_of_clopper_and_pearson():
    for count, ones in [(5, 0), (20, 3), (50, 49), (7, 7)]:
        least = np.array([1.0 if ones == count else 0.0])
        found = _quantile_of_mean(
            least,
            np.array([float(ones)]),
            np.array([float(ones)]),
            np.array([float(count)]),
            np.ones(1),
            0.95,
        )
        exact = stats.beta.ppf(0.95, ones + 1, count - ones) if ones < count else 1.0
        assert found[0] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("law", ["rare", "even", "skewed"])
def test_the_limit_covers_the_mean(law):
    generator = np.random.default_rng(1)
    size = (4000, 15)
    values, mean = {
        "rare": ((generator.random(size) < 0.05) * 0.9 + 0.1, 0.145),
        "even": (generator.random(size), 0.5),
        "skewed": (generator.beta(0.2, 1.0, size), 1 / 6),
    }[law]
    counts = np.full(4000, 15.0)
    limits = _quantile_of_mean(
        values.min(1), values.sum(1), (values**2).sum(1), counts, np.ones(4000), 0.95
    )
    covered = (limits >= mean).mean()
    assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 4000)
    assert limits.mean() < 1  # it says something


@pytest.mark.parametrize("clip", [0.5, 5.0])
def test_limits_cover_the_truth_of_redrawn_batches(clip):
    covered, of_epsilon = [], []
    for seed in range(5):
        observed, exact = runs(clip=clip, seed=seed, num_rows=80)
        limits = loss_limits(observed, 8)
        worst = worst_case_loss(observed.mechanism, 8)
        assert (limits <= worst).all()
        covered.append((privacy_losses(exact, 8) <= limits).mean())
        most = epsilon_limits(observed, 1e-5, orders=ORDERS)
        of_epsilon.append((epsilons(exact, 1e-5, orders=ORDERS) <= most).mean())
    assert np.mean(covered) > 0.95 and np.mean(of_epsilon) > 0.95


def test_no_limit_is_below_the_estimate():
    observed, _ = runs(seed=3, num_rows=20)
    estimates = privacy_losses(observed, 8)
    limits = loss_limits(observed, 8, confidence=0.3)  # many would be below it
    assert (limits >= estimates).all() and (limits == estimates).any()
    estimates = epsilons(observed, 1e-5, orders=ORDERS)
    assert (epsilon_limits(observed, 1e-5, orders=ORDERS) >= estimates).all()


def test_standard_errors_are_as_large_as_the_errors():
    shares = []
    for seed in range(4):
        observed, exact = runs(seed=seed, num_rows=80, rate=0.3)
        errors = privacy_losses(exact, 2) - privacy_losses(observed, 2)
        expected = standard_errors(observed, 2)
        shares.append(np.sqrt((errors**2).sum() / (expected**2).sum()))
    assert 0.8 < np.mean(shares) < 1.25
    assert (standard_errors(exact, 2) == 0).all()


def test_who_was_never_drawn():
    observed, _ = runs()
    rows = observed.grad_norms.copy()
    rows[:, 0] = NAN
    run = GradNormLedger(observed.mechanism, observed.steps, rows, source="observed")
    worst = worst_case_loss(run.mechanism, 8)
    assert loss_limits(run, 8)[0] == worst
    assert 0 < privacy_losses(run, 8, hoelder_p=math.inf)[0] < worst
    assert standard_errors(run, 8)[0] > np.median(standard_errors(run, 8))


def test_unattributed_samples_raise_the_limit():
    observed, _ = runs()
    links = tuple(Link(name, CHECKED, "Looked at.") for name in LINKS)
    limits = [
        loss_limits(replace(observed, custody=Custody(links, 10_000, missing)), 8)
        for missing in (0, 100)
    ]
    np.testing.assert_array_equal(limits[0], loss_limits(observed, 8))
    worst = worst_case_loss(observed.mechanism, 8)
    below = limits[0] < worst
    assert below.any() and (limits[1] > limits[0])[below].all()
    broken = (Link("draw", BROKEN, "It was drawn twice."), *links[1:])
    refused = replace(observed, custody=Custody(broken, 10_000, 0))
    for reading in (loss_limits, standard_errors):
        with pytest.raises(AccountingError, match="drawn twice"):
            reading(refused, 8)


def test_without_clipping_there_is_no_limit():
    observed, _ = runs(max_grad_norm=math.inf)
    assert np.isinf(loss_limits(observed, 8)).all()
    assert np.isfinite(privacy_losses(observed, 8)).all()


def test_a_swept_ledger_is_its_own_limit():
    _, exact = runs()
    np.testing.assert_allclose(loss_limits(exact, 8), privacy_losses(exact, 8))


def test_nothing_limits_the_norms_between_swept_rows():
    """Norms fall in the first updates, which rows at the ends of epochs do not show."""
    _, exact = runs()
    sparse = GradNormLedger(
        exact.mechanism,
        steps=exact.steps[9::10],
        grad_norms=np.full_like(exact.grad_norms[9::10], 1e-3),
        source="swept",
    )
    assert (privacy_losses(sparse, 8) < privacy_losses(exact, 8)).all()
    for reading, point in ((loss_limits, 8), (epsilon_limits, 1e-5)):
        with pytest.raises(ValueError, match="swept rows that stand for up to 10"):
            reading(sparse, point)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"confidence": 1.0}, "confidence must be in .*got 1"),
        ({"confidence": 0.0}, "confidence must be in .*got 0"),
        ({"tolerance": 2.0}, "tolerance must be .*got 2"),
    ],
)
def test_bad_options_of_limits_are_refused(options, message):
    observed, _ = runs(num_rows=3)
    with pytest.raises(ValueError, match=message):
        loss_limits(observed, 8, **options)
    with pytest.raises(ValueError, match=message):
        epsilon_limits(observed, 1e-5, **options)


def test_bad_input_is_refused():
    observed, _ = runs(num_rows=3)
    with pytest.raises(ValueError, match="gaps must be in .*got 'nearest'"):
        privacy_losses(observed, 8, gaps="nearest")
    with pytest.raises(ValueError, match="assume"):
        epsilon_limits(observed.with_noise_std(2.0), 1e-5)


def test_limits_are_of_one_run():
    observed, _ = runs(num_rows=3)
    for reading in (loss_limits, standard_errors, epsilon_limits):
        with pytest.raises(ValueError, match="ledger must be one GradNormLedger"):
            reading([observed, observed], 1e-5 if reading is epsilon_limits else 8)


def test_nobody_is_drawn_at_rate_0():
    mechanism = NoisySGD(3, 0.0, noise_std=1.0, max_grad_norm=1.0)
    rows = np.full((3, 4), NAN)
    run = GradNormLedger(mechanism, [1, 2, 3], rows, source="observed")
    assert (loss_limits(run, 8) == 0).all()
    assert (privacy_losses(run, 8) == 0).all()


def test_limits_of_a_large_run_are_rounded_up_by_a_thousandth(monkeypatch):
    observed, _ = runs(num_rows=12, num_examples=40)
    orders = (2.0, 8.0)
    exact = epsilon_limits(observed, 1e-5, orders=orders)
    np.testing.assert_array_equal(
        exact, epsilon_limits(observed, 1e-5, orders=orders, tolerance=0)
    )
    monkeypatch.setattr("opacus_pi.accounting.uncertainty._MANY", 12 * 40 - 1)
    rounded = epsilon_limits(observed, 1e-5, orders=orders)
    assert (rounded >= exact).all() and (rounded > exact).any()
    np.testing.assert_allclose(rounded, exact, rtol=1e-3)
