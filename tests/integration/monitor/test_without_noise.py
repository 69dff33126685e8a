"""Monitored without noise: the user's loop bit for bit."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from opacus_pi.attribution import Tracker
from opacus_pi.integration.monitor import monitor
from opacus_pi.recording import Recorder
from tests.integration.monitor.training import Augmented, monitored, net, train


# --------------------------------------------------------------- noise_std=0: untouched
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_noise_training_is_bit_identical(optimizer):
    def trained(watched):
        random.seed(0)
        np.random.seed(0)
        model = net()
        rows = []
        if optimizer == "sgd":
            opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        else:
            opt = torch.optim.Adam(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
        losses = []
        if watched:
            recorder = Recorder("swept", every=0.5, batch_size=8)
            same = monitor(
                recorder=recorder,
                tracker=Tracker(),
                module=model,
                optimizer=opt,
                data_loader=loader,
                noise_std=0,
                criterion=nn.CrossEntropyLoss(),
                poisson_sampling=False,
            )
            assert same[0] is model and same[1] is opt and same[2] is loader
            assert isinstance(loader, DataLoader) and type(model) is nn.Sequential
        for _ in range(3):
            model.train()
            for x, y in loader:
                opt.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                opt.step()
                schedule.step()
                losses.append(loss.item())
        if watched:
            rows = recorder.ledger.steps.tolist()
            assert recorder.num_steps == len(losses)
        states = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
        return model.state_dict(), opt.state_dict(), losses, states, rows

    plain, watched = trained(False), trained(True)
    assert watched[4] == [3, 6, 9, 12, 15, 18]
    assert plain[2] == watched[2]
    assert all(torch.equal(plain[0][k], watched[0][k]) for k in plain[0])
    torch.testing.assert_close(plain[1], watched[1], rtol=0, atol=0)
    assert torch.equal(plain[3][0], watched[3][0])
    assert np.array_equal(plain[3][1], watched[3][1]) and plain[3][2] == watched[3][2]


def test_without_noise_a_closure_is_the_users_matter():
    run = monitored(noise_std=0, poisson_sampling=False)
    x, y = next(iter(run.loader))

    def closure():
        run.optimizer.zero_grad()
        loss = cross_entropy(run.module(x), y)
        loss.backward()
        return loss

    for _ in range(6):
        run.optimizer.step(closure)
    mechanism = run.recorder.ledger.mechanism
    assert mechanism.num_steps == 6
    assert mechanism.sample_rate == 1 / len(run.loader)  # of one batch, again and again


def test_without_noise_a_loss_is_refused_and_a_noise_may_be_assumed():
    run = monitored(noise_std=0)
    train(run)
    ledger = run.recorder.ledger
    assert ledger.mechanism.noise_std == 0 and ledger.mechanism.max_grad_norm == np.inf
    with pytest.raises(ValueError, match=r"ledger\.with_noise_std\(sigma\)"):
        ledger.ratios()
    assert np.isfinite(ledger.with_noise_std(0.1).ratios()).all()
