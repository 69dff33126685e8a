"""Worst case and group bounds, compared with exact laws of tiny trainings.

90 random trainings in each run; ``OPACUS_PI_EXACT_CASES=300`` takes more, and ``-s``
shows how close the bounds are.
"""

import math
import os

import numpy as np
import pytest

from opacus_pi.accounting import (
    NoisySGD,
    group_worst_case_loss,
    rdp_to_delta,
    worst_case_loss,
)
from opacus_pi.accounting.conversion import gaussian_delta
from tests.accounting.exact_training import (
    TinyTraining,
    hockey_stick,
    outliers,
    random_case,
    renyi,
    tanh_network,
)

NUM_CASES = int(os.environ.get("OPACUS_PI_EXACT_CASES", "90"))
ORDERS = (1.25, 2.0, 4.0, 16.0)
ROUNDING = 1e-9


def mechanism_of(case):
    """The facts that a ledger of the training would have."""
    training, rates = case.training, np.array(case.schedule)
    poisson = len(np.unique(rates)) == 1 and 0 < rates.min()
    most = int(rates[:, list(case.group)].sum(axis=0).max())
    return NoisySGD(
        num_steps=len(rates),
        sample_rate=float(rates.min()) if poisson else 1.0,
        noise_std=training.noise_std,
        max_grad_norm=training.max_grad_norm,
        sampling="poisson" if poisson else "fixed",
        max_participations=None if poisson else most,
    )


def test_the_oracle_is_a_gaussian_where_training_is_one():
    """One update at rate 1, and two of constant gradients: shifts of known length."""
    grid = np.linspace(-14, 14, 113)
    training = TinyTraining(outliers(np.array([[9.0, 0.0]])), 1.0, 2.0, 1.0, grid)
    first = training.start((0.0, 0.0))
    for num_steps in (1, 2):
        law = training.run(first, [(1.0,)] * num_steps)
        rest = training.run(first, [(0.0,)] * num_steps)
        assert law.sum() == pytest.approx(1, rel=1e-12)
        mu = num_steps / (2 * math.sqrt(num_steps))
        # rounding takes away a little: at most 1 %, and never adds
        for order in (1.5, 4.0):
            exact = order * mu**2 / 2
            assert 0.99 * exact <= renyi(law, rest, order) <= exact * (1 + ROUNDING)
        exact = float(gaussian_delta(mu, 0.5))
        assert 0.99 * exact <= hockey_stick(law, rest, 0.5) <= exact * (1 + ROUNDING)


def test_the_oracle_agrees_with_simulated_training():
    """Frequencies of half a million runs, within four standard errors."""
    rng = np.random.default_rng(0)
    gradients = tanh_network(np.array([1.0, -2.0, 0.5]), np.array([1.0, 1.0, -3.0]))
    training = TinyTraining(gradients, 1.0, 1.2, 0.5, np.linspace(-4, 4, 9))
    law = training.run(training.start((0.4, -0.3)), [(0.6,) * 3] * 3)
    where = np.full(500_000, np.argmax(training.start((0.4, -0.3))))
    for _ in range(3):
        drawn = rng.random((len(where), 3)) < 0.6
        total = (training.clipped[where] * drawn[..., None]).sum(axis=1)
        noisy = total + 1.2 * rng.standard_normal(total.shape)
        places = np.rint(training.states[where] - 0.5 * noisy).clip(-4, 4) + 4
        where = (9 * places[:, 0] + places[:, 1]).astype(int)
    found = np.bincount(where, minlength=81) / len(where)
    error = np.sqrt(law * (1 - law) / len(where))
    common = law > 1e-4
    assert (np.abs(found - law)[common] <= 4 * error[common]).all()


@pytest.mark.parametrize("poisson", [True, False])
def test_no_exact_divergence_is_above_its_bound(poisson):
    """Forward and reverse, one example and groups, Rényi and δ(ε): no violation."""
    rng = np.random.default_rng(20 + poisson)
    slack = []
    for _ in range(NUM_CASES // 2):
        case = random_case(rng, poisson=poisson)
        mechanism, (law, rest) = mechanism_of(case), case.laws
        size = len(case.group)
        bounds = [group_worst_case_loss(mechanism, size, a) for a in ORDERS]
        if size == 1:
            single = [worst_case_loss(mechanism, a) for a in ORDERS]
            np.testing.assert_allclose(single, bounds, rtol=1e-6)
        for order, bound in zip(ORDERS, bounds, strict=True):
            for exact in (renyi(law, rest, order), renyi(rest, law, order)):
                assert exact <= bound * (1 + ROUNDING) + ROUNDING, (case, order)
                slack.append(bound / exact if exact > ROUNDING else math.inf)
        for epsilon in (0.0, 0.3, 1.0, 3.0):
            most = float(rdp_to_delta(bounds, ORDERS, epsilon)) + ROUNDING
            assert hockey_stick(law, rest, epsilon) <= most, (case, epsilon)
            assert hockey_stick(rest, law, epsilon) <= most, (case, epsilon)
    # the bounds are not only safe: some cases come close to them
    assert min(slack) < 1.1
    print(f"bound / exact: smallest {min(slack):.3f}, median {np.median(slack):.3g}")


def test_a_bound_that_is_too_small_would_be_found():
    """With the bound of a smaller clip norm and sample rate there are violations."""
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(10):
        case = random_case(rng)
        law, rest = case.laws
        mechanism = mechanism_of(case)
        wrong = NoisySGD(mechanism.num_steps, mechanism.sample_rate / 2, 1.0, 0.2)
        found += renyi(law, rest, 2.0) > worst_case_loss(wrong, 2.0)
    assert found > 0
