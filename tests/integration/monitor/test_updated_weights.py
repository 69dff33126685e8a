"""Norms are over the weights that the optimizer updates, and over no others.

The oracle is ``torch.autograd.grad`` of one example at a time.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import Recorder

NUM, BATCH = 16, 8
CRITERION = nn.CrossEntropyLoss()


class Run:
    """A training of a network of two layers, of which each update is recorded."""

    def __init__(
        self, parameters, *, clips=False, noise_std=0.0, buffered=nn.Sequential
    ):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(NUM, 6), torch.arange(NUM) % 3
        self.net = buffered(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        if buffered is not nn.Sequential:
            self.net.register_buffer("mean", torch.zeros(6))
        self.optimizer = torch.optim.SGD(parameters(self.net), lr=0.1)
        self.snapshots = []
        self.engine = PrivacyEngine(
            recorder=Recorder("swept", every=[0, 2, 4], criterion=CRITERION)
        )
        options = {
            "module": self.net,
            "optimizer": self.optimizer,
            "data_loader": DataLoader(TensorDataset(self.x, self.y), BATCH),
            "poisson_sampling": False,
        }
        if clips:
            prepared = self.engine.make_private(
                noise_multiplier=1.0, max_grad_norm=1.0, **options
            )
        else:
            prepared = self.engine.make_monitored(
                noise_std=noise_std, criterion=CRITERION, **options
            )
        self.model, self.stepped, self.loader = prepared

    def epoch(self):
        for x, y in self.loader:
            self.model.zero_grad()
            self.stepped.zero_grad()
            CRITERION(self.model(x), y).backward()
            self.snapshots.append(copy.deepcopy(self.net.state_dict()))
            self.stepped.step()
        return self

    def norms(self, layers, state):
        plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        plain.load_state_dict(state)
        wanted = [p for k in layers for p in plain[k].parameters()]
        found = []
        for i in range(NUM):
            loss = CRITERION(plain(self.x[i : i + 1]), self.y[i : i + 1])
            parts = torch.autograd.grad(loss, wanted)
            found.append(torch.cat([g.flatten() for g in parts]).norm().item())
        return np.array(found)

    def link(self, name):
        links = self.engine.ledger.custody.links
        return next(link for link in links if link.name == name)


def of_head(net):
    return net[2].parameters()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clips", [False, True])
def test_an_optimizer_of_the_last_layer_alone(clips):
    run = Run(of_head, clips=clips).epoch()
    ledger = run.engine.ledger
    expected = run.norms([2], run.snapshots[0])
    np.testing.assert_allclose(ledger.grad_norms[0], expected, rtol=1e-4)
    assert run.link("norm").state == "checked"
    assert all(p.requires_grad for p in run.net.parameters())


def test_weights_that_are_added_to_the_optimizer_are_measured_and_said():
    run = Run(of_head).epoch()
    run.optimizer.add_param_group({"params": run.net[0].parameters()})
    with pytest.warns(UserWarning, match="weights that the optimizer updates changed"):
        run.epoch()
    ledger = run.engine.ledger
    last = copy.deepcopy(run.net.state_dict())
    states = {0: run.snapshots[0], 2: run.snapshots[2], 4: last}
    for row, step in enumerate(ledger.steps.tolist()):
        layers = [2] if step < 3 else [0, 2]
        expected = run.norms(layers, states[step])
        np.testing.assert_allclose(ledger.grad_norms[row], expected, rtol=1e-4)
    assert run.link("norm").state == "unchecked"


@pytest.mark.parametrize("clips", [False, True])
def test_weights_that_are_not_the_models_break_the_run(clips):
    run = Run(lambda net: net.parameters(), clips=clips).epoch()
    other = nn.Linear(1, 1)
    if clips:  # Opacus needs per-example gradients of all weights
        for p in other.parameters():
            p.requires_grad_(False)
    run.optimizer.add_param_group({"params": other.parameters()})
    if clips:
        assert run.epoch().link("norm").state != "broken"  # frozen ones do no harm
        return
    with pytest.warns(UserWarning, match="not weights of the model"):
        run.epoch()
    with pytest.raises(AccountingError, match="not weights of the model"):
        _ = run.engine.ledger


def test_weights_that_are_added_to_a_private_swept_run_are_said():
    run = Run(of_head, clips=True).epoch()
    assert run.link("norm").state == "checked"
    run.stepped.add_param_group({"params": run.net[0].parameters()})
    with pytest.warns(UserWarning, match="weights that the optimizer updates changed"):
        run.epoch()
    assert run.link("norm").state == "unchecked"


def test_ghost_clipping_does_not_clip_weights_of_others():
    torch.manual_seed(0)
    x, y = torch.randn(NUM, 6), torch.arange(NUM) % 3
    net, scale = nn.Linear(6, 3), nn.Parameter(torch.ones(1, 3))
    engine = PrivacyEngine()
    model, optimizer, criterion, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), BATCH),
        criterion=CRITERION,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    optimizer.add_param_group({"params": [scale]})
    with pytest.warns(UserWarning, match="not weights of the model"):
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(scale * model(images), labels).backward()
            optimizer.step()
    with pytest.raises(AccountingError, match="not weights of the model"):
        engine.epsilons(1e-5)


def test_writes_to_buffers_of_a_monitored_run_are_said():
    run = Run(lambda net: net.parameters())
    run.net.register_buffer("mean", torch.zeros(6))
    assert run.epoch().link("weights").state == "checked"  # it was not there before

    class Centred(nn.Sequential):
        def forward(self, x):
            return super().forward(x - self.mean)

    run = Run(lambda net: net.parameters(), buffered=Centred).epoch()
    run.net.load_state_dict(copy.deepcopy(run.net.state_dict()))
    run.epoch()
    assert run.link("weights").state == "checked"
    run.net.mean += 1
    with pytest.warns(UserWarning, match="The buffer 'mean' .* outside of the model"):
        run.epoch()
    assert run.link("weights").state == "unchecked"


def test_a_learning_rate_of_zero_does_not_take_a_weight_out():
    run = Run(lambda net: net.parameters())
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.epoch()
    expected = run.norms([0, 2], run.snapshots[0])
    np.testing.assert_allclose(run.engine.ledger.grad_norms[0], expected, rtol=1e-4)


def test_weights_of_a_second_optimizer_are_said():
    run = Run(of_head)
    other = torch.optim.SGD(run.net[0].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="not by the optimizer of the run"):
        for x, y in run.loader:
            run.model.zero_grad()
            CRITERION(run.model(x), y).backward()
            run.stepped.step()
            other.step()
    assert run.link("weights").state == "unchecked"


def test_all_weights_without_a_warning():
    run = Run(lambda net: net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.epoch().epoch()
    assert run.link("norm").state == "checked"
    assert run.link("weights").state == "checked"
