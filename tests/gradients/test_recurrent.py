"""Recurrent layers: unrolled and tapped, against one example after the other.

In sweeps, and in training (the fast mode).
"""

import copy

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from opacus_pi.gradients.clipping import TrainingTaps
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.no_trace import isolated

from .oracle import loop_norms

LOSSES = nn.CrossEntropyLoss(reduction="none")
B, T, D, H = 5, 6, 4, 3
LAYERS = {
    "plain": {},
    "sequence-first": {"batch_first": False},
    "no-bias": {"bias": False},
    "two-layers": {"num_layers": 2},
    "both-directions": {"num_layers": 2, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}
KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "dp-lstm": DPLSTM,
    "dp-gru": DPGRU,
    "dp-rnn": DPRNN,
}


class Net(nn.Module):
    """A recurrent layer, whose outputs and last states are all used."""

    def __init__(self, layer, packs=False, starts=False):
        super().__init__()
        self.layer, self.packs = layer, packs
        directions = 2 if layer.bidirectional else 1
        size = layer.proj_size or layer.hidden_size
        self.start = nn.Linear(1, size) if starts else None
        self.head = nn.Linear(directions * size, 3)
        self.last = nn.Linear(size, 3)

    def forward(self, x, lengths=None):
        state = None
        if self.start is not None:
            count = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
            first = torch.tanh(self.start(x[:, 0, :1]))
            state = first.expand(count, -1, -1)
            if isinstance(self.layer, nn.LSTM):
                cell = x[None, :, 1, :1].expand(count, -1, self.layer.hidden_size)
                state = state, cell
        if self.packs:
            x = pack_padded_sequence(
                x, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
        elif not self.layer.batch_first:
            x = x.transpose(0, 1)
        out, last = self.layer(x, state) if state is not None else self.layer(x)
        if self.packs:
            out = pad_packed_sequence(out, batch_first=True)[0]
        elif not self.layer.batch_first:
            out = out.transpose(0, 1)
        ends = last if isinstance(last, tuple) else (last,)
        ends = [end for end in ends if end.shape[-1] == self.last.in_features]
        return self.head(out.sum(1)) + self.last(torch.stack(ends).sum((0, 1)))


def made(kind="lstm", packs=False, starts=False, **options):
    torch.manual_seed(0)
    layer = KINDS[kind](D, H, **{"batch_first": True, **options})
    return Net(layer, packs, starts), torch.randn(B, T, D), torch.randint(3, (B,))


def check(model, x, y, leftover=()):
    truth = loop_norms(copy.deepcopy(model), LOSSES, x, y)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        net = copy.deepcopy(model).to(dtype)
        inputs = (x[0].to(dtype), *x[1:]) if isinstance(x, tuple) else x.to(dtype)
        with isolated():
            engine = NormEngine(net, LOSSES)
            norms = engine.squares(inputs, y)[0].sqrt()
        assert engine._taps.leftover == set(leftover)
        torch.testing.assert_close(norms, truth, rtol=tolerance, atol=0)
    return engine


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recurrent_layers(kind, options):
    check(*made(kind, **LAYERS[options]))


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    draw = torch.Generator().manual_seed(seed)
    b, t, d, h = (1 + int(n) for n in torch.randint(1, 9, (4,), generator=draw))
    kind = ["lstm", "gru", "rnn"][seed % 3]
    torch.manual_seed(seed)
    layer = KINDS[kind](d, h, 1 + seed // 3, batch_first=True, bidirectional=seed > 3)
    check(Net(layer), torch.randn(b, t, d), torch.randint(3, (b,)))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projected_states(bidirectional):
    check(*made(proj_size=2, num_layers=2, bidirectional=bidirectional))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_initial_states_with_gradients(kind):
    check(*made(kind, starts=True, num_layers=2, bidirectional=True))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_packed_sequences(kind):
    model, x, y = made(kind, packs=True, num_layers=2, bidirectional=True)
    check(model, (x, torch.tensor([3, 6, 1, 4, 2])), y)


@pytest.mark.parametrize("names", [["weight_hh_l0"], ["bias_ih_l0", "weight_ih_l0"]])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_frozen_parameters(kind, names):
    model, x, y = made(kind)
    for name in names:
        getattr(model.layer, name).requires_grad_(False)
    check(model, x, y)


def test_a_layer_called_twice():
    model, x, y = made()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x) + self.net(x.flip(1) + 1)

    check(Twice(), x, y)


def test_empty_batch():
    model, x, y = made()
    with isolated():
        squares, _ = NormEngine(model, LOSSES).squares(x, y)
        engine = NormEngine(model, LOSSES)
        engine.squares(x, y)
        none, _ = engine.squares(x[:0], y[:0])
    assert len(squares) == B and none.shape == (0,)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "relu"])
