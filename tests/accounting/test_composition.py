"""Order schedules, and sums over an interval against the sum one by one."""

import math
from decimal import Decimal, localcontext

import mpmath
import numpy as np
import pytest

from opacus_pi.accounting.composition import (
    corrected_order,
    hoelder_losses,
    interval_orders,
    mean_over_runs,
    printed_order,
)
from opacus_pi.accounting.moments import log_moments


@pytest.mark.parametrize(
    ("order", "p", "steps"), [(8, 180_000, 60_000), (1.01, 3e7, 10**7), (64, 5, 3)]
)
def test_schedules_hold_to_13_digits(order, p, steps):
    with mpmath.workdps(40):
        a, p_ = mpmath.mpf(order), mpmath.mpf(p)
        growth = (p_ / (p_ - 1)) ** steps
        corrected = 1 + (a - 1) * growth
        f = (p_ - 1) / p_
        printed = f + (a - f) * growth
    assert float(corrected_order(order, p, steps)) == pytest.approx(
        float(corrected), 1e-13
    )
    assert float(printed_order(order, p, steps)) == pytest.approx(float(printed), 1e-13)


def test_printed_order_iterates_the_published_map():
    order = 8.0
    for step in range(20):
        assert float(printed_order(8.0, 60.0, step)) == pytest.approx(order, 1e-13)
        order = 60 / 59 * order - 1 / 60


def test_start_of_both_schedules_is_the_order_itself():
    assert corrected_order(7.3, 100.0, 0) == 7.3
    assert printed_order(8.0, 100.0, 0) == 8.0


def one_by_one(ratios, q, order, remaining, p, mode):
    """Every update at its own order."""
    total = 0
    for i in range(remaining[0], remaining[1] + 1):
        taken = corrected_order(order, p, i)
        moments = log_moments(ratios.reshape(-1), q, np.array([taken]), mode=mode)
        mean = mean_over_runs(moments.reshape(ratios.shape), p)
        total = total + mean / (taken - 1)
    return total


CASES = [
    (8.0, 0.0445, (0, 1379)),
    (8.0, 0.0445, (500, 540)),
    (1.1, 0.0026, (0, 900)),
    (64.0, 0.0026, (200, 700)),
    (20.0, 1e-6, (0, 500)),
    (2.0, 0.9, (0, 1300)),
    (1.0001, 0.3, (0, 1399)),
    (1.19426, 0.021729, (0, 1399)),
]


@pytest.mark.parametrize("mode", ["exact", "chord", "ceil"])
@pytest.mark.parametrize(("order", "q", "remaining"), CASES)
def test_interval_sums_of_one_run(order, q, remaining, mode):
    ratios = np.array([[1e-4, 0.05, 0.3, 1.0, 2.0, 5.0, 5.8, 40.0]])
    p = 3 * 1400.0
    fast = hoelder_losses(ratios, q, order, remaining, hoelder_p=p, mode=mode)
    slow = one_by_one(ratios, q, order, remaining, p, mode)
    np.testing.assert_allclose(fast, slow, rtol=1e-11)


@pytest.mark.parametrize("mode", ["exact", "chord", "ceil"])
@pytest.mark.parametrize(("order", "q", "remaining"), CASES[:5])
def test_interval_sums_of_several_runs(order, q, remaining, mode):
    base = np.array([1e-4, 0.05, 0.3, 0.7, 1.0, 2.0])
    ratios = base * np.array([[1.0], [1.001], [0.9], [0.3]])
    p = 3 * 1400.0
    fast = hoelder_losses(ratios, q, order, remaining, hoelder_p=p, mode=mode)
    slow = one_by_one(ratios, q, order, remaining, p, mode)
    np.testing.assert_allclose(fast, slow, rtol=1e-9)


def test_few_orders_serve_many_updates():
    orders, weights = interval_orders(
        8.0, 180_000.0, (0, 1713), sample_rate=0.0026, mode="exact", single_run=True
    )
    assert len(orders) < 30
    assert weights @ (orders - 1) == pytest.approx(1714, 1e-12)


def test_infinite_p_keeps_the_order():
    orders, weights = interval_orders(
        8.0, math.inf, (5, 9), sample_rate=0.1, mode="exact", single_run=False
    )
    assert orders.tolist() == [8.0]
    assert weights == pytest.approx([5 / 7])


def test_power_mean_over_runs():
    values = np.array([[1.0, 5.0], [2.0, math.inf]])
    expected = math.log((math.exp(3) + math.exp(6)) / 2) / 3
    assert mean_over_runs(values, 3.0) == pytest.approx([expected, math.inf])
    assert mean_over_runs(values, math.inf).tolist() == [2.0, math.inf]
    assert mean_over_runs(values[:1], 3.0).tolist() == [1.0, 5.0]
    assert mean_over_runs(np.array([[1e5], [2e5]]), 1e5) == pytest.approx(2e5)


# ------------------------------------------------------------------ very long runs


@pytest.mark.parametrize("num_steps", [5000, 10**6, 10**12, 10**17])
@pytest.mark.parametrize("order", [1.3, 8.0, 60.0])
def test_sums_over_any_number_of_updates(num_steps, order):
    """Without sampling ln M = a(a-1)·r²/2, whose sum over updates has a closed form."""
    p = 3.0 * num_steps
    orders, weights = interval_orders(
        order, p, (0, num_steps - 1), sample_rate=1.0, mode="exact", single_run=True
    )
    assert len(orders) < 2000 and (weights > 0).all()
    got = weights @ (orders * (orders - 1) / 2)
    with localcontext() as context:
        context.prec = 60
        growth = Decimal(p) / (Decimal(p) - 1)
        series = (growth**num_steps - 1) / (growth - 1)
        exact = (num_steps + Decimal(order - 1) * series) / 2
    assert got == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("mode", ["chord", "ceil"])
@pytest.mark.parametrize("order", [1.2, 2.0, 7.9, 40.0])
def test_closed_sums_between_integer_orders(mode, order):
    """Against the sum over each update, for a function that is no polynomial."""
    num_steps = 50_000
    p, remaining = 0.9 * num_steps, (100, num_steps)
    visited = corrected_order(order, p, np.arange(remaining[0], remaining[1] + 1))
    values = np.ceil(visited) if mode == "ceil" else visited
    top = int(values.max()) + 1
    knots = np.arange(1, top + 1, dtype=float)
    heights = np.sin(knots) + knots**2
    slow = (np.interp(values, knots, heights) / (visited - 1)).sum()
    orders, weights = interval_orders(
        order, p, remaining, sample_rate=0.1, mode=mode, single_run=True
    )
    assert len(orders) <= top and (weights >= 0).all()
    assert weights @ np.interp(orders, knots, heights) == pytest.approx(slow, rel=1e-12)


def test_what_would_be_summed_one_by_one_is_refused_for_long_runs():
    with pytest.raises(ValueError, match="at most 1000000 updates may lie between"):
        interval_orders(
            8.0, 3e12, (0, 10**12), sample_rate=0.1, mode="chord", single_run=False
        )
