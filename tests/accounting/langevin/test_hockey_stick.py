"""Contraction of δ: exact adversaries, exact laws of random chains, and its solver."""

import math

import mpmath
import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.special import ndtr
from scipy.stats import norm

from opacus_pi.accounting.conversion import (
    gaussian_delta,
    log_gaussian_delta,
    rdp_to_delta,
)
from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.contraction import log_dobrushin_coefficient
from opacus_pi.accounting.langevin.hockey_stick import (
    contraction_noise_std,
    hockey_stick_contraction,
)
from opacus_pi.accounting.langevin.shifted import initial_distance_mu_squared

EPSILONS = np.array([0.0, 0.1, 0.5, 1.0, 3.0, 8.0])


def adversary(epsilon, diameters, stds, start):
    """δ after steps of the map that sends {p > γq} and its complement far apart.

    Both laws are then mixtures of the same two Gaussians, and the set where p > γq is
    a half line. So δ is exact, and only two probabilities describe a step's laws.
    """
    gamma = mpmath.exp(epsilon)
    # The first law is on one point, which has the mass q under the second one.
    p, q = mpmath.mpf(1), (1 - mpmath.mpf(start)) / gamma
    for diameter, std in zip(diameters, stds, strict=True):
        # p e^u + 1 − p > γ(q e^u + 1 − q), u = x·diameter/std² for centres ± half of it
        u = mpmath.log((gamma * (1 - q) - (1 - p)) / (p - gamma * q))
        edge = u * std**2 / diameter
        near, far = (mpmath.ncdf((c * diameter / 2 - edge) / std) for c in (1, -1))
        p, q = (w * near + (1 - w) * far for w in (p, q))
    return p - gamma * q


def test_an_adversary_attains_the_bound_of_single_steps():
    rng, compared = np.random.default_rng(0), 0
    for _ in range(200):
        num_steps = int(rng.integers(1, 12))
        diameters = rng.uniform(0.3, 3, num_steps)
        stds = rng.uniform(0.3, 2, num_steps)
        epsilon, start = rng.uniform(0.01, 5), rng.uniform(0.001, 0.999)
        bound = float(
            hockey_stick_contraction(epsilon, diameters, stds, initial_delta=start)
        )
        if bound > 1e-300:  # float64 holds it
            with mpmath.workdps(350):
                exact = adversary(epsilon, diameters, stds, start)
                assert exact <= bound <= exact * (1 + mpmath.mpf(1e-7))
            compared += 1
    assert compared > 50


CELLS = np.linspace(-1.0, 1.0, 81)
EDGES = np.r_[-np.inf, (CELLS[:-1] + CELLS[1:]) / 2, np.inf]
FINE = np.linspace(-8.0, 8.0, 3001)


def deltas_of(first, second, centres, std):
    """E_γ of two mixtures of Gaussians with common centres, by quadrature."""
    density = norm.pdf((FINE[:, None] - centres) / std) / std
    p, q = density @ first, density @ second
    gaps = p - np.exp(EPSILONS)[:, None] * q
    return trapezoid(np.maximum(gaps, 0), FINE)


def random_chain(rng, num_steps, lipschitz, drift, std):
    """Laws after steps whose maps are constant on cells: finite sums, nothing else.

    A map is c times the cell's centre plus a random part. Two points of the same or of
    neighbouring cells are nearer than their centres by at most one width.
    """
    width = CELLS[1] - CELLS[0]
    spread = drift - lipschitz * width
    assert spread > 0
    first, second = rng.dirichlet(np.full(len(CELLS), 0.05), 2)
    for step in range(num_steps):
        kind = rng.choice(["random", "apart"])
        sign = np.sign(first - second) if kind == "apart" else 1.0
        values = lipschitz * CELLS
        values = values + spread / 2 * sign * rng.uniform(-1, 1, len(CELLS))
        if step == num_steps - 1:
            return first, second, values
        masses = np.diff(ndtr((EDGES[None] - values[:, None]) / std), axis=1)
        first, second = first @ masses, second @ masses
    raise AssertionError


