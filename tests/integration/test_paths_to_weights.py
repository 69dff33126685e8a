"""Ghost clipping with weights that the loss uses outside of their layers' calls.

The oracle clips one ``torch.autograd.grad`` for each example. A case is refused where,
and only where, the update of a run without noise differs from the oracle's.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError

N, D = 8, 6


class Net(nn.Module):
    """Two linear layers, used in some way."""

    def __init__(self, use):
        super().__init__()
        self.f, self.h = nn.Linear(D, D), nn.Linear(D, 3)
        self.scale = nn.LayerNorm(D)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def usual(net, x):
    return net.h(net.scale(torch.tanh(net.f(x))))


def functional(net, x):
    return usual(net, x) + 5 * F.linear(x, net.h.weight)


def by_forward(net, x):
    return usual(net, torch.tanh(net.f.forward(x)))


def prototypes(net, x):
    return usual(net, x) - 0.5 * net.h.weight.pow(2).sum(1)


def functional_scale(net, x):
    return usual(net, x) + net.scale.weight.sum()[None, None] * x[:, :3]


def weight_as_data(net, x):
    return usual(net, x) + F.linear(x, net.h.weight.detach())


def two_calls_in_a_row(net, x):
    return net.h(net.scale(torch.tanh(net.f(x))) * net.f.weight.detach().norm())


class Penalised(nn.CrossEntropyLoss):
    """A penalty on all weights of a model in the criterion."""

    def __init__(self, net):
        super().__init__()
        self.weights = [net.h.weight]

    def forward(self, outputs, labels):
        penalty = self.weights[0].pow(2).sum()
        return super().forward(outputs, labels) + penalty


def clipped_sum(net, criterion, x, y):
    """Add up one clipped gradient for each example."""
    weights = list(net.parameters())
    total = [torch.zeros_like(w) for w in weights]
    for i in range(len(x)):
        loss = criterion(net(x[i : i + 1]), y[i : i + 1])
        own = torch.autograd.grad(loss, weights, allow_unused=True)
        own = [
            torch.zeros_like(w) if g is None else g
            for g, w in zip(own, weights, strict=True)
        ]
        norm = torch.cat([g.flatten() for g in own]).norm()
        for held, g in zip(total, own, strict=True):
            held += g * min(1.0, 1 / float(norm))
    return torch.cat([g.flatten() for g in total])


def train(net, criterion, *, updates=1, change=None, at_loss=None):
    """Make updates with ghost clipping; return the engine and the first clipped sum."""
    x, y = torch.randn(N, D), torch.arange(N) % 3
    engine = PrivacyEngine()
    model, optimizer, loss_of, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        criterion=criterion,
    )
    first = None
    for update in range(updates):
        if change is not None:
            change(net, update)
        ((inputs, labels),) = loader  # all examples, in some order
        optimizer.zero_grad()
        loss = loss_of(model(inputs), labels)
        (loss if at_loss is None else at_loss(loss, net)).backward()
        if first is None:
            first = torch.cat([p.grad.flatten().clone() for p in net.parameters()])
        optimizer.step()
    return engine, first, (x, y)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def is_refused(engine):
    try:
        _ = engine.ledger
    except AccountingError as error:
        if "outside of the call of its layer" not in str(error):
            raise
        return True
    return False


CASES = {
    functional: True,
    by_forward: True,
    prototypes: True,
    functional_scale: True,
    usual: False,
    weight_as_data: False,
    two_calls_in_a_row: False,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", CASES, ids=lambda use: use.__name__)
def test_refused_where_the_update_is_not_the_clipped_sum(use):
    net = Net(use)
    before = copy.deepcopy(net)
    engine, found, (x, y) = train(net, nn.CrossEntropyLoss())
    want = clipped_sum(before, nn.CrossEntropyLoss(), x, y)
    is_right = torch.allclose(found, want, atol=1e-4)
    assert is_right != CASES[use]
    assert is_refused(engine) == CASES[use]


@pytest.mark.filterwarnings("ignore")
def test_penalty_in_the_criterion_is_refused_even_if_its_gradient_is_zero():
    net = Net(usual)
    nn.init.zeros_(net.h.weight)
    engine, _, _ = train(net, Penalised(net))
    with pytest.raises(AccountingError, match=r"'h\.weight' outside"):
        _ = engine.ledger


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "at_loss",
    [
        lambda loss, net: loss + net.f.weight.pow(2).sum(),
        lambda loss, net: net.f.weight.pow(2).sum() + loss,
        lambda loss, net: (loss - net.f.bias.sum()) * 1.0,
    ],
)
def test_penalty_that_the_loop_adds_is_refused(at_loss):
    assert is_refused(train(Net(usual), nn.CrossEntropyLoss(), at_loss=at_loss)[0])


@pytest.mark.filterwarnings("ignore")
def test_sum_of_losses_is_accepted():
    engine, _, _ = train(Net(usual), nn.CrossEntropyLoss(), at_loss=lambda a, _: a + a)
    assert not is_refused(engine)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("begins", "refused"), [(2, True), (6, True), (8, False)])
def test_use_that_begins_later_is_found_at_a_power_of_two(begins, refused):
    def change(net, update):
        net.use = functional if update >= begins else usual

    engine, _, _ = train(Net(usual), nn.CrossEntropyLoss(), updates=9, change=change)
    assert is_refused(engine) == refused


@pytest.mark.filterwarnings("ignore")
def test_autocast_weight_that_is_cast_once():
    class Cast(nn.Module):
        def __init__(self, extra):
            super().__init__()
            self.h, self.extra = nn.Linear(D, 3), extra

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                out = self.h(x)
                if self.extra:
                    out = out + F.linear(x, self.h.weight)
            return out.float()

    for extra in (False, True):
        engine, _, _ = train(Cast(extra), nn.CrossEntropyLoss())
        assert is_refused(engine) == extra


class Recurrent(nn.Module):
    """Opacus's layers that consist of several layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.lstm = DPLSTM(4, 4, batch_first=True)
        self.attend = DPMultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        states, _ = self.lstm(self.embed(x.unsqueeze(-1)))
        return self.head(self.attend(states, states, states)[0].mean(1))


