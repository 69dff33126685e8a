"""Comparisons in few dimensions: never below those in all, and hardly above."""

from dataclasses import replace

import numpy as np
import pytest

from opacus_pi.unlearning.heads import RidgeHead, unit_rows
from opacus_pi.unlearning.heads import compression as module

STEPS = [0, 3, 40]


def head_on(rows, **settings):
    labels = np.random.default_rng(1).integers(4, size=len(rows))
    settings = {"num_steps": 300, "noise_std": 1e-3, "seed": 0} | settings
    return RidgeHead(num_classes=4, **settings).fit(rows, labels)


def rows_of(size, width, decay):
    scale = np.arange(1, width + 1) ** -decay
    return unit_rows(np.random.default_rng(0).normal(size=(size, width)) * scale)


def compared(head, some, method="hockey-stick"):
    """ε in few dimensions and in all."""
    found = head.epsilons(num_steps=STEPS, indices=some, method=method)
    return found, head._one_by_one(np.asarray(some), STEPS, 1e-5, method)


@pytest.mark.parametrize("method", ["hockey-stick", "renyi"])
@pytest.mark.parametrize("penalty", [0.2, 0.01, 0.001])
@pytest.mark.parametrize("decay", [0.3, 1.5])
def test_close_to_all_dimensions_and_not_below(decay, penalty, method):
    head = head_on(rows_of(120, 40, decay), regularisation=penalty, initial_std=0.01)
    found, exact = compared(head, np.arange(0, 120, 13), method)
    assert (found >= exact * (1 - 1e-11)).all()
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_certified_error_is_small_on_ordinary_data():
    found, exact = compared(head_on(rows_of(200, 64, 0.7)), np.arange(0, 200, 23))
    np.testing.assert_allclose(found, exact, rtol=2e-8)


def test_rows_that_do_not_fit_are_compared_in_all_dimensions():
    rows = rows_of(60, 12, 0.5)
    rows[0], rows[1] = 0, np.eye(12)[11]  # no row at all, and a direction of its own
    rows[2:, 11] = 0
    found, exact = compared(head_on(rows), np.arange(60))
    assert (found[:, 0] == 0).all()
    assert (found >= exact * (1 - 1e-11)).all()
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("width", [4, 6, 8])
def test_the_slack_is_above_the_true_error(width):
    """With so few functions the error can be seen; it must be below what is said."""
    head = head_on(rows_of(80, 30, 0.5))
    pairs, slack = narrowed(head._compression(), width).pairs(
        head._features, head._targets, 300, [10]
    )
    exact = [head._gap(np.array([i])).pair(10) for i in range(80)]
    length = np.sqrt([pair.squares.sum() for pair in exact])
    spread = np.array([np.abs(pair.variances).sum() for pair in exact])
    error = np.abs(np.sqrt(pairs[0].squares.sum(axis=1)) - length)
    other = np.abs(np.abs(pairs[0].variances).sum(axis=1) - spread)
    sound = np.isfinite(slack)
    assert sound.sum() > 40
    assert error.max() > 1e-9  # there is something to bound
    assert (error[sound] <= (slack * (1 + length))[sound]).all()
    assert (other[sound] <= (2 * slack)[sound]).all()


def narrowed(small, width):
    """A compression with fewer functions, and the errors that it then has."""
    functions, _ = np.linalg.qr(small.functions[:, :width])
    powers = np.arange(small.num_powers)
    target = module._powers(small.descent.rates, powers)
    error = target - functions @ (functions.T @ target)
    missing = np.square(error) @ (powers + 1.0)
    return replace(small, functions=functions, missing=missing)
