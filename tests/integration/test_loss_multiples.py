"""Factors by which a loop multiplies an audited loss: schedules, and batches' own."""

import warnings

import numpy as np
import pytest

from opacus_pi.custody import Chain
from opacus_pi.integration.loss_multiples import LossMultiples

SCHEDULES = {
    "warm-up": lambda k: min(1.0, k / 8),
    "slow": lambda k: min(1.0, k / 1000),
    "decay": lambda k: 0.99**k,
    "doubled": lambda k: 2.0 ** (k // 10),
    "halved": lambda k: 0.5 ** (k > 20),
    "cyclic": lambda k: 1.5 + np.sin(k),
    "constant": lambda k: 0.5,
}


def state_after(factors, sizes, losses):
    chain = Chain()
    judge = LossMultiples(chain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for factor, size, loss in zip(factors, sizes, losses, strict=True):
            judge.saw(float(factor), size=int(size), loss=float(loss))
        (link,) = [x for x in chain.custody().links if x.name == "loss"]
    return link.state if link.state == "broken" else len(chain.doubts())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mean", [3, 12, 100])
def test_no_schedule_is_taken_for_one_of_the_batch(name, mean):
    draws = np.random.default_rng(0)
    for _ in range(100):
        factors = [SCHEDULES[name](k) for k in range(1, 65)]
        sizes = draws.poisson(mean, 64)
        losses = 0.5 + 0.01 * draws.random(64) + 0.98 ** np.arange(64)
        assert state_after(factors, sizes, losses) == (name != "constant")
        ends = [mean, mean, mean, max(1, mean // 2)] * 16  # a short last batch
        assert state_after(factors, ends, losses) == (name != "constant")


FOLLOWING = {
    "sum": lambda size, loss: size,
    "sum over the expected size": lambda size, loss: size / 12,
    "mean in place of the sum": lambda size, loss: 1 / size,
    "logarithm": lambda size, loss: 1 / loss,
    "root": lambda size, loss: 0.5 / loss**0.5,
    "square": lambda size, loss: 2 * loss,
}


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("start", [0, 30])
def test_a_factor_of_the_batch_is_found_within_a_few_updates(name, start):
    draws = np.random.default_rng(1)
    sizes, losses = 1 + draws.poisson(12, 40), 0.5 + draws.random(40)
    factors = [
        1.0 if k < start else FOLLOWING[name](sizes[k], losses[k]) for k in range(40)
    ]
    assert state_after(factors, sizes, losses) == "broken"
    enough = start + (4 if "loss" in FOLLOWING[name].__code__.co_names else 10)
    assert state_after(factors[:enough], sizes[:enough], losses[:enough]) == "broken"


def test_a_short_last_batch_shows_a_sum():
    sizes = [12, 12, 12, 6] * 3
    assert state_after(sizes, sizes, np.linspace(2, 1, 12)) == "broken"
    assert state_after([12] * 12, [12] * 12, np.linspace(2, 1, 12)) == 0


def test_a_factor_of_zero_or_with_another_sign_is_only_said():
    sizes = [3, 4, 5, 6, 7, 8, 9, 10]
    turned = [size * (-1) ** k for k, size in enumerate(sizes)]
    assert state_after(turned, sizes, [1.0] * 8) == 1
    assert state_after([0, 1] * 4, sizes, [0.0] * 8) == 1
