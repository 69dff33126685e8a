"""Epsilons by numerical composition, against exact, brute-force and sampled values."""

import math
from functools import cache

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import norm

from opacus_pi.accounting import GradNormLedger, NoisySGD, epsilons
from opacus_pi.accounting.losses import norms_of_runs
from opacus_pi.accounting.update_transforms import (
    ADDED,
    REMOVED,
    Line,
    log_transforms,
)

DELTA = 1e-5


def composed(ledger, delta=DELTA, **options):
    """The epsilons under test."""
    return epsilons(ledger, delta, composition="numerical", **options)


def one_row(norms, num_steps, rate=1.0, noise=1.0, clip=1.0):
    """A ledger whose norms hold for all updates."""
    mechanism = NoisySGD(num_steps, rate, noise, clip)
    return GradNormLedger(mechanism, [num_steps], [norms])


def gaussian_epsilon(mu, delta):
    """Exact ε of one Gaussian mechanism of ratio mu (Balle and Wang 2018)."""

    def excess(epsilon):
        second = math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
        return norm.cdf(mu / 2 - epsilon / mu) - second - delta

    return brentq(excess, 0, 50 + 50 * mu**2) if excess(0) > 0 else 0.0


def grid_masses(ratio, rate, way, width, half, up):
    """Probabilities of one update's privacy loss on a grid, rounded up or down."""
    z = np.linspace(-14, 14 + ratio, 2_000_001)
    middle = (z[1:] + z[:-1]) / 2
    logs = np.log1p(rate * np.expm1(ratio * middle - ratio**2 / 2))
    without, given = np.diff(norm.cdf(z)), np.diff(norm.cdf(z - ratio))
    mixed = (1 - rate) * without + rate * given
    loss, weights = (logs, mixed) if way == REMOVED else (-logs, without)
    # The loss at the ends of a cell of z is off by less than 1e-4 cells of the grid.
    place = np.ceil(loss / width + 1e-4) if up else np.floor(loss / width - 1e-4)
    return np.bincount(place.astype(int) + half, weights, minlength=2 * half)


def brute_epsilon(updates, way, delta, up, width=2e-4, half=1 << 17):
    """ε by convolution of rounded losses: an upper or lower bound of the exact one."""
    total = np.ones(half + 1, dtype=complex)
    for ratio, rate, number in updates:
        masses = np.roll(grid_masses(ratio, rate, way, width, half, up), -half)
        total *= np.fft.rfft(masses) ** number
    masses = np.roll(np.fft.irfft(total, 2 * half), half)
    losses = width * (np.arange(2 * half) - half)

    def excess(epsilon):
        above = losses > epsilon
        return (masses[above] * -np.expm1(epsilon - losses[above])).sum() - delta

    return brentq(excess, 0, losses[-1]) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("way", [REMOVED, ADDED])
