"""Rule "smoothed": what is charged between the rows of a swept ledger."""

import math

import numpy as np
import pytest

from opacus_pi import GradNormLedger, NoisySGD
from opacus_pi.accounting import privacy_losses, worst_case_loss
from tests.accounting.test_observed_losses import runs


def thinned(exact, size):
    """Every ``size``-th row, as sweeps would have measured them."""
    return GradNormLedger(
        exact.mechanism,
        exact.steps[size - 1 :: size],
        exact.grad_norms[size - 1 :: size],
    )


def errors_of(clip, rule, sampling="poisson"):
    """The logarithms of loss over exact loss, at order 8, of one row in six."""
    _, exact = runs(num_rows=120, clip=clip, sampling=sampling)
    plain = {"hoelder_p": math.inf}
    truth = privacy_losses(exact, 8.0, **plain)
    few = thinned(exact, 6)
    return np.log(privacy_losses(few, 8.0, rule=rule, **plain) / truth)


@pytest.mark.parametrize("clip", [0.5, 2.0])
@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_few_rows_are_closer_to_all_rows(clip, sampling):
    held = errors_of(clip, "right", sampling)
    smoothed = errors_of(clip, "smoothed", sampling)
    assert np.sqrt(np.mean(smoothed**2)) < 0.9 * np.sqrt(np.mean(held**2))
    assert smoothed.min() > held.min()  # nobody is charged far too little


def test_a_row_for_every_update_says_everything():
    _, exact = runs(num_rows=20)
    found = privacy_losses(exact, 8.0, rule="smoothed")
    np.testing.assert_allclose(found, privacy_losses(exact, 8.0), rtol=1e-12)


def test_equal_norms_of_equal_examples_have_nothing_to_smooth():
    mechanism = NoisySGD(40, 0.1, noise_std=1.0, max_grad_norm=1.0)
    ledger = GradNormLedger(mechanism, [20, 40], np.full((2, 9), 0.3))
    found = privacy_losses(ledger, 8.0, rule="smoothed", tolerance=0)
    np.testing.assert_allclose(found, privacy_losses(ledger, 8.0), rtol=1e-3)


def test_no_loss_is_above_the_worst_case():
    _, exact = runs(num_rows=60, clip=0.05)
    worst = worst_case_loss(exact.mechanism, 8.0)
    assert privacy_losses(thinned(exact, 6), 8.0, rule="smoothed").max() <= worst


def test_several_runs_of_the_same_norms_are_one():
    _, exact = runs(num_rows=60, num_examples=50)
    few, plain = thinned(exact, 6), {"hoelder_p": math.inf, "rule": "smoothed"}
    one = privacy_losses(few, 8.0, **plain)
    two = privacy_losses([few, few], 8.0, **plain)  # a quadrature of nine nodes
    np.testing.assert_allclose(two, one, rtol=0.1)
    assert np.median(np.abs(two / one - 1)) < 0.01


def test_a_subset_keeps_the_ranks_of_the_whole_that_was_asked():
    _, exact = runs(num_rows=60)
    few = thinned(exact, 6)
    whole = privacy_losses(few, 8.0, rule="smoothed")
    part = privacy_losses(few.subset([7, 3]), 8.0, rule="smoothed")
    np.testing.assert_allclose(part, whole[[7, 3]], rtol=1e-9)


def test_the_rule_is_for_sweeps():
    observed, _ = runs()
    with pytest.raises(ValueError, match="gaps='smoothed', the default, does the same"):
        privacy_losses(observed, 8.0, rule="smoothed")
