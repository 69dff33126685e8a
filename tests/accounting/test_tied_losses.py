"""Why losses equal the worst case: clipped examples, and estimates that were cut."""

import math

import numpy as np
import pytest

from opacus_pi.accounting import GradNormLedger, NoisySGD, privacy_losses
from opacus_pi.accounting.tied_losses import (
    TiedLosses,
    always_clipped,
    tied_losses,
)

C = 2.0
RUN = NoisySGD(num_steps=105, sample_rate=0.05, noise_std=C, max_grad_norm=C)
NORMS = C * np.array(
    [
        [3.0, np.nan, 0.95, 1.0, 0.2],  # columns 0, 1, 3: clipped where known
        [1.1, 4.0, 1.50, 1.0, 0.3],
        [1.2, np.nan, 0.95, 1.0, 0.2],
    ]
)


def ledger_of(norms=NORMS, mechanism=RUN, source="observed"):
    return GradNormLedger(mechanism, [35, 70, 105], norms, source=source)


def test_examples_that_were_always_clipped():
    expected = [True, True, False, True, False]
    assert always_clipped(ledger_of()).tolist() == expected
    twice = [ledger_of(np.nan_to_num(NORMS, nan=9)), ledger_of(NORMS[:, ::-1] + 3)]
    assert always_clipped(twice).tolist() == expected
    changing = NoisySGD(105, 0.05, [1.0, 2.0, 1.0], [C, 2 * C, C])
    assert always_clipped(ledger_of(mechanism=changing)).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        pytest.param(7, TiedLosses(2, 1, 1.5, 2), id="middle: one was cut"),
        pytest.param(1.5, TiedLosses(2, 0), id="low: only clipped ones"),
    ],
)
def test_causes_by_order(order, expected):
    ledger = ledger_of(np.nan_to_num(NORMS[:, [0, 2, 3, 4]], nan=9), source="swept")
    found = tied_losses(ledger, privacy_losses(ledger, order), order)
    assert found == expected


def test_without_clipping_nothing_is_at_a_worst_case():
    free = NoisySGD(105, 0.05, 1.0, math.inf)
    ledger = ledger_of(np.full((3, 4), 1.0), free, "swept")
    assert tied_losses(ledger, privacy_losses(ledger, 2), 2) == TiedLosses(0, 0)
