"""Loops whose forward passes have other weights than the updates."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tests.private_training import prepared

N, D = 48, 6
INPUTS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, torch.arange(N) % 3)
CAUSE = "The model was called with other weights"
MODES = ["hooks", "functorch", "ghost", "fast"]


def mlp():
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))


def ascent(net, x, y):
    """Return the step of sharpness-aware minimisation for each parameter."""
    twin = mlp()
    twin.load_state_dict(net.state_dict())
    grads = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
    return [2.0 * g / g.norm() for g in grads]


def replaced(net, x, y):
    """Other memory, put back."""
    kept = [p.data for p in net.parameters()]
    for p, step in zip(net.parameters(), ascent(net, x, y), strict=True):
        p.data = p.data + step

    def back():
        for p, value in zip(net.parameters(), kept, strict=True):
            p.data = value

    return back


def loaded(net, x, y):
    """A write that torch counts, and a state dict that is loaded again."""
    kept, steps = copy.deepcopy(net.state_dict()), ascent(net, x, y)
    with torch.no_grad():
        for p, step in zip(net.parameters(), steps, strict=True):
            p.add_(step)
    return lambda: net.load_state_dict(kept)


def uncounted(net, x, y):
    """A write through ``.data``, put back bit by bit."""
    kept = [p.detach().clone() for p in net.parameters()]
    for p, step in zip(net.parameters(), ascent(net, x, y), strict=True):
        p.data.add_(step)

    def back():
        for p, value in zip(net.parameters(), kept, strict=True):
            p.data.copy_(value)

    return back


def weights_link(change, mode="hooks", clears_late=False):
    torch.manual_seed(0)
    net = mlp()
    engine, model, optimizer, loss, loader = prepared(
        net, DATA, mode, criterion=nn.CrossEntropyLoss()
    )
    loss = loss if mode == "ghost" else F.cross_entropy
    for x, y in loader:
        optimizer.zero_grad()
        back = change(net, x, y)
        value = loss(model(x), y)
        if clears_late:
            optimizer.zero_grad()
        value.backward()
        back()
        optimizer.step()
    links = {link.name: link for link in engine.ledger.custody.links}
    return links["weights"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("move", [replaced, loaded, uncounted])
def test_gradients_of_other_weights_are_said(move, mode):
    with pytest.warns(UserWarning, match=CAUSE):
        link = weights_link(move, mode)
    assert link.state == "unchecked"
    assert CAUSE in link.sentence


@pytest.mark.filterwarnings("ignore")
def test_clearing_between_the_passes_hides_nothing():
    assert weights_link(replaced, clears_late=True).state == "unchecked"


def plain(net, x, y):
    return lambda: None


def evaluated(net, x, y):
    """Other weights for an evaluation, put back before the pass."""
    back = replaced(net, x, y)
    net.eval()
    net(x)
    net.train()
    back()
    state = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    net.load_state_dict(state)
    return lambda: None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [plain, evaluated])
def test_usual_loops_are_checked(change, mode):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(other|changed between) .*")
        assert weights_link(change, mode).state == "checked"


@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_gradients_that_are_cleared_are_not_said(mode):
    def looked_at(net, x, y):
        back = replaced(net, x, y)
        F.cross_entropy(net(x), y).backward()
        back()
        optimizer.zero_grad()

    torch.manual_seed(0)
    net = mlp()
    engine, model, optimizer, _, loader = prepared(net, DATA, mode)
    for x, y in loader:
        looked_at(net, x, y)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    links = {link.name: link for link in engine.ledger.custody.links}
    assert links["weights"].state == "checked"
