import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from opacus_pi.accounting import RenyiFilter
from opacus_pi.accounting.conversion import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)

# ---------------------------------------------------------------- the Gaussian's curve


@pytest.mark.parametrize("mu", [1e-3, 0.03, 0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.2, 1.0, 5.0, 60.0])
def test_delta_is_the_hockey_stick_of_two_gaussians(mu, epsilon):
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        first, second = (mpmath.ncdf(s * m / 2 - e / m) for s in (1, -1))
        wanted = first - mpmath.exp(e) * second
    assert float(gaussian_delta(mu, epsilon)) == pytest.approx(
        float(wanted), rel=1e-11, abs=1e-300
    )


@given(st.floats(1e-4, 50), st.floats(1e-12, 0.5))
@settings(max_examples=100, deadline=None)
def test_epsilon_and_mu_invert_it_on_the_safe_side(mu, delta):
    epsilon = float(gaussian_epsilon(mu, delta))
    assert gaussian_delta(mu, epsilon) <= delta
    if epsilon > 1e-8:
        assert gaussian_delta(mu, epsilon * (1 - 1e-9)) > delta * (1 - 1e-12)
        back = float(gaussian_mu(epsilon, delta))
        assert back == pytest.approx(mu, rel=1e-9)
        assert gaussian_delta(back, epsilon) <= delta


def test_ends_and_shapes_of_the_curve():
    assert gaussian_delta(0.0, 0.0) == 0 and gaussian_delta(np.inf, 3.0) == 1
    values = gaussian_epsilon([[0.0, 1.0], [1e-9, np.inf]], 1e-5)
    assert values.shape == (2, 2)
    assert values[0, 0] == values[1, 0] == 0 and np.isinf(values[1, 1])
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match="mu"):
            gaussian_delta(wrong, 1.0)
        with pytest.raises(ValueError, match="epsilon"):
            gaussian_mu(wrong, 1e-5)
    with pytest.raises(ValueError, match="epsilon must .*got inf"):
        gaussian_mu(np.inf, 1e-5)
    with pytest.raises(ValueError, match="delta"):
        gaussian_epsilon(1.0, 1.0)


# ---------------------------------------------------------------------------- admission


def begun(budget, num_examples, order=8.0):
    made = RenyiFilter(budget, order)
    made.begin(num_examples)
    return made


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_admission_is_that_of_a_loop_over_examples(seed, individual):
    rng = np.random.default_rng(seed)
    n, order = 7, 1 + 10 * rng.random()
    budgets = rng.exponential(3, n) if individual else np.full(n, rng.exponential(3))
    made = begun(budgets if individual else budgets[0], n, order)
    paid = [[] for _ in range(n)]
    for _ in range(30):
        indices = rng.permutation(n)[: rng.integers(0, n + 1)]
        ratios = rng.exponential(0.5, len(indices))
        admitted = made.admit(indices, ratios)
        assert admitted.dtype == bool and admitted.shape == indices.shape
        for i, r, may in zip(indices, ratios, admitted, strict=True):
            charge = order * r * r / 2
            assert may == (sum(paid[i]) + charge <= budgets[i])
            paid[i] += [charge] if may else []
    np.testing.assert_allclose(made.spent, [sum(p) for p in paid], rtol=1e-12)
    assert (made.spent <= budgets).all()


def test_an_example_that_was_left_out_may_fit_later():
    made = begun(1.0, 1)
    results = [made.admit([0], [r])[0] for r in (0.4, 0.4, 0.3, 0.01)]
    assert results == [True, False, True, False]  # 0.64, 0.64, 0.36, 0.0004
    assert made.spent == pytest.approx([1.0])


def test_the_charge_reaches_the_budget_and_no_further():
    made = begun(4.0, 2, order=2.0)
    assert made.admit([0, 1], [2.0, np.nextafter(2.0, 3)]).tolist() == [True, False]


def test_without_limit():
    made = begun(np.inf, 2)
    assert made.admit([0, 1], [1e6, np.inf]).all()
    assert np.isinf(made.epsilons(1e-5))


# ----------------------------------- exact divergences of two filtered, adaptive steps

GRID = np.linspace(-16, 20, 180_001)
ORDERS = (1.5, 2.0, 8.0, 13.0)


def density(z):
    return np.exp(-z * z / 2) / np.sqrt(2 * np.pi)


def rare_big(y):
    return np.where(y > 1.0, 3.0, 0.05)


def growing(y):
    return 0.3 * np.minimum(np.abs(y), 4)


def exhausting(y):
    return np.full_like(y, np.sqrt(2 * 2.0 / 8 - 0.4**2) * (1 - 1e-12))


def paths(budget, second_step, first=0.4):
    """Each first output is one path; the ratios that really enter along it."""
    made = begun(budget, len(GRID))
    everyone = np.arange(len(GRID))
    steps = np.full(len(GRID), first), second_step(GRID)
    return [np.where(made.admit(everyone, r), r, 0.0) for r in steps]


def divergence(first, second, order, reverse):
    """Rényi divergence of the two outputs: a quadrature over the first."""
    log_p, log_q = -((GRID - first) ** 2) / 2, -(GRID**2) / 2
    log_p, log_q = (log_q, log_p) if reverse else (log_p, log_q)
    inner = order * (order - 1) * second**2 / 2
    values = np.exp(order * log_p + (1 - order) * log_q + inner)
    total = values.sum() * (GRID[1] - GRID[0]) / np.sqrt(2 * np.pi)
    return np.log(total) / (order - 1)


