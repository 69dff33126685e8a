"""Examples that differ in few of many entries, and items of numbers only.

The recorded norms are compared with gradients that are computed one at a time.
"""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import AccountingError, PrivacyEngine, Recorder
from opacus_pi.attribution.whole_contents import has_lookalikes, whole_checksums

NUM, BATCH, WIDTH = 20, 10, 3000


def sparse_data():
    """Return inputs that differ in three entries of 3000, and targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(NUM, WIDTH)
    for row in x:
        row[torch.randint(WIDTH, (3,), generator=generator)] = 1 + row.new_tensor(
            torch.rand(3, generator=generator).tolist()
        )
    return TensorDataset(x, torch.arange(NUM) % 3)


def train(data, model, loss, *, change=None, collate_fn=None):
    """Train for two epochs and return the ledger and the true norms."""
    torch.manual_seed(0)
    engine = PrivacyEngine(recorder=Recorder(every=range(1, 5)))
    module, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, BATCH, shuffle=True, collate_fn=collate_fn),
        noise_multiplier=1.0,
        max_grad_norm=1e3,
        poisson_sampling=False,
    )
    weights = list(model.parameters())
    true = []
    for item in data:
        value = loss(model, *[part[None] for part in item])
        gradients = torch.autograd.grad(value, weights)
        true.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "collate_fn|The library|Samples|.*samples")
        for _ in range(2):
            for batch in loader:
                given = batch if change is None else change(*batch)
                optimizer.zero_grad()
                loss(module, *given).backward()
                optimizer.step()
        ledger = engine.ledger
    return ledger, np.array(true)


def is_right(ledger, true):
    norms = ledger.grad_norms
    told = ~np.isnan(norms)
    assert told.sum() == 2 * NUM
    return np.allclose(norms[told], np.broadcast_to(true, norms.shape)[told], rtol=1e-4)


def classify(model, x, y):
    return cross_entropy(model(x), y)


# ------------------------------------------------------------- few of many entries
def permuted(x, y):
    order = torch.randperm(len(x))
    return x[order], y[order]


def flipped_in_place(x, y):
    return x.copy_(x.flip(0)), y.copy_(y.flip(0))


def flipped_by_numpy(x, y):
    x.numpy()[:] = x.numpy()[::-1].copy()
    y.numpy()[:] = y.numpy()[::-1].copy()
    return x, y


def two_swapped_by_data(x, y):
    x.data[[0, 1]] = x.data[[1, 0]]
    y.data[[0, 1]] = y.data[[1, 0]]
    return x, y


@pytest.mark.parametrize(
    "change", [permuted, flipped_in_place, flipped_by_numpy, two_swapped_by_data]
)
def test_a_loop_that_moves_samples_with_few_different_entries(change):
    model = nn.Linear(WIDTH, 3)
    assert is_right(*train(sparse_data(), model, classify, change=change))


def collated(items):
    return tuple(torch.stack([item[j] for item in items]) for j in range(len(items[0])))


def reverse(items):
    return collated(items[::-1])


def shuffle(items):
    return collated([items[i] for i in torch.randperm(len(items))])


def swap_two(items):
    return collated([items[1], items[0], *items[2:]])


@pytest.mark.parametrize("collate_fn", [collated, reverse, shuffle, swap_two])
def test_a_collate_fn_that_moves_items_with_few_different_entries(collate_fn):
    model = nn.Linear(WIDTH, 3)
    assert is_right(*train(sparse_data(), model, classify, collate_fn=collate_fn))


def test_whole_checksums_see_every_entry():
    x = torch.zeros(5, 40_000)
    x[1, 123] = x[2, 39_999] = x[3, 20_000] = 1.0
    sums = whole_checksums(x, 0)
    assert len(set(sums.tolist())) == 4 and sums[0] == sums[4]
    assert np.array_equal(whole_checksums(x.T.double(), 1), sums)
    x[0, 123 + (1 << 14)] = 1.0  # the same place in another part
    assert whole_checksums(x, 0)[0] not in sums


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], False),
        ([[1, 2, 3], [1, 2, 3]], True),
        ([[1, 2, 3], [3, 2, 1]], False),  # equal sums
        ([[np.nan, 2, 3], [np.nan, 2, 3]], True),
    ],
)
def test_lookalikes_are_equal_rows(entries, expected):
    assert has_lookalikes(np.array(entries, np.float32)) is expected


# ------------------------------------------------------------------- numbers only
class Ratings(nn.Module):
    """One bias for each user."""

    def __init__(self):
        super().__init__()
        self.user, self.out = nn.Embedding(3, 4), nn.Linear(4, 1)

    def forward(self, user):
        return self.out(self.user(user))[:, 0]


def squared(model, user, rating, *_):
    return mse_loss(model(user), rating)


def rating_data():
    generator = torch.Generator().manual_seed(0)
    users = torch.arange(NUM) % 3
    return TensorDataset(users, torch.rand(NUM, generator=generator), torch.arange(NUM))


@pytest.mark.parametrize("collate_fn", [collated, reverse, shuffle, swap_two])
def test_a_collate_fn_that_moves_items_of_numbers(collate_fn):
    torch.manual_seed(1)
    assert is_right(*train(rating_data(), Ratings(), squared, collate_fn=collate_fn))


# ------------------------------------------------- other numbers of samples than items
def reasons_of(data, collate_fn):
    """Return why a run whose items are collated like this has no ledger."""
    torch.manual_seed(0)
    model, engine = nn.Linear(6, 3), PrivacyEngine()
    module, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=2, collate_fn=collate_fn),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(module(x), y).backward()
            optimizer.step()
    with pytest.raises(AccountingError) as error:
        engine.ledger  # noqa: B018
    return str(error.value)


def joined(items):
    return torch.cat([item[0] for item in items]), torch.cat([i[1] for i in items])


@pytest.mark.parametrize("is_ragged", [False, True])
def test_a_collate_fn_that_makes_a_sample_of_each_row(is_ragged):
    nums = [1 + i % 4 if is_ragged else 4 for i in range(12)]
    data = [(torch.randn(n, 6), torch.zeros(n, dtype=torch.long)) for n in nums]
    reason = reasons_of(data, joined)
    assert reason.startswith("collate_fn made a sample of each row of an item")


def test_a_collate_fn_that_cuts_a_stream_into_samples():
    def cut(items):
        stream = torch.cat([item[0] for item in items])
        x = stream[: len(stream) // 6 * 6].view(-1, 6)
        return x, torch.zeros(len(x), dtype=torch.long)

    data = [(torch.randn(20 + i % 3), 0) for i in range(12)]
    reason = reasons_of(data, cut)
    assert "returned more or fewer samples than it was given items" in reason


def test_a_collate_fn_that_repeats_items_and_changes_some():
    def repeat(items):
        x = torch.stack([item[0] for item in items]).repeat(2, 1)
        x[-1] += 1
        return x, torch.zeros(len(x), dtype=torch.long)

    reason = reasons_of([(torch.randn(6), 0) for _ in range(12)], repeat)
    assert "collate_fn" in reason or "more than once" in reason
