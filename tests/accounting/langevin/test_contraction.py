import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.accounting.langevin.contraction import (
    dobrushin_bound,
    first_step,
    hypercontractive_bound,
    log_dobrushin_coefficient,
    source_bound,
)

orders = st.floats(1.01, 100.0)
growths = st.floats(0.0, 600.0)
sizes = st.floats(1e-9, 1e6)


@given(orders, growths, sizes)
def test_hyper_contraction_dominates_the_source_form(order, growth, size):
    ours = hypercontractive_bound(size, order, growth)
    assert ours <= source_bound(size, order, growth) * (1 + 1e-12)
    assert ours >= 0


@given(orders, growths, sizes)
def test_lower_orders_only_help(order, growth, size):
    linear = hypercontractive_bound(lambda a: size * a / order, order, growth)
    assert linear <= hypercontractive_bound(size, order, growth) * (1 + 1e-12)


@given(orders, growths)
def test_exact_for_shifted_gaussians(order, growth):
    """N(μ, C) against N(0, C), plus noise (G − 1)·C: α·μ²/2C becomes α·μ²/2CG."""
    bound = hypercontractive_bound(lambda a: a / 2, order, growth)
    assert bound == pytest.approx(order / 2 * math.exp(-growth), rel=1e-12)


@given(orders, growths, growths, sizes)
def test_two_stretches_make_one(order, first, second, size):
    """Along the flow the order moves: composing two bounds is the joint bound."""

    def loss(a):
        return size * (1 - 0.5 / a)

    middle = lambda a: hypercontractive_bound(loss, max(a, 1 + 1e-15), first)  # noqa: E731
    stepwise = hypercontractive_bound(middle, order, second)
    joint = hypercontractive_bound(loss, order, first + second)
    assert stepwise == pytest.approx(joint, rel=1e-6)


@given(orders, sizes, st.floats(0.0, 50.0))
def test_dobrushin_against_its_definition(order, size, shrink):
    bound = dobrushin_bound(size, order, -shrink)
    assert 0 <= bound <= size * (1 + 1e-12)
    exponent = (order - 1) * size
    if exponent < 500:
        plain = math.log1p(math.exp(-shrink) * math.expm1(exponent)) / (order - 1)
        assert bound == pytest.approx(plain, rel=1e-9)


def test_dobrushin_holds_for_random_kernels():
    """Any Markov kernel contracts e^{(α−1)D} − 1 by its largest total variation."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        kernel = rng.dirichlet(np.full(4, 0.5), size=5)
        first, second = rng.dirichlet(np.ones(5), size=2)
        gaps = np.abs(kernel[:, None] - kernel[None]).sum(-1) / 2
        order = rng.uniform(1.1, 6)

        def divergence(p, q, a=order):
            return math.log((p**a * q ** (1 - a)).sum()) / (a - 1)

        after = divergence(first @ kernel, second @ kernel)
        bound = dobrushin_bound(divergence(first, second), order, np.log(gaps.max()))
        assert after <= bound * (1 + 1e-9)


def test_dobrushin_coefficient_is_a_total_variation():
    z = np.linspace(-20, 20, 400_001)
    first, second = np.exp(-(z**2) / 4), np.exp(-((z - 1.7) ** 2) / 4)  # variance 2
    gap = np.abs(first - second).sum() / first.sum() / 2
    assert math.exp(log_dobrushin_coefficient(1.7, 2.0)) == pytest.approx(gap, rel=1e-6)


def test_dobrushin_coefficient_keeps_its_digits_at_both_ends():
    near = log_dobrushin_coefficient(1e-9, 1.0)
    assert near == pytest.approx(math.log(1e-9 / math.sqrt(2 * math.pi)), rel=1e-12)
    far = log_dobrushin_coefficient(20.0, 1.0)
    assert far == pytest.approx(-math.erfc(10 / math.sqrt(2)), rel=1e-9)
    assert log_dobrushin_coefficient(math.inf, 1.0) == 0
    assert log_dobrushin_coefficient(0.0, 1.0) == -math.inf
    assert log_dobrushin_coefficient(1.0, 0.0) == 0


def test_edges():
    assert hypercontractive_bound(math.inf, 2.0, 3.0) == math.inf
    assert hypercontractive_bound(math.inf, 2.0, math.inf) == math.inf
    assert source_bound(math.inf, 2.0, math.inf) == math.inf
    assert hypercontractive_bound(1.0, 2.0, math.inf) == 0
    assert hypercontractive_bound(1.0, 2.0, 0.0) == 1
    assert dobrushin_bound(0.0, 2.0, -1.0) == 0
    assert dobrushin_bound(math.inf, 2.0, -1.0) == math.inf
    assert dobrushin_bound(5.0, 2.0, -math.inf) == 0


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_first_step_is_the_first(threshold, limit):
    found = first_step(lambda k: k >= threshold, limit)
    assert found == (threshold if threshold <= max(limit, 1) else math.inf)


@pytest.mark.parametrize("bound", [hypercontractive_bound, source_bound])
def test_bad_input(bound):
    with pytest.raises(ValueError, match=r"order must be in \(1, inf\), got 1.0"):
        bound(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="divergence must .*got -1"):
        bound(-1.0, 2.0, 1.0)
    with pytest.raises(ValueError, match="log_growth must .*got -1"):
        bound(1.0, 2.0, -1.0)
    with pytest.raises(ValueError, match="log_coefficient must .*got 0.5"):
        dobrushin_bound(1.0, 2.0, 0.5)
    with pytest.raises(ValueError, match="map_diameter must .*got -1"):
        log_dobrushin_coefficient(-1.0, 1.0)
