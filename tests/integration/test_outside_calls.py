"""Layers that a loop runs outside of the model's forward pass."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import Recorder
from tests.integration.usual_models import WIDTH, Convolutional, Recurrent
from tests.private_training import prepared

N, D = 24, WIDTH
INPUTS = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % 3
CAUSE = "outside of the model's forward pass"
BY_OPACUS = ["hooks", "functorch"]


class Net(nn.Module):
    """An encoder with a head, and a head that ``forward`` does not use."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(D, 8), nn.Linear(8, 3)
        self.other = nn.Linear(D, 3)

    def score(self, x):
        return self.head(torch.tanh(self.encoder(x)))

    def forward(self, x):
        return self.score(x)


def as_usual(model, x):
    return model(x)


def method_later(model, x):
    return model(x) - model._module.score(x[torch.randperm(len(x))])


def method_first(model, x):
    other = model._module.score(x[torch.randperm(len(x))])
    return model(x) - other


def layers(model, x):
    return model(x) + model.head(torch.tanh(model.encoder(x - x.mean(0))))


def unused_head(model, x):
    return model(x) + model.other(x.flip(0))


def features_are_given(model, x):
    return model(x * model.encoder(x).mean(1, keepdim=True))


OUTSIDE = [method_later, method_first, layers, unused_head, features_are_given]


def instead(model, x):
    return model._module.score(x)


def in_no_grad(model, x):
    with torch.no_grad():
        other = model._module.score(x.flip(0))
    return model(x) - other


def in_evaluation(model, x):
    model.eval()
    other = model._module.score(x.flip(0)).detach()
    model.train()
    return model(x) - other


def without_hooks(model, x):
    model.disable_hooks()
    _ = model._module.score(x.flip(0)).sum().backward()
    model.enable_hooks()
    return model(x)


def on_a_copy(model, x):
    teacher = copy.deepcopy(model).eval()  # Opacus's hooks fail in a copy that trains
    return model(x) - teacher._module.score(x.flip(0)).detach()


ALLOWED = [as_usual, in_no_grad, in_evaluation, without_hooks, on_a_copy]


class Checkpointed(Net):
    """Runs its encoder again in the backward pass."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        given = x.clone().requires_grad_()
        h = checkpoint(self.encoder, given, use_reentrant=self.reentrant)
        return self.head(torch.tanh(h))


class Tied(nn.Module):
    """Two layers share a weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, D), nn.Linear(D, D)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        return self.head(self.decoder(torch.tanh(self.encoder(x))))


class Wrapper(nn.Module):
    """Runs a model inside, as adapters do: by its method ``forward``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_base_model(self):
        return self.inner

    def forward(self, x):
        return self.get_base_model().forward(x)


def swapped_forward():
    """A model whose ``forward`` was replaced on the object, as accelerate does."""
    net = Net()
    net.other = nn.Identity()
    forward = net.forward

    net.forward = lambda x: forward(x).float()
    return net


def without_other(net):
    net.other = nn.Identity()
    return net


MODELS = {
    "one layer": lambda: nn.Linear(D, 3),
    "recurrent": Recurrent,
    "convolutional": Convolutional,
    "tied": Tied,
    "wrapper": lambda: Wrapper(without_other(Net())),
    "swapped": swapped_forward,
    "checkpointed": lambda: without_other(Checkpointed(reentrant=False)),
    "reentrant": lambda: without_other(Checkpointed(reentrant=True)),
}


def trained(loop, mode, net=None, *, epochs=1, audit=False, since=0):
    """Train; from the update ``since`` on with the loop."""
    torch.manual_seed(0)
    net = Net() if net is None else net
    if loop not in (unused_head, without_hooks) and isinstance(net, Net):
        net.other = nn.Identity()  # each layer must have gradients
    is_text = isinstance(net, Recurrent)
    data = TensorDataset(torch.arange(N * D).view(N, D) % 7 if is_text else INPUTS)
    data.tensors += (LABELS,)
    engine, model, optimizer, loss, loader = prepared(
        net, data, mode, criterion=nn.CrossEntropyLoss()
    )
    if mode != "ghost":
        loss = F.cross_entropy
    if audit:
        engine.audit(nn.CrossEntropyLoss())
    updates = 0
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            outputs = (loop if updates >= since else as_usual)(model, x)
            loss(outputs, y).backward()
            optimizer.step()
            updates += 1
    return engine


def doubts(engine):
    """Return the links that are unchecked for the reason of this file."""
    links = engine.ledger.custody.unchecked
    return [link.name for link in links if CAUSE in link.sentence]


@pytest.mark.parametrize("mode", BY_OPACUS)
@pytest.mark.parametrize("loop", OUTSIDE)
def test_calls_outside_are_said(loop, mode):
    with pytest.warns(UserWarning, match=CAUSE) as said:
        engine = trained(loop, mode)
    assert doubts(engine) == ["rows", "model"]
    assert sum(CAUSE in str(one.message) for one in said) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_layer_of_the_loop_alone_is_said_in_ghost_clipping():
    assert doubts(trained(unused_head, "ghost")) == ["rows", "model"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", BY_OPACUS)
def test_calls_that_begin_later_are_said(mode):
    engine = trained(method_later, mode, epochs=3, since=3)
    assert doubts(engine) == ["rows", "model"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", OUTSIDE[:3])
def test_other_modes_had_refused_or_said_it(loop):
    with pytest.raises(NotImplementedError):
        trained(loop, "ghost")
    with pytest.raises(ValueError, match="in other ways than through the model's"):
        trained(loop, "fast")
    unchecked = trained(loop, "ew").ledger.custody.unchecked
    assert "norm" in [link.name for link in unchecked]


def test_an_update_without_a_forward_pass_has_its_own_reason():
    engine = PrivacyEngine(recorder=Recorder(unattributed="worst_case"))
    net = without_other(Net())
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with warnings.catch_warnings(record=True) as said:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(instead(model, x), y).backward()
            optimizer.step()
    assert doubts(engine) == []
    assert not any(CAUSE in str(one.message) for one in said)
    assert {"rows", "model"} <= {k.name for k in engine.ledger.custody.unchecked}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", ALLOWED)
@pytest.mark.parametrize("mode", BY_OPACUS)
def test_calls_without_gradients_in_the_update_are_not_said(mode, loop):
    assert doubts(trained(loop, mode, without_other(Net()))) == []


@pytest.mark.filterwarnings("ignore")
def test_an_audit_is_not_said():
    assert doubts(trained(as_usual, "hooks", audit=True)) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_within_the_forward_pass_are_not_said(name, mode):
    if (name, mode) == ("tied", "ghost"):
        pytest.skip("Opacus does not train it")
    assert doubts(trained(as_usual, mode, MODELS[name]())) == []


@pytest.mark.filterwarnings("ignore")
def test_gradients_that_are_cleared_are_not_said():
    """A generator is trained on features of the private discriminator."""
    torch.manual_seed(0)
    generator = nn.Linear(2, D)
    engine, model, optimizer, _, loader = prepared(
        without_other(Net()), TensorDataset(INPUTS, LABELS), "hooks"
    )
    for x, y in loader:
        fake = generator(torch.randn(len(x), 2))
        model._module.encoder(fake).mean().backward()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert doubts(engine) == []
