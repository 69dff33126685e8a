"""Layers that are given the examples in another order than the model.

The oracle is one backward pass for each example, as Opacus's own norms are compared.
"""

import copy

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.custody import Chain
from opacus_pi.custody.model_probe import probe_separability
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.wrong_layers import watch_inputs
from opacus_pi.recording import AccountingError

SIZE, LENGTH = 6, 5
UNSORTED, SORTED, EQUAL = [2, 5, 3, 5, 4, 1], [5, 5, 4, 3, 2, 1], [LENGTH] * SIZE


class Texts(nn.Module):
    """The last output of a recurrent layer for each sequence, and a linear layer."""

    def __init__(self, kind=DPLSTM, *, enforce_sorted=False, **options):
        super().__init__()
        self.rnn = kind(4, 6, batch_first=True, **options)
        width = 12 if options.get("bidirectional") else 6
        self.head, self.enforce_sorted = nn.Linear(width, 3), enforce_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted
        )
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(out[torch.arange(len(x)), lengths - 1])


class Reordering(nn.Module):
    """A linear layer between a change of the order and its inverse."""

    def __init__(self, order):
        super().__init__()
        self.first, self.head = nn.Linear(LENGTH * 4, 6), nn.Linear(6, 3)
        self.order = order

    def forward(self, x, lengths):
        order = self.order(x, lengths)
        hidden = torch.tanh(self.first(x.flatten(1)[order]))
        return self.head(hidden[order.argsort()])


def batch(lengths):
    x = torch.randn(SIZE, LENGTH, 4, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor(lengths)


def losses(outputs):
    return torch.sin(1.3 * outputs).sum(1) + outputs.square().sum(1)


def opacus_is_right(model, inputs):
    expected = []
    for i in range(SIZE):
        outputs = model(*[x[i : i + 1] for x in inputs])
        found = torch.autograd.grad(losses(outputs).sum(), list(model.parameters()))
        expected.append(torch.cat([g.flatten() for g in found]).norm().item())
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    losses(wrapped(*inputs)).sum().backward()
    each = [p.grad_sample.reshape(SIZE, -1).norm(dim=1) for p in wrapped.parameters()]
    return np.allclose(torch.stack(each).norm(dim=0).tolist(), expected, rtol=1e-3)


RECURRENT = [
    (DPLSTM, {}),
    (DPGRU, {}),
    (DPRNN, {}),
    (DPLSTM, {"bidirectional": True, "num_layers": 2}),
]


@pytest.mark.parametrize("lengths", [UNSORTED, SORTED, EQUAL])
@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_packed_sequences_are_refused_if_opacus_is_wrong(kind, options, lengths):
    torch.manual_seed(0)
    model, inputs = Texts(kind, **options), batch(lengths)
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    chain, reasons = Chain(), []
    chain.on_break(reasons.append)
    watch_inputs(wrapped, chain)
    wrapped(*inputs)
    assert bool(reasons) == (not opacus_is_right(model, inputs))
    assert bool(reasons) == (lengths is UNSORTED)
    assert all("the layer 'rnn'" in reason for reason in reasons)


ORDERS = {
    "by length": lambda x, n: n.argsort(descending=True),
    "by content": lambda x, n: x.sum((1, 2)).argsort(),
    "reversed": lambda x, n: torch.arange(len(x)).flip(0),
    "at random": lambda x, n: torch.randperm(len(x)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_examples_sorted_before_a_layer_are_found(name):
    torch.manual_seed(0)
    model, inputs = Reordering(ORDERS[name]), batch(UNSORTED)
    assert not opacus_is_right(model, inputs)
    finding = probe_separability(model, inputs, {}, layers_in_order=True)
    assert finding.state == "broken", finding.sentence
    assert "The layer 'first' is given the examples in another order" in (
        finding.sentence
    )
    # without gradients of rows of layers, the order in which they come is of no concern
    assert probe_separability(model, inputs, {}).state == "checked"


def test_examples_in_their_order_pass():
    torch.manual_seed(0)
    model, inputs = Reordering(lambda x, n: torch.arange(len(x))), batch(UNSORTED)
    assert opacus_is_right(model, inputs)
    finding = probe_separability(model, inputs, {}, layers_in_order=True)
    assert finding.state == "checked", finding.sentence


def test_frozen_layers_may_sort():
    torch.manual_seed(0)
    model = Reordering(ORDERS["reversed"])
    model.first.requires_grad_(False)
    finding = probe_separability(model, batch(UNSORTED), {}, layers_in_order=True)
    assert finding.state == "checked", finding.sentence


@pytest.mark.filterwarnings("ignore:This run", "ignore:Secure RNG", "ignore:Full")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "fast", "ew"])
def test_a_training_whose_model_sorts_is_refused(mode):
    torch.manual_seed(0)
    model, (x, lengths) = Reordering(ORDERS["by length"]), batch(UNSORTED)
    labels = torch.arange(SIZE) % 3
    engine = PrivacyEngine()
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, lengths, labels), SIZE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    for inputs, number, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs, number), targets).backward()
        optimizer.step()
    with pytest.raises(AccountingError, match="'first' is given the examples in ano"):
        _ = engine.ledger
