"""A guarantee never claims more than its assumptions carry."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.accounting.guarantee import Assumption, Guarantee, rounded_up

MET = Assumption("the weights stay in a ball", True, "projection")
UNMET = Assumption("the loss is an upper bound", False, "one run")
ORDERS = (2.0, 8.0, 32.0)
DIVERGENCES = (0.1, 0.5, 3.0)


def guarantee(assumptions=(MET,), divergences=DIVERGENCES):
    return Guarantee("Langevin", assumptions, ORDERS, divergences)


def test_kind_follows_from_the_assumptions():
    assert guarantee().kind == "certified"
    assert guarantee((MET, UNMET)).kind == "estimate"
    assert guarantee((), DIVERGENCES).kind == "estimate"
    assert guarantee((MET,), (math.inf,) * 3).kind == "empirical"
    assert Guarantee("FineTune", (MET,)).kind == "empirical"


def test_kind_cannot_be_passed_in_or_set():
    with pytest.raises(TypeError):
        Guarantee("Langevin", (UNMET,), ORDERS, DIVERGENCES, kind="certified")
    with pytest.raises(dataclasses.FrozenInstanceError):
        guarantee().kind = "certified"


def test_epsilon_is_the_smallest_over_the_finite_orders():
    delta = 1e-5
    by_hand = [
        d + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a, d in zip(ORDERS, DIVERGENCES, strict=True)
    ]
    assert guarantee().epsilon(delta) == pytest.approx(min(by_hand), rel=1e-12)
    partly = guarantee(divergences=(0.1, 0.5, math.inf))
    assert partly.epsilon(delta) == pytest.approx(min(by_hand[:2]), rel=1e-12)
    assert guarantee(divergences=(0.0, 0.0, 0.0)).epsilon(0.5) == 0
    assert Guarantee("FineTune", (MET,)).epsilon(delta) == math.inf


def test_the_text_states_epsilon_at_the_delta_that_is_asked_for():
    claim = guarantee()
    assert str(claim) == claim.text() == claim.text(1e-5)
    assert "at δ = 1e-05" in str(claim)
    words = claim.text(0.001)
    assert f"ε ≤ {rounded_up(claim.epsilon(0.001))} at δ = 0.001 (a bound)" in words
    assert claim.epsilon(0.001) < claim.epsilon(1e-5)
    assert "δ =" not in Guarantee("FineTune", (MET,)).text(0.001)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, float("nan")])
def test_the_text_refuses_a_delta_outside_0_1(delta):
    for claim in (guarantee(), Guarantee("FineTune", (MET,))):
        with pytest.raises(ValueError, match="delta"):
            claim.text(delta)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, float("nan")])
def test_epsilon_refuses_a_delta_outside_0_1(delta):
    with pytest.raises(ValueError, match="delta"):
        guarantee().epsilon(delta)


@pytest.mark.parametrize(
    "claim",
    [
        guarantee(),
        guarantee((MET, UNMET)),
        guarantee(divergences=(0.1, math.inf, math.inf)),
        Guarantee("FineTune", ()),
    ],
)
def test_json_round_trip(claim):
    text = claim.to_json()
    assert Guarantee.from_json(text) == claim
    assert json.loads(text)["kind"] == claim.kind
    assert "Infinity" not in text


def test_a_promoted_kind_in_the_text_is_refused():
    facts = json.loads(guarantee((MET, UNMET)).to_json())
    facts["kind"] = "certified"
    with pytest.raises(ValueError, match="kind must be 'estimate', .*, got certified"):
        Guarantee.from_json(json.dumps(facts))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "other"}'])
def test_foreign_text_is_refused(text):
    with pytest.raises(ValueError, match="Guarantee.to_json"):
        Guarantee.from_json(text)


def test_a_bound_is_written_rounded_up_and_an_estimate_to_nearest():
    for d in np.random.default_rng(0).uniform(0.1, 9, 50):
        words = str(Guarantee("Langevin", (MET,), (2.0,), (d,)))
        assert d <= float(words.split("≤ ")[1].split()[0]) <= d * 1.001
        words = str(Guarantee("Langevin", (MET, UNMET), (2.0,), (d,)))
        assert f"≈ {d:.4g} at" in words


def test_text_says_what_it_is_worth_and_which_way():
    certified, estimate = str(guarantee()), str(guarantee((MET, UNMET)))
    assert "≤ 0.1 at α = 2" in certified and "(a bound)" in certified
    assert "not a bound" in estimate and "≤ 0.1" not in estimate
    assert "not met: the loss is an upper bound (one run)" in estimate
    for text in (certified, estimate):
        assert "Pr[unlearned ∈ E] ≤ e^ε · Pr[retrained ∈ E] + δ" in text
    empirical = str(Guarantee("FineTune", (MET,)))
    assert "No finite divergence" in empirical and "ε" not in empirical


@pytest.mark.parametrize(
    "orders, divergences, named",
    [
        ((2.0,), (0.1, 0.2), "divergences"),
        ((1.0,), (0.1,), "orders"),
        ((2.0,), (-0.1,), "divergences"),
        ((2.0,), (float("nan"),), "divergences"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(orders, divergences, named):
    with pytest.raises(ValueError, match=named):
        Guarantee("Langevin", (MET,), orders, divergences)


def test_unknown_is_no_truth_value():
    with pytest.raises(ValueError, match="met must .*got None"):
        Assumption("the seed was secret", None, "unknown")


def test_arrays_are_taken_and_frozen():
    claim = Guarantee("Langevin", [MET], np.array(ORDERS), np.array(DIVERGENCES))
    assert claim == guarantee()
    assert hash(claim) == hash(guarantee())


@given(st.floats(0, 1e300), st.integers(1, 12))
def test_rounded_up_is_never_below_and_never_more_than_a_digit_above(value, num_digits):
    found = float(rounded_up(value, num_digits))
    assert found >= value
    assert found - value <= 10 ** (1 - num_digits) * value * (1 + 1e-9) + 5e-324


@pytest.mark.parametrize(
    "value, text",
    [(0.1, "0.1"), (1.23401, "1.235"), (9.99951, "10"), (0.0, "0"), (math.inf, "inf")],
)
def test_rounded_up_has_few_digits(value, text):
    assert rounded_up(value) == text