@pytest.mark.parametrize(
    ("ratio", "rate", "tilt", "frequency"),
    [(1.0, 0.01, 4.0, 60.0), (0.02, 0.1, 300.0, 4000.0), (4.0, 0.3, 0.5, 9.0)],
)
def test_moments_at_complex_orders(way, ratio, rate, tilt, frequency):
    """Against quadrature of the definition at 30 digits."""
    line = Line(tilt, frequency / 9, 10)
    found = log_transforms(np.array([ratio]), np.array([rate]), line, way)[0]
    with mpmath.workdps(30):
        r, q = mpmath.mpf(ratio), mpmath.mpf(rate)
        for place in (0, 4, 9):
            s = mpmath.mpc(complex(line.points[place]))
            power = s + 1 if way == REMOVED else -s

            def integrand(z, r=r, q=q, power=power):
                likelihood = 1 + q * mpmath.expm1(r * z - r * r / 2)
                return likelihood**power * mpmath.npdf(z)

            ends = [-12 + k * (24 + float(r) * (tilt + 1)) / 60 for k in range(61)]
            exact = complex(mpmath.quad(integrand, ends))
            scale = math.exp(found[0].real)
            assert abs(np.exp(found[place]) - exact) < 1e-11 * scale


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_gaussian_updates_are_exact(delta):
    norms = np.array([[0.0, 1e-3, 0.1, 1.0], [0.0, 1e-3, 0.3, 0.01]])
    ledger = GradNormLedger(NoisySGD(30, 1.0, 2.0, 1.0), [10, 30], norms)
    mus = np.sqrt((norms**2 * [[10], [20]]).sum(axis=0)) / 2
    exact = np.array([gaussian_epsilon(mu, delta) if mu else 0.0 for mu in mus])
    found = composed(ledger, delta)
    assert (found >= exact).all()
    np.testing.assert_allclose(found, exact, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("updates", "delta"),
    [
        ([(1.0, 0.05, 20), (0.4, 0.05, 30)], 1e-5),
        ([(2.0, 0.01, 3)], 1e-3),
        ([(0.5, 0.3, 40), (0.25, 0.3, 40)], 1e-6),
        ([(1.5, 0.9, 2)], 1e-2),
    ],
)
def test_never_below_brute_force(updates, delta):
    """Between two convolutions of rounded losses lies the exact ε."""
    rate = updates[0][1]
    steps = np.cumsum([number for *_, number in updates])
    mechanism = NoisySGD(int(steps[-1]), rate, 1.0, 3.0)
    ledger = GradNormLedger(mechanism, steps, [[ratio] for ratio, *_ in updates])
    (found,) = composed(ledger, delta)
    ways = (REMOVED, ADDED)
    lower = max(brute_epsilon(updates, way, delta, up=False) for way in ways)
    upper = max(brute_epsilon(updates, way, delta, up=True) for way in ways)
    assert lower <= found
    assert found <= 1.025 * upper
    assert upper - lower < 0.03


def test_never_below_a_sample():
    """δ at the returned ε, from a million sampled privacy losses of whole runs."""
    generator = np.random.default_rng(3)
    ratio, rate, number, delta = 1.0, 0.1, 5, 0.02
    (found,) = composed(one_row([ratio], number, rate), delta)
    drawn = generator.random((number, 1_000_000)) < rate
    z = generator.standard_normal(drawn.shape) + ratio * drawn
    logs = np.log1p(rate * np.expm1(ratio * z - ratio**2 / 2)).sum(axis=0)
    exact = np.maximum(-np.expm1(found - logs), 0)
    error = 5 * exact.std() / 1000
    assert 0.97 * delta - error < exact.mean() < delta + error


@pytest.mark.parametrize(
    ("rate", "noise", "number"), [(0.01, 1.0, 1000), (0.001, 0.7, 10_000)]
)
def test_worst_case_agrees_with_the_prv_accountant(rate, noise, number):
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, number)]
    prv = accountant._get_dprv(eps_error=0.005, delta_error=1e-9)
    lower, estimate, _ = prv.compute_epsilon(DELTA, 1e-9, 0.005)
    (found,) = composed(one_row([7.0], number, rate, noise))
    assert lower <= found <= 1.012 * estimate


@settings(max_examples=10, deadline=None)
@given(
    st.floats(0.001, 3),
    st.floats(0.001, 1),
    st.integers(1, 3000),
    st.floats(1e-8, 0.1),
)
def test_never_above_renyi_and_larger_for_larger_norms(ratio, rate, number, delta):
    ledger = one_row([ratio * share for share in (0.2, 0.7, 1.0)], number, rate, clip=9)
    found, renyi = composed(ledger, delta), epsilons(ledger, delta)
    assert (found <= renyi).all()
    assert (np.diff(found) >= -1e-3 * found[1:]).all()
    certain = gaussian_epsilon(math.sqrt(number) * ratio, delta)
    assert found[-1] <= 1.02 * certain + 1e-3


def test_schedules():
    """Rows with their own sample rate, noise and clip norm."""
    mechanism = NoisySGD(50, [0.1, 1.0], [1.0, 10.0], [1.0, 2.0])
    ledger = GradNormLedger(mechanism, [30, 50], [[5.0], [5.0]])
    updates = [(1.0, 0.1, 30), (0.2, 1.0, 20)]
    upper = brute_epsilon(updates, REMOVED, DELTA, up=True)
    lower = brute_epsilon(updates, REMOVED, DELTA, up=False)
    (found,) = composed(ledger)
    assert lower <= found <= 1.025 * upper


