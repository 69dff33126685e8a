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


def unique(x):
    return torch.unique(x, dim=0, return_inverse=True)


def unique_ids(x):
    return torch.unique(x, return_inverse=True)


def unique_in_a_row(x):
    return torch.unique_consecutive(x, dim=0, return_inverse=True)


def in_a_dict(x):
    places = {}
    back = [places.setdefault(tuple(row.tolist()), len(places)) for row in x]
    return torch.tensor(list(places)), torch.tensor(back)


def in_a_set(x):
    rows = sorted({tuple(row.tolist()) for row in x})
    return torch.tensor(rows), torch.tensor([rows.index(tuple(r.tolist())) for r in x])


def padded(x):
    rows, back = unique(x)
    return torch.cat([rows, rows[:1].expand(len(x) - len(rows), -1)]), back


class Deduplicating(nn.Module):
    """A layer that is called once for all equal examples."""

    def __init__(self, how, kind="linear", *, drops=False):
        super().__init__()
        layers = {
            "linear": lambda: nn.Linear(4, 6),
            "ids": lambda: nn.Embedding(40, 6),
            "recurrent": lambda: DPGRU(4, 6, batch_first=True),
        }
        self.how, self.kind = how, kind
        self.first, self.head = layers[kind](), nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.5 if drops else 0.0)

    def forward(self, x):
        rows, back = self.how(x)
        if self.kind == "recurrent":
            hidden = self.first(rows[:, None].expand(-1, 3, -1).contiguous())[0][:, -1]
        else:
            hidden = self.first(rows)
        return self.head(self.dropout(torch.tanh(hidden))[back])


def examples(kind="linear"):
    generator = torch.Generator().manual_seed(2)
    if kind == "ids":
        return torch.randperm(40, generator=generator)[:SIZE]
    return torch.randn(SIZE, 4, generator=generator)


DEDUPLICATED = [
    (unique, "linear", "broken"),
    (unique, "recurrent", "broken"),
    (unique_ids, "ids", "broken"),
    (in_a_set, "linear", "broken"),
    (padded, "linear", "broken"),
    (unique_in_a_row, "linear", "unchecked"),
    (in_a_dict, "linear", "unchecked"),
]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("how", "kind", "state"), DEDUPLICATED)
def test_rows_of_different_examples_only_are_found(how, kind, state, drops):
    torch.manual_seed(0)
    model, x = Deduplicating(how, kind), examples(kind)
    assert opacus_is_right(model, [x]) == (state == "unchecked")
    model = Deduplicating(how, kind, drops=drops)
    finding = probe_separability(model, (x,), {}, layers_in_order=True)
    assert finding.state == state, finding.sentence
    assert "'first" in finding.sentence
    if how is not padded and kind != "recurrent":
        words = "'first' depend on the values of the examples, as after torch.unique: "
        assert words + f"it had {SIZE} rows for {SIZE} examples, but " in (
            finding.sentence
        )
    assert probe_separability(model, (x,), {}).state == "checked"


def test_deduplicating_in_a_frozen_layer_is_fine():
    model = Deduplicating(unique)
    model.first.requires_grad_(False)
    finding = probe_separability(model, (examples(),), {}, layers_in_order=True)
    assert finding.state == "checked", finding.sentence


class Positions(nn.Module):
    """Adds position embeddings up to the longest length of the batch."""

    def __init__(self):
        super().__init__()
        self.at, self.word = nn.Embedding(LENGTH + 1, 4), nn.Embedding(9, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x[:, : int((x > 0).sum(1).max())]
        hidden = torch.tanh(self.word(x) + self.at(torch.arange(x.shape[1])))
        return self.head((hidden * (x > 0).unsqueeze(2)).sum(1))


@pytest.mark.parametrize("by_rows", [False, True])
def test_positions_up_to_the_longest_length_are_not_taken_for_unique_rows(by_rows):
    torch.manual_seed(0)
    lengths = torch.tensor([2, 1, SIZE, 3, 2, 1])
    x = torch.randint(1, 9, (SIZE, SIZE)) * (torch.arange(SIZE) < lengths[:, None])
    finding = probe_separability(
        Positions(), (x,), {}, layers_in_order=True, rows_are_examples=by_rows
    )
    # only where rows are taken for the examples do these positions make norms wrong
    assert finding.state == ("unchecked" if by_rows else "checked"), finding.sentence


RIGHT = {
    "gather": lambda x: x.gather(1, torch.tensor([[3, 1, 0, 2]]).expand(len(x), -1)),
    "best entries": lambda x: x.topk(4, dim=1).values,
    "chosen": lambda x: x[torch.arange(len(x))],
    "turned twice": lambda x: x.flip(0).flip(0),
    "mask": lambda x: x[x.isfinite().all(1)],
}


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_rows_that_stay_those_of_the_examples_are_fine(name, drops):
    torch.manual_seed(0)

    def how(x):
        return RIGHT[name](x), torch.arange(len(x))

    x = examples()
    assert opacus_is_right(Deduplicating(how), [x])
    model = Deduplicating(how, drops=drops)
    finding = probe_separability(model, (x,), {}, layers_in_order=True)
    assert finding.state == "checked", finding.sentence


TRAINED = [
    (lambda: Reordering(ORDERS["by length"]), "'first' is given the examples in ano"),
    (lambda: Deduplicating(unique), "'first' depend on the values of the examples"),
]


@pytest.mark.filterwarnings("ignore:This run", "ignore:Secure RNG", "ignore:Full")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "fast", "ew"])
@pytest.mark.parametrize(("build", "reason"), TRAINED)
def test_a_training_whose_model_sorts_is_refused(mode, build, reason):
    torch.manual_seed(0)
    model, (x, lengths) = build(), batch(UNSORTED)
    inputs = (x, lengths) if isinstance(model, Reordering) else (examples(),)
    labels = torch.arange(SIZE) % 3
    engine = PrivacyEngine()
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*inputs, labels), SIZE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    for *inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(*inputs), targets).backward()
        optimizer.step()
    with pytest.raises(AccountingError, match=reason):
        _ = engine.ledger
