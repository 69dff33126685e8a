"""Ghost clipping where the two backward passes do not belong together.

The oracle clips one ``torch.autograd.grad`` of the model without hooks that depend on
the batch. A case is refused where the clipped sum may exceed what the norms allow.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError
from tests.integration.usual_models import WIDTH, Convolutional, Recurrent

N, D = 8, WIDTH


class Net(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between):
        super().__init__()
        self.f, self.act, self.h = nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)
        self.between = between

    def forward(self, x):
        return self.h(self.between(self.act(self.f(x))))


class Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def normalised(grad):
    return grad / (grad.norm() + 1e-6)


def limited(grad):
    return grad.clamp(-0.05, 0.05)


def mixed(grad):
    return grad + grad.roll(1, 0)


def reversed_(grad):
    return -3.0 * grad


def alternating():
    count = iter(range(100))
    return lambda grad: grad * (1 + next(count) % 2)


def by_function(change):
    return Net(lambda x: Changed.apply(x, change))


def by_tensor_hook(change):
    def between(x):
        if x.requires_grad:
            x.register_hook(change)
        return x

    return Net(between)


def by_module_hook(change):
    net = Net(lambda x: x)
    net.act.register_full_backward_hook(lambda layer, grads, _: (change(grads[0]),))
    return net


PLACES = (by_function, by_tensor_hook, by_module_hook)


def train(net, *, updates=1, x=None, reduction="mean", batch_first=True):
    x = 3 * torch.randn(N, D) if x is None else x
    engine = PrivacyEngine()
    model, optimizer, criterion, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, torch.arange(N) % 3), batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        criterion=nn.CrossEntropyLoss(reduction=reduction),
        loss_reduction=reduction,
        batch_first=batch_first,
    )
    for _ in range(updates):
        for inputs, labels in loader:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
    return engine


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("change", [normalised, limited, mixed, alternating])
def test_gradients_that_change_otherwise_are_refused(make, change):
    engine = train(make(change() if change is alternating else change))
    with pytest.raises(AccountingError, match="the layer 'f' in the second one"):
        _ = engine.ledger


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_constant_factor_is_accepted(make, reduction):
    engine = train(make(reversed_), updates=3, reduction=reduction)
    assert not engine.ledger.custody.unchecked


@pytest.mark.parametrize("make", [Recurrent, Convolutional])
def test_usual_models_are_accepted(make):
    x = torch.randint(0, 7, (N, 5)) if make is Recurrent else None
    assert not train(make(), updates=4, x=x).ledger.custody.broken


def test_hooks_are_removed_between_compared_updates():
    counts = []
    for updates in (3, 4):  # the fourth is compared, the fifth is not
        net = Net(lambda x: x)
        _engine = train(net, updates=updates)
        counts.append(len(net.f._backward_hooks))
    assert counts[0] == counts[1] + 2  # another check removes its hook as well
