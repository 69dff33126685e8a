"""Per-example epsilons against the minimum over every order."""

import math

import numpy as np
import pytest

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    epsilons,
    privacy_losses,
    rdp_to_epsilon,
    worst_case_loss,
)
from opacus_pi.accounting.epsilon import DEFAULT_ORDERS, losses_and_epsilons


def run(max_grad_norm=1.0, num_examples=12, num_steps=60, noise_std=1.0):
    rng = np.random.default_rng(1)
    mechanism = NoisySGD(num_steps, 0.05, noise_std, max_grad_norm)
    norms = rng.lognormal(-1, 1.5, (3, num_examples))
    return GradNormLedger(mechanism, [20, 40, 60], norms)


@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
@pytest.mark.parametrize("noise_std", [0.3, 1.0, 5.0])
def test_bisection_finds_the_least_of_all_orders(max_grad_norm, noise_std):
    ledger = run(max_grad_norm, noise_std=noise_std)
    orders = DEFAULT_ORDERS[::4]
    table = np.array([privacy_losses(ledger, order) for order in orders])
    for delta in (1e-5, 0.01):
        expected = rdp_to_epsilon(table, orders, delta)
        values = epsilons(ledger, delta, orders=orders)
        np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_default_orders_are_opacus_s():
    from opacus.accountants import RDPAccountant

    assert list(DEFAULT_ORDERS) == RDPAccountant.DEFAULT_ALPHAS


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_losses_and_epsilons_are_those_of_either_function(tolerance):
    random = np.random.default_rng(2)
    norms = random.lognormal(-1, 1.5, (3, 50))
    norms[random.random(norms.shape) < 0.7] = np.nan
    mechanism = NoisySGD(60, 0.05, 1.0, max_grad_norm=1.0)
    ledger = GradNormLedger(mechanism, [20, 40, 60], norms, source="observed")
    losses, own = losses_and_epsilons(ledger, 3.5, 1e-5, tolerance=tolerance)
    expected = privacy_losses(ledger, 3.5, tolerance=tolerance)
    np.testing.assert_array_equal(losses, expected)
    np.testing.assert_array_equal(own, epsilons(ledger, 1e-5, tolerance=tolerance))


def test_never_above_the_mechanism_s_own_epsilon():
    ledger = run()
    rdp = [worst_case_loss(ledger.mechanism, order) for order in DEFAULT_ORDERS]
    assert (epsilons(ledger, 1e-5) <= rdp_to_epsilon(rdp, DEFAULT_ORDERS, 1e-5)).all()


def test_clipped_at_zero_and_infinite_where_unbounded():
    mechanism = NoisySGD(10, 0.01, 50.0)
    ledger = GradNormLedger(mechanism, [10], [[0.0, 0.01, math.nan]])
    values = epsilons(ledger, 0.1)
    assert values.tolist() == [0.0, 0.0, math.inf]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"^delta must be in \(0, 1\), got 0.0"):
        epsilons(run(), 0)
    with pytest.raises(ValueError, match="^orders must be above 1, got"):
        epsilons(run(), 1e-5, orders=[1, 2])
    with pytest.raises(ValueError, match="noise_std"):
        epsilons(run().with_noise_std(0.0), 1e-5)
