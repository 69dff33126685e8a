import numpy as np
import pytest
from scipy.optimize import minimize

from opacus_pi.accounting.langevin.shifted import (
    initial_distance_mu_squared,
    learn_unlearn_mu_squared,
    shifted_mu_squared,
)


def by_optimisation(c, d, s, start):
    """Minimise Σ a²/s over all feasible payments, as the theorem states them."""
    size = len(c)

    def distances(a):
        z, out = start, []
        for t in range(size):
            z = c[t] * z + d[t] - a[t]
            out.append(z)
        return np.array(out)

    constraints = [
        {"type": "ineq", "fun": lambda a: distances(a)[:-1]},
        {"type": "eq", "fun": lambda a: distances(a)[-1]},
    ]
    greedy, z = [], start
    for t in range(size):
        z = c[t] * z + d[t]
        greedy.append(z)
        z = 0.0
    found = minimize(
        lambda a: (a**2 / s).sum(),
        greedy,
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return found.fun


@pytest.mark.parametrize("seed", range(12))
def test_the_taut_string_is_the_minimum(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 8))
    c, d, s = (
        rng.uniform(0.6, 1.1, size),
        rng.uniform(0, 1, size),
        rng.uniform(0.2, 2, size),
    )
    d *= rng.random(size) < 0.6
    start = float(rng.uniform(0, 1))
    found = shifted_mu_squared(c, d, s, initial_distance=start)
    assert found == pytest.approx(by_optimisation(c, d, s, start), rel=1e-4)


@pytest.mark.parametrize("c", [0.3, 0.99, 1 - 1e-9, 1.0])
def test_closed_forms(c):
    steps = np.ones(25)
    d = np.r_[np.full(15, 0.2), np.zeros(10)]
    general = shifted_mu_squared(c * steps, d, 0.5 * steps)
    closed = learn_unlearn_mu_squared(c, 0.2, 15, 10, 0.5)
    assert closed == pytest.approx(general, rel=1e-7)
    general = shifted_mu_squared(
        c * steps, 0 * steps, 0.5 * steps, initial_distance=1.3
    )
    closed = initial_distance_mu_squared(c, 1.3, 25, 0.5)
    assert closed == pytest.approx(general, rel=1e-7)


def test_closed_form_serves_many_examples():
    shifts = np.array([0.1, 0.2, 0.0])
    many = learn_unlearn_mu_squared(0.9, shifts, 5, 5, 0.1)
    assert many == pytest.approx(
        [learn_unlearn_mu_squared(0.9, d, 5, 5, 0.1) for d in shifts]
    )


def test_long_contractive_runs_do_not_overflow():
    """c^(−2t) leaves float64's range; units of the end do not."""
    size = 20_000
    value = shifted_mu_squared(
        np.full(size, 0.9), np.full(size, 0.1), np.full(size, 0.5)
    )
    limit = learn_unlearn_mu_squared(0.9, 0.1, size, 0, 0.5)
    assert value == pytest.approx(limit, rel=1e-9)


def test_a_constant_map_forgets_everything():
    value = shifted_mu_squared([0.9, 0.0, 0.9], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert value == 0


def test_more_unlearning_means_less_divergence():
    values = [learn_unlearn_mu_squared(0.95, 0.3, 50, k, 0.1) for k in range(40)]
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shifted_mu_squared([1.0], [1.0, 2.0], [1.0]), "share one shape"),
        (
            lambda: shifted_mu_squared([1.0], [1.0], [0.0]),
            "noise_variances must .*got 0",
        ),
        (lambda: shifted_mu_squared([1.0], [-1.0], [1.0]), "shifts must .*got -1"),
        (
            lambda: learn_unlearn_mu_squared(1.1, 1.0, 1, 1, 1.0),
            "lipschitz must .*got 1.1",
        ),
        (
            lambda: initial_distance_mu_squared(0.9, 1.0, 0, 1.0),
            "num_steps must .*got 0",
        ),
        (lambda: initial_distance_mu_squared(0.9, -1.0, 1, 1.0), "shift must .*got -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mu_is_zero_without_a_distance():
    assert shifted_mu_squared([1.0], [0.0], [1.0]) == 0


def test_expanding_maps_stay_in_range():
    """The distance is paid where it arises: later it only grows."""
    steps = np.ones(5000)
    once = np.r_[0.3, np.zeros(4999)]
    for c in (1.2, 5.0):
        value = shifted_mu_squared(c * steps, once, 0.5 * steps)
        # Step t weighs c^(−2t): the minimum spreads the payment accordingly.
        expected = 0.3**2 / (0.5 / (1 - c**-2))
        assert value == pytest.approx(expected, rel=1e-12)
