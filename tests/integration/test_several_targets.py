"""Targets that are several tensors, as models with several heads have them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from opacus_pi import FineTune, PrivacyEngine, Unlearner
from opacus_pi.gradients import norm_sweep, per_example_grad_norms
from opacus_pi.models.batches import num_examples

SIZE = 12


def _losses(outputs, targets):
    labels, values = targets
    return (
        F.cross_entropy(outputs[:, :3], labels, reduction="none")
        + (outputs[:, 3] - values).square()
    )


def _mean_over_present(outputs, targets):
    labels, values = targets
    present = values > 0
    squares = (outputs[present, 3] - values[present]).square()
    own = torch.zeros(len(labels)).masked_scatter(present, squares)
    classes = F.cross_entropy(outputs[:, :3], labels, reduction="none")
    return classes + own / present.float().mean().clamp(min=0.1)


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SIZE, 6, generator=generator)
    labels = torch.randint(0, 3, (SIZE,), generator=generator)
    values = torch.randn(SIZE, generator=generator)
    return x, (labels, values)


@pytest.fixture
def data_set(examples):
    x, (labels, values) = examples
    return [(x[i], (labels[i], values[i])) for i in range(SIZE)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def _norms_alone(model, x, targets):
    norms = []
    for i in range(len(x)):
        loss = _losses(model(x[i : i + 1]), tuple(t[i : i + 1] for t in targets))
        gradients = torch.autograd.grad(loss.sum(), list(model.parameters()))
        norms.append(sum(g.double().square().sum() for g in gradients).sqrt())
    return torch.stack(norms)


def _prepared(model, data_set, mode, criterion):
    engine = PrivacyEngine()
    options = {"criterion": criterion} if mode == "ghost" else {}
    prepared = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set, batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        **options,
    )
    return engine, prepared


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (torch.zeros(4, 2), 4),
        ((torch.zeros(5), torch.zeros(5, 3)), 5),
        ({"shared": torch.tensor(1.0), "y": torch.zeros(6)}, 6),
        (["a", "b", "c"], 3),
        (torch.tensor(1.0), 0),
        (None, 0),
    ],
)
def test_the_first_tensor_counts_the_examples(targets, expected):
    assert num_examples(targets) == expected


def test_sweeps_take_them(model, examples, data_set):
    expected = _norms_alone(model, *examples)
    norms = per_example_grad_norms(model, _losses, *examples)
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-7)
    swept = norm_sweep(model, _losses, data_set, batch_size=5)
    torch.testing.assert_close(swept, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
def test_an_audit_takes_them(model, data_set, mode):
    engine, _ = _prepared(model, data_set, mode, _losses)
    audit = engine.audit(_losses)
    assert audit.passed
    assert audit.num_examples == 6
    assert audit["norms"].passed
    assert audit["loss"].passed


def test_an_audit_finds_that_they_couple_examples(model, data_set):
    engine, _ = _prepared(model, data_set, "hooks", _losses)
    audit = engine.audit(_mean_over_present)
    assert not audit.passed
    assert audit["loss"].passed is False


@pytest.mark.parametrize(
    ("criterion", "state"), [(_losses, "unchecked"), (_mean_over_present, "broken")]
)
def test_ghost_clipping_compares_a_criterion_of_them(model, data_set, criterion, state):
    torch.manual_seed(1)
    engine, (model, optimizer, criterion, loader) = _prepared(
        model, data_set, "ghost", criterion
    )
    for x, targets in loader:
        if len(x) < 2:
            continue
        optimizer.zero_grad()
        criterion(model(x), targets).backward()
        optimizer.step()
    links = {link.name: link.state for link in engine.recorder.chain.custody().links}
    assert links["loss"] == state


def test_an_unlearner_takes_them(model, data_set):
    unlearner = Unlearner(model, criterion=_losses, method=FineTune())
    result = unlearner.unlearn(data_set, [0, 1], num_epochs=1)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(model.parameters(), result.model.parameters(), strict=True)
    ]
    assert any(moved)
