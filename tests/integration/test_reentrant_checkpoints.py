"""Gradients inside checkpoints with ``use_reentrant=True`` count everywhere.

``torch.autograd.grad`` does not reach them. The oracle is the same model without
checkpoints.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import opacus_pi
from opacus_pi import PrivacyEngine
from opacus_pi.evaluation import gaussian_unlearning_score
from opacus_pi.gradients import gradient_gram, minibatch_gram, per_example_grad_norms
from opacus_pi.models.backward_gradients import gradients_by_backward
from opacus_pi.unlearning.methods import Task
from opacus_pi.unlearning.rivals.gradients import mean_gradient

NUM = 24


class Net(nn.Module):
    """Its first layer, and the second one if ``deep``, are in a checkpoint."""

    def __init__(self, *, checkpoints=True, deep=False):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.checkpoints, self.deep = checkpoints, deep

    def part(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        part = self.second if self.deep else self.part
        h = self.part(x) if self.deep else x.clone()
        if not self.checkpoints:
            h = part(h)
        else:  # of checkpoints, the inputs must require gradients
            h = h if h.requires_grad else h.requires_grad_()
            h = checkpoint(part, h, use_reentrant=True)
        return self.head(torch.tanh(h if self.deep else self.second(h)))


def examples():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(NUM, 5, generator=generator)
    return x, torch.randint(0, 3, (NUM,), generator=generator)


def both(deep=False):
    return Net(deep=deep), Net(checkpoints=False, deep=deep)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "fast"])
def test_an_audit_passes(mode, deep):
    net, criterion = Net(deep=deep), nn.CrossEntropyLoss()
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*examples()), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    found = engine.audit(criterion)
    assert found.passed and found["norms"].passed, str(found)
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert len(engine.ledger.steps)


@pytest.mark.parametrize("deep", [False, True])
def test_an_audit_of_one_batch_expects_the_right_norms(deep):
    net, plain = both(deep)
    criterion, (x, y) = nn.CrossEntropyLoss(), examples()
    found = opacus_pi.audit(net, criterion, (x, y))
    assert found.passed, str(found)
    right = opacus_pi.audit(plain, criterion, (x, y))
    torch.testing.assert_close(found.expected, right.expected, rtol=1e-5, atol=0)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("deep", [False, True])
def test_monitored_training_is_compared_with_its_criterion(deep):
    net = Net(deep=deep)
    criterion, engine = nn.CrossEntropyLoss(reduction="none"), PrivacyEngine()
    model, optimizer, loader = engine.make_monitored(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*examples()), batch_size=8),
        criterion=criterion,
        noise_std=0.1,
    )
    assert engine.audit(criterion)["norms"].passed
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).mean().backward()
        optimizer.step()
    links = {link.name: link for link in engine.ledger.custody.links}
    assert links["loss"].state == "checked", links["loss"].sentence


class Unruled(Net):
    """A parameter in the checkpoint is used by an operation that has no rule."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.rand(6))

    def part(self, x):
        return torch.tanh(self.first(x)) * torch.fft.rfft(self.scale, n=10).abs()


@pytest.mark.filterwarnings("ignore:There is no formula")
def test_parameters_without_a_rule_have_their_gradients():
    criterion, (x, y) = nn.CrossEntropyLoss(reduction="none"), examples()
    norms, grams = zip(
        *(
            (
                per_example_grad_norms(net, criterion, x, y),
                gradient_gram(net, criterion, TensorDataset(x, y), range(NUM)),
            )
            for net in (Unruled(), Unruled(checkpoints=False))
        ),
        strict=True,
    )
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(*grams, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grams[0].diagonal().sqrt(), norms[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("deep", [False, True])
def test_gram_matrices_have_every_gradient(deep):
    found, right = (
        gradient_gram(
            net,
            nn.CrossEntropyLoss(reduction="none"),
            TensorDataset(*examples()),
            range(6),
        )
        for net in both(deep)
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("deep", [False, True])
def test_sums_of_minibatches_have_every_gradient(deep):
    found, right = (
        minibatch_gram(
            net,
            nn.CrossEntropyLoss(reduction="none"),
            TensorDataset(*examples()),
            [range(4), range(3, 9)],
            range(9, 14),
        )
        for net in both(deep)
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("deep", [False, True])
def test_gradients_of_sets_have_every_part(deep):
    batches = [examples()]
    sets = []
    for net in both(deep):
        criterion = nn.CrossEntropyLoss(reduction="none")
        task = Task(net, criterion, batches, batches, torch.Generator())
        sets.append(mean_gradient(task, list(net.parameters())))
        assert all(p.grad is None for p in net.parameters())
    for one, other in zip(*sets, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gaussian_score_is_defined():
    x, y = examples()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    criterion = nn.CrossEntropyLoss(reduction="none")
    found, right = (
        gaussian_unlearning_score(net, criterion, x, y, noise) for net in both()
    )
    assert found == pytest.approx(right, rel=1e-5)


def test_other_gradients_stay():
    weight, scale = (torch.ones(2, requires_grad=True) for _ in range(2))
    weight.grad, scale.grad = torch.full((2,), 7.0), None
    (found,) = gradients_by_backward((weight * scale * 3).sum(), [weight])
    assert found.tolist() == [3, 3]
    assert weight.grad.tolist() == [7, 7] and scale.grad is None
