"""Examples that are equal in inputs and targets, in a model with dropout or without.

The gradients of two copies differ if the model draws random numbers. Then it matters
which of them is which, and an order that is not known must be said.
"""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.accounting import RenyiFilter
from opacus_pi.attribution.causes import EQUAL_COPIES, TRUSTED

LOSS = nn.CrossEntropyLoss()
NUM, SIZE, UPDATES = 36, 12, 6


class Rows(Dataset):
    """Twelve rows, each of them three times. It notes what was drawn, in order."""

    def __init__(self):
        self.x, self.y = torch.rand(12, 6).repeat(3, 1), torch.arange(12).repeat(3) % 3
        self.drawn = []

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        self.drawn.append(index)
        return self.x[index], self.y[index]

    def shuffled(self, items):
        order = torch.randperm(len(items)).tolist()
        self.drawn[-len(items) :] = [self.drawn[i - len(items)] for i in order]
        return default_collate([items[i] for i in order])


def as_delivered(x, y, _):
    return x, y, torch.arange(len(x))


def cloned(x, y, _):
    return x.clone(), y.clone(), torch.arange(len(x))


def permuted(x, y, _):
    order = torch.randperm(len(x))
    return x[order], y[order], order


def permuted_in_place(x, y, _):
    order = torch.randperm(len(x))
    x.copy_(x[order].clone())
    y.copy_(y[order].clone())
    return x, y, order


def permuted_later(x, y, update):
    return cloned(x, y, update) if update < 2 else permuted(x, y, update)


def net(dropout):
    hidden = nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout)
    return nn.Sequential(*hidden, nn.Linear(8, 3))


class Training:
    """A training with the true norms of each update, (updates, NUM)."""

    def __init__(self, change, *, dropout=0.5, mode="hooks", in_collate=False, seed=0):
        torch.manual_seed(seed)
        rows, module = Rows(), net(dropout)
        collate = rows.shuffled if in_collate else None
        self.engine = PrivacyEngine(recorder=Recorder(every=range(1, UPDATES + 1)))
        model, optimizer, *criterion, loader = self.engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(rows, SIZE, shuffle=True, collate_fn=collate),
            noise_multiplier=1.0,
            max_grad_norm=5.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
            **({"criterion": LOSS} if mode == "ghost" else {}),
        )
        loss = criterion[0] if criterion else LOSS
        self.true = np.full((UPDATES, NUM), np.nan)
        self.warned = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            update = 0
            while update < UPDATES:
                for x, y in loader:
                    drawn, rows.drawn = torch.tensor(rows.drawn[-len(x) :]), []
                    x, y, order = change(x, y, update)
                    self.note(update, module, x, y, drawn[order], dropout)
                    optimizer.zero_grad()
                    loss(model(x), y).backward()
                    optimizer.step()
                    update += 1
        self.warned = [str(w.message) for w in caught]

    def note(self, update, module, x, y, drawn, dropout):
        own, state = net(dropout), torch.get_rng_state()
        own.load_state_dict(module.state_dict())
        losses = nn.functional.cross_entropy(own(x), y, reduction="none")
        torch.set_rng_state(state)
        for index, one in zip(drawn.tolist(), losses, strict=True):
            found = torch.autograd.grad(one, list(own.parameters()), retain_graph=True)
            norm = torch.cat([g.flatten() for g in found]).norm()
            self.true[update, index] = float(norm)

    @property
    def ratios(self):
        """The recorded norms, divided by the true ones."""
        return self.engine.ledger.grad_norms / self.true

    def says(self, cause):
        links = self.engine.ledger.custody.unchecked
        return any(cause.explanation in link.sentence for link in links)

    def warns(self):
        return any(EQUAL_COPIES.explanation in text for text in self.warned)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "fast"])
@pytest.mark.parametrize(
    ("change", "in_collate"),
    [(permuted, False), (permuted_in_place, False), (as_delivered, True)],
    ids=["permuted", "permuted in place", "in collate"],
)
def test_copies_with_other_gradients_are_charged_the_largest(change, in_collate, mode):
    training = Training(change, in_collate=in_collate, mode=mode)
    ratios = training.ratios
    assert np.nanmin(ratios) > 1 - 1e-4
    assert np.nanmax(ratios) > 1.01
    assert training.says(EQUAL_COPIES)
    assert training.warns()


@pytest.mark.parametrize(
    ("change", "dropout", "in_collate"),
    [
        (as_delivered, 0.5, False),
        (cloned, 0.5, False),
        (permuted, 0.0, False),
        (permuted_in_place, 0.0, False),
        (as_delivered, 0.0, True),
    ],
    ids=["dropout", "clones", "permuted", "permuted in place", "in collate"],
)
def test_an_exchange_that_changes_nothing_is_not_said(change, dropout, in_collate):
    training = Training(change, dropout=dropout, in_collate=in_collate)
    assert training.ratios[~np.isnan(training.true)] == pytest.approx(1, abs=1e-4)
    assert not training.says(EQUAL_COPIES)
    assert not training.says(TRUSTED)
    assert not training.warns()


def test_a_loop_that_begins_to_permute_was_in_order_before():
    training = Training(permuted_later)
    ratios = training.ratios
    assert ratios[:2][~np.isnan(ratios[:2])] == pytest.approx(1, abs=1e-4)
    assert np.nanmin(ratios) > 1 - 1e-4
    assert training.says(EQUAL_COPIES)


@pytest.mark.parametrize("dropout", [0.5, 0.0])
def test_a_filter_leaves_out_copies_with_other_gradients(dropout):
    torch.manual_seed(0)
    module, rows = net(dropout), Rows()
    budgets = RenyiFilter(order=8.0, budget=1e6)
    engine = PrivacyEngine(renyi_filter=budgets)
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(rows, NUM),
        noise_multiplier=1.0,
        max_grad_norm=5.0,
        poisson_sampling=False,
    )
    ((x, y),) = loader
    x, y, _ = permuted(x, y, 0)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LOSS(model(x), y).backward()
        optimizer.step()
    spent = budgets.spent
    assert (spent > 0).all() == (dropout == 0)
    assert (spent > 0).any() == (dropout == 0)
