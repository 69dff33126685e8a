"""Tables are never below the exact values, and within the tolerance above them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    epsilons,
    log_moment,
    privacy_losses,
)
from opacus_pi.accounting.composition import weighted_log_moments
from opacus_pi.accounting.tables import UpperTable, upper_log_moments

LAWS = settings(max_examples=15, deadline=None)
rates = st.floats(-6, -0.05).map(lambda x: 10**x)
orders = st.one_of(
    st.floats(-2, 2.3).map(lambda x: 1 + 10**x),
    st.integers(2, 400).map(float),
)


def both(ratios, q, visited, weights, tolerance):
    visited, weights = np.array(visited, float), np.array(weights, float)
    upper = upper_log_moments(ratios, q, visited, weights, tolerance)
    exact = weighted_log_moments(
        ratios[None], q, visited, weights, hoelder_p=2.0, mode="exact"
    )
    return upper, exact


def assert_just_above(upper, exact, tolerance):
    assert (upper >= exact).all()
    assert (upper <= exact * (1 + tolerance * (1 + 1e-9))).all()


# ------------------------------------------------------------------------ one function


@LAWS
@given(q=rates, order=orders, digits=st.sampled_from([1e-2, 1e-4, 1e-6]))
def test_one_order(q, order, digits):
    crossing = math.sqrt(2 * max(-math.log(q), 0.1) / (order - 1))  # where it bends
    ratios = np.concatenate(
        [
            [0.0, 1e-12, 1e3, 1e6],
            np.geomspace(1e-5, 1e2, 150),
            crossing * np.linspace(0.5, 1.5, 250),
        ]
    )
    assert_just_above(*both(ratios, q, [order], [3.7], digits), digits)


@LAWS
@given(
    q=rates,
    visited=st.lists(orders, min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
)
def test_sums_of_several_orders(q, visited, seed):
    rng = np.random.default_rng(seed)
    ratios = 10 ** rng.uniform(-4, 1.5, 200)
    weights = rng.uniform(0.1, 2, len(visited))
    assert_just_above(*both(ratios, q, visited, weights, 1e-3), 1e-3)


def test_nothing_and_everything():
    ratios = np.array([0.0, math.inf, 1e200])
    upper, exact = both(ratios, 0.01, [4], [1], 1e-6)
    assert upper.tolist() == exact.tolist() == [0, math.inf, math.inf]


@pytest.mark.parametrize("q", [0.0, 1e-99, 1.0])
def test_rates_without_a_table_are_exact(q):
    ratios = np.array([0.0, 0.5, 3.0])
    upper, exact = both(ratios, q, [4.5], [2], 1e-3)
    assert upper.tolist() == exact.tolist()


@pytest.mark.parametrize("q", [1e-19, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("tolerance", [1.0, 1e-4, 1e-7])
def test_rates_at_the_ends_of_what_has_a_table(q, tolerance):
    ratios = np.geomspace(1e-5, 1e4, 300)
    for order in (1.001, 2.0, 9.5):
        assert_just_above(*both(ratios, q, [order], [1], tolerance), tolerance)


def test_a_table_grows_with_its_argument():
    ratios = np.geomspace(1e-6, 1e4, 200_000)
    upper, _ = both(ratios, 0.01, [7.5], [1], 1e-3)
    assert (np.diff(upper) >= -1e-14 * upper[1:]).all()


def test_a_coarser_table_needs_fewer_evaluations():
    counts = []
    for tolerance in (1e-6, 1e-3):
        evaluated = []

        def function(s, evaluated=evaluated):
            evaluated.append(len(s))
            return np.expm1(s)

        UpperTable(function, tolerance / 2, 1.0, math.e, tolerance)
        counts.append(sum(evaluated))
    assert 3000 > counts[0] > 10 * counts[1] > 0


def test_any_convex_function_is_met_from_above():
    """A kink, as moments of high order have it, far sharper than a bucket."""

    def function(s):
        return 1e-4 * s + np.maximum(s - 0.3, 0) ** 1.5

    steepest = 1e-4 + 1.5 * math.sqrt(0.7)
    table = UpperTable(function, 1e-3, 1.0, steepest, 1e-5)
    s = np.concatenate(
        [np.linspace(1e-3, 1, 20_001), 0.3 + np.geomspace(1e-9, 0.7, 99)]
    )
    assert_just_above(table(s), function(s), 1e-5)


# --------------------------------------------------------------------------- the proof


@LAWS
@given(q=rates, order=orders)
def test_moments_are_convex_in_half_the_squared_ratio(q, order):
    s = np.geomspace(1e-4, 50, 400)
    values = log_moment(np.sqrt(2 * s), q, order)
    slopes = np.diff(np.append(0.0, values)) / np.diff(np.append(0.0, s))
    assert (np.diff(slopes) >= -1e-8 * slopes[1:]).all()
    c = order * (order - 1)
    assert (c * q**2 * (1 - 1e-8) <= slopes).all()
    assert (slopes <= c * (1 + 1e-8)).all()


@LAWS
@given(q=rates, order=orders)
def test_the_straight_ends(q, order):
    c = order * (order - 1)
    x = np.geomspace(1e-6, 3, 40)
    s = x / max(c, 2.0)
    values = log_moment(np.sqrt(2 * s), q, order)
    assert (values <= c * q**2 * s * np.expm1(x) / x * (1 + 1e-9)).all()
    far = np.geomspace(1e-2, 1e4, 40)
    values = log_moment(np.sqrt(2 * far), q, order)
    assert (values >= (c * far + order * math.log(q)) * (1 - 1e-12)).all()


@pytest.mark.parametrize(("q", "order", "s"), [(0.01, 3.3, 0.4), (0.3, 1.4, 2.0)])
def test_the_slope_is_the_mean_of_p_squared(q, order, s):
    def density(y):
        return (1 - q + q * math.exp(y)) ** order * math.exp(-y / 2 - y * y / (4 * s))

    def p_squared(y):
        return (q * math.exp(y) / (1 - q + q * math.exp(y))) ** 2 * density(y)

    mass, mean = (quad(f, -30, 30, epsrel=1e-11)[0] for f in (density, p_squared))
    h = 1e-4
    values = log_moment(np.sqrt(2 * np.array([s - h, s + h])), q, order)
    slope = (values[1] - values[0]) / (2 * h)
    assert slope == pytest.approx(order * (order - 1) * mean / mass, 1e-6)


@given(q=st.floats(1e-6, 0.999), order=st.floats(1, 200), t=st.floats(1e-3, 20))
def test_the_mean_of_p_squared_grows_with_the_distance_from_0(q, order, t):
    """G of the proof: p² at ±t, weighted by φ(e^y)·e^(-y/2)."""

    def mean(t):
        y = np.array([t, -t])
        log_a = np.log1p(q * np.expm1(y))
        log_weights = order * log_a - y / 2
        weights = np.exp(log_weights - log_weights.max())
        return weights @ np.exp(2 * (math.log(q) + y - log_a)) / weights.sum()

    assert mean(t) <= mean(t * 1.01) * (1 + 1e-12)


# ----------------------------------------------------------------------------- ledgers


def run(num_examples=300, seed=0, **changes):
    rng = np.random.default_rng(seed)
    facts = {"num_steps": 900, "sample_rate": 0.02, "noise_std": 1.0}
    norms = rng.lognormal(-1, 1.5, (4, num_examples))
    norms[rng.random(norms.shape) < 0.1] = math.nan
    mechanism = NoisySGD(**{"max_grad_norm": 20.0, **facts, **changes})
    return GradNormLedger(mechanism, [100, 300, 301, 850], norms)


@pytest.mark.parametrize("convention", ["corrected", "icml2025", "thudi2024_code"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_losses_are_never_below_the_exact_ones(convention, tolerance):
    for ledger in (
        run(),
        run(sample_rate=[0.1, 0.02, 0.5, 1.0], noise_std=[1.0, 2.0, 0.5, 3.0]),
        run(sampling="fixed"),
        run(max_grad_norm=math.inf),
    ):
        for order, rule in [(1.5, "max"), (24.0, "trapezoid")]:
            exact, upper = (
                privacy_losses(
                    ledger, order, convention=convention, rule=rule, tolerance=x
                )
                for x in (0.0, tolerance)
            )
            assert_just_above(upper, exact, tolerance)


@pytest.mark.parametrize("mode", ["exact", "chord", "ceil"])
@pytest.mark.parametrize("p", [300.0, None, math.inf])
def test_every_mode_and_p(mode, p):
    ledger = run(50)
    exact, upper = (
        privacy_losses(ledger, 3.3, mode=mode, hoelder_p=p, tolerance=x)
        for x in (0.0, 1e-4)
    )
    assert_just_above(upper, exact, 1e-4)


def test_an_example_s_loss_does_not_depend_on_the_others():
    ledger = run()
    chosen = [7, 3, 200]
    np.testing.assert_array_equal(
        privacy_losses(ledger.subset(chosen), 8, tolerance=1e-4),
        privacy_losses(ledger, 8, tolerance=1e-4)[chosen],
    )


def test_epsilons_are_never_below_the_exact_ones():
    ledger = run(60)
    orders = [1.5, 2, 3, 5, 8, 16, 32]
    exact, upper = (
        epsilons(ledger, 1e-5, orders=orders, tolerance=x) for x in (0.0, 1e-5)
    )
    assert_just_above(upper, exact, 1e-5)


def test_exact_is_the_default():
    ledger = run(20)
    exact = privacy_losses(ledger, 8)
    np.testing.assert_array_equal(exact, privacy_losses(ledger, 8, tolerance=0.0))
    assert (privacy_losses(ledger, 8, tolerance=1e-2) > exact).all()


@pytest.mark.parametrize("tolerance", [-1e-3, 1e-9, 1.5, math.nan])
def test_tolerances_that_cannot_be_kept_are_refused(tolerance):
    for call in (
        lambda: privacy_losses(run(5), 8, tolerance=tolerance),
        lambda: epsilons(run(5), 1e-5, tolerance=tolerance),
    ):
        with pytest.raises(ValueError, match=r"tolerance must be 0 or in \[1e-08, 1\]"):
            call()


def test_several_runs_are_refused():
    runs = [run(5), run(5, seed=1)]
    with pytest.raises(ValueError, match="tolerance must be 0 with 2 runs, got 0.001"):
        privacy_losses(runs, 8, tolerance=1e-3)
    with pytest.raises(ValueError, match="tolerance must be 0 with 2 runs, got 0.001"):
        epsilons(runs, 1e-5, tolerance=1e-3)