@pytest.mark.parametrize("second_step", [rare_big, growing, exhausting])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_direction_and_order_exceeds_the_budget(second_step, reverse):
    budget = 2.0
    entered = paths(budget, second_step)
    for order in ORDERS:
        exact = divergence(*entered, order, reverse)
        assert exact <= order * budget / 8 * (1 + 1e-9)
        if second_step is exhausting:
            assert exact == pytest.approx(order * budget / 8, rel=1e-8)
    assert divergence(*entered, 8.0, reverse) > 8 * 0.4**2 / 2  # something entered
    if second_step is not exhausting:  # and what was left out would have been too much
        unfiltered = np.full(len(GRID), 0.4), second_step(GRID)
        assert divergence(*unfiltered, 8.0, reverse) > budget


@pytest.mark.parametrize("second_step", [rare_big, growing, exhausting])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_epsilons_hold_exactly_for_adaptive_steps(second_step, delta):
    budget = 2.0
    epsilon = float(RenyiFilter(budget).epsilons(delta))
    first, second = paths(budget, second_step)
    p, q = density(GRID - first), density(GRID)
    gap = (epsilon - (GRID * first - first**2 / 2)) / np.where(second > 0, second, 1)
    one, other = (ndtr(sign * second / 2 - gap) for sign in (1, -1))
    later = p * one - np.exp(epsilon) * q * other
    alone = np.maximum(p - np.exp(epsilon) * q, 0)
    exact = np.where(second > 0, later, alone).sum() * (GRID[1] - GRID[0])
    assert 0 < exact <= delta * (1 + 1e-6)
    if second_step is exhausting:
        assert exact == pytest.approx(delta, rel=1e-5)


def test_budgets_from_epsilon():
    wanted = np.array([0.1, 1.0, 8.0])
    made = RenyiFilter.from_epsilon(wanted, 1e-6, order=4.0)
    np.testing.assert_allclose(made.epsilons(1e-6), wanted, rtol=1e-9)
    other = RenyiFilter.from_epsilon(wanted, 1e-6, order=16.0)
    np.testing.assert_allclose(other.budget, 4 * made.budget)  # the order is a unit
    with pytest.raises(ValueError, match="epsilon must .*got 0"):
        RenyiFilter.from_epsilon(0.0, 1e-6)


# -------------------------------------------------------------------- state and errors


def test_state_round_trip():
    made = RenyiFilter([1.0, 2.0, 3.0], order=4.0)
    made.begin(3, "toy")
    made.admit([2, 0], [0.5, 0.2])
    for prepared in (False, True):
        again = RenyiFilter([1.0, 2.0, 3.0], order=4.0)
        if prepared:
            again.begin(3, "toy")
        again.load_state_dict(made.state_dict())
        again.begin(3, "toy")
        np.testing.assert_array_equal(again.spent, made.spent)
        assert again.admit([0, 2], [0.7, 1.2]).tolist() == [False, False]
        np.testing.assert_array_equal(again.spent, made.spent)
        with pytest.raises(ValueError, match="data_set"):
            again.begin(3, "other")


def test_a_state_of_something_else_changes_nothing():
    made = begun(1.0, 2)
    made.admit([0], [0.1])
    for other in (begun(2.0, 2), begun(1.0, 2, order=4.0), begun([1.0, 1.0], 2)):
        with pytest.raises(ValueError, match="the saved budget"):
            made.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="3 examples"):
        made.load_state_dict(begun(1.0, 3).state_dict())
    with pytest.raises(ValueError, match="charged since the save cannot be taken back"):
        made.load_state_dict(begun(1.0, 2).state_dict())
    assert made.spent == pytest.approx([0.04, 0.0])


def test_what_it_shows_cannot_change_it():
    made = begun([1.0, 1.0], 2)
    made.spent[:] = 5.0
    made.state_dict()["spent"][:] = 5.0
    assert (made.spent == 0).all()
    with pytest.raises(ValueError, match="read-only"):
        made.budget[0] = 9.0
    assert repr(made) == "RenyiFilter(budget=<2 numbers>, order=8)"
    assert repr(RenyiFilter(1.5)) == "RenyiFilter(budget=1.5, order=8)"


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0.0,), "budget must be above 0, got 0.0"),
        (([1.0, -1.0],), "budget must be above 0, got -1.0"),
        ((np.nan,), "budget must .*got nan"),
        (([[1.0]],), "one number per example"),
        ((1.0, 1.0), r"order must be finite and above 1, got 1.0"),
        ((1.0, np.inf), "order must .*got inf"),
    ],
)
def test_bad_budgets(arguments, message):
    with pytest.raises(ValueError, match=message):
        RenyiFilter(*arguments)


@pytest.mark.parametrize(
    "indices,ratios,message",
    [
        ([0, 0], [0.1, 0.1], "must not have duplicates"),
        ([0, 3], [0.1, 0.1], r"in \[0, 3\)"),
        ([-1], [0.1], r"in \[0, 3\)"),
        ([0.0], [0.1], "whole numbers"),
        ([0, 1], [0.1], "one ratio per index"),
        ([0, 1], [0.1, np.nan], "ratios must .*got nan"),
        ([0], [-0.1], "ratios must .*got -0.1"),
    ],
)
def test_bad_steps_charge_nothing(indices, ratios, message):
    made = begun(1.0, 3)
    with pytest.raises(ValueError, match=message):
        made.admit(indices, ratios)
    assert (made.spent == 0).all()


def test_before_and_after_the_beginning():
    made = RenyiFilter([1.0, 2.0])
    for question in (lambda: made.spent, made.state_dict, lambda: made.admit([0], [1])):
        with pytest.raises(ValueError, match="make_private"):
            question()
    with pytest.raises(ValueError, match="one for each of 3 examples"):
        made.begin(3)
    made.begin(2)
    made.begin(2)
    assert made.admit([], []).shape == (0,)
