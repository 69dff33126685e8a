"""Layers that one forward pass calls with different numbers of rows."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import TensorDataset

from opacus_pi.accounting import RenyiFilter
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError
from tests.private_training import Training, prepared

N, D = 24, 6
INPUTS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, torch.arange(N) % 3)
CAUSE = "called with different numbers of rows"


class Net(nn.Module):
    """Two layers; ``use`` says how they are called."""

    def __init__(self, use):
        super().__init__()
        self.f, self.h, self.use = nn.Linear(D, 8), nn.Linear(8, 3), use
        self.register_buffer("anchors", INPUTS[:3] * 0.7)

    def forward(self, x):
        return self.use(self, x)


def once(net, x):
    return net.h(torch.tanh(net.f(x)))


def some_examples(net, x):
    """The head is called again for hard examples."""
    hard = x[:, 0] > 0
    places = hard.nonzero().flatten()
    return once(net, x).index_add(0, places, net.h(torch.tanh(net.f(x[hard] / 2))))


def prototypes(net, x):
    return net.h(torch.tanh(net.f(x))) + net.f(x) @ net.f(net.anchors).t()


def more_rows(net, x):
    """The small call comes first."""
    return torch.tanh(net.f(net.anchors)).sum() + once(net, x)


def twice(net, x):
    return once(net, x) + once(net, 2 * x)


def without_gradients(net, x):
    with torch.no_grad():
        shift = once(net, net.anchors).mean(0)
    return once(net, x) + shift


def shared_parameter():
    net = Net(lambda s, x: s.g(s.anchors).sum() + once(s, x))
    net.g = nn.Linear(D, 8)
    net.g.weight, net.g.bias = net.f.weight, net.f.bias
    return net


def untrained():
    """A layer with unequal calls, of which the optimizer holds nothing."""
    net = Net(prototypes)
    net.f.requires_grad_(False)
    return net


LENGTHS = torch.tensor([3, 3, 3, 2, 2, 1, 1, 1]).repeat(N // 8)
SORTED = TensorDataset(torch.cat([INPUTS[:, 1:], LENGTHS[:, None]], 1), DATA[:][1])


class Sequences(nn.Module):
    """A recurrent layer whose sequences end one after another."""

    def __init__(self):
        super().__init__()
        self.lstm, self.h = DPLSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        lengths = x[:, -1].long()
        packed = pack_padded_sequence(x.view(-1, 3, 2), lengths, batch_first=True)
        return self.h(self.lstm(packed)[1][0][-1])


def rows_link(net, mode, audit=False):
    engine, *_ = trained(net, mode, audit)
    return next(k for k in engine.ledger.custody.links if k.name == "rows")


def trained(net, mode, audit=False):
    engine, model, optimizer, loss, loader = prepared(
        net,
        SORTED if isinstance(net, Sequences) else DATA,
        mode,
        criterion=nn.CrossEntropyLoss(),
    )
    if mode != "ghost":
        loss = F.cross_entropy
    if audit:
        engine.audit(nn.CrossEntropyLoss())
    for x, y in loader:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return engine, model, loss, optimizer


UNEQUAL = [
    *(lambda use=use: Net(use) for use in (some_examples, prototypes, more_rows)),
    shared_parameter,
]
EQUAL = [
    *(lambda use=use: Net(use) for use in (once, twice, without_gradients)),
    untrained,
    Sequences,
]


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("make", UNEQUAL)
def test_calls_of_unequal_numbers_of_rows_are_said(make, mode):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=CAUSE):
        link = rows_link(make(), mode)
    assert link.state == "unchecked"
    assert CAUSE in link.sentence


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", UNEQUAL[:2])
def test_an_audit_refuses_what_they_make_wrong(make):
    torch.manual_seed(0)
    with pytest.raises(AccountingError, match="audit"):
        rows_link(make(), "hooks", audit=True)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("make", EQUAL)
def test_calls_of_equal_numbers_of_rows_are_not(make, mode):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*" + CAUSE)
        assert rows_link(make(), mode).state == "checked"


@pytest.mark.filterwarnings("error:(?s).*" + CAUSE)
@pytest.mark.parametrize("mode", ["ghost", "fast"])
def test_other_modes_are_not_looked_at(mode):
    torch.manual_seed(0)
    assert rows_link(Net(once), mode).state == "checked"


@pytest.mark.filterwarnings("error:(?s).*The library assumes")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost", "fast"])
def test_an_evaluation_that_no_update_follows_is_not(mode):
    """In training mode and with gradients; the last batch is smaller."""
    torch.manual_seed(0)
    engine, model, loss, _optimizer = trained(Net(once), mode, audit=True)
    before = engine.ledger.custody
    for size in (9, 5):
        loss(model(INPUTS[:size]), DATA[:size][1])
        if mode == "ghost":  # where Opacus refuses a second pass
            break
    assert engine.ledger.custody == before
    assert not before.unchecked


@pytest.mark.parametrize("make", UNEQUAL[:2])
def test_an_evaluation_with_such_calls_is_not(make):
    """The calls are equal in training."""
    torch.manual_seed(0)
    net = make()
    use, net.use = net.use, once
    engine, model, _, _optimizer = trained(net, "hooks")
    net.use = use
    model(INPUTS)
    assert CAUSE not in str(engine.ledger.custody)


@pytest.mark.filterwarnings("ignore")
def test_calls_of_the_last_update_are_said_after_an_evaluation():
    """Between the backward pass and the step, the model is evaluated."""
    torch.manual_seed(0)
    engine, model, optimizer, _, loader = prepared(Net(once), DATA, "hooks")
    batches = iter(loader)
    model._module.use = prototypes
    x, y = next(batches)
    F.cross_entropy(model(x), y).backward()
    model._module.use = once
    model(INPUTS)
    optimizer.step()
    assert CAUSE in str(engine.ledger.custody)


def test_calls_are_said_where_budgets_are_limited():
    torch.manual_seed(0)
    run = Training(
        engine=PrivacyEngine(renyi_filter=RenyiFilter(1e3)),
        module=Net(prototypes),
        data_set=DATA,
    )
    with pytest.warns(UserWarning, match=CAUSE):
        run.batch(*next(iter(run.loader)))
