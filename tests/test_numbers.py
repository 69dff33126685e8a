"""What NumPy would silently turn into a number is refused by the argument's name."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from opacus_pi import GradNormLedger, GramLedger, NoisySGD
from opacus_pi._validate import numbers
from opacus_pi.accounting import (
    RenyiFilter,
    epsilons,
    fill_unobserved,
    log_moment,
    privacy_losses,
    rdp_to_delta,
    rdp_to_epsilon,
    renyi_divergence,
)
from opacus_pi.difficulty.agreement import rank_correlations
from opacus_pi.evaluation import membership_inference

NO_NUMBERS = {
    "masked": lambda x: np.ma.masked_array(x, np.arange(np.size(x)).reshape(x.shape)),
    "text": lambda x: x.astype(str),
    "bytes": lambda x: x.astype("S"),
    "complex": lambda x: x + 1j,
    "flags": lambda x: x > 0,
    "dates": lambda x: x.astype("m8[s]"),
    "none": lambda x: np.array([*x.ravel()[:-1], None]).reshape(x.shape),
    "texts among numbers": lambda x: np.array([*x.ravel()[:-1], "1"], "O").reshape(
        x.shape
    ),
    "too large": lambda x: np.array([*x.ravel()[:-1], 10**400], "O").reshape(x.shape),
}
ROWS, STEPS = np.array([[0.5, 1.0], [0.25, 2.0]]), np.array([5, 10])
MECHANISM = NoisySGD(10, sample_rate=0.1, noise_std=1.0, max_grad_norm=1.0)
LEDGER = GradNormLedger(MECHANISM, STEPS, ROWS)
VECTOR = np.array([0.5, 0.75])


def mechanism(**facts):
    given = {"num_steps": 10, "sample_rate": 0.1, "noise_std": 1.0, **facts}
    return NoisySGD(**given)


# the argument's name, a good value, and a call with a value in its place
TAKEN = {
    "ratio": (VECTOR, lambda x: log_moment(x, 0.1, 2.0)),
    "ratio ": (VECTOR, lambda x: renyi_divergence(x, 0.1, 2.0)),
    "sample_rate": (VECTOR, lambda x: mechanism(sample_rate=x)),
    "noise_std": (VECTOR, lambda x: mechanism(noise_std=x)),
    "max_grad_norm": (VECTOR, lambda x: mechanism(max_grad_norm=x)),
    "grad_norms": (ROWS, lambda x: GradNormLedger(MECHANISM, STEPS, x)),
    "confidences": (
        ROWS / 2,
        lambda x: GradNormLedger(MECHANISM, STEPS, ROWS, confidences=x),
    ),
    "steps": (STEPS, lambda x: GradNormLedger(MECHANISM, x, ROWS)),
    "grams": (
        np.stack([np.eye(2), 2 * np.eye(2)]),
        lambda x: GramLedger(MECHANISM, STEPS, x),
    ),
    "orders": (VECTOR + 2, lambda x: epsilons(LEDGER, 1e-5, orders=x)),
    "divergences": (VECTOR, lambda x: rdp_to_epsilon(x, [2.0, 3.0], 1e-5)),
    "orders ": (VECTOR + 2, lambda x: rdp_to_delta(VECTOR, x, 1.0)),
    "rows": (ROWS, fill_unobserved),
    "budget": (VECTOR, lambda x: RenyiFilter(x, order=8.0)),
    "retain_confidences": (
        VECTOR,
        lambda x: membership_inference(x, VECTOR / 2, VECTOR),
    ),
    "scores": (
        np.arange(4) + 0.5,
        lambda x: rank_correlations({"a": x, "b": np.arange(4)}),
    ),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_no_number_is_refused_by_name(name, kind):
    good, call = TAKEN[name]
    call(good)
    with pytest.raises(ValueError, match=rf"^{name.strip()}\b"):
        call(NO_NUMBERS[kind](good))


@pytest.mark.parametrize(
    "bad",
    ["8", True, 1j, None, np.ma.masked, 10**400, [8.0]],
    ids=lambda bad: type(bad).__name__,
)
def test_scalars_that_are_no_numbers(bad):
    for call in (
        lambda: privacy_losses(LEDGER, bad),
        lambda: epsilons(LEDGER, bad),
        lambda: mechanism(num_steps=bad),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()


@pytest.mark.parametrize(
    "good",
    [
        *(1, 2.5, np.float32(2.5), np.int8(3), [1, 2.5], (), [[]], np.inf),
        *(torch.tensor([1.0, 2.0]), torch.tensor(3), Fraction(5, 2), [Fraction(1, 2)]),
        *(np.arange(3, dtype=np.uint64), np.array([1, 2.5], "O"), 10**300, np.nan),
    ],
    ids=str,
)
def test_real_numbers_of_every_kind_are_taken(good):
    found = numbers("x", good)
    expected = np.asarray(good).astype(np.float64)
    assert found.dtype == np.float64 and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


def test_an_array_that_is_right_is_not_copied():
    array = np.ones(3)
    assert numbers("x", array) is array
    with pytest.raises(ValueError, match="x must hold real numbers only"):
        numbers("x", Decimal("0.5"))  # has no common type with floats
