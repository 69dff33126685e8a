"""A model that averages over padding is reported, whichever batch has padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from opacus_pi import PrivacyEngine

NUM_BATCHES, SIZE = 10, 8


class Average(nn.Module):
    """Averages over the padded length, which other examples determine."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).mean(1))


def collate(items):
    inputs, labels = zip(*items, strict=True)
    return pad_sequence(inputs, batch_first=True), torch.tensor(labels)


def rows_link(padded):
    """Train on items of equal lengths but in the batch ``padded``; None: in all."""
    torch.manual_seed(0)
    lengths = [5] * (NUM_BATCHES * SIZE)
    if padded is not None:
        lengths[padded * SIZE : (padded + 1) * SIZE] = range(3, 3 + SIZE)
    data = [(torch.randn(n, 4), i % 3) for i, n in enumerate(lengths)]
    net, engine = Average(), PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=SIZE, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return next(k for k in engine.ledger.custody.links if k.name == "rows")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padded", [0, 1, 6, NUM_BATCHES - 1])
def test_padding_in_one_batch_leaves_the_rows_unchecked(padded):
    link = rows_link(padded)
    assert link.state == "unchecked"
    assert "padding to the longest example" in link.sentence


def test_items_of_equal_lengths_are_checked():
    assert rows_link(None).state == "checked"
