"""The worst case by numerical composition, against brute force and exact values."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    epsilons,
    privacy_statement,
    rdp_to_epsilon,
)
from opacus_pi.accounting.composed_epsilon import composed_worst_case
from opacus_pi.accounting.guarantee import rounded_up
from opacus_pi.accounting.training_bound import worst_case_curve
from opacus_pi.accounting.update_transforms import ADDED, REMOVED

from .test_composed_epsilon import DELTA, brute_epsilon, gaussian_epsilon


def renyi(mechanism, delta=DELTA):
    """The worst case from Rényi divergences."""
    curve = worst_case_curve(mechanism, 1)
    return float(rdp_to_epsilon(curve.divergences, curve.orders, delta))


def test_never_below_brute_force_for_a_schedule():
    """Clip norm, noise and sample rate change; between two bounds lies the exact ε."""
    mechanism = NoisySGD(50, [0.1, 0.3], [1.0, 4.0], [1.0, 2.0])
    updates = [(1.0, 0.1, 30), (0.5, 0.3, 20)]
    ways = (REMOVED, ADDED)
    lower = max(brute_epsilon(updates, way, DELTA, up=False) for way in ways)
    upper = max(brute_epsilon(updates, way, DELTA, up=True) for way in ways)
    found = composed_worst_case(mechanism, DELTA, steps=[30, 50])
    assert lower <= found <= 1.025 * upper
    with pytest.raises(ValueError, match="steps must be given"):
        composed_worst_case(mechanism, DELTA)


@pytest.mark.parametrize(
    ("rate", "noise", "number"), [(0.01, 1.0, 1000), (0.001, 0.7, 10_000)]
)
def test_it_agrees_with_the_prv_accountant(rate, noise, number):
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, number)]
    prv = accountant._get_dprv(eps_error=0.005, delta_error=1e-9)
    lower, estimate, _ = prv.compute_epsilon(DELTA, 1e-9, 0.005)
    mechanism = NoisySGD(number, rate, 3 * noise, 3.0)
    found = composed_worst_case(mechanism, DELTA)
    assert lower <= found <= 1.012 * estimate
    assert found < 0.95 * renyi(mechanism)


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_updates_that_draw_everything_are_exact(sampling):
    mechanism = NoisySGD(25, 1.0, 4.0, 2.0, sampling)
    exact = gaussian_epsilon(math.sqrt(25) / 2, DELTA)
    assert exact <= composed_worst_case(mechanism, DELTA) <= 1.005 * exact


@pytest.mark.parametrize(("most", "number"), [(3, 3), (None, 2)])
def test_fixed_sampling_charges_as_many_updates_as_an_example_is_in(most, number):
    """Three as counted; or one in each of the two epochs of 20 updates."""
    mechanism = NoisySGD(20, 0.1, 2.0, 1.0, "fixed", max_participations=most)
    exact = gaussian_epsilon(math.sqrt(number) / 2, DELTA)
    assert exact <= composed_worst_case(mechanism, DELTA) <= 1.005 * exact


def test_without_clipping_noise_or_updates():
    assert composed_worst_case(NoisySGD(9, 0.1, 1.0), DELTA) == math.inf
    assert composed_worst_case(NoisySGD(9, 0.1, 0.0, 1.0), DELTA) == math.inf
    assert composed_worst_case(NoisySGD(0, 0.1, 1.0, 1.0), DELTA) == 0


@settings(max_examples=10, deadline=None)
@given(
    st.floats(0.001, 3),
    st.floats(0.001, 1),
    st.integers(1, 3000),
    st.floats(1e-8, 0.1),
)
def test_no_estimate_of_the_same_composition_exceeds_it(ratio, rate, number, delta):
    mechanism = NoisySGD(number, rate, 1.0, ratio)
    norms = ratio * np.array([0.3, 1.0, 7.0])
    ledger = GradNormLedger(mechanism, [number], [norms])
    found = epsilons(ledger, delta, composition="numerical")
    worst = composed_worst_case(mechanism, delta)
    assert (found <= worst * (1 + 1e-9)).all() and found[2] == found[1]
    assert worst <= 1.001 * renyi(mechanism, delta)


def test_a_statement_says_which_bound_is_which():
    mechanism = NoisySGD(60, 0.05, 2.0, 1.0)
    ledger = GradNormLedger(mechanism, [60], [[0.1, 9.0]])
    statement = privacy_statement(ledger, [0], DELTA)
    assert statement.composed_worst_case == composed_worst_case(mechanism, DELTA)
    assert statement.converted_worst_case == renyi(mechanism, DELTA)
    assert statement.worst_case == statement.composed_worst_case
    assert statement.worst_case < statement.converted_worst_case
    text = str(statement)
    assert "The bound is by numerical composition of the updates. Other" in text
    larger = rounded_up(statement.converted_worst_case)
    assert f"lose more: ε ≤ {larger}, converted from Rényi divergences." in text
    assert f"For any data: ε ≤ {rounded_up(statement.worst_case)} at" in text
    assert json.loads(statement.to_json())["composed_worst_case"] > 0
    group = privacy_statement(ledger, [0, 1], DELTA)
    assert group.composed_worst_case == math.inf
    assert group.worst_case == group.converted_worst_case
    assert "The bound is converted from Rényi divergences." in str(group)
    assert json.loads(group.to_json())["composed_worst_case"] == "inf"
    assumed = privacy_statement(ledger.with_noise_std(1.0), [0], DELTA)
    assert assumed.composed_worst_case == math.inf
