"""Embedding bags with offsets and weights: norms, against single examples."""

import copy

import pytest
import torch
from torch import nn

from opacus_pi.gradients.layers.registry import gradients_by_rule, layer_rule
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.no_trace import isolated

from .oracle import loop_norms

LOSSES = nn.CrossEntropyLoss(reduction="none")
NUM_ROWS, B, T = 7, 6, 5


class Ragged(nn.Module):
    """Bags of different lengths, one after the other, with 0 as end of a bag."""

    def __init__(self, mode, last, weighted, padding):
        super().__init__()
        self.bag = nn.EmbeddingBag(
            NUM_ROWS, 4, mode=mode, include_last_offset=last, padding_idx=padding
        )
        self.head, self.weighted = nn.Linear(4, 3), weighted

    def forward(self, tokens):
        lengths = (tokens > 0).sum(1)
        flat = tokens[tokens > 0]
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        offsets = offsets if self.bag.include_last_offset else offsets[:-1]
        weights = None
        if self.weighted:
            weights = torch.cos(flat.to(self.head.weight.dtype))
        return self.head(
            self.bag(flat, offsets, per_sample_weights=weights)
            if self.weighted
            else self.bag(flat, offsets)
        )


class Weighted(nn.Module):
    """Weights that are learned, too."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(NUM_ROWS, 4, mode="sum", padding_idx=1)
        self.weights, self.head = nn.Embedding(NUM_ROWS, 1), nn.Linear(4, 3)

    def forward(self, tokens):
        weights = self.weights(tokens)[..., 0]
        return self.head(torch.tanh(self.bag(tokens, None, weights)))


def check(model, x, leftover=frozenset()):
    y = torch.arange(len(x)) % 3
    truth = loop_norms(copy.deepcopy(model), LOSSES, x, y)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        with isolated():
            engine = NormEngine(copy.deepcopy(model).to(dtype), LOSSES)
            norms = engine.squares(x, y)[0].sqrt()
        torch.testing.assert_close(norms, truth, rtol=tolerance, atol=0)
        assert engine._taps.leftover == leftover


def ragged(seed=0):
    torch.manual_seed(seed)
    tokens = torch.randint(1, NUM_ROWS, (B, T))
    lengths = torch.tensor([3, 0, 5, 1, 2, 4])
    return tokens * (torch.arange(T) < lengths[:, None])


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize(
    "mode, weighted",
    [("sum", False), ("sum", True), ("mean", False), ("max", False)],
)
def test_bags_at_offsets(mode, weighted, padding):
    torch.manual_seed(0)
    check(Ragged(mode, False, weighted, padding), ragged())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_rule_with_the_last_offset(mode):
    model, tokens = Ragged(mode, True, False, 2), ragged()
    layer = model.bag.double()
    lengths = (tokens > 0).sum(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    grad = torch.randn(B, 4).double()
    rule = layer_rule(layer)
    call = ((tokens[tokens > 0], offsets), {})
    found = gradients_by_rule(rule, layer, call, grad, ["weight"])["weight"]
    for i in range(B):
        loss = (layer(*call[0])[i] * grad[i]).sum()
        (truth,) = torch.autograd.grad(loss, layer.weight)
        torch.testing.assert_close(found.form()[i], truth, rtol=1e-9, atol=0)
        assert float(found.squares[i]) == pytest.approx(float(truth.square().sum()))


def test_learned_weights():
    torch.manual_seed(0)
    check(Weighted(), torch.randint(NUM_ROWS, (B, T)))


def test_bags_used_twice_and_bags_scaled_by_frequency():
    class Twice(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.bag = nn.EmbeddingBag(NUM_ROWS, 4, **options)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            first = self.bag(tokens[:, :3])
            return self.head(torch.tanh(first) * self.bag(tokens[:, 2:]))

    torch.manual_seed(0)
    x = torch.randint(NUM_ROWS, (B, T))
    check(Twice(mode="sum"), x)
    check(Twice(scale_grad_by_freq=True), x, {"bag.weight"})
