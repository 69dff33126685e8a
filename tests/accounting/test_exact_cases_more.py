"""What the exact cases rest on, and the runs in which printed formulas fail."""

import math

import numpy as np
import pytest
from scipy.linalg import eigh_tridiagonal
from scipy.special import log_ndtr, ndtr

from benchmarks.looseness import cases
from benchmarks.looseness.case import gaussian_divergence
from benchmarks.looseness.constants import muckenhoupt, two_point_density
from benchmarks.looseness.ridge import Ridge
from opacus_pi.accounting import rdp_to_delta
from opacus_pi.accounting.langevin.lsi import bounded_support_lsi


def ratios(name, number, seed, bound):
    """A bound over the exact value, for every case of a family."""
    found = cases(name, number, seed)
    return [(case.ours | case.published)[bound] / case.exact for case in found]


def test_counting_the_steps_before_instead_of_after_is_no_bound():
    assert max(ratios("rare_events", 8, 1, "forward index")) < 1
    assert min(ratios("rare_events", 8, 1, "Hölder")) >= 1


def test_the_printed_definition_is_no_bound():
    assert max(ratios("threshold_orders", 4, 1, "Definition 4.2")) < 0.5
    assert min(ratios("threshold_orders", 4, 1, "Hölder")) >= 1


@pytest.mark.parametrize("seed", range(3))
def test_the_joint_law_of_a_ridge_run_is_its_recursion(seed):
    ridge = Ridge(np.random.default_rng(seed))
    for with_x in (True, False):
        A, c = ridge.map(with_x=with_x)
        mean, cov = np.zeros(ridge.dims), ridge.prior * np.eye(ridge.dims)
        for _ in range(5):
            mean, cov = A @ mean + c, A @ cov @ A.T + ridge.noise * np.eye(ridge.dims)
        joint_mean, joint_cov = ridge.trajectory(5, with_x=with_x)
        last = slice(-ridge.dims, None)
        np.testing.assert_allclose(joint_mean[last], mean, rtol=1e-10)
        np.testing.assert_allclose(joint_cov[last, last], cov, rtol=1e-10)


def test_a_step_of_ridge_differs_by_the_point_s_gradient():
    ridge = Ridge(np.random.default_rng(5))
    (A, c), (B, d) = (ridge.map(with_x=x) for x in (True, False))
    w = np.random.default_rng(0).normal(size=ridge.dims)
    gap = np.linalg.norm(A @ w + c - B @ w - d)
    residual = ridge.points[0] @ w - ridge.labels[0]
    assert gap == pytest.approx(float(ridge.moves(residual)), rel=1e-12)


def test_whole_runs_reveal_more_than_their_last_weights():
    ridge = Ridge(np.random.default_rng(2))
    laws = [ridge.trajectory(6, with_x=x) for x in (True, False)]
    last = slice(-ridge.dims, None)
    ends = [(mean[last], cov[last, last]) for mean, cov in laws]
    assert gaussian_divergence(*ends[0], *ends[1], 2.0) < gaussian_divergence(
        *laws[0], *laws[1], 2.0
    )


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_delta_is_never_below_the_gaussian_mechanism_s(sigma):
    orders = np.geomspace(1.01, 500, 400)
    curve = orders / (2 * sigma**2)
    for epsilon in (0.1, 0.5, 1.0, 3.0):
        exact = ndtr(0.5 / sigma - epsilon * sigma) - math.exp(
            epsilon + log_ndtr(-0.5 / sigma - epsilon * sigma)
        )
        found = float(rdp_to_delta(curve, orders, epsilon))
        # At epsilon 0 and above the total variation 1 is the trivial answer.
        assert exact <= found
        if found < 1e-2:
            assert found < 20 * exact


def poincare(radius, noise):
    """1 / spectral gap of the two-point law plus noise, by finite differences."""
    x = np.linspace(-1, 1, 1601) * (radius + 8 * math.sqrt(noise))
    step = x[1] - x[0]
    density = two_point_density(x, radius, noise)
    between = two_point_density((x[1:] + x[:-1]) / 2, radius, noise) / step**2
    diagonal = (np.r_[between, 0] + np.r_[0, between]) / density
    beside = -between / np.sqrt(density[1:] * density[:-1])
    lowest = eigh_tridiagonal(diagonal, beside, select="i", select_range=(0, 1))[0]
    return 1 / lowest[1]


def test_the_spectral_gap_of_a_gaussian():
    assert poincare(0.0, 0.7) == pytest.approx(0.7, rel=1e-4)


@pytest.mark.parametrize(
    ("radius", "noise"), [(0.3, 1.0), (1.0, 1.0), (1.0, 0.5), (1.2, 0.6), (0.0, 0.5)]
)
def test_the_cap_is_above_the_constant_of_a_two_point_law(radius, noise):
    """An LSI constant lies between the inverse spectral gap and the criterion."""
    low, high = muckenhoupt(radius, noise)
    assert low <= high
    gap = poincare(radius, noise)
    assert noise <= gap * (1 + 1e-3)
    assert max(gap, low) <= high <= bounded_support_lsi(radius, noise)
