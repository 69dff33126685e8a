"""One object counts what happens in a run, and says what of it is looked at."""

import copy
import random
from itertools import islice

import pytest

from opacus_pi.custody.looks import Looks, few_updates
from opacus_pi.integration.glances import _updates

SCHEDULES = {
    "cheap": (None, lambda n: n % 64 == 0 or n & (n - 1) == 0),
    "few": ([1, 2, 3, 7], lambda n: n in (1, 2, 3, 7)),
    "no look": ([], lambda n: False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_number_is_looked_at_as_its_schedule_says(name):
    numbers, wanted = SCHEDULES[name]
    looks = Looks(numbers)
    for number in range(1, 400):
        assert looks.num_past == number - 1
        assert looks.is_due == wanted(number)
        assert looks.is_near == (wanted(number) or wanted(number + 1))
        assert looks.count() == wanted(number)


def test_a_look_that_was_impossible_is_made_up_for():
    looks = Looks([1, 2, 5])
    made = [looks.count(is_done=number > 3) for number in range(1, 8)]
    assert made == [True] * 5 + [
        True,
        False,
    ]  # 1 is made at the 4th, 2 at the 5th
    assert looks.are_over and not looks.is_near


def test_looks_that_were_ended_are_over():
    looks = Looks()
    assert looks.is_due and not looks.are_over
    looks.end()
    assert looks.are_over and not any(looks.count() for _ in range(9))
    assert looks.num_past == 9


def test_a_copy_goes_on_by_itself():
    looks = Looks()
    made = [looks.count() for _ in range(100)]
    copied = copy.deepcopy(looks)
    assert [copied.count() for _ in range(100)] == [looks.count() for _ in range(100)]
    assert sum(made) == 7


def test_glances_are_at_most_15_updates_apart():
    numbers = list(islice(_updates(), 300))
    assert numbers[:64] == list(range(1, 65))
    gaps = {b - a for a, b in zip(numbers[63:], numbers[64:], strict=False)}
    assert gaps == set(range(1, 16))


def test_few_updates_are_in_each_period():
    assert few_updates(random.Random(1))[:3] == [1, 2, 3]
