"""Ghost clipping of layers whose output a hook or a replaced method changes."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pi.recording import AccountingError
from tests.private_training import prepared

N, D = 24, 6
INPUTS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, torch.arange(N) % 3)
REASON = "has a forward hook, or its method forward was replaced"


def mlp():
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(net, then=lambda net: None, mode="ghost"):
    """Train an epoch; ``then`` is called after the first update."""
    engine, model, optimizer, criterion, loader = prepared(
        net, DATA, mode, criterion=nn.CrossEntropyLoss()
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        then(net)
        then = lambda net: None  # noqa: E731
    return engine


def scaled(net):
    net[2].register_forward_hook(lambda layer, args, out: out * 8.0)


def slightly_scaled(net):
    net[2].register_forward_hook(lambda layer, args, out: out * 1.05)


def replaced(net):
    def forward(layer, x):
        return F.linear(x, layer.weight * 6.0, layer.bias)

    net[2].forward = types.MethodType(forward, net[2])


def by_closure(net):
    layer = net[0]
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2


def straight_through(net):
    """The values are those of the layer, and the gradients are not."""

    def hook(layer, args, out):
        return 5 * out - 4 * out.detach()

    net[2].register_forward_hook(hook)


CHANGES = [scaled, slightly_scaled, replaced, by_closure, straight_through]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_refused(change):
    torch.manual_seed(0)
    net = mlp()
    change(net)
    with pytest.raises(AccountingError, match=REASON):
        _ = trained(net).ledger


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_so_is_one_that_is_changed_after_an_update(change):
    torch.manual_seed(0)
    with pytest.raises(AccountingError, match=REASON):
        _ = trained(mlp(), change).ledger


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_root", [False, True])
def test_layers_of_other_types_are_refused(is_root):
    torch.manual_seed(0)
    layer = nn.Linear(D, 3) if is_root else nn.LayerNorm(D)
    layer.register_forward_hook(lambda layer, args, out: out * 4.0)
    net = layer if is_root else nn.Sequential(layer, nn.Linear(D, 3))
    with pytest.raises(AccountingError, match=REASON):
        _ = trained(net).ledger


def test_what_cannot_be_run_again_is_said():
    torch.manual_seed(0)
    net = mlp()
    kept = net[2].forward
    net[2].forward = lambda x, scale: kept(x)
    net[2].register_forward_pre_hook(
        lambda layer, args, options: (args, {"scale": 1.0}), with_kwargs=True
    )
    with pytest.warns(UserWarning, match="could not be run again as a Linear"):
        engine = trained(net)
    links = {link.name: link for link in engine.ledger.custody.links}
    assert links["norm"].state == "unchecked"


def looking(net):
    seen = []
    for layer in net:
        layer.register_forward_hook(lambda layer, args, out: seen.append(out.mean()))


def copying(net):
    net[2].register_forward_hook(lambda layer, args, out: out.clone())


def wrapped(net):
    """As libraries that place layers on devices do."""
    for layer in net:
        layer.forward = _calling(layer.forward)


def _calling(function):
    return lambda *args, **options: function(*args, **options)


def input_scaled(net):
    net[2].register_forward_pre_hook(lambda layer, args: (args[0] * 4.0,))


def of_no_layer(net):
    net[1].register_forward_hook(lambda layer, args, out: out * 4.0)


def without_effect(net):
    """A bias without a gradient, up to rounding: the loss does not see the shift."""
    net[2].register_forward_hook(lambda layer, args, out: out.clone())
    net.append(nn.LayerNorm(3, elementwise_affine=False))
    net.insert(2, nn.Identity())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "change",
    [looking, copying, wrapped, input_scaled, of_no_layer, without_effect],
)
def test_layers_that_compute_what_they_should_are_not(change, late):
    torch.manual_seed(0)
    net = mlp()
    if not late:
        change(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The library assumes")
        engine = trained(net, change if late and change is not without_effect else _no)
    links = {link.name: link for link in engine.ledger.custody.links}
    assert links["norm"].state == "checked"


def _no(net):
    """Change nothing."""


@pytest.mark.parametrize("change", [_no, copying])
def test_gradients_stay_those_of_opacus(change, monkeypatch):
    def weights():
        torch.manual_seed(0)
        net = mlp()
        change(net)
        trained(net)
        return [p.detach().clone() for p in net.parameters()], torch.get_rng_state()

    found, state = weights()
    monkeypatch.setattr(
        "opacus_pi.integration.changed_layers.ChangedLayers._begin", lambda self: None
    )
    expected, expected_state = weights()
    assert all(map(torch.equal, found, expected))
    assert torch.equal(state, expected_state)
