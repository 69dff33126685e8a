"""One clear error for each bad argument of the functions that give numbers."""

import math
import re

import numpy as np
import pytest

from opacus_pi.accounting import (
    GradNormLedger,
    NoisySGD,
    epsilon_limits,
    epsilons,
    privacy_losses,
    worst_case_loss,
)

NORMS = np.random.default_rng(0).random((4, 5), dtype=np.float32)
LEDGER = GradNormLedger(NoisySGD(4, 0.5, 1.0, 1.0), [1, 2, 3, 4], NORMS)
SCHEDULED = NoisySGD(4, 0.5, [1.0, 2.0], 1.0)
NAN, INF = math.nan, math.inf

GOOD = {
    privacy_losses: {"ledger": LEDGER, "order": 2.0},
    epsilons: {"ledger": LEDGER, "delta": 1e-5},
    epsilon_limits: {"ledger": LEDGER, "delta": 1e-5},
    worst_case_loss: {"mechanism": SCHEDULED, "order": 2.0, "steps": [2, 4]},
}
TEXTS = ["x", None, 3, ["right"], NAN]
NUMBERS = ["8", NAN, -1, 1j, True, [0.5], (0.5, 0.5), np.array([0.5]), {}]
LEDGERS = [None, 3, "x", [], [3], [LEDGER, None], {}, {"a": LEDGER}, NoisySGD, NORMS]
BAD = {
    "ledger": [*LEDGERS, LEDGER.mechanism],
    "mechanism": [None, 3, "x", LEDGER, NoisySGD],
    "order": [*NUMBERS, None, 1, 1.0, 0.5, 0, INF, -INF],
    "delta": [*NUMBERS, None, 0, 1, 2, INF],
    "orders": ["8", -2, [], [1.0], ["a"], [NAN], [None], [[2, 3]], [2, True], True],
    "rule": ["rigth", *TEXTS[1:3], [3], NAN],
    "convention": TEXTS,
    "mode": TEXTS,
    "gaps": TEXTS,
    "composition": TEXTS,
    "hoelder_p": ["2", NAN, -1, 0, 1, 1.0, 1j, True, [2.0]],
    "tolerance": [*NUMBERS, 1e-9, 2, INF],
    "confidence": [*NUMBERS[:5], None, 0, 1, 2, INF],
    "steps": [
        [2],
        [2, 4, 4],
        [-1, 4],
        [2, 5],
        [4, 2],
        [2, 2],
        [1.5, 4],
        [NAN, 4],
        ["2", "4"],
        [[2, 4]],
        "x",
        4,
        [],
        None,
    ],
}
NAMES = {
    privacy_losses: (
        *("ledger", "order", "convention", "rule", "hoelder_p", "mode"),
        *("tolerance", "gaps"),
    ),
    epsilons: ("ledger", "delta", "orders", "tolerance", "gaps", "composition"),
    epsilon_limits: (
        *("ledger", "delta", "confidence", "orders", "hoelder_p", "tolerance"),
        "composition",
    ),
    worst_case_loss: ("mechanism", "order", "steps"),
}
CASES = [
    pytest.param(function, name, value, id=f"{function.__name__}-{name}-{number}")
    for function, names in NAMES.items()
    for name in names
    for number, value in enumerate(BAD[name])
]


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_a_bad_argument_has_one_clear_error(function, name, value):
    with pytest.raises(ValueError) as caught:
        function(**{**GOOD[function], name: value})
    text = str(caught.value)
    assert re.match(rf"{name} must .*, got .*\. [A-Z(`].*\.$", text), text
    assert "\n" not in text and len(text) < 500


@pytest.mark.parametrize("function", GOOD)
def test_good_arguments_of_every_kind_are_accepted(function):
    good = GOOD[function]
    value = function(**good)
    for name in {"order", "delta"} & good.keys():
        for kind in (np.float64, np.array):
            assert np.array_equal(function(**{**good, name: kind(good[name])}), value)
    if "ledger" in good and function is not epsilon_limits:
        for several in ((LEDGER,), [LEDGER], iter([LEDGER])):
            assert np.array_equal(function(**{**good, "ledger": several}), value)


def test_steps_are_checked_where_they_are_not_needed():
    mechanism = LEDGER.mechanism
    assert worst_case_loss(mechanism, 2.0, steps=[]) == worst_case_loss(mechanism, 2.0)
    with pytest.raises(ValueError, match="steps must be increasing whole numbers"):
        worst_case_loss(mechanism, 2.0, steps=[5])


def test_limits_say_that_they_hold_for_numerical_composition():
    limits = epsilon_limits(LEDGER, 1e-5, composition="renyi")
    assert (limits >= epsilons(LEDGER, 1e-5, composition="numerical")).all()
    with pytest.raises(ValueError, match='composition must be "renyi".*Leave it out'):
        epsilon_limits(LEDGER, 1e-5, composition="numerical")