def test_outputs_are_those_of_the_plain_layer(kind):
    model, x, y = made(kind, num_layers=2, bidirectional=True)
    with isolated():
        _, outputs = NormEngine(model, LOSSES).squares(x, y)
    torch.testing.assert_close(outputs, model.eval()(x).detach())


def trained(model, x, y, attached=None):
    """Squares and one weighted sum of all gradients, from one backward pass."""
    taps = attached or TrainingTaps()
    handles = taps.attach(model)
    inputs = x if isinstance(x, tuple) else (x,)
    LOSSES(model(*inputs), y).sum().backward()
    (cache,) = taps.caches
    found = cache.gradients(model.parameters(), model)
    taps.require_complete(model.parameters(), model)
    for handle in handles:
        handle.remove()
    taps.detach()
    factors = torch.linspace(-1, 1, len(y))
    sums = [found[p].weighted_sum(factors).flatten() for p in model.parameters()]
    return sum(g.squares for g in found.values()), torch.cat(sums)


def alone(model, x, y):
    """The same from one backward pass for each example."""
    rows = []
    for i in range(len(y)):
        inputs = x if isinstance(x, tuple) else (x,)
        loss = LOSSES(model(*(one[i : i + 1] for one in inputs)), y[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    rows = torch.stack(rows)
    return rows.square().sum(1).double(), torch.linspace(-1, 1, len(y)) @ rows


def check_training(model, x, y):
    model.train()
    squares, total = trained(model, x, y)
    expected, expected_total = alone(model, x, y)
    torch.testing.assert_close(squares, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(total, expected_total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [name for name in LAYERS if name != "dropout"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "relu"])
@pytest.mark.filterwarnings("error")
def test_training_clips_from_the_gates(kind, options):
    check_training(*made(kind, **LAYERS[options]))


@pytest.mark.filterwarnings("error")
def test_training_with_projected_and_initial_states():
    check_training(*made(proj_size=2, bidirectional=True))
    check_training(*made("gru", starts=True, num_layers=2))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.filterwarnings("error")
def test_training_on_packed_sequences(kind):
    model, x, y = made(kind, packs=True, num_layers=2, bidirectional=True)
    check_training(model, (x, torch.tensor([3, 6, 1, 4, 2])), y)


@pytest.mark.filterwarnings("error")
def test_training_keeps_hooks_of_the_user_and_modes():
    model, x, y = made()
    model.layer.register_forward_hook(lambda m, args, out: (2 * out[0], out[1]))
    check_training(model, x, y)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.layer)


@pytest.mark.filterwarnings("ignore:.*slow")
def test_training_with_a_weight_that_is_used_elsewhere_too():
    class Net2(Net):
        def forward(self, x):
            weight = self.layer.weight_hh_l0  # also used outside of layers
            return super().forward(x) + (x[:, 0] @ weight[:D, :3].square())

    torch.manual_seed(0)
    model = Net2(nn.GRU(D, H, batch_first=True))
    x, y = torch.randn(B, T, D), torch.randint(3, (B,))
    with pytest.raises(ValueError, match="weight_hh_l0"):  # torch.func refuses GRUs
        trained(model, x, y)


def test_training_with_dropout_between_layers_is_refused():
    model, x, y = made(num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match="layer.weight_hh_l0"):
        trained(model.train(), x, y)
    check_training(*made(num_layers=2, dropout=0.0))
