"""A cross entropy that divides by a quantity of the batch is found without an audit."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import DataLoader

from opacus_pi import PrivacyEngine
from opacus_pi._errors import AccountingError
from opacus_pi.custody.loss_shares import shares_of

CLASSES, LENGTH = 3, 4
WEIGHTS = torch.tensor([1.0, 4.0, 0.5])


def examples(tokens, size=96):
    generator = torch.Generator().manual_seed(0)
    shape = (size, LENGTH) if tokens else (size,)
    x = torch.randn(*shape, 5, generator=generator)
    labels = torch.randint(CLASSES, shape, generator=generator)
    if tokens:
        lengths = torch.arange(size) % LENGTH + 1
        labels[torch.arange(LENGTH) >= lengths[:, None]] = -100
    return list(zip(x, labels, strict=True))


def weighted(z, y):
    return cross_entropy(z, y, WEIGHTS)


def own(z, y):
    return cross_entropy(z, y, WEIGHTS, reduction="none").mean()


def by_hand(z, y):
    weights = WEIGHTS[y]
    return (weights * cross_entropy(z, y, reduction="none")).sum() / weights.sum()


def accumulated(z, y):
    return cross_entropy(z, y, WEIGHTS) / 2


def tokens(z, y):
    return cross_entropy(z.transpose(1, 2), y)


def flat_tokens(z, y):
    return cross_entropy(z.flatten(0, 1), y.flatten())


def own_tokens(z, y):
    losses = cross_entropy(z.transpose(1, 2), y, reduction="none")
    return (losses.sum(1) / (y >= 0).sum(1)).mean()


def expected(z, y):
    return cross_entropy(z, y, reduction="sum") / 16


def balanced(z, y):
    """Weights of the examples whose mean is 1 in the data set, not in each batch."""
    weights = torch.rand(len(y), generator=torch.Generator().manual_seed(len(y))) * 2
    return (weights * cross_entropy(z, y, reduction="none")).mean()


def margins(z, y):
    return nn.functional.multi_margin_loss(z, y, weight=WEIGHTS)


def smoothed(z, y):
    return cross_entropy(z, y, label_smoothing=0.1)


def trained(loss, mode="hooks", last=None, **options):
    torch.manual_seed(0)
    is_tokens = loss in (tokens, flat_tokens, own_tokens)
    model = nn.Sequential(nn.Linear(5, CLASSES), *([last] if last else []))
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(examples(is_tokens), batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        **options,
    )
    for x, y in loader:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return engine


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize("mode", ["hooks", "fast"])
@pytest.mark.parametrize(
    "loss", [weighted, nn.CrossEntropyLoss(WEIGHTS), by_hand, accumulated, tokens]
)
def test_what_divides_by_a_quantity_of_the_batch_is_refused(loss, mode):
    engine = trained(loss, mode)
    with pytest.raises(AccountingError, match='by the sum of the class.*"none"'):
        _ = engine.ledger


@pytest.mark.filterwarnings("ignore:This run no longer has a ledger")
@pytest.mark.parametrize(
    "loss,last",
    [
        (flat_tokens, None),
        (lambda z, y: nll_loss(z, y, WEIGHTS), nn.LogSoftmax(-1)),
    ],
)
def test_other_ways_to_write_such_losses_are_refused(loss, last):
    with pytest.raises(AccountingError, match="the sum of the class weights"):
        _ = trained(loss, last=last).ledger


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    "loss",
    [cross_entropy, own, own_tokens, expected, balanced, margins, smoothed],
)
def test_losses_of_their_own_are_not_refused(loss, sampled):
    engine = trained(loss, poisson_sampling=sampled)
    link = next(one for one in engine.ledger.custody.links if one.name == "loss")
    assert link.state == "unchecked" and "does not see the loss" in link.sentence


@pytest.mark.parametrize("transposed", [False, True])
def test_shares_are_those_of_the_definition(transposed):
    torch.manual_seed(0)
    z = torch.randn(6, CLASSES, LENGTH, requires_grad=True)
    y = torch.randint(CLASSES, (6, LENGTH))
    y[0, 1:] = -100
    weights = torch.where(y >= 0, WEIGHTS[y.clamp(min=0)], 0.0)
    rows = z.transpose(1, 2).detach().requires_grad_()
    loss = cross_entropy(rows.transpose(1, 2) if transposed else z, y, WEIGHTS)
    (gradient,) = torch.autograd.grad(loss, rows if transposed else z)
    found = shares_of((rows if transposed else z).detach(), gradient)
    torch.testing.assert_close(
        found, (weights.sum(1) / weights.sum()).double(), rtol=1e-4, atol=0.0
    )
    assert shares_of(z.detach(), torch.randn_like(z)) is None


def test_nothing_is_said_of_logits_that_are_certain():
    z = torch.tensor([[40.0, 0.0], [0.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(z, torch.tensor([0, 0])), z)
    assert shares_of(z.detach(), gradient) is None
