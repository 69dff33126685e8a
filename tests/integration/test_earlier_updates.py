"""A run that begins with an optimizer that has made updates before says so."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Unlearner

DATA = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
CRITERION = nn.CrossEntropyLoss()
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


def prepared(make, *, is_private=True, state=None):
    """A run; ``state`` is that of an earlier optimizer, loaded by hand."""
    torch.manual_seed(0)
    module, engine = nn.Linear(4, 3), PrivacyEngine()
    options = {
        "module": module,
        "optimizer": make(module.parameters()),
        "data_loader": DataLoader(DATA, batch_size=6),
        "poisson_sampling": False,
    }
    if is_private:
        parts = engine.make_private(noise_multiplier=1.0, max_grad_norm=1.0, **options)
    else:
        parts = engine.make_monitored(noise_std=0.1, criterion=CRITERION, **options)
    model, optimizer, loader = parts
    if state is not None:
        optimizer.load_state_dict(state)
    for x, y in loader:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    return engine, model, optimizer


def doubts(engine):
    """What the ledger says of its link "weights"; empty: it was checked."""
    links = engine.ledger.custody.unchecked
    return next((link.sentence for link in links if link.name == "weights"), "")


@pytest.mark.parametrize("is_private", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_was_loaded_by_hand_is_said(name, is_private):
    make = OPTIMIZERS[name]
    first, _, optimizer = prepared(make, is_private=is_private)
    assert not doubts(first)
    state = optimizer.state_dict()
    with pytest.warns(UserWarning, match="the optimizer had made updates already"):
        second, model, _ = prepared(make, is_private=is_private, state=state)
    assert "engine.load_checkpoint" in doubts(second)
    claim = Unlearner(second, criterion=CRITERION).plan([3]).guarantee
    assert "the optimizer had made updates already" in claim.text(1e-3)


def test_a_run_that_an_engine_resumes_is_one_run(tmp_path):
    make, path = OPTIMIZERS["momentum"], tmp_path / "run.pt"
    engine, model, optimizer = prepared(make)
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    module, again = nn.Linear(4, 3), PrivacyEngine()
    model, optimizer, loader = again.make_private(
        module=module,
        optimizer=make(module.parameters()),
        data_loader=DataLoader(DATA, batch_size=6),
        poisson_sampling=False,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    again.load_checkpoint(path=path, module=model, optimizer=optimizer)
    for x, y in loader:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
    assert again.ledger.mechanism.num_steps == 8 and not doubts(again)
