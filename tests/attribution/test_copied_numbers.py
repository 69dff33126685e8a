"""Copies of examples that are one number in each tensor, in two passes of a loss."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder

USERS, ITEMS, NUM, SIZE = 40, 300, 96, 12
EPOCHS = 3


class Rating(nn.Module):
    """Rates an item, for the first user if none is given."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, 4), nn.Embedding(ITEMS, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, item, user=None):
        user = torch.zeros_like(item) if user is None else user
        return self.out(self.items(item) * self.users(user))[:, 0]


def copied(*tensors):
    return [t.clone() for t in tensors]


def random_items(item):
    return torch.randint(ITEMS, item.shape)


def ranked(one, other):
    return -functional.logsigmoid(one - other).mean()


def pairs(model, user, item, other):
    (u, i), (v, j) = copied(user, item), copied(user, other)
    return ranked(model(i, u), model(j, v))


def delivered_first(model, user, item, other):
    v, j = copied(user, other)
    return ranked(model(item, user), model(j, v))


def the_same_twice(model, user, item, _):
    u, i = copied(user, item)
    return ranked(model(i, u), 2 * model(i, u))


def items_alone(model, user, item, other):
    return ranked(model(item.clone()), model(other.clone()))


def own_negatives(model, user, item, _):
    u, i = copied(user, item)
    return ranked(model(i, u), model(random_items(i), u))


def negatives_of_others(model, user, item, _):
    u, i = copied(user, item)
    return ranked(model(i, u), model(i[torch.randperm(len(i))], u))


def reversed_pairs(model, user, item, _):
    return ranked(model(item.clone(), user.clone()), model(item.flip(0), user.flip(0)))


class Training:
    """A training with weights that do not move, and the norm of each example."""

    def __init__(self, loss, *, num_updates=1):
        torch.manual_seed(0)
        users, others = torch.randint(USERS, (NUM,)), torch.randint(20, (NUM,))
        data = TensorDataset(users, torch.randperm(ITEMS)[:NUM], others)
        module = Rating()
        self.engine = PrivacyEngine(recorder=Recorder(every=range(1, 100)))
        model, optimizer, loader = self.engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
            data_loader=DataLoader(data, SIZE, shuffle=True),
            noise_multiplier=1.0,
            max_grad_norm=1e3,
            poisson_sampling=False,
        )
        self.true = []
        for item in data:
            value = loss(module, *[part[None] for part in item])
            found = torch.autograd.grad(
                value, list(module.parameters()), allow_unused=True
            )
            squares = [float(g.square().sum()) for g in found if g is not None]
            self.true.append(sum(squares) ** 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(EPOCHS):
                for batch in loader:
                    for _ in range(num_updates):
                        optimizer.zero_grad()
                        loss(model, *batch).backward()
                        optimizer.step()

    def unchecked(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            links = self.engine.ledger.custody.unchecked
        return {link.name: link.sentence for link in links}


@pytest.mark.parametrize(
    "loss",
    [pairs, delivered_first, the_same_twice, items_alone],
    ids=lambda f: f.__name__,
)
def test_copies_in_two_passes_are_recognised(loss):
    training = Training(loss)
    assert set(training.unchecked()) == {"loss"}
    norms = training.engine.ledger.grad_norms
    seen = ~np.isnan(norms)
    assert seen.any(axis=0).all()
    true = np.broadcast_to(training.true, norms.shape)
    assert norms[seen] == pytest.approx(true[seen], rel=1e-4)


def test_numbers_that_were_not_delivered_are_another_pass():
    training = Training(own_negatives)
    assert set(training.unchecked()) == {"draw", "rows", "loss"}
    assert training.engine.attribution["unattributed"] == 0


@pytest.mark.parametrize("loss", [negatives_of_others, reversed_pairs])
def test_numbers_of_others_in_the_second_pass_are_said(loss):
    rows = Training(loss).unchecked()["rows"]
    assert "more entries of other examples" in rows


def test_two_updates_with_one_batch_are_both_counted():
    training = Training(pairs, num_updates=2)
    assert set(training.unchecked()) == {"loss"}
    counts = np.isfinite(training.engine.ledger.grad_norms).sum(axis=0)
    assert (counts == 2 * EPOCHS).all()
