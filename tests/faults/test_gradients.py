"""Gradients that are no numbers, or enormous: the clip norm's charge, or an error."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.recording import AccountingError
from tests.private_training import CLASSES, NUM_EXAMPLES, Training, data

pytestmark = [
    pytest.mark.filterwarnings("ignore:This run has no ledger"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]


def with_example(value, label=0):
    """The data with one example whose inputs are a number."""
    x, y = (tensor.clone() for tensor in data().tensors)
    x[5], y[5] = value, label
    return TensorDataset(x, y)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.out(x.flatten(1))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_gradient_that_is_no_number(mode, value):
    training = Training(
        module=Plain(),
        data_set=with_example(value),
        batch_size=24,
        grad_sample_mode=mode,
    ).train(1)
    with pytest.raises(
        AccountingError, match=r"not finite at or before update 1: that of example \d+"
    ):
        _ = training.engine.ledger
    with pytest.raises(AccountingError, match="not finite"):
        training.engine.privacy_losses(2)
    assert training.engine.get_epsilon(1e-3) > 0  # of the mechanism, as Opacus's


def test_strict_stops_before_the_weights_are_no_numbers():
    training = Training(
        module=Plain(),
        data_set=with_example(float("nan")),
        batch_size=24,
        recorder=Recorder(strict=True),
    )
    with pytest.raises(AccountingError, match="not finite"):
        training.train(1)
    assert all(torch.isfinite(p).all() for p in training.net.parameters())


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_enormous_gradient_is_charged_the_clip_norm(mode):
    training = Training(
        module=Plain(),
        data_set=with_example(1e15),
        batch_size=24,
        grad_sample_mode=mode,
    ).train(1)
    ledger = training.engine.ledger
    assert np.nanmax(ledger.grad_norms[:, 5]) > 1e14
    assert ledger.ratios()[0, 5] == 1.0  # C / noise_std: no more than anybody's
    losses = training.engine.privacy_losses(4)
    assert losses[5] == losses.max() and np.isfinite(losses).all()


def monitored(value, label=0):
    torch.manual_seed(0)
    model = Plain()
    engine = PrivacyEngine()
    criterion = nn.CrossEntropyLoss()
    model, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(with_example(value, label), batch_size=24),
        noise_std=0.1,
        criterion=criterion,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return engine


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sweep_over_a_gradient_that_is_no_number(value):
    with pytest.raises(AccountingError, match="not finite at or before update 1"):
        _ = monitored(value).ledger


def test_without_clipping_an_enormous_gradient_costs_enormously():
    """Of an input this large one label is certain, and the others are absurd."""
    losses = [monitored(1e6, label).privacy_losses(2) for label in range(CLASSES)]
    assert np.isfinite(losses).all()
    assert sorted(each[5] > 1e6 for each in losses) == [False, True, True]


def test_a_run_that_diverges_by_its_learning_rate():
    training = Training(lr=1e30, noise_multiplier=5.0).train(3)
    try:
        ratios = training.engine.ledger.ratios()
    except AccountingError as error:
        assert "Lower the learning rate" in str(error)
    else:
        assert ratios.shape[1] == NUM_EXAMPLES and (ratios <= 0.2 + 1e-12).all()
