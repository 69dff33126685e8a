"""A prepared model that is compiled trains as with Opacus, and is recorded."""

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine

NUM, BATCH = 36, 9
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def outside(model):
    return torch.compile(model, backend="eager")


def inside(model):
    model._module.compile(backend="eager")
    return model


def as_it_is(model):
    return model


def trained(engine, mode, compiled):
    """Train for two epochs; return the engine and the weights."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(NUM, 6), torch.arange(NUM) % 3)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    parts = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data, BATCH),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    model, optimizer, loader = parts[0], parts[1], parts[-1]
    criterion = parts[2] if mode == "ghost" else nn.CrossEntropyLoss()
    called = compiled(model)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(called(x), y).backward()
            optimizer.step()
    return engine, torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("compiled", [outside, inside])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_the_training_is_that_of_opacus(mode, compiled):
    _, ours = trained(PrivacyEngine(), mode, compiled)
    _, theirs = trained(opacus.PrivacyEngine(), mode, compiled)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compiled", [outside, inside])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost", "fast"])
def test_the_norms_are_those_of_the_model(mode, compiled):
    engine, _ = trained(PrivacyEngine(), mode, compiled)
    plain, _ = trained(PrivacyEngine(), mode, as_it_is)
    found, expected = engine.ledger.grad_norms, plain.ledger.grad_norms
    torch.testing.assert_close(*map(torch.as_tensor, (found, expected)), equal_nan=True)
    custody = engine.ledger.custody
    assert not custody.broken
    assert {link.name for link in custody.unchecked} <= {"loss"}
