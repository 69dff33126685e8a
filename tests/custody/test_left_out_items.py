"""A collate_fn that leaves out items makes the use of an example depend on others."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from opacus_pi import PrivacyEngine

NUM = 40
criterion = nn.CrossEntropyLoss()


def numbers():
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(NUM, 6, generator=generator), torch.arange(NUM) % 3
    )


class Unreadable(Dataset):
    """Returns None for every fifth example, as data sets of broken images do."""

    def __init__(self):
        self.data = numbers()

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        return self.data[index] if index % 5 else None


def first_items(items):
    return default_collate(items[:6])


def one_of_each_class(items):
    return default_collate(list({int(item[1]): item for item in items}.values()))


def within_a_budget(items):
    kept = [item for i, item in enumerate(items) if (i + 1) * len(item[0]) <= 36]
    return default_collate(kept)


def sorted_by_sum(items):
    return default_collate(sorted(items, key=lambda item: float(item[0].sum())))


def padded(items):
    x, y = zip(*items, strict=True)
    return pad_sequence(x, batch_first=True), torch.stack(y)


def readable_only(items):
    return default_collate([item for item in items if item is not None])


def draw_link(collate_fn, data_set=None, *, num_workers=0):
    """Train for an epoch; return the engine and its link "draw"."""
    torch.manual_seed(1)
    module, engine = nn.Linear(6, 3), PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(
            data_set or numbers(), 8, collate_fn=collate_fn, num_workers=num_workers
        ),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    links = engine.ledger.custody.links
    return next(link for link in links if link.name == "draw")


@pytest.mark.parametrize(
    "collate_fn", [first_items, one_of_each_class, within_a_budget]
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_items_that_are_left_out_are_said(collate_fn, num_workers):
    link = draw_link(collate_fn, num_workers=num_workers)
    assert link.state == "unchecked"
    assert "left out some of the items" in link.sentence


@pytest.mark.parametrize("collate_fn", [sorted_by_sum, padded, default_collate])
def test_a_collate_fn_that_keeps_all_items_is_not_doubted(collate_fn):
    assert draw_link(collate_fn).state == "checked"


def test_items_that_are_none_may_be_left_out():
    assert draw_link(readable_only, Unreadable()).state == "checked"
