"""Conversions against Opacus, the exact Gaussian curve, and their promised errors."""

import math

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import get_privacy_spent
from scipy.stats import norm

from opacus_pi.accounting import rdp_to_delta, rdp_to_epsilon

ORDERS = np.array([1.1, 1.5, 2, 3, 8, 20, 64])


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
@pytest.mark.filterwarnings("ignore")
def test_epsilon_equals_opacus_where_positive(delta):
    rdp = 0.05 * ORDERS
    expected, _ = get_privacy_spent(orders=list(ORDERS), rdp=list(rdp), delta=delta)
    assert rdp_to_epsilon(rdp, ORDERS, delta) == pytest.approx(max(0, expected), 1e-12)


def test_many_examples_at_once():
    table = np.outer(ORDERS, [0.0, 0.01, 0.5])
    values = rdp_to_epsilon(table, ORDERS, 1e-5)
    alone = [rdp_to_epsilon(column, ORDERS, 1e-5) for column in table.T]
    np.testing.assert_array_equal(values, alone)
    deltas = rdp_to_delta(table, ORDERS, 1.0)
    np.testing.assert_array_equal(
        deltas, [rdp_to_delta(column, ORDERS, 1.0) for column in table.T]
    )


def test_clipped_at_zero_and_one():
    assert rdp_to_epsilon([0.0], [64.0], 0.9) == 0
    assert rdp_to_delta([500.0], [8.0], 0.1) == 1


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_delta_is_never_below_the_exact_gaussian_curve(epsilon):
    mu = 0.7  # D_a = a·mu²/2
    exact = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
        -mu / 2 - epsilon / mu
    )
    orders = np.linspace(1.01, 60, 4000)
    bound = float(rdp_to_delta(orders * mu**2 / 2, orders, epsilon))
    assert exact <= bound <= 10 * exact


def test_epsilon_and_delta_invert_each_other():
    rdp = 0.05 * ORDERS
    epsilon = rdp_to_epsilon(rdp, ORDERS, 1e-5)
    assert rdp_to_delta(rdp, ORDERS, epsilon) == pytest.approx(1e-5, 1e-9)


def test_mironov_is_looser():
    value = rdp_to_epsilon([0.5], [8.0], 1e-5, conversion="mironov")
    assert value == pytest.approx(0.5 + math.log(1e5) / 7, 1e-14)
    assert value > rdp_to_epsilon([0.5], [8.0], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1, 2, math.nan])
def test_delta_outside_is_refused(delta):
    with pytest.raises(ValueError, match=r"^delta must be in \(0, 1\)"):
        rdp_to_epsilon([0.5], [8.0], delta)


@pytest.mark.parametrize("order", [1.0, 0.5, math.nan])
def test_order_of_one_is_refused(order):
    with pytest.raises(ValueError, match="^orders must be above 1, got"):
        rdp_to_epsilon([0.5], [order], 1e-5)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="^epsilon must .*got -1"):
        rdp_to_delta([0.5], [8.0], -1)
    with pytest.raises(ValueError, match="must have 2 rows, one per order"):
        rdp_to_epsilon([0.5], [8.0, 9.0], 1e-5)
    with pytest.raises(ValueError, match="^divergences must .*got -0.5"):
        rdp_to_epsilon([-0.5], [8.0], 1e-5)
    with pytest.raises(ValueError, match="^conversion must .*got 'x'"):
        rdp_to_epsilon([0.5], [8.0], 1e-5, conversion="x")
    with pytest.raises(ValueError, match="non-empty flat list"):
        rdp_to_epsilon([], [], 1e-5)
