"""One model, trained by our engine, by Opacus's and by plain PyTorch, is unlearned."""

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import Langevin, PrivacyEngine, Unlearner

CRITERION = nn.CrossEntropyLoss()


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(20, 4, generator=generator), torch.arange(20) % 3)


def trained(engine, **options):
    """What training leaves in the user's hands."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader, made = DataLoader(data(), batch_size=5), model
    if engine is not None:
        made, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            poisson_sampling=False,
            **options,
        )
    hands_on = made if isinstance(made, nn.Module) else model
    for x, y in loader:
        optimizer.zero_grad()
        CRITERION(hands_on(x), y).backward()
        optimizer.step()
    return hands_on


def unlearned(model):
    unlearner = Unlearner(
        model,
        criterion=CRITERION,
        method=Langevin(noise_std=0.01),
        generator=torch.Generator().manual_seed(1),
    )
    result = unlearner.unlearn(data(), [2, 3], num_epochs=2, batch_size=6)
    return result, nn.utils.parameters_to_vector(result.model.parameters())


@pytest.mark.parametrize("wrap_model", [True, False])
def test_by_opacus_as_by_our_engine(wrap_model):
    theirs = trained(opacus.PrivacyEngine(), wrap_model=wrap_model)
    ours = trained(PrivacyEngine(), wrap_model=wrap_model)
    (result, a), (_, b) = unlearned(theirs), unlearned(ours)
    assert torch.equal(a, b) and type(result.model) is nn.Sequential
    assert not any(m._forward_hooks for m in result.model.modules())
    assert result.guarantee.kind == "empirical"  # there is no ledger


def test_by_plain_pytorch():
    model = trained(None)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    result, after = unlearned(model)
    assert not torch.equal(before, after)
    assert torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))
    assert result.guarantee.kind == "empirical"
    with pytest.raises(ValueError, match="ledger"):
        Unlearner(model, criterion=CRITERION).plan([2])


def test_an_engine_tells_what_it_trained():
    engine = PrivacyEngine()
    model = trained(engine)
    assert torch.equal(unlearned(engine)[1], unlearned(model)[1])
