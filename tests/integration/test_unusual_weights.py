"""Weights that are complex, have sparse gradients, or are all frozen."""

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.gradients import norm_sweep, per_example_grad_norms

NUM = 20
CRITERION = nn.CrossEntropyLoss()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out((x.to(torch.complex64) @ self.weight).abs())


class Tokens(nn.Module):
    def __init__(self, sparse=True):
        super().__init__()
        self.embedding = nn.Embedding(30, 4, sparse=sparse)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.embedding(x).mean(1))


def data(tokens=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM, 4, generator=generator)
    if tokens:
        x = torch.randint(30, (NUM, 4), generator=generator)
    return TensorDataset(x, torch.arange(NUM) % 3)


def private(net, engine=None, mode="hooks"):
    engine = PrivacyEngine() if engine is None else engine
    return engine, *engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )


def train(model, optimizer, loader):
    for inputs, labels in loader:
        loss = CRITERION(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def monitored(net, noise_std, tokens):
    engine = PrivacyEngine(recorder=Recorder("swept", criterion=CRITERION))
    return engine, *engine.make_monitored(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(tokens), batch_size=5),
        noise_std=noise_std,
        criterion=CRITERION,
    )


# ------------------------------------------------------------------------------ complex
@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_complex_weights_are_trained_as_opacus_does_and_refused(mode):
    weights = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = Complex()
        engine = PrivacyEngine() if ours else opacus.PrivacyEngine()
        engine, *rest = private(net, engine, mode if ours else "hooks")
        train(*rest)
        weights.append(net.weight.detach())
        if ours:
            with pytest.raises(AccountingError, match="parameter weight is complex"):
                _ = engine.ledger
    torch.testing.assert_close(*weights, rtol=0 if mode == "hooks" else 1e-4, atol=1e-5)


def test_frozen_complex_weights_are_no_reason():
    net = Complex()
    net.weight.requires_grad_(False)
    engine, *rest = private(net)
    train(*rest)
    assert engine.ledger.num_examples == NUM


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_monitored_training_refuses_complex_weights(noise_std):
    with pytest.raises(ValueError, match="the parameter weight must have real entries"):
        monitored(Complex(), noise_std, tokens=False)


def test_norms_of_complex_weights_are_refused():
    x, y = data().tensors
    with pytest.raises(ValueError, match="view_as_complex"):
        norm_sweep(Complex(), CRITERION, data(), progress=False)
    with pytest.raises(ValueError, match="view_as_complex"):
        per_example_grad_norms(Complex(), CRITERION, x, y)


# ------------------------------------------------------------------------------- sparse
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_sparse_gradients_are_trained_as_dense_ones(noise_std):
    weights = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = Tokens(sparse)
        engine, *rest = monitored(net, noise_std, tokens=True)
        train(*rest)
        weights.append(net.embedding.weight.detach())
        states = {link.name: link.state for link in engine.ledger.custody.links}
        assert states["noise"] == "checked"
        assert states["loss"] == ("checked" if noise_std else "unchecked")
    torch.testing.assert_close(*weights)


# ------------------------------------------------------------------------------- frozen
class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.second.requires_grad_(False)
        self.is_first = True

    def forward(self, x):
        return self.first(x) if self.is_first else self.second(x)


def test_an_optimizer_whose_weights_are_all_frozen_changes_nothing():
    net, engine = Switched(), PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.first.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    train(model, optimizer, loader)
    steps = engine.ledger.mechanism.num_steps
    net.first.requires_grad_(False)
    net.second.requires_grad_(True)
    net.is_first = False
    before = [p.detach().clone() for p in net.parameters()]
    train(model, optimizer, loader)
    assert all(map(torch.equal, before, net.parameters()))
    links = {link.name: link.state for link in engine.ledger.custody.links}
    assert links["noise"] == "checked"
    assert engine.ledger.mechanism.num_steps == steps
