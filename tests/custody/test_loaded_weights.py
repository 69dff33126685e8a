"""Writes to weights by others than the optimizer of the run are reported."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine


def training(sampler=None):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 5), torch.randint(0, 3, (24,)))
    module = nn.Linear(5, 3)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, 6, sampler=sampler),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )

    def run():
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return engine, module, run


def state_of(engine, name):
    return next(k.state for k in engine.ledger.custody.links if k.name == name)


def test_other_weights_are_said():
    engine, module, run = training()
    run()
    module.load_state_dict(nn.Linear(5, 3).state_dict())
    with pytest.warns(UserWarning, match="brought back earlier weights"):
        run()
    assert state_of(engine, "weights") == "unchecked"


def test_the_same_weights_are_not():
    engine, module, run = training()
    run()
    own = copy.deepcopy(module.state_dict())
    module.load_state_dict(nn.Linear(5, 3).state_dict())  # to evaluate others
    module.load_state_dict(own)
    run()
    assert state_of(engine, "weights") == "checked"


def test_weights_loaded_before_the_first_update_are_not():
    engine, module, run = training()
    module.load_state_dict(nn.Linear(5, 3).state_dict())
    run()
    assert state_of(engine, "weights") == "checked"


def test_negative_positions_belong_to_nobody():
    positions = [-2, -5, -9, 0, 1, 2]
    engine, _, run = training(SubsetRandomSampler(positions))
    with pytest.warns(UserWarning, match="positions from 0"):
        run()
        with pytest.raises(AccountingError, match="unattributed"):
            engine.privacy_losses(2)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_second_optimizer_for_other_layers_is_said(is_first):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 5), torch.randint(0, 3, (24,)))
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    engine = PrivacyEngine()
    model, private, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module[2].parameters(), lr=0.1),
        data_loader=DataLoader(data, 6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    plain = torch.optim.SGD(module[0].parameters(), lr=0.1)
    optimizers = [plain, private] if is_first else [private, plain]
    with pytest.warns(UserWarning, match="not by the optimizer of the run"):
        for x, y in loader:
            private.zero_grad()
            plain.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert state_of(engine, "weights") == "unchecked"


def test_frozen_layers_are_not():
    engine, module, run = training()
    module.register_module("frozen", nn.Linear(2, 2).requires_grad_(False))
    run()
    assert state_of(engine, "weights") == "checked"
