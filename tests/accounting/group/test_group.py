import itertools
import math
import warnings

import numpy as np
import pytest

from opacus_pi.accounting import GradNormLedger, NoisySGD, log_moment, privacy_losses
from opacus_pi.accounting.group.divergence import group_divergence, theorem_b1_estimates
from opacus_pi.accounting.group.gaussian_mixture import (
    mixture_log_moment,
    operator_norm_law,
    scalar_law,
)
from opacus_pi.accounting.group.moments import (
    coupled_log_moment,
    log_mean_exp,
    pair_exponents,
)
from opacus_pi.accounting.published import (
    order_multiplied_divergence,
    summed_losses,
)
from opacus_pi.ledger.gram_ledger import GramLedger


def gram(rng, size, dims=4, scale=0.4):
    vectors = rng.normal(size=(size, dims)) * scale
    return vectors @ vectors.T


def by_all_tuples(K, rate, order):
    """E over every tuple of subsets, written as in the theorem."""
    size, total = len(K), 0.0
    subsets = list(itertools.product((0, 1), repeat=size))
    for batches in itertools.product(subsets, repeat=order):
        b = np.array(batches, dtype=float)
        chosen = b.sum()
        chance = rate**chosen * (1 - rate) ** (b.size - chosen)
        exponent = sum(b[i] @ K @ b[j] for i in range(order) for j in range(i))
        total += chance * math.exp(exponent)
    return math.log(total)


@pytest.mark.parametrize(("size", "order"), [(1, 4), (2, 3), (3, 3), (4, 2)])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_coupled_against_all_tuples(size, order, rate):
    K = gram(np.random.default_rng(size), size)
    found = coupled_log_moment(K, rate, order)
    assert found.log_moment == pytest.approx(by_all_tuples(K, rate, order), rel=1e-9)
    assert found.effective_size == math.inf


@pytest.mark.parametrize("order", [2, 5, 32])
@pytest.mark.parametrize("ratio", [1e-6, 0.3, 4.0])
def test_one_example_is_the_single_moment(order, ratio):
    K = np.array([[ratio**2]])
    expected = float(log_moment(ratio, 0.02, order))
    assert coupled_log_moment(K, 0.02, order).log_moment == pytest.approx(expected)
    for law in (scalar_law([ratio], 0.02), operator_norm_law(ratio**2, 1, 0.02)):
        assert mixture_log_moment(*law, order) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rate", "scale"), [(0.2, 0.4), (0.01, 0.3), (0.7, 0.2)])
def test_monte_carlo_converges_to_enumeration(rate, scale, monkeypatch):
    K = gram(np.random.default_rng(1), 5, scale=scale)
    exact = coupled_log_moment(K, rate, 4).log_moment
    monkeypatch.setattr("opacus_pi.accounting.group.moments.EXACT_LIMIT", 0)
    sampled = coupled_log_moment(
        K, rate, 4, num_samples=200_000, generator=np.random.default_rng(0)
    )
    assert sampled.log_moment == pytest.approx(exact, rel=0.02)
    assert 0 < sampled.largest_share < 0.01
    assert 1000 < sampled.effective_size < 200_001


