"""A recorder that goes on with a model should find the weights that it recorded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder

DATA = TensorDataset(torch.randn(32, 6), torch.arange(32) % 3)
OWN_LOSSES = nn.CrossEntropyLoss(reduction="none")
OTHER = "not those with which the recorded updates had ended"
UNKNOWN = "not known with which weights"


def trained(recorder, *, seed=0, weights=None, late=False, monitored=False):
    """Train for four updates; load ``weights`` before the run is prepared, or after."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    if monitored:
        net.insert(1, nn.BatchNorm1d(8))
    if weights is not None and not late:
        net.load_state_dict(weights)
    engine = PrivacyEngine(recorder=recorder)
    options = {
        "module": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "data_loader": DataLoader(DATA, batch_size=8),
        "poisson_sampling": False,
    }
    if monitored:
        model, optimizer, loader = engine.make_monitored(
            noise_std=0.1, criterion=OWN_LOSSES, **options
        )
    else:
        model, optimizer, loader = engine.make_private(
            noise_multiplier=1.0, max_grad_norm=1.0, **options
        )
    if weights is not None and late:
        net.load_state_dict(weights)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return engine, net


def weights_link(engine):
    ledger = engine.ledger
    assert ledger.mechanism.num_steps == 8
    return next(link for link in ledger.custody.links if link.name == "weights")


def swept():
    return Recorder(mode="swept", criterion=OWN_LOSSES)


@pytest.mark.parametrize("monitored", [False, True])
def test_another_model_is_reported(monitored):
    recorder = swept() if monitored else Recorder()
    first = trained(recorder, monitored=monitored)
    with pytest.warns(UserWarning, match=OTHER):
        found = trained(copy.deepcopy(recorder), seed=1, monitored=monitored)
    link = weights_link(found[0])
    assert link.state == "unchecked" and OTHER in link.sentence
    assert first[0].ledger.mechanism.num_steps == 4


@pytest.mark.parametrize("late", [False, True])
def test_the_same_weights_are_right_whenever_they_are_loaded(late):
    recorder = Recorder()
    _, net = trained(recorder)
    again = copy.deepcopy(recorder)
    engine, _ = trained(again, seed=1, weights=net.state_dict(), late=late)
    assert weights_link(engine).state == "checked"


def test_buffers_that_a_forward_pass_changes_are_not_taken_for_another_model():
    recorder = swept()
    _, net = trained(recorder, monitored=True)
    again = copy.deepcopy(recorder)
    weights = net.state_dict()
    engine, _ = trained(again, seed=1, weights=weights, monitored=True)
    assert OTHER not in weights_link(engine).sentence


def test_weights_that_are_not_known_are_reported():
    recorder = Recorder()
    _, net = trained(recorder)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    again = copy.deepcopy(recorder)
    with pytest.warns(UserWarning, match=UNKNOWN):
        engine, _ = trained(again, seed=1)
    assert UNKNOWN in weights_link(engine).sentence


def test_a_saved_recorder_is_compared_too():
    recorder, loaded = Recorder(), Recorder()
    trained(recorder)
    loaded.load_state_dict(recorder.state_dict())
    with pytest.warns(UserWarning, match=OTHER):
        trained(loaded, seed=1)
