"""Laws of group bounds, for random groups, mechanisms and orders."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from opacus_pi.accounting import GradNormLedger, NoisySGD, log_moment, privacy_losses
from opacus_pi.accounting.group.divergence import group_divergence
from opacus_pi.accounting.group.gaussian_mixture import (
    mixture_log_moment,
    operator_norm_law,
    scalar_law,
)
from opacus_pi.accounting.group.moments import coupled_log_moment
from opacus_pi.accounting.group.worst_case import group_worst_case_loss
from opacus_pi.ledger.gram_ledger import GramLedger

METHODS = ("coupled", "scalar", "operator_norm")
SLACK = 1 + 1e-9

rates = st.sampled_from([0.01, 0.1, 0.5, 1.0])
whole_orders = st.integers(2, 4)
real_orders = st.floats(1.2, 5.0)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 3)
few = settings(max_examples=25, deadline=None)


def vectors(seed, size, dims=3, rows=2):
    """Gradients (rows, size, dims) of very different lengths."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, size, dims)) * 10 ** rng.uniform(
        -2, 0.3, (1, size, 1)
    )


def ledger(G, rate, clip=1.0, num_steps=12):
    """A run of two checkpoints."""
    mechanism = NoisySGD(num_steps, rate, 2.0, clip)
    return GramLedger(mechanism, [5, num_steps], G @ G.transpose(0, 2, 1))


def divergence(*args, **options):
    """These groups are small: the Monte Carlo must not be needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return group_divergence(*args, **options)


def moments(K, rate, order):
    """The three log moments of one update, at a whole order."""
    norms, largest = np.sqrt(np.diag(K)), float(np.linalg.eigvalsh(K)[-1])
    return {
        "coupled": coupled_log_moment(K, rate, order).log_moment,
        "scalar": mixture_log_moment(*scalar_law(norms, rate), order),
        "operator_norm": mixture_log_moment(
            *operator_norm_law(largest * (1 + 1e-12), len(K), rate), order
        ),
    }


@few
@given(rates, real_orders, st.sampled_from(METHODS))
def test_empty_groups_and_zero_gradients_have_no_loss(rate, order, method):
    empty = ledger(np.zeros((2, 0, 3)), rate)
    assert divergence(empty, order, method=method) == 0
    zero = ledger(np.zeros((2, 3, 3)), rate)
    assert divergence(zero, order, method=method) == 0


@few
@given(seeds, rates, whole_orders)
def test_the_moment_of_one_example(seed, rate, order):
    K = np.array([[float((vectors(seed, 1) ** 2).sum())]])
    single = float(log_moment(np.sqrt(K[0, 0]), rate, order))
    for value in moments(K, rate, order).values():
        assert value == pytest.approx(single, rel=1e-7)


@few
@given(seeds, rates, real_orders, st.sampled_from(METHODS))
def test_one_example_has_its_privacy_loss(seed, rate, order, method):
    G = vectors(seed, 1)
    norms = np.linalg.norm(G, axis=2).astype(np.float32)
    group = GramLedger(
        ledger(G, rate).mechanism, [5, 12], norms.astype(float)[..., None] ** 2
    )
    loss = privacy_losses(GradNormLedger(group.mechanism, [5, 12], norms), order)[0]
    found = divergence(group, order, method=method)
    assert loss / SLACK <= found <= 1.01 * loss


@few
@given(seeds, sizes, rates, whole_orders)
def test_coupled_is_below_the_deterministic_bounds(seed, size, rate, order):
    G = vectors(seed, size)[0]
    found = moments(G @ G.T, rate, order)
    assert found["coupled"] <= SLACK * min(found["scalar"], found["operator_norm"])


@few
@given(seeds, sizes, rates, real_orders)
def test_also_when_composed_and_none_is_above_the_worst_case(seed, size, rate, order):
    group = ledger(vectors(seed, size), rate)
    coupled, *others = (divergence(group, order, method=m) for m in METHODS)
    assert coupled <= SLACK * min(others)
    worst = group_worst_case_loss(group.mechanism, size, order)
    assert max(coupled, *others) <= SLACK * worst


@few
@given(seeds, sizes, rates, whole_orders)
def test_another_example_does_not_lower_a_moment(seed, size, rate, order):
    """For the coupled one if no angle is obtuse; opposite gradients may cancel."""
    G = vectors(seed, size + 1)[0]
    before, after = (moments(V @ V.T, rate, order) for V in (G[:-1], G))
    for method in ("scalar", "operator_norm"):
        assert before[method] <= SLACK * after[method]
    acute = np.abs(G)
    before, after = (moments(V @ V.T, rate, order) for V in (acute[:-1], acute))
    assert before["coupled"] <= SLACK * after["coupled"]


def test_opposite_gradients_cancel_in_the_coupled_moment_only():
    K = np.array([[1.0, -1.0], [-1.0, 1.0]])
    found = moments(K, 1.0, 2)
    assert found["coupled"] == pytest.approx(0, abs=1e-12)
    assert found["scalar"] == pytest.approx(4)


@few
@given(seeds, st.integers(2, 3), rates, real_orders, st.sampled_from(METHODS))
def test_the_order_of_the_examples_does_not_matter(seed, size, rate, order, method):
    G = vectors(seed, size)
    shuffled = G[:, np.random.default_rng(seed).permutation(size)]
    found = [divergence(ledger(V, rate), order, method=method) for V in (G, shuffled)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@few
@given(seeds, sizes, rates, real_orders, st.sampled_from(METHODS))
def test_more_noise_lowers_the_loss(seed, size, rate, order, method):
    group = ledger(vectors(seed, size), rate, clip=np.inf)
    found = [
        divergence(group.with_noise_std(s), order, method=method) for s in (2.0, 3.0)
    ]
    assert found[1] <= SLACK * found[0]


@pytest.mark.parametrize("scale", [0.003, 0.1, 2.0])
@pytest.mark.parametrize("order", [1.5, 8.0])
def test_the_moment_of_a_large_group_equals_a_sum_over_the_whole_line(scale, order):
    """Of a large group the integrand matters in a small part of a long range."""
    norms = scale * np.random.default_rng(0).lognormal(size=200)
    a, w = scalar_law(norms, 0.02)
    step = 0.05
    z = np.arange(-12, order * a.max() + 12, step)
    log_ratio = np.concatenate(
        [logsumexp(np.outer(part, a) - a**2 / 2 + w, axis=1) for part in _parts(z)]
    )
    log_terms = order * log_ratio - z**2 / 2 - np.log(2 * np.pi) / 2
    expected = logsumexp(log_terms) + np.log(step)
    found = mixture_log_moment(a, w, order)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def _parts(z):
    return np.array_split(z, 1 + len(z) // 200)
