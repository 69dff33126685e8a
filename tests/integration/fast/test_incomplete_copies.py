"""Models of which ``copy.deepcopy`` makes no complete copy, in the fast mode."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tests.private_training import one_at_a_time, prepared

N, D = 24, 6
INPUTS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % 3
DATA = TensorDataset(INPUTS, LABELS)
REASON = "A copy of the model still computes with the parameters of the original"


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))


def closure(net):
    """Replace a method by a function that refers to the layer."""
    layer = net[2]
    layer.forward = lambda x: F.linear(x, layer.weight * 6.0, layer.bias)
    return net


def bound(net):
    def forward(layer, x):
        return F.linear(x, layer.weight * 6.0, layer.bias)

    net[2].forward = types.MethodType(forward, net[2])
    return net


class OnSelf(nn.Module):
    """A function that refers to the model itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.h = nn.Linear(D, 8), nn.Linear(8, 3)
        self.run = [lambda x: self.h(torch.tanh(self.f(x)))]

    def forward(self, x):
        return self.run[0](x)


class OutsideOfLayers(OnSelf):
    """A parameter outside of layers, for which the whole model is run again."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 8))
        self.run = [lambda x: self.h(self.f(x)) + torch.cdist(self.f(x), self.centres)]


def updates(net, change=lambda net: net, mode="fast"):
    """Make three updates; ``change`` comes after the first one."""
    engine, model, optimizer, loss, loader = prepared(net, DATA, mode)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        change(net)
    return engine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: closure(mlp()), OutsideOfLayers])
def test_they_are_refused(make):
    with pytest.raises(ValueError, match=REASON) as found:
        updates(make())
    assert 'grad_sample_mode="hooks"' in str(found.value)


@pytest.mark.filterwarnings("ignore")
def test_so_is_one_that_becomes_incomplete():
    with pytest.raises(ValueError, match=REASON):
        updates(mlp(), closure)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_late", [False, True])
def test_a_bound_method_is_measured(is_late):
    net = mlp() if is_late else bound(mlp())
    engine, model, optimizer, _, loader = prepared(net, DATA, "fast")
    first = next(iter(loader))
    if is_late:
        optimizer.zero_grad()
        F.cross_entropy(model(first[0]), first[1]).backward()
        optimizer.step()
        bound(net)
    twin = bound(mlp())
    twin.load_state_dict(net.state_dict())
    optimizer.zero_grad()
    F.cross_entropy(model(first[0]), first[1]).backward()
    optimizer.step()
    found = optimizer.per_sample_gradient_norms.tolist()
    assert found == pytest.approx(one_at_a_time(twin, *first), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_hooks_that_run_around_a_late_method_run_once():
    net = mlp()
    net[2].register_forward_hook(lambda layer, args, out: out * 3.0)
    net[2].register_forward_pre_hook(lambda layer, args: (args[0] * 2.0,))
    engine, model, optimizer, _, loader = prepared(net, DATA, "fast")
    for number, (x, y) in enumerate(loader):
        if number:
            bound(net)
        expected = one_at_a_time(twin_of(net), x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found = optimizer.per_sample_gradient_norms.tolist()
        assert found == pytest.approx(expected, rel=1e-4)


def twin_of(net):
    """A model that computes the same, without Opacus."""
    twin = mlp()
    twin.load_state_dict(net.state_dict())
    if "forward" in vars(net[2]):
        bound(twin)
    twin[2].register_forward_hook(lambda layer, args, out: out * 3.0)
    twin[2].register_forward_pre_hook(lambda layer, args: (args[0] * 2.0,))
    return twin


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_layers_with_formulas_needs_no_copy():
    net = OnSelf()
    _, model, optimizer, _, loader = prepared(net, DATA, "fast")
    x, y = next(iter(loader))
    expected = one_at_a_time(copy_of(net), x, y)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    found = optimizer.per_sample_gradient_norms.tolist()
    assert found == pytest.approx(expected, rel=1e-4)


def copy_of(net):
    """A model with the same weights that computes with its own."""
    twin = OnSelf()
    twin.load_state_dict(net.state_dict())
    return twin


@pytest.mark.filterwarnings("ignore")
def test_the_check_leaves_no_trace():
    def weights():
        torch.manual_seed(0)
        net = bound(nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
        updates(net)
        return net.state_dict(), torch.get_rng_state()

    found, state = weights()
    with pytest.MonkeyPatch.context() as patch:
        name = "opacus_pi.gradients.clipping.layer_hooks.require_copyable"
        patch.setattr(name, lambda *_: None)
        expected, other = weights()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(state, other)
