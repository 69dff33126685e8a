"""Epsilons read from tables of all orders: never below, and just above, the exact ones.

The oracle is the search that evaluates every order by quadrature, without any table.
"""

import numpy as np
import pytest

from opacus_pi.accounting import GradNormLedger, NoisySGD, epsilons
from opacus_pi.accounting.composition import interval_orders, weighted_log_moments
from opacus_pi.accounting.conversion import epsilon_offset
from opacus_pi.accounting.dyadic_cells import DyadicCells, halved, octaves
from opacus_pi.accounting.order_tables import order_tables
from opacus_pi.accounting.row_orders import RowUpdates

FEW_ORDERS = (1.3, 1.8, 2.5, 4.0, 6.5, 10.0, 16.0)


def ledger_of(seed, num_steps, rate, noise, *, source="swept", size=12, num_rows=3):
    random = np.random.default_rng(seed)
    rows = min(num_rows, num_steps)
    steps = np.sort(random.choice(num_steps, rows, replace=False) + 1)
    norms = 10 ** random.uniform(-4, 0.5, (rows, size))
    norms[0, 0] = 0.0
    if source == "observed":
        norms[random.random(norms.shape) < 0.6] = np.nan
    mechanism = NoisySGD(num_steps, rate, noise, max_grad_norm=1.0)
    return GradNormLedger(mechanism, steps, norms, source=source)


def assert_just_above(ledger, delta, tolerance, orders=FEW_ORDERS):
    exact = epsilons(ledger, delta, orders=orders, tolerance=0)
    upper = epsilons(ledger, delta, orders=orders, tolerance=tolerance)
    assert (upper >= exact).all()
    assert (upper <= exact * (1 + tolerance)).all()


@pytest.mark.parametrize(
    ("num_steps", "rate", "noise", "delta"),
    [
        (1, 0.1, 0.625, 1e-2),
        (3, 0.5, 2.0, 1e-5),
        (40, 0.01, 1.0, 1e-5),
        (3000, 0.003, 0.8, 1e-9),
        (10**7, 1e-4, 20.0, 1e-6),
    ],
)
def test_random_swept_ledgers(num_steps, rate, noise, delta):
    ledger = ledger_of(num_steps, num_steps, rate, noise)
    assert_just_above(ledger, delta, 1e-2)


@pytest.mark.parametrize("source", ["swept", "observed"])
def test_default_orders_and_tolerance(source):
    ledger = ledger_of(4, 700, 0.01, 1.0, source=source, size=8200, num_rows=2)
    some = np.arange(0, 8200, 200)
    exact = epsilons(ledger.subset(some), 1e-5, tolerance=0)
    upper = epsilons(ledger, 1e-5)[some]
    assert (upper >= exact).all()
    assert (upper <= exact * (1 + 1e-3)).all()
    assert (upper != exact).any()  # tables were used


def test_scheduled_noise_and_rates():
    random = np.random.default_rng(0)
    mechanism = NoisySGD(
        30, [0.1, 0.02], noise_std=[1.0, 2.0], max_grad_norm=[1.0, 0.5]
    )
    norms = random.uniform(0, 1.5, (2, 20))
    assert_just_above(GradNormLedger(mechanism, [10, 30], norms), 1e-5, 1e-2)


def test_few_examples_of_one_run_are_exact_by_default():
    ledger = ledger_of(1, 40, 0.05, 1.0)
    exact = epsilons(ledger, 1e-5, orders=FEW_ORDERS, tolerance=0)
    assert (epsilons(ledger, 1e-5, orders=FEW_ORDERS) == exact).all()


def test_every_tabulated_loss_is_an_upper_bound():
    """At every order and not only at the best one, whatever the certificate says."""
    orders = np.array(FEW_ORDERS)
    row = RowUpdates(0.02, ((5, 24),), 0.5)
    tables = order_tables(
        (row,), FEW_ORDERS, tuple(epsilon_offset(orders, 1e-5)), 90.0, 1e-2, False
    )
    s = np.geomspace(1e-9, 0.5, 300)
    upper = tables.losses(0, s)
    for k, place in enumerate(tables.places):
        visited, weights = interval_orders(
            orders[place],
            90.0,
            (5, 24),
            sample_rate=0.02,
            mode="exact",
            single_run=True,
        )
        exact = weighted_log_moments(
            np.sqrt(2 * s)[None],
            0.02,
            visited,
            weights,
            hoelder_p=90.0,
            mode="exact",
        )
        assert (upper[:, k] >= exact).all()


def test_losses_differ_more_between_orders_the_larger_the_norm():
    """The tables drop orders by this: d/ds of a divergence increases with the order."""
    s = np.geomspace(1e-4, 5, 60)
    for rate in (1e-3, 0.1, 0.7):
        divergences = np.array(
            [
                weighted_log_moments(
                    np.sqrt(2 * s)[None],
                    rate,
                    np.array([order]),
                    np.array([1 / (order - 1)]),
                    hoelder_p=3.0,
                    mode="exact",
                )
                for order in (1.2, 2.0, 3.7, 8.0, 20.5)
            ]
        )
        assert (np.diff(np.diff(divergences, axis=0), axis=1) > 0).all()


def test_cells_contain_their_numbers():
    nodes = octaves(0.3, 5.0)
    nodes, values = halved(np.sqrt, nodes, np.sqrt(nodes.view(float)), np.arange(5) % 4)
    np.testing.assert_array_equal(values, np.sqrt(nodes.view(float)))
    s = np.append(np.random.default_rng(0).uniform(0, 10, 1000), nodes.view(float))
    expected = np.searchsorted(nodes.view(float), s, side="right")
    np.testing.assert_array_equal(DyadicCells(nodes).of(s), expected)