@pytest.mark.parametrize("block", [1, 2, 5, "best"])
def test_no_random_chain_is_above_the_bound(block):
    """Each step projects onto [−1, 1], so any block length is allowed."""
    rng, largest = np.random.default_rng(1), 0.0
    for _ in range(60):
        num_steps = int(rng.integers(1, 9))
        c, d = rng.uniform(0.3, 1.2), rng.uniform(0.1, 0.6)
        std = rng.uniform(0.15, 1.0)
        first, second, values = random_chain(rng, num_steps, c, d, std)
        bounds = hockey_stick_contraction(
            EPSILONS,
            np.full(num_steps, 2 * c + d),
            std,
            block_length=block,
            lipschitz=c,
            drifts=d,
        )
        exact = deltas_of(first, second, values, std)
        assert (exact <= bounds + 1e-9).all()
        largest = max(largest, float((exact / bounds).max()))
    assert largest > 0.05  # the chains are not trivial


def test_one_block_is_the_shifted_divergence():
    mu = math.sqrt(initial_distance_mu_squared(0.9, 2.0, 6, 0.25))
    bound = hockey_stick_contraction(
        EPSILONS, [1.8] * 6, 0.5, block_length=6, lipschitz=0.9
    )
    np.testing.assert_allclose(bound, gaussian_delta(mu, EPSILONS), rtol=1e-8)


def test_without_epsilon_it_is_the_product_of_total_variations():
    bound = hockey_stick_contraction(0.0, [1.0, 2.0], [1.5, 0.8], initial_delta=0.3)
    logs = [
        log_dobrushin_coefficient(1.0, 1.5**2),
        log_dobrushin_coefficient(2.0, 0.8**2),
    ]
    assert float(bound) == pytest.approx(0.3 * math.exp(sum(logs)), rel=1e-12)


@pytest.mark.parametrize("block", [1, 3, "best"])
def test_it_moves_the_right_way_with_every_argument(block):
    rng = np.random.default_rng(2)

    def delta(epsilon=1.0, diameter=2.0, std=0.6, steps=6, c=0.9, d=0.1, start=0.8):
        return hockey_stick_contraction(
            epsilon,
            np.full(steps, diameter),
            std,
            initial_delta=start,
            block_length=block,
            lipschitz=c,
            drifts=d,
        )

    for name in ("diameter", "c", "d", "start"):
        low, high = np.sort(rng.uniform(0.3, 1.0, 2))
        assert delta(**{name: low}) <= delta(**{name: high})
    for name in ("epsilon", "std"):
        low, high = np.sort(rng.uniform(0.3, 1.0, 2))
        assert delta(**{name: low}) >= delta(**{name: high})
    by_steps = [float(delta(steps=n)) for n in (3, 6, 12, 24)]
    assert by_steps == sorted(by_steps, reverse=True)
    along = delta(epsilon=np.linspace(0, 20, 200))
    assert (np.diff(along) <= 0).all()


def test_the_best_block_length_is_the_best():
    shared = {"lipschitz": 0.9, "drifts": 0.02}
    each = [
        hockey_stick_contraction(EPSILONS, [1.82] * 30, 0.2, block_length=j, **shared)
        for j in range(1, 31)
    ]
    best = hockey_stick_contraction(
        EPSILONS, [1.82] * 30, 0.2, block_length="best", **shared
    )
    np.testing.assert_array_equal(best, np.min(each, axis=0))
    assert (best[1:] < each[0][1:]).all()
    assert (best[1:] < each[-1][1:]).all()


def test_small_deltas_neither_underflow_nor_round_down():
    bound = hockey_stick_contraction([50.0, 700.0, 1e6, np.inf], [2.0] * 10, 0.75)
    assert (bound[:3] > 0).all()
    assert bound[3] == 0
    tiny = hockey_stick_contraction(1.0, 2.0, 0.75, initial_delta=1e-300)
    assert 0 < float(tiny) < 1e-300


