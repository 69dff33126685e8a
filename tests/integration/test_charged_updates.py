"""An accountant that counts other updates than were made limits no epsilon."""

import warnings

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, accounting

DELTA, RATE = 1e-3, 0.25


class Training:
    def __init__(self):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        data = TensorDataset(10 * torch.randn(24, 4), torch.randint(0, 3, (24,)))
        self.engine = PrivacyEngine(accountant="rdp")
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=6),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        self.true = RDPAccountant()

    def train(self, num_epochs=3):
        for _ in range(num_epochs):
            for x, y in self.loader:
                noise = self.optimizer.noise_multiplier
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
                self.true.step(noise_multiplier=noise, sample_rate=RATE)
        return self

    def epsilons(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.engine.epsilons(DELTA)


def noise_raised_first(run):
    own = run.optimizer.step_hook

    def hook(optimizer):
        optimizer.noise_multiplier *= 1.2
        own(optimizer)

    run.optimizer.attach_step_hook(hook)


def attached_with_another_rate(run):
    hook = run.engine.accountant.get_optimizer_hook_fn(sample_rate=0.05)
    run.optimizer.attach_step_hook(hook)


@pytest.mark.parametrize("change", [noise_raised_first, attached_with_another_rate])
def test_an_update_that_is_charged_too_little_limits_nothing(change):
    run = Training()
    change(run)
    run.train()
    true = run.true.get_epsilon(DELTA)
    with pytest.warns(UserWarning, match="too small: the accountant has counted"):
        assert run.engine.get_epsilon(DELTA) < 0.9 * true
    alone = accounting.epsilons(run.engine.ledger, DELTA)
    np.testing.assert_array_equal(run.epsilons(), alone)
    assert run.epsilons().max() > run.engine.accountant.get_epsilon(DELTA)


def lowered_after_each_epoch(run):
    for _ in range(3):
        run.train(1)
        run.optimizer.noise_multiplier *= 0.9


def with_another_release(run):
    own = run.optimizer.step_hook

    def both(optimizer):
        own(optimizer)
        run.engine.accountant.step(noise_multiplier=50.0, sample_rate=0.01)

    run.optimizer.attach_step_hook(both)
    run.train()


@pytest.mark.parametrize("train", [Training.train, lowered_after_each_epoch])
def test_an_accountant_that_counts_the_updates_raises_no_alarm(train):
    run = Training()
    train(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        worst = run.engine.get_epsilon(DELTA)
    assert run.epsilons().max() <= worst * (1 + 1e-9)


def test_another_release_after_the_update_is_no_small_charge():
    run = Training()
    with_another_release(run)
    assert not run.engine.recorder.is_charged_too_little
