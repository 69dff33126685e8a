import math

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.special import logsumexp
from scipy.stats import binom

from opacus_pi.accounting import NoisySGD, worst_case_loss
from opacus_pi.accounting.group.divergence import group_divergence
from opacus_pi.accounting.group.gaussian_mixture import mixture_log_moment, scalar_law
from opacus_pi.accounting.group.worst_case import (
    group_step_divergence,
    group_worst_case_loss,
)
from opacus_pi.accounting.published import order_multiplied_divergence
from opacus_pi.ledger.gram_ledger import GramLedger


def log_ratio(z, size, rate, ratio):
    """Ln dP/dQ of the mixture of N(k·ratio, 1), k ~ Bin(size, rate)."""
    k = np.arange(size + 1)
    weights = binom.logpmf(k, size, rate)
    return logsumexp(np.outer(z, k * ratio) - (k * ratio) ** 2 / 2 + weights, axis=1)


def both_directions(size, rate, ratio, order):
    """D_α(P ‖ Q) and D_α(Q ‖ P) by a plain Riemann sum."""
    z = np.linspace(-14, order * size * ratio + 14, 40_001)
    logs = log_ratio(z, size, rate, ratio)
    density = -z * z / 2 - math.log(2 * math.pi) / 2 + math.log(z[1] - z[0])
    moments = [logsumexp(a * logs + density) for a in (order, 1 - order)]
    return [float(m) / (order - 1) for m in moments]


@pytest.mark.parametrize("seed", range(10))
def test_one_update_against_the_definition_in_both_directions(seed):
    rng = np.random.default_rng(seed)
    size, rate = int(rng.choice([1, 2, 5, 20])), float(rng.uniform(0.05, 0.95))
    ratio, order = float(rng.uniform(0.1, 1.5)), float(rng.uniform(1.2, 8))
    found = group_step_divergence(ratio, rate, size, order)
    there, back = both_directions(size, rate, ratio, order)
    assert found == pytest.approx(there, rel=1e-7)
    assert back <= found * (1 + 1e-7)


def test_positive_shifts_have_a_smaller_reverse_divergence():
    """Removing is cheaper than adding for every mixture on the positive half-line."""
    rng = np.random.default_rng(0)
    z = np.linspace(-14, 60, 20_001)
    density = -z * z / 2 - math.log(2 * math.pi) / 2 + math.log(z[1] - z[0])
    for _ in range(50):
        a = rng.uniform(0, 2, int(rng.integers(1, 6)))
        w = np.log(rng.dirichlet(np.ones(len(a))))
        order = float(rng.uniform(1.1, 10))
        logs = logsumexp(np.outer(z, a) - a**2 / 2 + w, axis=1)
        back = logsumexp((1 - order) * logs + density)
        assert back <= mixture_log_moment(a, w, order) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("order", [1.05, 1.3, 1.5, 2.5, 4.0])
@pytest.mark.parametrize(
    "norms, rate",
    [
        ([3.0] + [0.15] * 20, 0.01),
        ([3.0] + [0.15] * 20, 1e-3),
        ([4.0] + [0.3] * 8, 0.001),
    ],
)
def test_one_long_gradient_among_short_ones(norms, rate, order):
    """Lengths in between are possible, and so rare that the long one takes over."""
    lengths, weights = scalar_law(norms, rate)
    z = np.arange(-14, 14 + order * lengths.max(), 2e-3)
    logs = [
        logsumexp(part[:, None] * lengths - lengths**2 / 2 + weights, axis=1)
        for part in np.array_split(z, 50)
    ]
    density = -z * z / 2 - math.log(2 * math.pi) / 2 + math.log(2e-3)
    truth = logsumexp(order * np.concatenate(logs) + density)
    found = mixture_log_moment(lengths, weights, order)
    assert found == pytest.approx(truth, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_one_example_is_the_accountant_of_opacus(rate):
    mechanism = NoisySGD(100, rate, 1.3, 1.0)
    for order in (1.1, 2.0, 7.3, 40.0):
        expected = compute_rdp(q=rate, noise_multiplier=1.3, steps=100, orders=[order])
        found = group_worst_case_loss(mechanism, 1, order)
        assert found == pytest.approx(expected[0], rel=1e-7)
        assert found == pytest.approx(worst_case_loss(mechanism, order), rel=1e-9)


def test_without_subsampling_a_group_is_one_long_gradient():
    mechanism = NoisySGD(7, 1.0, 2.0, 1.0)
    assert group_worst_case_loss(mechanism, 5, 3.0) == pytest.approx(
        7 * 3 * 2.5**2 / 2, rel=1e-12
    )


def test_schedules_are_added_up_interval_by_interval():
    noise = np.array([1.0, 2.0])
    found = group_worst_case_loss(NoisySGD(10, 0.2, noise, 1.0), 3, 2.0, steps=[4, 9])
    parts = [group_step_divergence(1 / s, 0.2, 3, 2.0) for s in noise]
    assert found == pytest.approx(4 * parts[0] + 6 * parts[1], rel=1e-12)


def test_below_the_multiplied_order():
    rng, ratios = np.random.default_rng(0), []
    for _ in range(30):
        size, order = int(rng.choice([2, 3, 8])), float(rng.uniform(1.2, 11))
        rate, noise = 10 ** rng.uniform(-3, 0), 10 ** rng.uniform(-0.2, 1)
        mechanism = NoisySGD(1, rate, noise, 1.0)
        chained = order_multiplied_divergence(
            lambda a, m=mechanism: worst_case_loss(m, a), size, order
        )
        ratios.append(group_worst_case_loss(mechanism, size, order) / chained)
    assert max(ratios) < 1
    assert min(ratios) < 0.01


def test_no_group_exceeds_the_worst_case():
    """Parallel gradients at the clip norm, composed, stay at the worst case."""
    mechanism = NoisySGD(50, 0.1, 2.0, 1.0)
    parallel = GramLedger(mechanism, [50], np.full((1, 3, 3), 100.0))
    worst = group_worst_case_loss(mechanism, 3, 4.0)
    for method in ("coupled", "scalar", "operator_norm"):
        assert group_divergence(parallel, 4.0, method=method) == worst


def test_a_fixed_schedule_may_put_all_in_one_batch():
    mechanism = NoisySGD(40, 0.25, 2.0, 1.0, "fixed")
    found = group_worst_case_loss(mechanism, 3, 4.0)
    assert found == pytest.approx(10 * 4 * (3 / 2) ** 2 / 2, rel=1e-12)


def test_edges():
    assert group_worst_case_loss(NoisySGD(5, 0.1, 1.0), 3, 2.0) == math.inf
    assert group_worst_case_loss(NoisySGD(5, 0.0, 1.0, 1.0), 3, 2.0) == 0
    assert group_worst_case_loss(NoisySGD(0, 0.1, 1.0, 1.0), 3, 2.0) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NoisySGD(5, 0.1, 1.0, 1.0), 0, 2.0), "group_size must .*got 0"),
        ((NoisySGD(5, 0.1, 1.0, 1.0), 1, 1.0), "order must .*got 1.0"),
        ((NoisySGD(5, 0.1, 0.0, 1.0), 1, 2.0), "noise_std"),
        ((NoisySGD(5, 0.1, np.ones(2), 1.0), 1, 2.0), "steps must .*got None"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_worst_case_loss(*arguments)
