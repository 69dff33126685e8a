"""Sums with noise that are divided by a number that changes from update to update."""

import pytest
from torch import nn

from opacus_pi import Unlearner
from tests.private_training import Training

CHANGED = "expected_batch_size was changed"
STATEMENT = "training divided by a batch size that does not depend on the set"


def noise(training):
    links = training.engine.ledger.custody.links
    return next(link for link in links if link.name == "noise")


def divisor(training):
    plan = Unlearner(training.engine, criterion=nn.CrossEntropyLoss()).plan([3])
    found = [a for a in plan.guarantee.assumptions if a.statement == STATEMENT]
    return [a.standing for a in found]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_a_batch_divided_by_its_own_size(mode):
    training = Training(grad_sample_mode=mode)

    def divide_by_size(x, y):
        training.optimizer.expected_batch_size = max(1, len(x))

    with pytest.warns(UserWarning, match=CHANGED):
        training.train(2, divide_by_size)
    assert noise(training).state == "unchecked"
    assert divisor(training) == ["declared"]


def test_the_size_of_a_first_batch():
    training = Training()
    batches = ((x, y) for x, y in training.loader if len(x) not in (0, 6))
    x, y = next(batches)
    training.optimizer.expected_batch_size = len(x)
    with pytest.warns(UserWarning, match=CHANGED):
        training.batch(x, y)


def test_a_constant_is_accepted():
    training = Training()
    training.optimizer.expected_batch_size = 100
    training.train(2)
    assert noise(training).state == "checked"
    assert divisor(training) == ["derived"]


def test_a_sum_is_not_divided():
    training = Training(loss_reduction="sum")

    def change(x, y):
        training.optimizer.expected_batch_size = max(1, len(x))

    training.train(1, change)
    assert noise(training).state == "checked"


def test_physical_batches_are_divided_by_one_number():
    training = Training()
    for _ in training.memory_managed():
        training.train(1)
    assert noise(training).state == "checked"