def test_monte_carlo_repeats_itself():
    K = gram(np.random.default_rng(1), 40, scale=0.2)
    assert coupled_log_moment(K, 0.1, 4) == coupled_log_moment(K, 0.1, 4)
    other = coupled_log_moment(K, 0.1, 4, generator=np.random.default_rng(5))
    assert other != coupled_log_moment(K, 0.1, 4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("order", [2, 3])
def test_mixture_bounds_are_above_the_coupled_moment(seed, order):
    rng = np.random.default_rng(seed)
    size, rate = int(rng.integers(1, 6)), float(rng.uniform(0.01, 0.9))
    K = gram(rng, size, scale=rng.uniform(0.05, 1))
    coupled = coupled_log_moment(K, rate, order).log_moment
    scalar = mixture_log_moment(*scalar_law(np.sqrt(np.diag(K)), rate), order)
    largest = np.linalg.eigvalsh(K)[-1]
    norm = mixture_log_moment(*operator_norm_law(largest, size, rate), order)
    assert min(scalar, norm) >= coupled * (1 - 1e-9)


@pytest.mark.parametrize("order", [1.3, 2.5])
def test_mixture_bounds_hold_at_real_orders(order):
    """Kahane's inequality: two orthogonal points against the same on a line."""
    rng, rate = np.random.default_rng(0), 0.3
    axis = np.linspace(-12, 14, 521)
    x, y = np.meshgrid(axis, axis)
    log_normal = (
        -(x**2 + y**2) / 2 - math.log(2 * math.pi) + 2 * math.log(axis[1] - axis[0])
    )
    for _ in range(5):
        a, b = rng.uniform(0.3, 1.5, 2)
        ratio = (1 - rate + rate * np.exp(a * x - a * a / 2)) * (
            1 - rate + rate * np.exp(b * y - b * b / 2)
        )
        exact = math.log((np.exp(log_normal) * ratio**order).sum())
        assert mixture_log_moment(*scalar_law([a, b], rate), order) >= exact
        largest = max(a, b) ** 2
        assert mixture_log_moment(*operator_norm_law(largest, 2, rate), order) >= exact


def test_rounding_up_keeps_the_bound_and_changes_little():
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.05, 0.3, 12)
    exact = mixture_log_moment(*scalar_law(norms, 0.1), 3.0)
    more = mixture_log_moment(*scalar_law(np.append(norms, 1e-9), 0.1), 3.0)  # grid
    assert exact <= more <= 1.2 * exact


def test_laws_are_probabilities():
    for law in (
        scalar_law(np.random.default_rng(0).uniform(0, 1, 40), 0.2),
        scalar_law(np.ones(3), 1.0),
        operator_norm_law(2.0, 9, 0.2),
        operator_norm_law(2.0, 9, 1.0),
    ):
        assert np.exp(law[1]).sum() == pytest.approx(1, rel=1e-9)


def test_log_mean_exp_keeps_small_values():
    assert log_mean_exp([1e-20, 1e-20], math.log(0.5)) == pytest.approx(1e-20)
    assert log_mean_exp([1e-18, -1e-18, 3e-18], math.log(1 / 3)) == pytest.approx(1e-18)
    assert log_mean_exp([2000.0, 0.0], math.log(0.5)) == pytest.approx(
        2000 - math.log(2)
    )
    assert log_mean_exp([0.0], 0.0) == 0
    assert log_mean_exp([-3.0], 0.0) == pytest.approx(-3.0)


def test_centred_exponents_survive_a_common_offset():
    """float32 gradients around 10: the printed form of Δ loses its digits."""
    rng = np.random.default_rng(0)
    U = (rng.normal(size=(6, 1000)) * 1e-3 + 10).astype(np.float32)
    centre = (rng.normal(size=1000) * 1e-3 + 10).astype(np.float32)
    V = U.astype(np.float64) - centre
    truth = sum(V[i] @ V[j] for i in range(6) for j in range(i))
    centred = (U - centre).astype(np.float64)
    found = pair_exponents(centred @ centred.T, np.arange(6)[None])[0]
    assert found == pytest.approx(truth, rel=1e-5)
    a = np.float32(len(U))
    squares = (U**2).sum() - (a - 1) * (centre**2).sum()
    printed = squares - ((U.sum(axis=0) - (a - 1) * centre) ** 2).sum()
    assert abs(-printed / 2 - truth) > 10 * abs(found - truth)


def ledgers(ratios, rate=0.02, num_steps=200):
    mechanism = NoisySGD(num_steps, rate, 1.0, 5.0)
    steps = np.linspace(0, num_steps, len(ratios) + 1).astype(int)[1:]
    norms = np.array(ratios, dtype=np.float32)[:, None]
    alone = GradNormLedger(mechanism, steps, norms)
    squares = norms.astype(np.float64)[..., None] ** 2
    return alone, GramLedger(mechanism, steps, squares)


