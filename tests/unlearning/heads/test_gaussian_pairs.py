"""Hockey-sticks of Gaussian pairs against closed forms, quadrature and simulation."""

import mpmath
import numpy as np
import pytest
from scipy.stats import norm

from opacus_pi.accounting.conversion import gaussian_epsilon
from opacus_pi.unlearning.heads.gaussian_pairs import ORDERS, GaussianPair


def pair_of(variances, squares, columns):
    return GaussianPair(np.array([variances]), np.array([squares]), columns)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-10])
def test_shifts_have_the_closed_form(delta):
    mu = np.array([0.01, 0.1, 0.7, 1.5, 4.0, 9.0])
    pairs = GaussianPair(np.zeros((6, 2)), np.stack([mu**2 / 2] * 2, axis=1), 3)
    exact = gaussian_epsilon(mu, delta)
    found = pairs.epsilons(delta)
    assert (found >= exact * (1 - 1e-12)).all()
    np.testing.assert_allclose(found, exact, rtol=1e-8)
    assert (found <= pairs.renyi_epsilons(delta)[0]).all()


def exact_delta(shift, beta, epsilon):
    """Two Gaussians on a line: the event L > ε is an interval or its complement."""
    a, b = beta / (2 * (1 + beta)), shift / (1 + beta)
    c = -np.log1p(beta) / 2 - shift**2 / (2 * (1 + beta)) - epsilon
    root, std = np.sqrt(b * b - 4 * a * c), np.sqrt(1 + beta)
    far = -(b + np.copysign(root, b)) / 2  # without cancellation
    low, high = sorted([far / a, c / far])
    if a > 0:
        p = norm.cdf(low, shift, std) + norm.sf(high, shift, std)
        return p - np.exp(epsilon) * (norm.cdf(low) + norm.sf(high))
    p = norm.sf(low, shift, std) - norm.sf(high, shift, std)
    return p - np.exp(epsilon) * (norm.sf(low) - norm.sf(high))


def test_one_dimension_has_the_closed_form():
    rng = np.random.default_rng(0)
    for _ in range(40):
        beta, shift = (
            rng.uniform(-0.4, 0.5),
            rng.uniform(0.8, 2.5),
        )  # positive: the event lies to the right
        found = float(pair_of([beta], [shift**2], 1).epsilons(1e-4)[0])
        assert exact_delta(shift, beta, found) <= 1e-4 * (1 + 1e-9)
        assert exact_delta(shift, beta, found * 0.995) > 1e-4


def test_many_dimensions_against_high_precision():
    """The same integral by adaptive quadrature with 30 digits."""
    rng = np.random.default_rng(1)
    for _ in range(2):
        betas, squares = rng.uniform(-0.05, 0.05, 3), rng.uniform(0.05, 0.4, 3)
        pair = pair_of(betas, squares, 4)
        epsilon = float(pair.epsilons(1e-5)[0])
        w = float(pair.renyi_epsilons(1e-5)[1][0]) - 1

        def integrand(t, w=w, betas=betas, squares=squares, epsilon=epsilon):
            z, total = mpmath.mpc(1 + w, t), mpmath.mpf(0)
            for b, q in zip(betas.tolist(), squares.tolist(), strict=True):
                room = 1 - (z - 1) * b
                total += z * (z - 1) / 2 * q / room
                total -= 2 * (mpmath.log(room) + (z - 1) * mpmath.log(1 + b))
            return mpmath.re(mpmath.exp(total - (z - 1) * epsilon) / (z * (z - 1)))

        with mpmath.workdps(30):
            delta = mpmath.quad(integrand, [0, 10, 30, 80]) / mpmath.pi
        assert float(delta) == pytest.approx(1e-5, rel=1e-8)


@pytest.mark.parametrize("columns", [1, 5])
def test_both_directions_against_simulation(columns):
    rng = np.random.default_rng(2)
    betas, means = np.array([0.3, -0.2]), rng.normal(size=(2, columns)) * 0.4
    pair = pair_of(betas, np.square(means).sum(axis=1), columns)
    std = np.sqrt(1 + betas)[:, None]
    for side, sign in ((pair, 1), (pair.reversed(), -1)):
        epsilon = float(side.epsilons(0.02)[0])
        u = rng.normal(size=(250_000, 2, columns))
        u = means + std * u if sign > 0 else u
        ratio = np.square(u) / 2 - np.square((u - means) / std) / 2 - np.log(std)
        gain = -np.expm1(np.minimum(epsilon - sign * ratio.sum(axis=(1, 2)), 0))
        assert gain.mean() == pytest.approx(0.02, abs=5 * gain.std() / 500)


def test_equal_laws_and_infinite_divergences():
    same = pair_of([0.0, 0.0], [0.0, 0.0], 2)
    assert same.epsilons(1e-5)[0] == 0
    wide = pair_of([0.5], [0.1], 1)
    values = wide.divergences(ORDERS)[:, 0]
    assert (np.isinf(values) == (ORDERS >= 3)).all()
    assert np.isfinite(wide.epsilons(1e-5)[0])
