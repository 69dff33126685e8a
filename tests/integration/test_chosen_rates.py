"""Learning rates that the training loop chooses, and those of schedules."""

import itertools
import math

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules

from tests.private_training import Training

SET = r"param_groups\[{}\]\['{}'\] rises and falls"
NUM_EPOCHS = 8  # of four updates each


def state(training):
    links = training.engine.ledger.custody.links
    return next(link.state for link in links if link.name == "noise")


def raw_norm(training):
    gradients = [p.grad_sample.mean(0) for p in training.net.parameters()]
    return float(torch.sqrt(sum(g.square().sum() for g in gradients)))


class Choosing(Training):
    """A loop that does something between ``backward`` and ``step``."""

    def __init__(self, choose=lambda *_: None, **options):
        super().__init__(**options)
        self.choose, self.number = choose, itertools.count()
        self.schedule = None

    def batch(self, x, y):
        self.optimizer.zero_grad()
        self.criterion(self.forward(x), y).backward()
        self.choose(self, x, next(self.number))
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()


def set_rate(group, value, name="lr"):
    if isinstance(group[name], torch.Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


CHOSEN = {
    "norm": lambda t, x, n: 0.1 / raw_norm(t),
    "size": lambda t, x, n: 0.1 * len(x) / 6,
    "mean": lambda t, x, n: 0.1 * float(x.abs().mean()),
    "decayed": lambda t, x, n: 0.1 * 0.97**n / raw_norm(t),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_rates_that_are_computed_from_the_batch(name):
    def choose(training, x, number):
        value = CHOSEN[name](training, x, number)
        set_rate(training.optimizer.param_groups[0], value)

    training = Choosing(choose)
    with pytest.warns(UserWarning, match=SET.format(0, "lr")):
        training.train(NUM_EPOCHS)
    assert state(training) == "unchecked"


@pytest.mark.parametrize("name", ["weight_decay", "momentum"])
def test_other_settings_of_groups(name):
    def choose(training, x, number):
        group = training.optimizer.param_groups[0]
        set_rate(group, 0.1 * float(x.abs().mean()), name)

    with pytest.warns(UserWarning, match=SET.format(0, name)):
        Choosing(choose).train(NUM_EPOCHS)


def test_one_of_several_groups_and_rates_that_are_tensors():
    def choose(training, x, number):
        value = 0.1 * float(x.abs().mean())
        set_rate(training.optimizer.param_groups[1], value)

    training = Choosing(choose, lr=torch.tensor(0.1))
    groups = training.optimizer.param_groups
    last = groups[0]["params"].pop()
    groups.append({**groups[0], "params": [last], "lr": torch.tensor(0.1)})
    with pytest.warns(UserWarning, match=SET.format(1, "lr")):
        training.train(NUM_EPOCHS)


def test_a_rate_that_is_found_once_is_said_once():
    def choose(training, x, number):
        set_rate(training.optimizer.param_groups[0], 0.1 / raw_norm(training))

    training = Choosing(choose)
    with pytest.warns(UserWarning, match=SET.format(0, "lr")) as caught:
        training.train(NUM_EPOCHS)
    assert sum("rises and falls" in str(w.message) for w in caught) == 1


TORCH = {
    "step": lambda o: torch_schedules.StepLR(o, 3),
    "multi-step": lambda o: torch_schedules.MultiStepLR(o, [4, 9]),
    "one cycle": lambda o: torch_schedules.OneCycleLR(o, 0.5, total_steps=200),
    "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, 10),
    "warm restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 3),
    "longer restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 2, 2),
    "triangles": lambda o: torch_schedules.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "lower triangles": lambda o: torch_schedules.CyclicLR(
        o, 0.01, 0.1, step_size_up=4, mode="triangular2"
    ),
    "polynomial": lambda o: torch_schedules.PolynomialLR(o, 20, power=2.0),
    "lambda": lambda o: torch_schedules.LambdaLR(o, lambda n: 1 / (1 + n)),
    "exponential": lambda o: torch_schedules.ExponentialLR(o, 0.9),
    "sequential": lambda o: torch_schedules.SequentialLR(
        o,
        [
            torch_schedules.LinearLR(o, 0.1, total_iters=5),
            torch_schedules.CosineAnnealingLR(o, 20),
        ],
        [5],
    ),
}
HUGGING_FACE = {
    "linear": {"num_warmup_steps": 4, "num_training_steps": 40},
    "cosine": {"num_warmup_steps": 4, "num_training_steps": 40},
    "cosine_with_restarts": {
        "num_warmup_steps": 4,
        "num_training_steps": 40,
        "scheduler_specific_kwargs": {"num_cycles": 4},
    },
    "polynomial": {"num_warmup_steps": 4, "num_training_steps": 40},
    "inverse_sqrt": {"num_warmup_steps": 4},
}
BY_HAND = {
    "warm-up and cosine": lambda n: min(n / 5, 1) * (1 + math.cos(n / 10)),
    "1/sqrt(t)": lambda n: 0.1 / math.sqrt(1 + n),
    "by epoch": lambda n: [0.1, 0.05, 0.08, 0.02, 0.01, 0.01, 0.001, 0.001][n // 4],
    "in turn": lambda n: 0.1 if n % 2 else 0.01,
}


@pytest.mark.filterwarnings("error:.*rises and falls")
@pytest.mark.parametrize("name", TORCH)
def test_schedulers_of_torch_are_schedules(name):
    training = Choosing()
    training.schedule = TORCH[name](training.optimizer)
    assert state(training.train(NUM_EPOCHS)) == "checked"


def test_a_rate_that_is_lowered_on_a_plateau():
    training = Choosing(lambda t, x, n: schedule.step(1.0))
    schedule = torch_schedules.ReduceLROnPlateau(training.optimizer, patience=1)
    assert state(training.train(NUM_EPOCHS)) == "checked"


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_schedulers_of_hugging_face_are_schedules(name):
    transformers = pytest.importorskip("transformers")
    training = Choosing()
    training.schedule = transformers.get_scheduler(
        name, training.optimizer, **HUGGING_FACE[name]
    )
    assert state(training.train(NUM_EPOCHS)) == "checked"


@pytest.mark.parametrize("name", BY_HAND)
def test_schedules_by_hand(name):
    def choose(training, x, number):
        set_rate(training.optimizer.param_groups[0], BY_HAND[name](number))

    assert state(Choosing(choose).train(NUM_EPOCHS)) == "checked"


def test_a_single_change_cannot_be_told_from_a_schedule():
    def choose(training, x, number):
        if number == 4:
            set_rate(training.optimizer.param_groups[0], 0.1 / raw_norm(training))

    assert state(Choosing(choose).train(3)) == "checked"