def test_a_start_may_be_a_function_and_may_be_nothing():
    from_function = hockey_stick_contraction(
        [1.0, 2.0],
        [2.0] * 3,
        1.0,
        initial_delta=lambda e: float(rdp_to_delta([4.0], [8.0], e)),
    )
    for epsilon, bound in zip([1.0, 2.0], from_function, strict=True):
        start = float(rdp_to_delta([4.0], [8.0], epsilon))
        alone = hockey_stick_contraction(epsilon, [2.0] * 3, 1.0, initial_delta=start)
        assert float(alone) == float(bound)
        assert float(bound) < start
    assert hockey_stick_contraction(1.0, 2.0, 1.0, initial_delta=0.0) == 0
    assert hockey_stick_contraction(1.0, 0.0, 1.0) == 0
    assert hockey_stick_contraction(1.0, math.inf, 1.0) == 1


@pytest.mark.parametrize("block", [1, 10, "best"])
@pytest.mark.parametrize("start", [1.0, 1e-3, lambda e: 0.5 / (1 + e)])
def test_the_solver_returns_the_smallest_noise(block, start):
    shared = {
        "initial_delta": start,
        "block_length": block,
        "lipschitz": 0.98,
        "drifts": 0.02,
    }
    std = contraction_noise_std(1.0, 1e-5, [2.0] * 40, **shared)
    assert hockey_stick_contraction(1.0, [2.0] * 40, std, **shared) <= 1e-5
    less = std * (1 - 1e-9)
    assert hockey_stick_contraction(1.0, [2.0] * 40, less, **shared) > 1e-5


def test_the_solver_at_its_limits():
    assert contraction_noise_std(1.0, 0.5, [2.0], initial_delta=0.4) == 0
    assert contraction_noise_std(1.0, 1e-5, [0.0, 0.0]) == 0
    assert contraction_noise_std(1.0, 1e-5, [math.inf]) == math.inf


def test_constants_give_the_same_and_beat_the_coefficient():
    process = LangevinConstants(
        learning_rate=0.1,
        noise_variance=0.3,
        smoothness=2.0,
        strong_convexity=-1.0,
        radius=1.0,
        gradient_bound=0.5,
    )
    found = process.delta_after(EPSILONS, 7, initial_delta=0.6)
    direct = hockey_stick_contraction(
        EPSILONS,
        [2 * process.map_radius] * 7,
        math.sqrt(0.3),
        initial_delta=0.6,
        block_length="best",
        lipschitz=process.lipschitz,
    )
    np.testing.assert_array_equal(found, direct)
    assert (found <= 0.6 * math.exp(7 * process.log_dobrushin) * (1 + 1e-9)).all()


def test_delta_of_a_shift_against_many_digits():
    rng = np.random.default_rng(3)
    with mpmath.workdps(60):
        for _ in range(300):
            mu, eps = 10 ** rng.uniform(-4, 1), 10 ** rng.uniform(-6, 2.5)
            eps *= rng.random() > 0.2
            a = mpmath.mpf(mu) / 2 - mpmath.mpf(eps) / mpmath.mpf(mu)
            exact = mpmath.ncdf(a) - mpmath.exp(eps) * mpmath.ncdf(a - mu)
            found = float(log_gaussian_delta(np.float64(mu), np.float64(eps)))
            logarithm = mpmath.log(exact)
            assert found >= logarithm
            assert found - logarithm <= 1e-9 + 1e-9 * abs(logarithm)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be at least 0"),
        ({"map_diameters": -1.0}, "map_diameters must be at least 0"),
        ({"noise_stds": 0.0}, "noise_stds must be above 0"),
        ({"noise_stds": [1.0, 1.0]}, r"share one shape \(N,\)"),
        ({"map_diameters": []}, "at least one step"),
        ({"initial_delta": 1.5}, "initial_delta must be in"),
        ({"initial_delta": [0.1, 0.2]}, "one number or a function"),
        ({"block_length": 0}, "block_length must be"),
        ({"block_length": True}, "block_length must be"),
        ({"block_length": "all"}, "block_length must be"),
        ({"block_length": 2}, "lipschitz must be finite"),
    ],
)
def test_bad_input_is_named(changed, message):
    good = {"epsilon": 1.0, "map_diameters": [1.0] * 3, "noise_stds": 1.0}
    with pytest.raises(ValueError, match=message):
        hockey_stick_contraction(**(good | changed))