class Own(nn.Module):
    """A parameter of its own, whose norm torch computes for all inside of the layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))
        self.h = nn.Linear(D, 3)

    def forward(self, x):
        return self.h(x * self.scale) + F.linear(x, self.h.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Recurrent, Own])
def test_layers_of_layers_are_accepted(kind):
    net = kind()
    before = copy.deepcopy(net)
    engine, found, (x, y) = train(net, nn.CrossEntropyLoss())
    want = clipped_sum(before, nn.CrossEntropyLoss(), x, y)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-3)
    assert not is_refused(engine)


@pytest.mark.filterwarnings("ignore")
def test_hooks_are_removed_between_checked_passes():
    def num_hooks(net):
        return len(net.h._forward_hooks) + len(net.h._forward_pre_hooks)

    counts = []
    train(
        Net(usual),
        nn.CrossEntropyLoss(),
        updates=6,
        change=lambda net, _: counts.append(num_hooks(net)),
    )
    few, many = counts[2], counts[0]
    assert counts == [many, many, few, many, few, few]
    assert many == few + 3  # two of this check, and one of changed layers


@pytest.mark.filterwarnings("ignore")
def test_hooks_in_copies_of_the_model_note_nothing():
    copies = []
    net = Net(usual)
    train(
        net,
        nn.CrossEntropyLoss(),
        change=lambda net, _: copies.append(copy.deepcopy(net)),
    )
    calls = [
        hook.__self__
        for hook in copies[0].h._forward_pre_hooks.values()
        if hook.__func__.__qualname__ == "_Call.begins"
    ]
    for call in calls:
        call.begins()
        call.ends()
    assert [(call._ranges, call._begun) for call in calls] == [(None, [])]