def test_fixed_sampling_charges_participations():
    """An example of fixed sampling is charged the updates that it was in, in full."""
    mechanism = NoisySGD(20, 0.1, 2.0, 1.0, "fixed", max_participations=3)
    counts = np.array([[1, 0], [2, 1]])
    ledger = GradNormLedger(
        mechanism, [10, 20], [[0.5, 0.5], [1.0, 0.25]], participations=counts
    )
    mus = [math.sqrt(0.25 + 2) / 2, 0.25 / 2]
    exact = [gaussian_epsilon(mu, 1e-3) for mu in mus]
    np.testing.assert_allclose(composed(ledger, 1e-3), exact, rtol=3e-3)


def test_unclipped_norms():
    """A norm so large that ε has no bound, and one far above the noise."""
    ledger = one_row([30.0, np.nan], 2, 0.5, clip=np.inf)
    found = composed(ledger)
    assert found[0] <= 1.01 * gaussian_epsilon(30 * math.sqrt(2), DELTA)
    assert np.isinf(found[1])


@cache
def observed_ledger():
    """A run whose batches drew half of the examples."""
    generator = np.random.default_rng(0)
    levels = np.exp(generator.normal(0, 0.3, 40))
    norms = levels * np.exp(generator.normal(0, 0.2, (10, 40)))
    drawn = generator.random(norms.shape) < 0.5
    mechanism = NoisySGD(10, 0.5, 2.0, 1.0)
    steps = np.arange(1, 11)
    exact = GradNormLedger(mechanism, steps, norms)
    rows = np.where(drawn, norms, np.nan)
    return GradNormLedger(mechanism, steps, rows, source="observed"), exact


def test_observed_norms_are_estimated_from_the_same_predictions():
    observed, exact = observed_ledger()
    estimates, truth = composed(observed), composed(exact)
    assert (estimates <= epsilons(observed, DELTA)).all()
    assert 0.9 < np.median(estimates / truth) < 1.1
    assert np.corrcoef(estimates, truth)[0, 1] > 0.9


def test_plausible_norms_have_the_mean_loss():
    """The shares of the plausible norms add up to 1, and give the same mean loss."""
    observed, _ = observed_ledger()
    runs = norms_of_runs(observed)
    (predicted,) = runs.predictions
    for row in (0, 7):
        norms = runs.norms[0, row]
        parts = list(predicted.plausible(row, norms))
        np.testing.assert_allclose(sum(share for share, _ in parts), 1)
        mean = sum(share * np.nan_to_num(given) ** 2 for share, given in parts)
        expected = predicted.direct(row, np.square)
        drawn = predicted.drawn[row]
        expected[drawn] = norms[drawn] ** 2  # one update for each row: all was seen
        np.testing.assert_allclose(mean, expected)


@pytest.mark.parametrize("gaps", ["rank", "next"])
def test_other_ways_to_fill_gaps(gaps):
    observed, _ = observed_ledger()
    found, renyi = composed(observed, gaps=gaps), epsilons(observed, DELTA, gaps=gaps)
    assert (0 < found).all()
    assert (found <= renyi).all()


def test_blocks_of_examples_do_not_matter(monkeypatch):
    observed, _ = observed_ledger()
    whole = composed(observed)
    monkeypatch.setattr("opacus_pi.accounting.composed_epsilon._ENTRIES", 2_000)
    monkeypatch.setattr("opacus_pi.accounting.composed_epsilon._AT_ONCE", 7)
    np.testing.assert_allclose(composed(observed), whole, rtol=1e-6)


def test_no_updates():
    ledger = GradNormLedger(NoisySGD(0, 0.1, 1.0, 1.0), [0], [[1.0, 2.0]])
    assert composed(ledger).tolist() == [0.0, 0.0]


def test_several_runs_are_refused():
    ledger = one_row([1.0], 5, 0.1)
    with pytest.raises(ValueError, match=r"ledger must be one run .* got 2 runs"):
        composed([ledger, ledger])


def test_unknown_composition_is_refused():
    with pytest.raises(ValueError, match="composition must be in"):
        epsilons(one_row([1.0], 5, 0.1), DELTA, composition="fft")
