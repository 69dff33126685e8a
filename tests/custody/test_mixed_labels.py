"""Loops that mix only the labels of a batch: each gradient depends on two examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine

NUM_CLASSES, SIZE = 3, 8


def permuted(labels):
    return labels.roll(1)


def averaged(labels):
    shares = F.one_hot(labels, NUM_CLASSES).float()
    return (shares + shares.roll(1, 0)) / 2


def train(mix, mode, *, criterion=None):
    """Train for two updates on labels that ``mix`` changed; return the engine."""
    torch.manual_seed(0)
    x, y = torch.randn(2 * SIZE, 6), torch.arange(2 * SIZE) % NUM_CLASSES
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
    engine = PrivacyEngine()
    model, optimizer, *loss_of, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=SIZE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({} if criterion is None else {"criterion": criterion}),
    )
    loss_of = loss_of[0] if loss_of else F.cross_entropy
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss_of(model(inputs), mix(labels)).backward()
        optimizer.step()
    return engine


def links(engine):
    return {link.name: link for link in engine.ledger.custody.links}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mix", [permuted, averaged])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "fast"])
def test_the_loss_is_unchecked_where_the_criterion_is_not_known(mix, mode):
    loss = links(train(mix, mode))["loss"]
    assert loss.state == "unchecked"
    assert "does not see the loss" in loss.sentence


@pytest.mark.filterwarnings("ignore")
def test_permuted_labels_are_refused_where_the_criterion_is_known():
    engine = train(permuted, "ghost", criterion=nn.CrossEntropyLoss())
    with pytest.raises(AccountingError, match="targets of the delivered batch in ano"):
        _ = engine.ledger


@pytest.mark.filterwarnings("ignore")
def test_averaged_labels_leave_the_rows_unchecked_where_the_criterion_is_known():
    engine = train(averaged, "ghost", criterion=nn.CrossEntropyLoss())
    rows = links(engine)["rows"]
    assert rows.state == "unchecked"
    assert "computed the targets" in rows.sentence
