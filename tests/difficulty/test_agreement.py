"""Rank correlations, bins and stability against slow or independent ones."""

import numpy as np
import pytest
from scipy import stats

from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.difficulty.agreement import (
    binned_means,
    rank_correlations,
    rank_stability,
)


def scores(n=60, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.gamma(1.0, size=n)
    return {
        "loss": base,
        "ties": np.round(base + rng.normal(size=n)),
        "turned": -(base**3) + rng.normal(size=n),
        "never learned": np.where(base > 2, np.inf, base),
    }


def test_every_pair_is_scipys():
    named = scores()
    found = rank_correlations(named)
    for a, x in named.items():
        for b, y in named.items():
            expected = stats.spearmanr(x, y).statistic
            assert found.between(a, b)[0] == pytest.approx(expected, abs=1e-12)
    assert (found.low <= found.rho).all() and (found.rho <= found.high).all()
    np.testing.assert_allclose(found.rho, found.rho.T)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    pearson = 0.7
    truth = 6 / np.pi * np.arcsin(pearson / 2)  # Spearman's ρ of a normal pair
    covered = []
    for _ in range(400):
        x, e = rng.normal(size=(2, 50))
        y = pearson * x + np.sqrt(1 - pearson**2) * e
        _, low, high = rank_correlations({"x": x, "y": y}).between("x", "y")
        covered.append(low <= truth <= high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_equal_rankings_and_constants():
    x = np.arange(9.0)
    found = rank_correlations({"x": x, "up": np.exp(x), "down": -x, "flat": 0 * x})
    np.testing.assert_array_equal(found.between("x", "up"), [1, 1, 1])
    np.testing.assert_array_equal(found.between("x", "down"), [-1, -1, -1])
    assert np.isnan(found.between("x", "flat")).all()


@pytest.mark.parametrize(
    "named, message",
    [
        ({}, "scores must .*got {}"),
        ({"a": [1, 2, 3]}, "at least 4"),
        ({"a": np.ones(5), "b": np.ones(6)}, r"length \[5, 6\]"),
        ({"a": [1, 2, 3, np.nan]}, r"scores\['a'\].*NaN"),
        ({"a": np.ones((4, 2))}, r"shape \(4, 2\)"),
    ],
)
def test_bad_scores_are_refused(named, message):
    with pytest.raises(ValueError, match=message):
        rank_correlations(named)


def test_confidence_is_a_probability():
    with pytest.raises(ValueError, match="confidence must .*got 95"):
        rank_correlations({"a": np.arange(5)}, confidence=95)


def test_bins_are_scipys_where_equal_counts_are_equal_widths():
    x = np.random.default_rng(0).permutation(60).astype(float)
    y = np.sin(x)
    found = binned_means(x, y, num_bins=6, normalise=False)
    for field, statistic in (("mean", "mean"), ("std", "std"), ("count", "count")):
        expected = stats.binned_statistic(x, y, statistic, bins=6, range=(-0.5, 59.5))
        np.testing.assert_allclose(getattr(found, field), expected.statistic)
    np.testing.assert_allclose(found.x, [4.5, 14.5, 24.5, 34.5, 44.5, 54.5])


def test_bins_lose_no_example_and_are_normalised_to_the_maximum():
    x, y = np.random.default_rng(2).gamma(1.0, size=(2, 101))
    found = binned_means(x, y)
    assert len(found.mean) == 30 and set(found.count) == {3, 4}
    np.testing.assert_allclose(found.mean @ found.count, y.sum() / y.max())
    assert (np.diff(found.x) >= 0).all()
    one_each = binned_means(x, y, num_bins=101)
    assert one_each.mean.max() == 1
    assert (binned_means(x, np.zeros(101)).mean == 0).all()


@pytest.mark.parametrize(
    "x, y, bins, message",
    [
        ([1, 2], [1, np.inf], 1, "y must .*got .* 1 not finite"),
        ([1, 2], [1], 1, "one value for each of the 2"),
        ([1, 2], [1, 2], 3, "num_bins must .*got 3"),
        ([], [], 1, "x must"),
    ],
)
def test_bad_bins_are_refused(x, y, bins, message):
    with pytest.raises(ValueError, match=message):
        binned_means(x, y, num_bins=bins)


def ledger(num_examples=40, seed=0):
    norms = np.random.default_rng(seed).gamma(1.0, size=(3, num_examples))
    return GradNormLedger(NoisySGD(30, 0.1, 0.0), [10, 20, 30], norms)


def test_stability_is_the_correlation_of_the_assumed_losses():
    runs = [ledger(seed=s) for s in (0, 1)]
    found = rank_stability(runs, [2.0, 0.5], order=8)
    losses = [privacy_losses([r.with_noise_std(s) for r in runs], 8) for s in (2, 0.5)]
    expected = stats.spearmanr(*losses).statistic
    assert found.between("σ=2", "σ=0.5")[0] == pytest.approx(expected)
    assert 0.5 < expected < 1


def test_one_row_ranks_alike_under_every_noise():
    run = GradNormLedger(NoisySGD(30, 0.1, 0.0), [30], [np.linspace(0.1, 2, 9)])
    assert (rank_stability(run, [1.0, 3.0, 9.0], order=4).rho > 1 - 1e-12).all()


def test_a_noise_named_twice_is_refused():
    with pytest.raises(ValueError, match="noise_stds"):
        rank_stability(ledger(), [1.0, 1.0], order=4)
