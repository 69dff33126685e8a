"""With every norm above the clip bound the accounting is Opacus's."""

import math
import warnings

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    epsilons,
    privacy_losses,
    rdp_to_epsilon,
    worst_case_loss,
)
from opacus_pi.accounting.epsilon import DEFAULT_ORDERS

ORDERS = [2, 3, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("sample_rate", [0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("noise_multiplier", [0.7, 1.1, 4.0])
def test_plain_sum_and_worst_case_equal_opacus(sample_rate, noise_multiplier):
    clip, steps = 0.75, 350
    mechanism = NoisySGD(
        num_steps=steps,
        sample_rate=sample_rate,
        noise_std=noise_multiplier * clip,
        max_grad_norm=clip,
    )
    ledger = GradNormLedger(mechanism, [100, 350], [[0.8, 5.0], [0.75, 300.0]])
    expected = compute_rdp(
        q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=ORDERS
    )
    worst = [worst_case_loss(mechanism, order) for order in ORDERS]
    np.testing.assert_allclose(worst, expected, rtol=1e-9)
    plain = [privacy_losses(ledger, order, hoelder_p=math.inf) for order in ORDERS]
    np.testing.assert_allclose(plain, np.tile(expected, (2, 1)).T, rtol=1e-9)


@pytest.mark.parametrize("noise_multiplier", [0.6, 1.1, 3.0])
def test_epsilons_are_never_above_opacus_s(noise_multiplier):
    mechanism = NoisySGD(500, 0.02, noise_multiplier, 1.0)
    ledger = GradNormLedger(mechanism, [250, 500], [[0.01, 0.5, 9], [0.01, 0.5, 9]])
    rdp = compute_rdp(
        q=0.02, noise_multiplier=noise_multiplier, steps=500, orders=DEFAULT_ORDERS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = float(rdp_to_epsilon(rdp, DEFAULT_ORDERS, 1e-5))
    values = epsilons(ledger, 1e-5)
    assert (values <= limit * (1 + 1e-9)).all()
    assert values[2] == pytest.approx(limit, 1e-6)
    assert values[0] < values[1] < values[2]