@pytest.mark.parametrize("rule", ["right", "left", "trapezoid", "max"])
@pytest.mark.parametrize("method", ["coupled", "scalar", "operator_norm"])
def test_one_example_composes_to_its_privacy_loss(rule, method):
    alone, group = ledgers([0.9, 0.5, 0.7])
    expected = privacy_losses(alone, 4.0, rule=rule)[0]
    found = group_divergence(group, 4.0, method=method, rule=rule)
    assert found == pytest.approx(expected, rel=2e-3)
    assert found >= expected * (1 - 1e-7)


def test_full_batch_is_the_summed_gradient():
    rng = np.random.default_rng(0)
    G = rng.normal(size=(2, 5, 3)) * 0.1
    mechanism = NoisySGD(20, 1.0, 1.0)
    group = GramLedger(mechanism, [10, 20], G @ G.transpose(0, 2, 1))
    sums = np.linalg.norm(G.sum(axis=1), axis=1).astype(np.float32)
    alone = GradNormLedger(mechanism, [10, 20], sums[:, None])
    expected = privacy_losses(alone, 2.5)[0]
    # Above it by the chord between the orders evaluated.
    assert expected <= group_divergence(group, 2.5) <= expected * 1.001


def test_several_runs_lie_between_the_mean_and_the_largest():
    runs = [ledgers([r, r])[1] for r in (0.3, 0.9)]
    each = [group_divergence(run, 4.0) for run in runs]
    joint = group_divergence(runs, 4.0)
    assert np.mean(each) <= joint <= max(each)


def test_an_empty_group_has_no_loss():
    mechanism = NoisySGD(20, 0.1, 1.0)
    empty = GramLedger(mechanism, [20], np.zeros((1, 0, 0)))
    for method in ("coupled", "scalar", "operator_norm"):
        assert group_divergence(empty, 4.0, method=method) == 0


def test_a_hopeless_monte_carlo_warns():
    rng = np.random.default_rng(0)
    K = gram(rng, 40, scale=2.0)[None]
    group = GramLedger(NoisySGD(1, 0.2, 1.0), [1], K)
    with pytest.warns(UserWarning, match="unreliable and probably too low"):
        sampled = group_divergence(group, 8.0, num_samples=500)
    upper = [
        group_divergence(group, 8.0, method=m) for m in ("scalar", "operator_norm")
    ]
    assert sampled < min(upper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_divergence(GramLedger(NoisySGD(1, 0.2, 1.0), [1], K / 1e4), 4.0)


@pytest.mark.filterwarnings("ignore:The group's divergence is unreliable")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [1, 30])
def test_a_sampled_divergence_never_falls_with_the_order(seed, num_steps):
    K = gram(np.random.default_rng(seed), 30)
    group = GramLedger(NoisySGD(num_steps, 0.05, 1.0), [num_steps], K[None])
    orders = np.array([1.5, *range(2, 20), 20.5])
    found = [group_divergence(group, order, num_samples=300) for order in orders]
    assert (np.diff(found) >= -1e-12).all() and found[0] > 0
    if num_steps == 1:  # each order has its own estimate, which may be lower
        single = [
            coupled_log_moment(K, 0.05, a, num_samples=300).log_moment / (a - 1)
            for a in orders[1:-1]
        ]
        assert (np.diff(single) < -0.01).any()
        assert (np.array(found[1:-1]) >= np.array(single) - 1e-12).all()


def minibatches(rng, rows=2, centres=20, batches=10):
    U = rng.normal(size=(rows, centres, batches, 30)) * 0.1
    return U @ U.transpose(0, 1, 3, 2)


