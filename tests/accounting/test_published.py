import math

import numpy as np
import pytest

from opacus_pi.accounting.conversion import rdp_to_epsilon
from opacus_pi.accounting.published import (
    chien_learning_divergence,
    chien_rate,
    chien_sequential,
    corollary_4_1,
    corollary_4_4_steps,
    mironov_allowance,
    steps_at_rate,
    weak_triangle,
)

NUM_EXAMPLES, SIGMA = 11_982, 0.03
STRONG_CONVEXITY = 1e-6 * NUM_EXAMPLES
LEARNING_RATE = 1 / (0.25 + STRONG_CONVEXITY)
ORDERS = 1 + np.geomspace(1e-2, 1e4, 20_001)
DELTA = 1 / NUM_EXAMPLES


def mnist(num_points):
    """Divergences before unlearning and the rate, Chien et al.'s MNIST experiment."""
    divergences = chien_learning_divergence(
        ORDERS,
        num_points=num_points,
        gradient_bound=1.0,
        strong_convexity=STRONG_CONVEXITY,
        sigma=SIGMA,
        num_examples=NUM_EXAMPLES,
    )
    rate = chien_rate(
        learning_rate=LEARNING_RATE,
        sigma=SIGMA,
        strong_convexity=STRONG_CONVEXITY,
        lsi=2 * SIGMA**2 / STRONG_CONVEXITY,
    )
    return divergences, rate


@pytest.mark.parametrize(
    ("num_points", "steps"), [(1, 0), (10, 778), (100, 1997), (1000, 3136)]
)
def test_published_mnist_numbers(num_points, steps):
    """ε = 1, δ = 1/n, by Mironov's conversion."""
    divergences, rate = mnist(num_points)
    allowed = mironov_allowance(1.0, DELTA, ORDERS)
    assert steps_at_rate(divergences, ORDERS, allowed, rate) == steps


def test_the_better_conversion_needs_fewer_steps():
    divergences, rate = mnist(100)
    allowed = (
        1.0 - np.log1p(-1 / ORDERS) + (math.log(DELTA) + np.log(ORDERS)) / (ORDERS - 1)
    )
    steps = steps_at_rate(divergences, ORDERS, allowed, rate)
    assert steps == 1342
    left = divergences * np.exp(-rate * steps / ORDERS)
    assert rdp_to_epsilon(left, ORDERS, DELTA) <= 1
    left = divergences * np.exp(-rate * (steps - 1) / ORDERS)
    assert rdp_to_epsilon(left, ORDERS, DELTA) > 1


def test_weak_triangle_on_random_gaussians():
    """Every factor u, exact divergences of one-dimensional Gaussians."""
    rng = np.random.default_rng(0)

    def divergence(p, q, a):
        (m0, v0), (m1, v1) = p, q
        mixed = (1 - a) * v0 + a * v1
        if mixed <= 0:
            return math.inf
        spread = math.log(mixed) - (1 - a) * math.log(v0) - a * math.log(v1)
        return a / 2 * (m0 - m1) ** 2 / mixed - spread / (2 * (a - 1))

    checked = 0
    for _ in range(2000):
        P, Q, R = ((rng.normal(), rng.uniform(0.5, 1.5)) for _ in range(3))
        a, u = rng.uniform(1.05, 4), rng.uniform(1.1, 5)
        first, second = divergence(P, R, u * a), divergence(R, Q, (u * a - 1) / (u - 1))
        if math.isfinite(first + second):
            checked += 1
            bound = weak_triangle(a, first, second, factor=u)
            assert divergence(P, Q, a) <= bound * (1 + 1e-9)
    assert checked > 200


def test_corollary_4_4_is_the_first_step_of_corollary_4_1():
    found = corollary_4_4_steps(3.0, 5.0, 0.2, 0.001, target=0.05, rate=0.02)
    assert corollary_4_1(3.0, 5.0, 0.2, 0.001, 0.02 * found) <= 0.05
    assert corollary_4_1(3.0, 5.0, 0.2, 0.001, 0.02 * (found - 1)) > 0.05


def test_corollary_4_4_cannot_go_below_the_distance_to_stationarity():
    assert corollary_4_4_steps(3.0, 5.0, 0.2, 0.1, target=0.05, rate=0.02) == math.inf
    assert corollary_4_4_steps(3.0, 0.0, 0.0, 0.0, target=0.05, rate=0.02) == 0


def test_corollary_4_1_prints_these_coefficients():
    a, loss, far, near = 3.0, 5.0, 0.2, 0.1
    printed = (2 * a - 0.5) / (2 * a - 2) * loss + (2 * a - 1) / (2 * a - 2) * far
    expected = printed * math.exp(-1.5 / (2 * a)) + near
    assert corollary_4_1(a, loss, far, near, 1.5) == pytest.approx(expected, rel=1e-14)


def test_learning_before_stationarity_has_a_smaller_divergence():
    shared = {
        "num_points": 1,
        "gradient_bound": 1.0,
        "strong_convexity": 0.1,
        "sigma": 0.1,
        "num_examples": 100,
    }
    early = chien_learning_divergence(2.0, learned=1.0, **shared)
    late = chien_learning_divergence(2.0, **shared)
    assert early / late == pytest.approx(1 - math.exp(-0.1))


def test_bad_input():
    good = {"learning_rate": 1.0, "sigma": 0.1, "strong_convexity": 0.1, "lsi": 0.2}
    assert chien_rate(**good) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="lsi must be above .*, got 0.1"):
        chien_rate(**good | {"lsi": 0.1})
    with pytest.raises(ValueError, match="learning_rate must be at most .*, got 11.0"):
        chien_rate(**good | {"learning_rate": 11.0})
    with pytest.raises(ValueError, match="order must be above 1, got 1.0"):
        weak_triangle(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="factor must be above 1, got 1.0"):
        weak_triangle(2.0, 1.0, 1.0, factor=1.0)
    with pytest.raises(ValueError, match="rate must .*got 0"):
        corollary_4_4_steps(2.0, 1.0, 1.0, 1.0, target=1.0, rate=0.0)
    with pytest.raises(ValueError, match="delta must .*got 1"):
        mironov_allowance(1.0, 1.0, [2.0])
    with pytest.raises(ValueError, match="must contain at least one request"):
        chien_sequential(2.0, lambda a: a, [])
    with pytest.raises(ValueError, match="sigma must .*got 0"):
        chien_learning_divergence(
            2.0,
            num_points=1,
            gradient_bound=1.0,
            strong_convexity=0.1,
            sigma=0.0,
            num_examples=10,
        )


def test_no_order_leaves_room():
    assert steps_at_rate([1.0], [2.0], [-0.1], 0.1) == math.inf
    assert steps_at_rate([1.0], [2.0], [2.0], 0.1) == 0
