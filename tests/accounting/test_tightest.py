"""The least of several bounds, and p chosen on other runs, against exact chains."""

import math

import numpy as np
import pytest

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    choose_hoelder_p,
    privacy_losses,
    tightest_losses,
    trajectory_losses,
    worst_case_loss,
)
from tests.accounting.adaptive_chain import CHAINS

ORDERS = (1.5, 3.0, 6.0)
NAN = math.nan


def random_runs(num_runs, seed=0, **changes):
    """Independent runs of one training, four examples."""
    rng = np.random.default_rng(seed)
    facts = {"num_steps": 12, "sample_rate": 0.2, "noise_std": 2.0}
    mechanism = NoisySGD(**{"max_grad_norm": 3.0, **facts, **changes})
    return [
        GradNormLedger(mechanism, [3, 4, 9], rng.lognormal(-1, 1, (3, 4)))
        for _ in range(num_runs)
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("chain", CHAINS)
def test_never_below_the_exact_divergence(chain, order):
    runs, exact = chain.runs(), chain.divergence(order)
    for rule in ("left", "stratified"):
        tightest = tightest_losses(runs, order, rule=rule)[0]
        assert exact * (1 - 1e-8) <= tightest
        assert tightest <= worst_case_loss(runs[0].mechanism, order)
        p = choose_hoelder_p(random_pilots(chain), runs, order, rule=rule)
        loss = privacy_losses(runs, order, hoelder_p=p, rule=rule)[0]
        assert exact * (1 - 1e-8) <= loss


def random_pilots(chain):
    """Two runs of the chain, made different from its own by a second example."""
    paths = chain.paths()
    chosen = np.random.default_rng(1).integers(len(paths), size=2)
    return [chain.ledger(paths[i][:, None] * (1 - 1e-6)) for i in chosen]


def test_the_least_is_not_always_the_same_form():
    """At a low order the trajectory form wins where losses fluctuate."""
    winners = set()
    for chain in CHAINS:
        for order in ORDERS:
            runs = chain.runs()
            hoelder = privacy_losses(runs, order, rule="left")[0]
            winners.add(bool(tightest_losses(runs, order, rule="left")[0] < hoelder))
    assert winners == {True, False}


@pytest.mark.parametrize("rule", ["right", "left", "trapezoid", "max"])
@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_is_the_least_of_its_parts(rule, sampling):
    runs, order = random_runs(5, sampling=sampling), 4.0
    kappas = (1.5, 4.0)
    parts = [privacy_losses(runs, order, rule=rule)]
    parts += [trajectory_losses(runs, order, k, rule=rule) for k in kappas]
    value = tightest_losses(runs, order, rule=rule, kappas=kappas)
    np.testing.assert_array_equal(value, np.min(parts, axis=0))


def test_an_example_never_observed_has_the_worst_case():
    runs = [
        GradNormLedger(run.mechanism, run.steps, np.c_[run.grad_norms, [NAN] * 3])
        for run in random_runs(3)
    ]
    worst = worst_case_loss(runs[0].mechanism, 4.0)
    losses = tightest_losses(runs, 4.0)
    assert losses[4] == pytest.approx(worst, 1e-12)
    assert (losses[:4] < worst).all()


def test_p_has_the_least_mean_loss_on_the_pilots():
    pilots, others = (
        random_runs(4, max_grad_norm=math.inf),
        random_runs(3, seed=1, max_grad_norm=math.inf),
    )
    candidates = [2.0, 4.0, 12.0, 40.0, 400.0]
    means = [privacy_losses(pilots, 6, hoelder_p=p).mean() for p in candidates]
    best = candidates[int(np.argmin(means))]
    assert choose_hoelder_p(pilots, others, 6, candidates=candidates) == best
    assert choose_hoelder_p(pilots, others[:1], 6, candidates=candidates) == best


def test_examples_of_infinite_loss_do_not_decide():
    pilots, others = (
        random_runs(2, max_grad_norm=math.inf),
        random_runs(2, seed=1, max_grad_norm=math.inf),
    )
    widened = [
        [
            GradNormLedger(r.mechanism, r.steps, np.c_[r.grad_norms, [NAN] * 3])
            for r in x
        ]
        for x in (pilots, others)
    ]
    assert choose_hoelder_p(*widened, 6.0) == choose_hoelder_p(pilots, others, 6.0)


def test_the_default_candidates_follow_the_length_of_the_run():
    p = choose_hoelder_p(random_runs(3), random_runs(3, seed=1), 6.0)
    assert 1.25 <= p <= 1200


def test_one_run_is_refused():
    runs = random_runs(3)
    with pytest.raises(
        ValueError, match=r"ledgers must contain at least two runs, got one run.*single"
    ):
        tightest_losses(runs[:1], 4)
    with pytest.raises(ValueError, match="ledgers must .*got one run"):
        tightest_losses(runs[0], 4)
    with pytest.raises(ValueError, match="pilots must contain at least two runs"):
        choose_hoelder_p(runs[0], runs[1:], 4)


def test_a_pilot_that_is_averaged_is_refused():
    runs = random_runs(4)
    with pytest.raises(
        ValueError, match=r"pilots must .*got runs \[1\] that are also averaged"
    ):
        choose_hoelder_p(runs[:2], runs[1:], 4)
    copy = GradNormLedger(runs[1].mechanism, runs[1].steps, runs[1].grad_norms)
    with pytest.raises(
        ValueError, match=r"pilots must .*got runs \[1\] that are also averaged"
    ):
        choose_hoelder_p([runs[0], copy], runs[1:], 4)


def test_bad_parameters_are_refused():
    runs = random_runs(4)
    for value in (1.0, math.inf, NAN):
        with pytest.raises(ValueError, match=r"^kappas must be in \(1, inf\)"):
            tightest_losses(runs, 4, kappas=[2.0, value])
        with pytest.raises(ValueError, match=r"^candidates must be in \(1, inf\)"):
            choose_hoelder_p(runs[:2], runs[2:], 4, candidates=[value])
    with pytest.raises(
        ValueError, match="candidates must contain at least one p, got \\[\\]"
    ):
        choose_hoelder_p(runs[:2], runs[2:], 4, candidates=[])
    with pytest.raises(ValueError, match="must have the same .*mechanism"):
        choose_hoelder_p(runs[:2], random_runs(2, seed=1, noise_std=3.0), 4)
