"""Schedules turn seldom, and quantities of random batches often."""

import math
import random

import pytest

from opacus_pi.attribution.turning_points import TurningPoints


def are_many(values, few=5):
    turns = TurningPoints()
    for value in values:
        turns.add(value)
        if turns.are_many(few):
            return True
    return False


def average(values, weight):
    latest, averages = 1.0, []
    for value in values:
        latest = weight * latest + (1 - weight) * value
        averages.append(latest)
    return averages


@pytest.mark.parametrize("length", [6, 7, 10, 31, 33])
def test_restarts_turn_seldom_wherever_they_begin(length):
    for start in range(length):
        cosines = [
            0.9 ** (n // length) * (1.1 + math.cos(math.pi * (n % length) / length))
            for n in range(start, start + 400)
        ]
        assert not are_many(cosines, few=3)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8])
def test_cycles_that_repeat_their_values(length):
    for start in range(length):
        numbers = range(start, start + 200)
        assert not are_many([0.1 + abs(n % length - length / 2) for n in numbers])


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 50,
        [1.0, float("nan"), float("inf"), 0.5] * 20,
        [1 + 1e-9 * (-1) ** n * n for n in range(100)],
        [1 / math.sqrt(1 + n) for n in range(100)],
        [1.0, 0.1] * 20,
    ],
    ids=["constant", "not finite", "rounding", "decay", "two values"],
)
def test_what_does_not_turn(values):
    assert not are_many(values)


def test_quantities_of_batches_turn():
    draw = random.Random(0)
    gains = [draw.gauss(1, 0.2) for _ in range(400)]
    sizes = [sum(draw.random() < 0.2 for _ in range(60)) for _ in range(40)]
    decayed = [gain * 0.9**n for n, gain in enumerate(gains[:40])]
    for values in (gains[:20], sizes, decayed, average(gains, 0.9)):
        assert are_many(values)
    schedule = [1 - n / 2000 for n in range(1000)]
    assert are_many(schedule + gains[:100])
