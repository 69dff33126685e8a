"""Trajectory form, confidence limits and their coverage on exactly solved chains."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    exceedance_limit,
    renyi_divergence,
    trajectory_limits,
    trajectory_losses,
    worst_case_loss,
)
from tests.accounting.adaptive_chain import CHAINS, Chain

WEAK = Chain(0.2, 0.05, 0.45, 1.0, (1, 1))  # κ(order-1)·(largest sum) about 1


def sums(chain, ratios, inner):
    """S of runs with ratios ``(..., T)``, from the definition."""
    return renyi_divergence(np.float32(ratios), chain.rate, inner).sum(axis=-1)


@pytest.mark.parametrize("order", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_whole_distribution_gives_a_bound(chain, order):
    exact = chain.divergence(order)
    for kappa in (1.1, 2.0, 8.0, math.inf):
        loss = trajectory_losses(chain.runs(), order, kappa, rule="left")[0]
        assert loss >= exact * (1 - 1e-8)


def test_stratified_rows_give_no_less_on_average_than_all_rows():
    """Jensen: every draw of one update in each of two parts, over every run."""
    chain, order, kappa = Chain(0.5, 0.2, 1.0, 1.0, (1, 2, 1)), 3.0, 1.5
    paths = chain.paths()
    draws = [[i, j] for i in (0, 1) for j in (2, 3)]
    runs = [chain.ledger(path[:, None], d) for path in paths for d in draws]
    sparse = trajectory_losses(runs, order, kappa, rule="stratified")[0]
    full = trajectory_losses(chain.runs(), order, kappa, rule="stratified")[0]
    assert sparse >= full >= chain.divergence(order)


def draw(chain, rng, num_runs, num_columns, steps=None):
    """Independent runs; every column is another repetition of the experiment."""
    paths = chain.paths()
    return [
        chain.ledger(paths[rng.integers(len(paths), size=num_columns)].T, steps)
        for _ in range(num_runs)
    ]


def test_limits_are_hoeffding_s():
    order, kappa, n, beta = 2.0, 1.5, 30, 0.1
    runs = draw(WEAK, np.random.default_rng(0), n, 5)
    inner, power = 1 + 3 * (order - 1), kappa * (order - 1)
    ratios = np.stack([run.grad_norms for run in runs])
    x = np.exp(power * sums(WEAK, np.moveaxis(ratios, 1, -1), inner))
    b = math.exp(power * WEAK.num_steps * float(renyi_divergence(0.45, 1.0, inner)))
    mean = x.mean(axis=0) + (b - 1) * math.sqrt(math.log(1 / beta) / (2 * n))
    expected = np.log(np.minimum(mean, b)) / power
    expected = np.minimum(expected, worst_case_loss(runs[0].mechanism, order))
    limits = trajectory_limits(runs, order, kappa, confidence=1 - beta)
    np.testing.assert_allclose(limits, expected, rtol=1e-6)
    assert (limits < worst_case_loss(runs[0].mechanism, order)).any()


@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_limits_cover_as_often_as_they_say(confidence):
    order, kappa = 2.0, 1.5
    runs = draw(WEAK, np.random.default_rng(1), 25, 4000)
    truth = trajectory_losses(WEAK.runs(), order, kappa, rule="left")[0]
    limits = trajectory_limits(runs, order, kappa, confidence=confidence)
    assert (limits >= truth).mean() >= confidence
    assert (limits >= WEAK.divergence(order)).mean() >= confidence
    plain = trajectory_losses(runs, order, kappa, rule="left")
    assert (plain >= truth).mean() < 0.6  # without the margin it is a toss
    assert (plain <= limits).all()


def test_limits_from_few_rows_cover_too():
    order, kappa, confidence = 2.0, 1.5, 0.5
    exact = WEAK.divergence(order)
    rng, covered = np.random.default_rng(2), []
    for _ in range(40):
        runs = [
            draw(WEAK, rng, 1, 50, steps=[int(rng.integers(3))])[0] for _ in range(12)
        ]
        covered.append(trajectory_limits(runs, order, kappa, confidence=confidence))
    assert (np.concatenate(covered) >= exact).mean() >= confidence


def test_limits_fall_with_runs_and_rise_with_confidence():
    runs = draw(WEAK, np.random.default_rng(3), 64, 3)
    few, many = (trajectory_limits(r, 2.0, 1.5) for r in (runs[:4] * 4, runs[:4] * 16))
    assert (many <= few).all()
    low, high = (trajectory_limits(runs, 2.0, 1.5, confidence=c) for c in (0.5, 0.999))
    assert (low < high).all()


def test_limits_never_exceed_the_worst_case_however_large():
    chain = Chain(9.0, 3.0, 9.0, 0.5, (1,))
    runs = draw(chain, np.random.default_rng(4), 3, 2)
    limits = trajectory_limits(runs, 64.0, 4.0)
    assert limits == pytest.approx(worst_case_loss(runs[0].mechanism, 64.0))


def test_limits_of_a_schedule_use_its_most_expensive_row():
    facts = {"sample_rate": 0.5, "max_grad_norm": 0.3}
    mechanism = NoisySGD(2, noise_std=[1.0, 0.5], **facts)
    dear = NoisySGD(2, noise_std=0.5, **facts)
    scheduled, constant = (
        trajectory_limits(GradNormLedger(m, [0, 1], [[0.0], [0.0]]), 2.0, 1.5)[0]
        for m in (mechanism, dear)
    )
    worst = worst_case_loss(mechanism, 2.0, steps=[0, 1])
    assert scheduled == pytest.approx(min(constant, worst), 1e-12)


def test_what_is_not_bounded_is_refused():
    chain = WEAK
    rng = np.random.default_rng(5)
    runs = draw(chain, rng, 2, 3)
    unclipped = NoisySGD(3, 1.0, 1.0)
    with pytest.raises(ValueError, match="max_grad_norm must be finite, got inf"):
        trajectory_limits(GradNormLedger(unclipped, [0, 1, 2], np.ones((3, 1))), 2, 2)
    fixed = chain.ledger(np.ones((3, 1)), sampling="fixed")
    with pytest.raises(ValueError, match="sampling must .*got 'fixed'"):
        trajectory_limits(fixed, 2, 2)
    with pytest.raises(ValueError, match="grad_norms must .*got 1 NaN"):
        trajectory_limits(chain.ledger([[0.1], [math.nan], [0.1]]), 2, 2)
    shared = draw(chain, rng, 2, 3, steps=[1])
    expected = "must have rows that were drawn independently, got .*with the same steps"
    with pytest.raises(ValueError, match=expected):
        trajectory_limits(shared, 2, 2)
    late = GradNormLedger(runs[0].mechanism, [1, 2, 3], np.ones((3, 1)))
    with pytest.raises(ValueError, match="one row in each of 3 equal parts"):
        trajectory_limits(late, 2, 2)
    for kappa in (1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="^kappa must"):
            trajectory_limits(runs, 2, kappa)
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match="^confidence must"):
            trajectory_limits(runs, 2, 2, confidence=confidence)
    with pytest.raises(ValueError, match=r"^order must be finite and above 1"):
        trajectory_limits(runs, 1.0, 2)


# ----------------------------------------------------------- probability of exceeding


def test_no_run_above_gives_the_closed_form():
    for n, beta in [(1, 0.05), (300, 0.05), (10**6, 1e-6)]:
        expected = -math.expm1(math.log(beta) / n)
        value = exceedance_limit(0, n, confidence=1 - beta)
        assert value == pytest.approx(expected, 1e-8)
    assert exceedance_limit(0, 300, confidence=0.95) == pytest.approx(3 / 300, rel=0.01)
    assert exceedance_limit(7, 7) == 1.0


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_coverage_is_exact(n, confidence):
    """Σ over counts of their binomial chance, where the limit covers the truth."""
    limits = np.array([exceedance_limit(k, n, confidence=confidence) for k in range(n)])
    limits = np.append(limits, 1.0)
    for truth in np.append(np.linspace(0.001, 0.999, 97), limits[:-1] * (1 - 1e-9)):
        counts = np.arange(n + 1)
        coverage = binom.pmf(counts, n, truth)[limits >= truth].sum()
        assert coverage >= confidence - 1e-12
    just_above = limits[0] * (1 + 1e-6)
    missed = binom.pmf(0, n, just_above)
    assert missed == pytest.approx(1 - confidence, rel=1e-4)


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="num_above must .*got 5"):
        exceedance_limit(5, 4)
    with pytest.raises(ValueError, match="num_runs must .*got 0"):
        exceedance_limit(0, 0)
    with pytest.raises(ValueError, match="confidence must .*got 1"):
        exceedance_limit(0, 4, confidence=1.0)
