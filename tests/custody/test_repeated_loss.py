"""Criteria whose weights or other values are set from each batch."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.private_training import prepared

N, D, CLASSES = 40, 5, 3


def weights_of(labels):
    counts = torch.bincount(labels, minlength=CLASSES).clamp(min=1)
    return len(labels) / counts


class Prior(nn.CrossEntropyLoss):
    """Adjusts logits by a running prior of the labels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("prior", torch.ones(CLASSES) / CLASSES)

    def forward(self, outputs, labels):
        return super().forward(outputs + self.prior.log(), labels)

    def update(self, labels):
        new = torch.bincount(labels, minlength=CLASSES) / len(labels)
        self.prior.mul_(0.9).add_(0.1 * new)


class Weighted(nn.Module):
    """The mean of weighted losses, which is not divided by the sum of weights."""

    weight = torch.ones(CLASSES)

    def forward(self, outputs, labels):
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return (self.weight[labels] * losses).mean()


class Counting(nn.CrossEntropyLoss):
    """Keeps facts about its calls that no loss depends on."""

    def __init__(self):
        super().__init__(torch.tensor([1.0, 2.0, 3.0]))
        self.calls, self.last = 0, None

    def forward(self, outputs, labels):
        self.calls += 1
        losses = super().forward(outputs, labels)
        self.last = losses.detach().mean()
        return losses


class Noisy(nn.CrossEntropyLoss):
    """Draws random numbers."""

    def forward(self, outputs, labels):
        return super().forward(outputs + torch.rand_like(outputs), labels)


def prepare(mode, criterion=None):
    torch.manual_seed(0)
    x, y = torch.randn(N, D), torch.randint(CLASSES, (N,))
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return prepared(model, TensorDataset(x, y), mode, criterion=criterion)


def loss_link(engine):
    return next(k for k in engine.ledger.custody.links if k.name == "loss")


def train_ghost(criterion, before=lambda criterion, labels: None):
    engine, model, optimizer, loss_of, loader = prepare("ghost", criterion)
    for x, y in loader:
        optimizer.zero_grad()
        before(criterion, y)
        loss_of(model(x), y).backward()
        optimizer.step()
    return loss_link(engine)


def set_weight(criterion, labels):
    criterion.weight = weights_of(labels)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_the_loop_sets_from_each_batch_are_reported():
    link = train_ghost(nn.CrossEntropyLoss(), set_weight)
    assert link.state == "unchecked"
    assert "gave other losses to the same outputs" in link.sentence


@pytest.mark.filterwarnings("ignore")
def test_a_running_prior_is_reported():
    link = train_ghost(Prior(), Prior.update)
    assert link.state == "unchecked"
    assert "gave other losses" in link.sentence


@pytest.mark.filterwarnings("ignore")
def test_a_variable_of_a_function_is_reported():
    held = {"weight": torch.ones(CLASSES)}

    def criterion(outputs, labels):
        return F.cross_entropy(outputs, labels, held["weight"], reduction="none")

    def before(_, labels):
        held["weight"] = weights_of(labels)

    assert "gave other losses" in train_ghost(criterion, before).sentence
    assert "gave other losses" not in train_ghost(criterion).sentence


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, Counting, Noisy])
def test_nothing_is_said_of_a_criterion_that_stays_as_it_is(criterion):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The library assumes")
        assert "gave other losses" not in train_ghost(criterion()).sentence


def test_a_function_with_a_state_trains_as_without_a_probe():
    calls = []

    def criterion(outputs, labels):
        calls.append(len(labels))
        return F.cross_entropy(outputs, labels, reduction="none")

    train_ghost(criterion)
    assert calls == [8] * 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "fast"])
@pytest.mark.parametrize("changes", [True, False])
def test_an_audited_criterion_that_the_loop_changes_is_reported(mode, changes):
    criterion = Weighted()
    engine, model, optimizer, _, loader = prepare(mode)
    assert engine.audit(criterion)["loss"].passed
    for x, y in loader:
        optimizer.zero_grad()
        if changes:
            set_weight(criterion, y)
        criterion(model(x), y).backward()
        optimizer.step()
    link = loss_link(engine)
    assert ("gave other losses" in link.sentence) == changes
