"""Moments of one step against high precision, the definition, and their laws."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from opacus_pi.accounting import log_moment, renyi_divergence
from tests.accounting import oracles

LAWS = settings(max_examples=60, deadline=None)
ratios = st.floats(1e-6, 1e3)
rates = st.floats(1e-6, 1.0)
orders = st.floats(1.0, 300.0)


def close(value, expected, tolerance):
    return math.isclose(float(value), expected, rel_tol=tolerance)


@pytest.mark.parametrize("seed", range(40))
def test_integer_orders_hold_to_11_digits(seed):
    rng = np.random.default_rng(seed)
    r, q = 10 ** rng.uniform(-6, 3), 10 ** rng.uniform(-6, 0)
    order = int(2 ** rng.uniform(1, 11))
    expected = oracles.mp_integer_moment(r, q, order)
    assert close(log_moment(r, q, order), expected, 1e-11)


@pytest.mark.parametrize("seed", range(8))
def test_real_orders_hold_to_10_digits(seed):
    rng = np.random.default_rng(seed)
    r, q = 10 ** rng.uniform(-4, 2), 10 ** rng.uniform(-6, 0)
    order = 1 + 10 ** rng.uniform(-3, 1.5)
    expected = oracles.mp_real_moment(r, q, order)
    assert close(log_moment(r, q, order), expected, 1e-10)


@pytest.mark.parametrize(
    ("r", "q", "order"),
    [
        (19, 0.5, 1.01),
        (16.9, 0.5, 1.01),
        (22, 1e-6, 1.1),
        (20, 0.01, 1.1),
        (7, 0.9, 2.5),
    ],
)
def test_real_orders_where_the_method_changes(r, q, order):
    expected = oracles.mp_real_moment(r, q, order)
    assert close(log_moment(r, q, order), expected, 1e-10)


@pytest.mark.parametrize("order", [1.01, 1.9, 2.5])
@pytest.mark.parametrize("r", [3.0, 8.0, 9.5])
def test_rare_participation_leaves_the_first_term(r, order):
    """P/Q - 1 is tiny wherever its square counts, up to z = 2r: only y² is left."""
    q = 1e-99
    expected = order * (order - 1) / 2 * q**2 * math.expm1(r * r)
    assert close(log_moment(r, q, order), expected, 1e-12)


def test_half_an_order_above_one_at_an_extreme_ratio():
    """M - 1 is two far peaks here; their closed forms, at 40 digits."""
    with mpmath.workdps(40):
        q, r, a = mpmath.mpf("0.01"), mpmath.mpf(1000), mpmath.mpf("1.5")
        far = q**a * mpmath.exp(a * (a - 1) * r * r / 2)
        expected = float(mpmath.log((1 - q) ** a + far))
    assert close(log_moment(1000.0, 0.01, 1.5), expected, 1e-13)


@pytest.mark.parametrize("r", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("order", [1.7, 4.0, 8.3])
def test_definition_by_adaptive_quadrature(r, order):
    q = 0.05

    def integrand(z):
        ratio = 1 - q + q * math.exp(r * z - r * r / 2)
        return norm.pdf(z) * ratio**order

    value, _ = quad(integrand, -12, order * r + 12, epsabs=0, epsrel=1e-12, limit=500)
    assert close(log_moment(r, q, order), math.log(value), 1e-9)


@pytest.mark.parametrize("q", [1e-4, 0.05, 0.7])
@pytest.mark.parametrize("r", [0.02, 0.5, 2.0])
def test_order_one_is_kullback_leibler(q, r):
    expected = oracles.log_moment(r, q, 1 + 1e-7) / 1e-7
    assert close(renyi_divergence(r, q, 1), expected, 1e-6)
    assert log_moment(r, q, 1) == 0


def test_kullback_leibler_of_far_peaks():
    q, r = 0.01, 60.0  # ln(P/Q) is ln(1-q) or ln q + r·z - r²/2, by the peak
    expected = 0.99 * math.log(0.99) + q * (math.log(q) + r * r / 2)
    assert close(renyi_divergence(r, q, 1), expected, 1e-12)


@LAWS
@given(r=ratios, order=orders, mode=st.sampled_from(["exact", "chord"]))
def test_full_batch_has_a_closed_form(r, order, mode):
    value = log_moment(r, 1.0, order, mode=mode)
    assert close(value, order * (order - 1) * r * r / 2, 1e-12)
    assert close(renyi_divergence(r, 1.0, order, mode=mode), order * r * r / 2, 1e-12)


@LAWS
@given(r=ratios, q=rates, order=orders)
def test_modes_are_ordered(r, q, order):
    exact, chord, ceil = (
        float(log_moment(r, q, order, mode=m)) for m in ("exact", "chord", "ceil")
    )
    assert 0 <= exact <= chord * (1 + 1e-11)
    assert chord <= ceil * (1 + 1e-11)


@LAWS
@given(r=ratios, q=rates, order=orders, factor=st.floats(1, 3))
def test_divergence_grows_with_ratio_rate_and_order(r, q, order, factor):
    value = float(renyi_divergence(r, q, order))
    more = 1 + 1e-11
    assert value <= float(renyi_divergence(r * factor, q, order)) * more
    assert value <= float(renyi_divergence(r, min(1.0, q * factor), order)) * more
    assert value <= float(renyi_divergence(r, q, order * factor)) * more


@LAWS
@given(q=st.floats(1e-6, 0.999), order=st.floats(1.001, 60))
def test_never_above_the_step_without_sampling(q, order):
    r = np.geomspace(1e-5, 1e3, 200)
    assert (renyi_divergence(r, q, order) <= order * r * r / 2).all()


def test_nothing_happens_without_gradient_or_sampling():
    assert log_moment(0.0, 0.3, 5.5) == 0
    assert log_moment(4.0, 0.0, 5.5) == 0
    assert renyi_divergence(0.0, 0.3, 1) == 0


def test_an_unbounded_gradient_has_no_finite_moment():
    for order in (1.5, 2, 3.5):
        for mode in ("exact", "chord", "ceil"):
            assert log_moment(math.inf, 0.3, order, mode=mode) == math.inf


def test_shape_is_the_ratios_shape():
    r = np.abs(np.random.default_rng(0).normal(size=(3, 4)))
    values = log_moment(r, 0.1, 3.3)
    assert values.shape == (3, 4)
    assert values.dtype == np.float64
    alone = [[float(log_moment(x, 0.1, 3.3)) for x in row] for row in r]
    np.testing.assert_allclose(values, alone, rtol=1e-12)


def test_a_million_ratios_stay_finite_and_monotone():
    r = np.geomspace(1e-6, 1e3, 1_000_000)
    values = log_moment(r, 0.01, 7.3)
    assert np.isfinite(values).all()
    assert (np.diff(values) >= -1e-11 * values[1:]).all()


@pytest.mark.parametrize("q", [1e-300, 1e-12, 1e-6, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("order", [1.0, 1 + 1e-12, 1.3, 8.5, 200.5, 2048.0])
@pytest.mark.filterwarnings("error")
def test_extremes_neither_overflow_nor_warn(q, order):
    r = np.geomspace(1e-8, 1e4, 200)
    values = renyi_divergence(r, q, order)
    assert np.isfinite(values).all()
    assert (np.diff(values) >= -1e-11 * values[1:]).all()


@pytest.mark.parametrize("order", [0.99, 0, -3, math.nan, math.inf])
def test_order_below_one_is_refused(order):
    for function in (log_moment, renyi_divergence):
        with pytest.raises(ValueError, match="^order must"):
            function(0.5, 0.1, order)


@pytest.mark.parametrize("q", [-0.1, 1.2, math.nan])
def test_sample_rate_outside_is_refused(q):
    with pytest.raises(ValueError, match=r"^sample_rate must be in \[0, 1\]"):
        log_moment(0.5, q, 2)


@pytest.mark.parametrize("r", [-1.0, math.nan])
def test_negative_ratio_is_refused(r):
    with pytest.raises(ValueError, match="^ratio must"):
        log_moment([0.5, r], 0.1, 2)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="^mode must .*got 'floor'"):
        log_moment(0.5, 0.1, 2.5, mode="floor")
