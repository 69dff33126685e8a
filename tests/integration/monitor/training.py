"""Small monitored trainings, the user's loop over them, and gradients by hand."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
)

from opacus_pi.attribution import Tracker
from opacus_pi.integration.monitor import monitor
from opacus_pi.recording import AccountingError, Recorder

N, CLASSES = 22, 3


class Augmented(Dataset):
    """Images with labels; draws from all three global generators."""

    def __init__(self, num_examples=N):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(num_examples, 1, 6, 6, generator=generator)
        self.targets = torch.randint(CLASSES, (num_examples,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        shift = torch.randn(()) + np.random.randn() + random.gauss(0, 1)
        return self.images[index] + 0.01 * shift.float(), self.targets[index]


def net(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64, CLASSES),
    )


def linear_data(num_examples=N, num_features=4):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_examples, num_features, generator=generator)
    y = torch.randint(CLASSES, (num_examples,), generator=generator)
    return TensorDataset(x, y)


def small(num_features=4):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(num_features, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def monitored(model=None, data_set=None, **changes):
    """Monitor a small default training; returns what a test may want to look at."""
    model = small() if model is None else model
    data_set = linear_data() if data_set is None else data_set
    options = {
        "recorder": Recorder("swept"),
        "tracker": Tracker(),
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(data_set, batch_size=4, shuffle=True),
        "noise_std": 0.5,
        "criterion": nn.CrossEntropyLoss(),
        **changes,
    }
    module, optimizer, loader = monitor(**options)
    return SimpleNamespace(
        **{**options, "module": module, "optimizer": optimizer, "loader": loader}
    )


def epoch(run):
    """The user's loop; yields (gradients before the step, batch size) after it."""
    run.module.train()
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.module(x), y).backward()
        before = [p.grad.clone() for p in run.module.parameters()]
        run.optimizer.step()
        yield before, len(y)


def train(run, num_epochs=1):
    for _ in range(num_epochs):
        for _ in epoch(run):
            pass


def gradients(run):
    return [p.grad for p in run.module.parameters()]


def autograd_norm(model, x, y):
    loss = cross_entropy(model(x[None]), y[None])
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([p.flatten() for p in parts]).norm().item()


# --------------------------------------------------- training goes on, without a ledger
def refused(run, match):
    with pytest.raises(AccountingError, match=match):
        _ = run.recorder.ledger
