"""A guarantee never claims more than its assumptions carry."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.accounting.guarantee import (
    Assumption,
    EpsilonDelta,
    Guarantee,
    derived,
    guarantee_of_run,
    observed,
    rounded_up,
)

MET = derived("the weights stay in a ball", "projection")
DECLARED = Assumption("the noise is secret", True, "not recorded")
UNMET = Assumption("the loss is an upper bound", False, "one run")
ORDERS = (2.0, 8.0, 32.0)
DIVERGENCES = (0.1, 0.5, 3.0)


def guarantee(assumptions=(MET,), divergences=DIVERGENCES):
    return guarantee_of_run("Langevin", assumptions, ORDERS, divergences)


def by_hand(assumptions=(MET,), divergences=DIVERGENCES):
    return Guarantee("Langevin", assumptions, ORDERS, divergences)


def test_kind_follows_from_the_assumptions():
    assert guarantee().kind == "certified"
    assert guarantee((MET, DECLARED)).kind == "certified if"
    assert guarantee((MET, DECLARED, UNMET)).kind == "estimate"
    assert guarantee((MET, UNMET)).kind == "estimate"
    assert guarantee((), DIVERGENCES).kind == "estimate"
    assert guarantee((MET,), (math.inf,) * 3).kind == "empirical"
    assert Guarantee("FineTune", (MET,)).kind == "empirical"


def test_kind_cannot_be_passed_in_or_set():
    with pytest.raises(TypeError):
        Guarantee("Langevin", (UNMET,), ORDERS, DIVERGENCES, kind="certified")
    with pytest.raises(dataclasses.FrozenInstanceError):
        guarantee().kind = "certified"


def test_a_caller_cannot_make_a_guarantee_certified():
    mine = by_hand((DECLARED,))
    assert mine.kind == "certified if"
    assert [a.statement for a in mine.declarations] == [
        "the numbers of this guarantee are bounds",
        "the noise is secret",
    ]
    # assumptions of a certified guarantee, or the guarantee itself, with other numbers
    assert by_hand().kind == "certified if"
    for changes in ({"divergences": (0.0, 0.0, 0.0)}, {"method": "mine"}):
        assert dataclasses.replace(guarantee(), **changes).kind == "certified if"
    changed = dataclasses.replace(MET, statement="everything holds")
    assert changed.is_declared
    for make in (
        lambda: Assumption("x", True, "y", "observed"),
        lambda: Assumption("x", True, "y", established="observed"),
        lambda: dataclasses.replace(DECLARED, established="observed"),
        lambda: Guarantee("x", (MET,), ORDERS, DIVERGENCES, established="derived"),
    ):
        with pytest.raises((TypeError, ValueError)):
            make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        DECLARED.established = "observed"


def test_an_edited_text_is_refused():
    def text(claim, **changes):
        facts = json.loads(claim.to_json())
        for name, value in changes.items():
            facts[name] = value
        return json.dumps(facts)

    certified = [{**dataclasses.asdict(DECLARED), "established": "observed"}]
    edits = (
        (by_hand((DECLARED,)), {"kind": "certified", "established": "derived"}),
        (
            guarantee((DECLARED,)),
            {"kind": "certified", "assumptions": certified},
        ),
        (guarantee(), {"divergences": [0.0, 0.0, 0.0]}),
        (guarantee(), {"checksum": None}),
        (guarantee(), {"statements": [{"epsilon": 0.0, "delta": 0.0, "source": "me"}]}),
        (guarantee(), {"established": "seen"}),
        (guarantee(), {"statements": [{"epsilon": 0.0}]}),
    )
    for claim, changes in edits:
        assert Guarantee.from_json(text(claim)) == claim
        with pytest.raises(ValueError, match="edited|unedited"):
            Guarantee.from_json(text(claim, **changes))


def test_texts_of_version_1_are_read_and_count_as_declared():
    def old(kind, met):
        return json.dumps(
            {
                "format": "opacus_pi.Guarantee.v1",
                "kind": kind,
                "method": "Langevin",
                "assumptions": [{"statement": "a", "met": met, "evidence": "b"}],
                "orders": [2.0],
                "divergences": [0.5],
            }
        )

    assert Guarantee.from_json(old("certified", True)).kind == "certified if"
    assert Guarantee.from_json(old("estimate", False)).kind == "estimate"
    with pytest.raises(ValueError, match="kind must be"):
        Guarantee.from_json(old("certified", False))


def test_a_pair_of_epsilon_and_delta_counts_at_its_delta_and_above():
    pair = EpsilonDelta(0.25, 1e-5, "the engine's PRV accountant")
    claim = guarantee_of_run(
        *("Langevin", (MET,), ORDERS, DIVERGENCES), statements=[pair]
    )
    alone = guarantee()
    assert claim.epsilon(1e-5) == claim.epsilon(1e-3) == 0.25
    assert claim.epsilon(1e-6) == alone.epsilon(1e-6) > 0.25
    assert "≤ 0.25 at δ = 1e-05 (a bound, by the engine's PRV acc" in claim.text(1e-5)
    assert "PRV" not in claim.text(1e-6)
    exact = guarantee_of_run(
        "rewind", (MET,), statements=[EpsilonDelta(0.0, 0.0, "exact", True)]
    )
    assert exact.kind == "certified" and exact.epsilon(1e-300) == 0
    assert exact.reverse_epsilon(1e-9) == 0 and "exactly the dist" in str(exact)
    assert claim.reverse_epsilon(1e-5) == math.inf and "One-sided" in str(claim)
    for epsilon, delta in ((math.inf, 0.1), (-1.0, 0.1), (1.0, 1.5)):
        with pytest.raises(ValueError, match="epsilon|delta"):
            EpsilonDelta(epsilon, delta, "me")


def test_both_directions_are_stated_where_they_are_known():
    def both(reverse):
        return guarantee_of_run(
            *("Langevin", (MET,), ORDERS, DIVERGENCES), reverse_divergences=reverse
        )

    same, larger = both(DIVERGENCES), both((0.2, 0.9, 5.0))
    assert same.reverse_epsilon(1e-5) == same.epsilon(1e-5)
    assert "Both directions" in str(same) and "≤ e^ε · Pr[unlearned" in str(same)
    words = str(larger)
    assert f"with ε ≤ {rounded_up(larger.reverse_epsilon(1e-5))}: Pr[r" in words
    assert "Both directions" not in str(both((math.inf,) * 3))


def test_an_estimate_beside_a_bound_is_named_an_estimate():
    claim = guarantee_of_run(
        *("Langevin", (MET,), ORDERS, DIVERGENCES), estimates=(0.01, 0.05, 0.3)
    )
    assert claim.kind == "certified"
    assert claim.epsilon(1e-5) == guarantee().epsilon(1e-5)
    estimate = claim.estimated_epsilon(1e-5)
    assert estimate == guarantee(divergences=(0.01, 0.05, 0.3)).epsilon(1e-5)
    assert f"estimate for this set: ε ≈ {estimate:.4g}" in str(claim)
    assert guarantee().estimated_epsilon(1e-5) == math.inf


def test_the_text_lists_what_is_declared():
    words = guarantee((MET, DECLARED, observed("it ran", "seen"))).text()
    assert words.startswith("Certified if the declarations below hold: guar")
    assert words.splitlines()[-3:] == [
        "  declared: the noise is secret (not recorded)",
        "  derived: the weights stay in a ball (projection)",
        "  observed: it ran (seen)",
    ]


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


def test_the_smallest_epsilon_comes_first_and_the_others_are_named_by_method():
    pairs = [
        EpsilonDelta(0.31, 1e-4, "composition", both_directions=True),
        EpsilonDelta(0.25, 1e-4, "an accountant"),
        EpsilonDelta(0.2500001, 1e-4, "the same again"),
    ]
    claim = guarantee_of_run("Langevin", (MET,), ORDERS, DIVERGENCES, statements=pairs)
    assert claim.own_delta == 1e-4 and str(claim) == claim.text(1e-4)
    assert "≤ 0.25 at δ = 0.0001" in repr(claim)
    text = claim.text(1e-4)
    assert "ε ≤ 0.25 at δ = 0.0001 (a bound, by an accountant)." in text
    alone = guarantee_of_run("Langevin", (MET,), ORDERS, DIVERGENCES)
    converted = rounded_up(alone.epsilon(1e-4))
    others = text.splitlines()[2]
    assert others.startswith("Other methods lose more: ")
    assert "ε ≤ 0.31, by composition; " in others
    assert f"ε ≤ {converted}, converted from D_α" in others
    assert others.endswith("hold, and the smallest counts.")
    for single in (alone, guarantee_of_run("L", (MET,), statements=pairs[:1])):
        assert "Other methods" not in single.text(1e-4)
    at_less = guarantee_of_run("L", (MET,), statements=pairs).text(1e-6)
    assert "ε ≤ inf at δ = 1e-06 (a bound)." in at_less


def test_the_text_states_epsilon_at_the_delta_that_is_asked_for():
    claim = guarantee()
    assert str(claim) == claim.text() == claim.text(1e-5)
    assert "at δ = 1e-05" in str(claim)
    words = claim.text(0.001)
    epsilon = rounded_up(claim.epsilon(0.001))
    assert f"ε ≤ {epsilon} at δ = 0.001 (a bound, conv" in words
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
        guarantee((MET, DECLARED)),
        by_hand(),
        guarantee(divergences=(0.1, math.inf, math.inf)),
        guarantee_of_run(
            *("FineTune", (MET,), ORDERS, DIVERGENCES),
            reverse_divergences=(0.1, 0.2, math.inf),
            estimates=DIVERGENCES,
            statements=[EpsilonDelta(1.0, 1e-5, "PRV", True)],
        ),
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
        words = str(guarantee_of_run("Langevin", (MET,), (2.0,), (d,)))
        written = float(words.split("retrained) ≤ ")[1].split()[0])
        assert d <= written <= d * 1.001
        words = str(guarantee_of_run("Langevin", (MET, UNMET), (2.0,), (d,)))
        assert f"≈ {d:.4g} at" in words


def test_text_says_what_it_is_worth_and_which_way():
    certified, estimate = str(guarantee()), str(guarantee((MET, UNMET)))
    assert "≤ 0.5 at α = 8" in certified and "(a bound, converted from D_α" in certified
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
    assert claim == by_hand()
    assert hash(claim) == hash(by_hand())


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


@pytest.mark.parametrize(
    ("curve", "pairs", "is_exact"),
    [
        ((0.0, 0.0), (EpsilonDelta(0.0, 0.0, "exact rewind", True),), True),
        ((math.inf, math.inf), (EpsilonDelta(0.0, 0.0, "a proof"),), True),
        ((0.5, 2.0), (EpsilonDelta(0.0, 1e-5, "a proof", True),), False),
        ((0.0, 0.0), (EpsilonDelta(0.0, 1e-5, "a proof", True),), False),  # rounded
    ],
)
def test_a_bound_of_zero_is_exact_at_every_order(curve, pairs, is_exact):
    clipped = observed("it was clipped", "max_grad_norm=1")
    curves = {"orders": (2.0, 63.0), "divergences": curve, "statements": pairs}
    claim = guarantee_of_run("exact rewind", [clipped], **curves)
    assert claim.is_exact is is_exact and claim.epsilon(1e-5) == 0
    text = claim.text(1e-5)
    assert ("ε = 0 and δ = 0, and a Rényi divergence of 0 at every" in text) is is_exact
    assert ("at α = " in text or "ε ≤ 0" in text) is not is_exact
    assert (claim.reverse_epsilon(1e-5) == 0) or not is_exact
    assert ("at most as probable as" in text) is not is_exact
    doubtful = observed("it is a bound", "one run", met=False)
    assert not guarantee_of_run("rewind", [doubtful], **curves).is_exact


@pytest.mark.parametrize(("divergence", "is_said"), [(1.0, False), (625.0, True)])
def test_a_bound_that_is_too_large_is_said_where_the_kind_is(divergence, is_said):
    holds = observed("it was clipped", "max_grad_norm=1")
    claim = guarantee_of_run("Langevin", [holds], [30.0], [divergence])
    assert claim.kind == "certified"
    assert ("too large to be of practical use" in repr(claim)) == is_said


def test_what_is_shown_to_others_has_no_estimate():
    facts = (observed("it was clipped", "max_grad_norm=1"),)
    curves = {"orders": (2.0, 8.0), "divergences": (0.5, 2.0)}
    whole = guarantee_of_run("Langevin", facts, **curves, estimates=(0.01, 0.02))
    shown = whole.without_estimates()
    assert shown == guarantee_of_run("Langevin", facts, **curves)
    assert "estimate" in whole.text() and "estimate" not in shown.text()
    assert shown.kind == whole.kind == "certified"
    assert shown.epsilon(1e-5) == whole.epsilon(1e-5)
    assert Guarantee.from_json(shown.to_json()) == shown
    doubtful = (*facts, observed("it is a bound", "one run", met=False))
    estimate = guarantee_of_run("SGD", doubtful, **curves)
    assert estimate.kind == "estimate"
    shown = estimate.without_estimates()
    assert shown.kind == "empirical" and shown.epsilon(1e-5) == math.inf
    assert shown.assumptions == doubtful


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [
        (math.log(2), "at most 2 times as probable"),
        (6.3321, "at most 570 times"),  # e^6.3321 = 562.3
        (9.17, "at most 9,700 times"),  # e^9.17 = 9,604: rounded up
        (10.0, "at most 23,000 times"),
        (10.01, "In words: this bound excludes almost nothing."),
        (800.0, "In words: this bound excludes almost nothing."),
        (0.0, "exactly the distribution that it would have had"),
    ],
)
def test_a_bound_is_said_in_words(epsilon, words):
    pair = EpsilonDelta(epsilon, 0.0, "a proof", both_directions=True)
    clipped = observed("it was clipped", "max_grad_norm=1")
    text = guarantee_of_run("SGD", [clipped], statements=[pair]).text(1e-5)
    assert words in text
    weak = "bound is too large to be of practical use"
    assert (weak in text.splitlines()[0]) == (epsilon > 10)
    doubtful = observed("it is a bound", "one run", met=False)
    assert (
        "In words" not in guarantee_of_run("SGD", [doubtful], statements=[pair]).text()
    )
