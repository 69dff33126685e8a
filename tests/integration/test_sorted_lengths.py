"""Models that pack sequences which ``collate_fn`` has sorted by their lengths."""

import warnings

import pytest
import torch
from opacus.layers import DPLSTM
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from opacus_pi import AccountingError, PrivacyEngine
from opacus_pi.custody.model_probe import probe_separability


class Reader(nn.Module):
    """An LSTM over packed sequences, with the last state or all steps as output."""

    def __init__(self, *, by_step=False, mixes=False, counts=False):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.layer, self.out = DPLSTM(4, 4, batch_first=True), nn.Linear(4, 3)
        self.by_step, self.mixes, self.counts = by_step, mixes, counts

    def forward(self, x, lengths=None):
        lengths = (x != 0).sum(1) if lengths is None else lengths
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True)
        steps, (hidden, _) = self.layer(packed)
        found = hidden[-1]
        if self.by_step:
            found = pad_packed_sequence(steps, batch_first=True)[0]
        found = found - found.mean(0) if self.mixes else found
        return self.out(found * len(x) if self.counts else found)


def sequences():
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(2, 8, (48,), generator=generator).tolist()
    return [
        (torch.randint(1, 20, (n,), generator=generator), i % 3)
        for i, n in enumerate(sizes)
    ]


def sorted_batch(items):
    items = sorted(items, key=lambda item: -len(item[0]))
    x = pad_sequence([x for x, _ in items], batch_first=True)
    lengths = torch.tensor([len(x) for x, _ in items])
    return (x, lengths), torch.tensor([y for _, y in items])


def train(model, *, audit):
    torch.manual_seed(0)
    engine, criterion = PrivacyEngine(), nn.CrossEntropyLoss()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(sequences(), 12, collate_fn=sorted_batch),
            noise_multiplier=1.0,
            max_grad_norm=0.5,
        )
        found = engine.audit(criterion) if audit else None
        for (x, lengths), y in loader:
            optimizer.zero_grad()
            criterion(model(x, lengths), y).backward()
            optimizer.step()
    return engine, found, [str(w.message) for w in said]


@pytest.mark.parametrize("audit", [True, False])
def test_sequences_that_are_sorted_in_collate_fn_are_checked(audit):
    engine, found, said = train(Reader(), audit=audit)
    links = {link.name: link for link in engine.ledger.custody.links}
    assert links["model"].state == "checked", links["model"].sentence
    assert not any("sorted" in message for message in said)
    if audit:
        assert found.passed and all(row.passed for row in found.rows), str(found)
        assert "the last example was left out" in found["order"].sentence
        assert links["loss"].state == "checked"


@pytest.mark.parametrize("audit", [True, False])
@pytest.mark.parametrize("how", ["mixes", "counts"])
def test_models_of_sorted_sequences_that_mix_examples_are_refused(how, audit):
    engine, found, _ = train(Reader(**{how: True}), audit=audit)
    if audit:
        assert not found.passed
    with pytest.raises(AccountingError, match=r"mixes the examples|number of examples"):
        assert engine.ledger


@pytest.mark.parametrize("by_step", [True, False])
@pytest.mark.parametrize("has_lengths", [True, False])
def test_the_probe_keeps_the_order_of_lengths(by_step, has_lengths):
    (x, lengths), _ = sorted_batch(sequences()[:7])
    inputs = (x, lengths) if has_lengths else (x,)
    for mixes, state in ((False, "checked"), (True, "broken")):
        found = probe_separability(Reader(by_step=by_step, mixes=mixes), inputs, {})
        assert found.state == state, found.sentence
