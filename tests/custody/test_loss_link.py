"""The link "loss": checked or refused where the criterion is known.

Norms are compared with one-at-a-time autograd where the link is said to hold.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.custody import Chain
from opacus_pi.custody.loss_probe import LossProbe
from tests.custody.probed_models import Calls

CLASSES = 3
WEIGHTS = torch.tensor([1.0, 5.0, 20.0])


def data_set():
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randn(12, 5, generator=generator), torch.arange(12) % CLASSES
    )


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def state_of(engine, name):
    links = engine.ledger.custody.links
    return next(link.state for link in links if link.name == name)


class OfLosses(nn.Module):
    """A criterion that makes losses of the examples' cross entropies."""

    def __init__(self, function, reduction="mean"):
        super().__init__()
        self.function, self.reduction = function, reduction

    def forward(self, outputs, targets):
        losses = self.function(F.cross_entropy(outputs, targets, reduction="none"))
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


def train_ghost(criterion, shape=None, loss_reduction="mean"):
    engine, model = PrivacyEngine(), net()
    model, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=criterion,
        data_loader=DataLoader(data_set(), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        loss_reduction=loss_reduction,
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return engine


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_ghost_clipping_checks_its_criterion(weight, reduction):
    criterion = nn.CrossEntropyLoss(weight, reduction=reduction)
    engine = train_ghost(criterion, loss_reduction=reduction)
    assert state_of(engine, "loss") == "checked"
    own = nn.CrossEntropyLoss(weight, reduction="sum")
    expected = []
    model = net()
    for x, y in data_set():
        loss = own(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(torch.cat([g.flatten() for g in gradients]).norm())
    recorded = np.nanmax(engine.ledger.grad_norms, axis=0)
    np.testing.assert_allclose(recorded, torch.stack(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda losses: losses * losses.detach().softmax(0),
        lambda losses: losses / losses.max(),
        lambda losses: losses + 1e-3 * losses.mean(),
        lambda losses: losses * (losses >= losses.median()),
    ],
    ids=["robust", "relative", "mixed", "hardest half"],
)
def test_ghost_clipping_refuses_a_coupled_criterion_and_trains_on(function):
    with pytest.warns(UserWarning, match="no longer has a ledger. Replacing some"):
        engine = train_ghost(OfLosses(function))
    with pytest.raises(AccountingError, match="compares the examples of a batch"):
        _ = engine.ledger
    assert engine.get_epsilon(1e-5) > 0


def test_a_criterion_that_cannot_be_evaluated_twice_is_said():
    class Once(OfLosses):
        num_calls = 0

        def forward(self, outputs, targets):
            Once.num_calls += 1
            if Once.num_calls == 2:
                raise RuntimeError("only once")
            return super().forward(outputs, targets)

    with pytest.warns(UserWarning, match="could not be evaluated a second time.*once"):
        engine = train_ghost(Once(lambda losses: losses))
    assert state_of(engine, "loss") == "unchecked"


def monitored(model, criterion, noise_std=0.01):
    engine = PrivacyEngine()
    _, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set(), batch_size=4),
        noise_std=noise_std,
        criterion=criterion,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).mean().backward()
        optimizer.step()
    return engine


def test_monitored_runs_check_criterion_and_model():
    engine = monitored(net(), nn.CrossEntropyLoss())
    assert state_of(engine, "loss") == state_of(engine, "model") == "checked"


def test_monitored_batch_norm_is_listed_and_not_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    engine = monitored(model, nn.CrossEntropyLoss())
    assert state_of(engine, "model") == "unchecked"
    (link,) = [x for x in engine.ledger.custody.unchecked if x.name == "model"]
    assert "BatchNorm layers are in training mode" in link.sentence


@pytest.mark.parametrize("noise_std", [0.0, 0.01])
def test_other_monitored_models_that_mix_are_refused(noise_std):
    model = Calls(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(5, CLASSES))
    with pytest.warns(UserWarning, match="no longer has a ledger. The model mixes"):
        engine = monitored(model, nn.CrossEntropyLoss(), noise_std)
    with pytest.raises(AccountingError, match="The model mixes"):
        _ = engine.ledger


def test_the_loss_of_a_loop_stays_unchecked_without_a_warning(recwarn):
    engine, model = PrivacyEngine(recorder=Recorder()), net()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data_set(), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert state_of(engine, "loss") == "unchecked"
    assert not [w for w in recwarn if "assumes, without a check" in str(w.message)]


class Trimmed(nn.Module):
    """Drops the largest loss of a batch if it is an outlier."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.reduction = limit, "mean"

    def forward(self, outputs, labels):
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        if len(losses) > 1 and losses.max() > self.limit:
            losses = losses * (losses < losses.max())
        return losses if self.reduction == "none" else losses.mean()


def probed(criterion, batches):
    chain = Chain()
    probe = LossProbe(criterion, chain, averages_each_example=True)
    for outputs, labels in batches:
        probe.saw(outputs, labels)
    (link,) = (k for k in chain.custody().links if k.name == "loss")
    return link


@pytest.mark.parametrize("place", [1, 3, 4, 8, 64, 128])
def test_an_outlier_is_dropped_in_one_of_the_probed_batches(place):
    draws = torch.Generator().manual_seed(place)
    labels = torch.arange(6) % 3
    batches = [
        (torch.randn(6, 3, generator=draws).clamp(-1, 1), labels) for _ in range(130)
    ]
    batches[place - 1][0][2] = torch.tensor([9.0, 0.0, 0.0])  # its label is 2
    link = probed(Trimmed(5.0), batches)
    assert link.state == "broken"
    assert "no example has a loss of its own" in link.sentence


def test_a_criterion_that_is_not_of_torch_is_unchecked_in_between():
    batches = [(torch.eye(3), torch.arange(3))] * 5
    link = probed(Trimmed(5.0), batches)
    assert link.state == "unchecked"
    assert "not one of torch's losses" in link.sentence
    assert probed(nn.CrossEntropyLoss(), batches).state == "checked"


def test_a_criterion_with_random_numbers_is_not_compared_with_single_examples():
    class Smoothed(nn.CrossEntropyLoss):
        def forward(self, outputs, labels):
            noise = torch.rand(len(outputs), 1)
            return super().forward(outputs * noise, labels)

    link = probed(Smoothed(), [(torch.eye(4), torch.arange(4))] * 4)
    assert link.state == "unchecked"