def test_theorem_b1_as_printed():
    """Every symbol spelled out, for one retain minibatch."""
    rng = np.random.default_rng(0)
    grams, order, sigma, num_steps = minibatches(rng), 4.0, 2.0, 50
    ledger = GramLedger(
        NoisySGD(num_steps, 0.1, sigma), [20, 50], grams, kind="minibatch"
    )
    p = 3 * num_steps
    total = 0.0
    for row, (step, width) in enumerate([(20, 20), (50, 30)]):
        o = order
        for _ in range(step):
            o = p / (p - 1) * o - 1 / p
        size = math.ceil(o)
        K = grams[row, 7]
        values = []
        for start in range(0, 10 // size * size, size):
            chosen = K[start : start + size, start : start + size]
            delta = np.trace(chosen) - chosen.sum()
            values.append(math.exp(-delta / (2 * sigma**2)))
        coefficient = ((p - 1) / p) ** (step + 1) / (order - 1)
        total += coefficient * p * math.log(np.mean(values)) * width
    estimates = theorem_b1_estimates(ledger, order)
    assert estimates.shape == (20,)
    assert estimates[7] == pytest.approx(total, rel=1e-9)
    mean = group_divergence(ledger, order, method="theorem_b1")
    assert mean == pytest.approx(estimates.mean())


def test_theorem_b1_needs_as_many_minibatches_as_the_order():
    ledger = GramLedger(
        NoisySGD(50, 0.1, 1.0),
        [20, 50],
        minibatches(np.random.default_rng(0), batches=4),
        kind="minibatch",
    )
    with pytest.raises(ValueError, match="because the order .*, got 4"):
        theorem_b1_estimates(ledger, 4.0)


def test_bad_input():
    _, group = ledgers([0.5])
    with pytest.raises(ValueError, match="method must .*got 'fast'"):
        group_divergence(group, 2.0, method="fast")
    with pytest.raises(ValueError, match="rule must .*got 'up'"):
        group_divergence(group, 2.0, rule="up")
    with pytest.raises(ValueError, match="order must .*got 1.0"):
        group_divergence(group, 1.0)
    remedy = r".*kind='minibatch'\).*method='coupled'\)"
    with pytest.raises(ValueError, match=f"of kind 'minibatch'{remedy}"):
        group_divergence(group, 2.0, method="theorem_b1")
    minibatches = GramLedger(group.mechanism, [1], [[[[1.0]]]], kind="minibatch")
    remedy = r".*kind='forget'\).*method='theorem_b1'\)"
    with pytest.raises(ValueError, match=f"of kind 'forget'{remedy}"):
        group_divergence(minibatches, 2.0)
    with pytest.raises(ValueError, match="must contain at least one run"):
        group_divergence([], 2.0)
    with pytest.raises(ValueError, match="must be a GramLedger, .*got str"):
        group_divergence("gram.safetensors", 2.0)
    with pytest.raises(ValueError, match="must have the same mechanism"):
        group_divergence([group, ledgers([0.5], rate=0.3)[1]], 2.0)
    with pytest.raises(ValueError, match="hoelder_p must be above 1, got 1.0"):
        group_divergence(group, 2.0, hoelder_p=1.0)
    fixed = GramLedger(NoisySGD(10, 0.1, 1.0, sampling="fixed"), [10], [[[1.0]]])
    with pytest.raises(ValueError, match="sampling must .*got 'fixed'"):
        group_divergence(fixed, 2.0)
    with pytest.raises(ValueError, match="must have at least one row"):
        group_divergence(GramLedger(fixed.mechanism, [], np.zeros((0, 1, 1))), 2.0)


def test_order_multiplication_on_gaussians_is_a_bound():
    for size in (1, 2, 3, 7, 16):
        found = order_multiplied_divergence(lambda a: a * 0.01 / 2, size, 3.0)
        assert found >= 3.0 * (size * 0.1) ** 2 / 2 * (1 - 1e-12)
    with pytest.raises(ValueError, match="group_size must .*got 0"):
        order_multiplied_divergence(lambda a: a, 0, 2.0)


def test_summed_losses_by_owner():
    assert summed_losses([1.0, 2.0, 4.0], [1, 0, 1]).tolist() == [2.0, 5.0]
    with pytest.raises(ValueError, match="owners must"):
        summed_losses([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="owners must .*got -1"):
        summed_losses([1.0], [-1])
