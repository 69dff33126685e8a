"""Errors of the fast mode name the cause."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.private_training import Net, Training

pytestmark = pytest.mark.filterwarnings("ignore")


def training(**options):
    return Training(grad_sample_mode="fast", **options)


def step(run, outputs, y):
    run.optimizer.zero_grad()
    F.cross_entropy(outputs, y).backward()
    run.optimizer.step()


def test_layers_that_are_called_one_by_one():
    run = training()
    x, y = next(iter(run.loader))
    with pytest.raises(ValueError, match="itself, and not its layers") as found:
        step(run, run.net.out(torch.tanh(run.net.conv(x)).flatten(1)), y)
    assert "model.train()" not in str(found.value)


def test_a_model_in_evaluation_mode():
    run = training()
    x, y = next(iter(run.loader))
    run.model.eval()
    with pytest.raises(ValueError, match=r"in evaluation mode now\. Call model\.train"):
        step(run, run.model(x), y)


class Halves(nn.Module):
    """Two layers, each for one half of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        x, half = x.flatten(1), len(x) // 2
        return torch.cat([self.first(x[:half]), self.second(x[half:])])


def test_a_model_that_splits_the_batch():
    run = training(module=Halves(), poisson_sampling=False)
    with pytest.raises(ValueError, match="treats an example alone in another way"):
        run.train(1)


def test_calls_with_different_numbers_of_examples():
    run = training(batch_size=12)
    x, y = next(iter(run.loader))
    run.optimizer.zero_grad()
    some = F.cross_entropy(run.model(x[1:]), y[1:])
    with pytest.raises(ValueError, match="calls of the model with different numbers"):
        (F.cross_entropy(run.model(x), y) + some).backward()


def test_two_backward_passes_are_still_named():
    run = training(module=Net())
    x, y = next(iter(run.loader))
    run.optimizer.zero_grad()
    F.cross_entropy(run.model(x), y).backward()
    with pytest.raises(ValueError, match="Poisson sampling is not compatible"):
        F.cross_entropy(run.model(x[1:]), y[1:]).backward()
