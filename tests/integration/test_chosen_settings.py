"""Clip norms and noise that the training loop chooses between updates."""

import itertools
import math

import pytest
import torch
from opacus.schedulers import LambdaGradClip, StepNoise

from tests.private_training import Training

SET_BY_LOOP = r"The training loop set optimizer\.{}"


def state(training, link):
    links = training.engine.ledger.custody.links
    return next(found.state for found in links if found.name == link)


@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_a_clip_norm_that_is_computed_from_the_batch(mode):
    training = Training(grad_sample_mode=mode)

    def choose(x, y):
        training.optimizer.max_grad_norm = float(x.abs().sum()) + 1.0

    with pytest.warns(UserWarning, match=SET_BY_LOOP.format("max_grad_norm")):
        training.train(4, choose)
    assert state(training, "norm") == "unchecked"
    assert state(training, "noise") == "checked"


def test_noise_that_is_computed_from_the_batch():
    training = Training()

    def choose(x, y):
        training.optimizer.noise_multiplier = 1.0 + float(x.abs().sum())

    with pytest.warns(UserWarning, match=SET_BY_LOOP.format("noise_multiplier")):
        training.train(4, choose)
    assert state(training, "noise") == "unchecked"


def test_values_of_opacus_and_those_from_before_the_first_batch_are_known():
    training = Training()
    training.optimizer.max_grad_norm = 0.5
    noise = StepNoise(training.optimizer, step_size=1, gamma=0.9)
    clip = LambdaGradClip(training.optimizer, scheduler_function=lambda n: 0.9**n)
    for _ in range(2):
        training.train(1)
        noise.step()
        clip.step()
    assert {state(training, link) for link in ("norm", "noise")} == {"checked"}


@pytest.mark.parametrize("value", [1.0, 1, torch.tensor(1.0)])
def test_the_same_value_is_no_other_one(value):
    training = Training(max_grad_norm=1.0)

    def repeat(x, y):
        training.optimizer.max_grad_norm = value

    training.train(2, repeat)
    assert state(training, "norm") == "checked"


def test_a_schedule_that_the_loop_keeps_by_hand_follows_a_rule():
    training, number = Training(), itertools.count(1)

    def choose(x, y):
        update = next(number)
        training.optimizer.max_grad_norm = 1.1**update
        training.optimizer.noise_multiplier = 1.0 if update < 4 else 0.5

    training.train(4, choose)
    assert {state(training, link) for link in ("norm", "noise")} == {"checked"}


BY_HAND = {
    "1/sqrt(t)": lambda n: 1 / math.sqrt(1 + n),
    "1/t": lambda n: 1 / (1 + 0.05 * n),
    "cosine": lambda n: 0.6 + 0.5 * math.cos(n / 5),
    "by epoch": lambda n: [1, 0.8, 0.5][n // 4],
    "warm-up": lambda n: min(0.1 + n / 7, 1.0) * 0.9**n,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_smooth_schedules_that_the_loop_keeps_by_hand(name):
    training, number = Training(), itertools.count()

    def choose(x, y):
        value = BY_HAND[name](next(number))
        training.optimizer.max_grad_norm = training.optimizer.noise_multiplier = value

    training.train(3, choose)
    assert {state(training, link) for link in ("norm", "noise")} == {"checked"}
