"""Weights that are used outside of their layers' calls, where updates are made of
per-example gradients.

The oracle is one ``torch.autograd.grad`` for each example. Recorded norms are the
oracle's, or the ledger is refused, or its link "norm" says what is missing.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import AccountingError, Recorder
from tests.integration.usual_models import WIDTH, Convolutional, Recurrent

N, D = 8, WIDTH
MODES = ("hooks", "functorch", "ew", "fast")
INPUTS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(9))
LABELS = torch.arange(N) % 3


class Net(nn.Module):
    """Layers that are used in some way."""

    def __init__(self, use, **layers):
        super().__init__()
        self.f, self.h = nn.Linear(D, D), nn.Linear(D, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def usual(net, x):
    return net.h(torch.tanh(net.f(x)))


def tied_decoder():
    return Net(lambda s, x: s.h(F.linear(torch.tanh(s.f(x)), s.f.weight.t())))


def functional():
    return Net(lambda s, x: usual(s, x) + F.linear(x, s.h.weight))


def by_forward():
    return Net(lambda s, x: usual(s, torch.tanh(s.f.forward(x))))


def bias_alone():
    return Net(lambda s, x: usual(s, x) + s.h.bias)


def scaled_by_a_norm():
    return Net(lambda s, x: usual(s, x) * s.f.weight.norm())


def embedding(use):
    return Net(use, e=nn.Embedding(7, D))


def functional_embedding():
    return embedding(
        lambda s, t: usual(s, s.e(t) + F.embedding(t.flip(1), s.e.weight)).mean(1)
    )


def rows_of_a_table():
    return embedding(lambda s, t: usual(s, s.e(t) + s.e.weight[t.flip(1)]).mean(1))


def before_a_call():
    net = Net(usual)
    net.h.register_forward_pre_hook(
        lambda layer, args: args[0] + F.linear(args[0], layer.weight).sum(1)[:, None]
    )
    return net


def after_a_call():
    net = Net(usual)
    net.h.register_forward_hook(
        lambda layer, _, output: output + layer.weight.pow(2).sum(1)
    )
    return net


def shared_parameter():
    net = Net(lambda s, x: usual(s, torch.tanh(s.g(x))), g=nn.Linear(D, D))
    net.g.weight = net.f.weight
    return net


def tied_head():
    net = embedding(lambda s, t: s.g(torch.tanh(s.f(s.e(t)))).mean(1))
    net.g, net.h = nn.Linear(D, 7, bias=False), nn.Identity()
    net.g.weight = net.e.weight
    return net


def two_calls():
    return Net(lambda s, x: usual(s, torch.tanh(s.f(x))))


def two_parents():
    layer = nn.Linear(D, D)
    a, b = nn.Sequential(layer, nn.Tanh()), nn.Sequential(layer, nn.ReLU())
    net = Net(lambda s, x: s.h(s.b(s.a(x))), a=a, b=b)
    net.f = nn.Identity()
    return net


def weight_norm():
    net = Net(usual)
    parametrizations.weight_norm(net.f)
    return net


def own_parameter():
    net = Net(lambda s, x: usual(s, x * s.scale) + F.linear(x, s.h.weight))
    net.scale = nn.Parameter(torch.ones(D))
    return net


def called_functionally():
    def use(net, x):
        return usual(net, x) + functional_call(net.h, dict(net.h.named_parameters()), x)

    return Net(use)


def compiled_layer():
    net = Net(usual)
    net.f.compile(backend="eager")
    return net


def detached():
    return Net(lambda s, x: usual(s, x) + F.linear(x, s.h.weight.detach()))


LOST = (
    tied_decoder,
    functional,
    by_forward,
    bias_alone,
    scaled_by_a_norm,
    functional_embedding,
    rows_of_a_table,
    before_a_call,
    after_a_call,
    two_parents,
)
KEPT = (
    lambda: Net(usual),
    shared_parameter,
    tied_head,
    two_calls,
    weight_norm,
    own_parameter,
    called_functionally,
    compiled_layer,
    detached,
    Recurrent,
    Convolutional,
)


def own_norms(model, x, y, penalty=0.0):
    weights, norms = list(model.parameters()), []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        if penalty:
            loss = loss + penalty * model.f.weight.pow(2).sum()
        own = torch.autograd.grad(loss, weights, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in own if g is not None]).norm())
    return torch.stack(norms).double()


def train(make, mode, *, updates=2, change=None, penalty=0.0):
    """Train; return the engine, and recorded and true norms of every update."""
    torch.manual_seed(0)
    model = make()
    oracle = copy.deepcopy(model)
    has_words = isinstance(model, Recurrent) or hasattr(model, "e")
    x = TOKENS if has_words else INPUTS
    engine = PrivacyEngine(recorder=Recorder(every=list(range(1, updates + 1))))
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, LABELS), batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    true = []
    for update in range(updates):
        if change is not None:
            change(model, update)
        oracle.load_state_dict(model.state_dict())
        true.append(own_norms(oracle, x, LABELS, penalty))
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(wrapped(inputs), labels)
            if penalty:
                loss = loss + penalty * model.f.weight.pow(2).sum()
            loss.backward()
            optimizer.step()
    return engine, torch.stack(true)


def agree(engine, true):
    found = torch.as_tensor(engine.ledger.grad_norms[: len(true)]).double()
    return torch.allclose(found, true, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", LOST, ids=lambda make: make.__name__)
def test_norms_are_right_or_refused(make, mode):
    try:
        engine, true = train(make, mode)
    except RuntimeError as error:  # of torch or Opacus, without this package too
        known = ("Expanded Weights", "functorch transforms")
        assert any(text in str(error) for text in known), error
        return
    try:
        assert agree(engine, true)
    except AccountingError as error:
        assert mode in ("hooks", "functorch"), error
        texts = ("outside of the call of its layer", "modules of the model contain it")
        assert any(text in str(error) for text in texts), error


@pytest.mark.parametrize("make", LOST[:5], ids=lambda make: make.__name__)
def test_hooks_mode_names_the_weight_that_it_leaves_out(make):
    with pytest.warns(UserWarning, match="no longer has a ledger"):
        engine, _ = train(make, "hooks", updates=1)
    with pytest.raises(AccountingError, match=r"uses '[fh]\.(weight|bias)'"):
        _ = engine.ledger


@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("make", KEPT, ids=lambda make: make.__name__)
def test_nothing_is_said_where_nothing_is_lost(make, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The library assumes")
        try:
            engine, true = train(make, mode)
        except RuntimeError as error:
            assert "Expanded Weights" in str(error)
            return
    assert agree(engine, true)
    assert [link.name for link in engine.ledger.custody.unchecked] == ["loss"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("begins", [0, 2, 63])
def test_use_that_begins_later_is_found(begins):
    def change(net, update):
        net.use = (lambda s, x: usual(s, x) + s.h.bias) if update >= begins else usual

    engine, _ = train(lambda: Net(usual), "hooks", updates=begins + 2, change=change)
    with pytest.raises(AccountingError, match=r"uses 'h\.bias' outside"):
        _ = engine.ledger


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES[:3])
def test_penalty_in_the_loss_is_said(mode):
    engine, true = train(lambda: Net(usual), mode, penalty=0.5)
    assert not agree(engine, true)
    (link,) = (k for k in engine.ledger.custody.unchecked if k.name == "norm")
    assert "'f.weight' is not the sum of the per-example gradients" in link.sentence


def prepared_in_pairs(model, mode):
    """Prepare a run in batches of two; return engine, model, optimizer and loader."""
    engine = PrivacyEngine()
    return engine, *engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("cleared", ["zeros", "set_to_none", "clipped"])
def test_gradients_that_the_loop_clears_or_clips_are_not_lost(mode, cleared):
    torch.manual_seed(0)
    model = Net(usual)
    engine, wrapped, optimizer, loader = prepared_in_pairs(model, mode)
    for inputs, labels in loader:
        outputs = wrapped(inputs)
        optimizer.zero_grad(set_to_none=cleared == "set_to_none")
        F.cross_entropy(outputs, labels).backward()
        if cleared == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert [link.name for link in engine.ledger.custody.unchecked] == ["loss"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES[:2])
def test_a_generator_is_trained_through_the_private_model(mode):
    torch.manual_seed(0)
    model, generator = Net(usual), nn.Linear(2, D)
    engine, wrapped, optimizer, loader = prepared_in_pairs(model, mode)
    for inputs, labels in loader:
        optimizer.zero_grad()
        wrapped.disable_hooks()
        F.cross_entropy(wrapped(generator(torch.randn(5, 2))), LABELS[:5]).backward()
        wrapped.enable_hooks()
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs), labels).backward()
        optimizer.step()
    assert [link.name for link in engine.ledger.custody.unchecked] == ["loss"]
