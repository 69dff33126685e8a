"""Weights and buffers that are set from the first batch, or before it, are said."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine


class FromFirstBatch(nn.Module):
    """Initialises a weight or a buffer in its first forward pass."""

    def __init__(self, write):
        super().__init__()
        self.linear, self.write, self.is_done = nn.Linear(4, 3), write, False
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training and not self.is_done:
            self.is_done = True
            with torch.no_grad():
                self.write(self, x)
        return self.linear(x - self.mean)


class Positions(nn.Module):
    """Has a buffer that every pass writes, and it does not depend on the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        self.factor.fill_(2.0)
        return self.linear(x * self.factor)


def sets_weight(module, x):
    module.linear.weight.copy_(x[:3])


def sets_weight_by_data(module, x):
    module.linear.weight.data += x.mean(0)


def sets_buffer(module, x):
    module.mean.copy_(x.mean(0))


def replaces_buffer(module, x):
    module.mean = x.mean(0)


def nothing(module, x):
    pass


def prepared(module):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )

    def train():
        for x, y in loader:
            outputs = model(x)
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs, y).backward()
            optimizer.step()

    return engine, model, train


def link(engine, name="weights"):
    return next(k for k in engine.ledger.custody.links if k.name == name)


@pytest.mark.parametrize("write", [sets_weight, sets_weight_by_data])
def test_weights_from_the_first_batch_are_said(write):
    engine, _, train = prepared(FromFirstBatch(write))
    with pytest.warns(UserWarning, match="before the first update"):
        train()
    assert link(engine).state == "unchecked"


@pytest.mark.parametrize("write", [sets_buffer, replaces_buffer])
def test_buffers_from_the_first_batch_are_said(write):
    engine, _, train = prepared(FromFirstBatch(write))
    train()
    with pytest.warns(UserWarning, match="write to the buffer 'mean'"):
        assert link(engine, "model").state == "unchecked"


def test_writes_before_the_first_update_are_said():
    module = FromFirstBatch(nothing)
    engine, _, train = prepared(module)
    module.linear.weight.data[:2] = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="before the first update"):
        train()
    module = FromFirstBatch(nothing)
    engine, _, train = prepared(module)
    module.mean.copy_(torch.randn(4))
    with pytest.warns(UserWarning, match="outside of the model's forward passes"):
        train()
    assert link(engine).state == "unchecked"


def loads_a_state(module):
    module.load_state_dict(FromFirstBatch(nothing).state_dict())


def moves(module):
    module.to("cpu")


def evaluates(module):
    module.eval()(torch.randn(2, 4))
    module.train()


@pytest.mark.parametrize("do", [loads_a_state, moves, evaluates])
def test_usual_preparations_are_fine(do):
    module = FromFirstBatch(nothing)
    engine, _, train = prepared(module)
    do(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Full backward hook")
        train()
    assert link(engine).state == "checked"


def test_a_buffer_that_every_pass_writes_is_left_to_the_probe():
    engine, _, train = prepared(Positions())
    train()
    assert link(engine).state == "checked"


# ------------------------------------------------------------- hooks on the wrapper
def centred(module, args, outputs):
    return outputs - outputs.mean(0)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_hook_on_the_returned_model_is_said(is_late):
    engine, model, train = prepared(FromFirstBatch(nothing))
    if is_late:
        train()
        assert link(engine, "model").state == "checked"
    model.register_forward_hook(centred)
    with pytest.warns(UserWarning, match="hook was registered on the model that"):
        train()
    assert link(engine, "model").state == "unchecked"
