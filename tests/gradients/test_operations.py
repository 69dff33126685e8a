"""Weights used outside of layers: each operation against a loop over the examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from opacus_pi.gradients.clipping import example_norms
from opacus_pi.gradients.clipping.training_taps import TrainingTaps
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.no_trace import isolated

from .oracle import loop_norms

LOSSES = nn.CrossEntropyLoss(reduction="none")
B, T, D = 6, 5, 4  # examples, positions, features
BUFFER = torch.randn(D, generator=torch.Generator().manual_seed(3))


class Using(nn.Module):
    """Hands a sequence ``(b, t, d)`` and free parameters to a function."""

    def __init__(self, function, *shapes):
        super().__init__()
        torch.manual_seed(0)
        self.function = function or self.function
        self.weights = nn.ParameterList(0.5 * torch.randn(shape) for shape in shapes)
        self.register_buffer("constant", BUFFER.clone())
        self.before, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x):
        h = self.function(self.before(x), *self.weights)
        return self.head(torch.tanh(h).reshape(len(x), -1, D).mean(1))


def with_token(x, token):
    return torch.cat([token, x], 1)


def tokens_of(x):
    return (7 * x.sigmoid()).long()[..., 0]


def image_of(x):
    return x[:, :, None, :].expand(-1, -1, 4, -1)  # five channels of 4 x 4 pixels


def shifted(x, w, v):
    shift = torch.zeros(T, D)
    shift = shift + v
    return x * w[:, None] + shift


def written_in_place(x, w):
    value = w.clone()
    value.mul_(2)
    return x * value


def three_projections(x, w):
    q, k, v = (F.linear(x, part) for part in w.chunk(3))
    return F.scaled_dot_product_attention(q, k, v)


def relative_positions(x, table):
    places = torch.arange(T)
    bias = table[(places[:, None] - places).flatten() + T - 1].view(T, T)
    return (x @ x.mT + bias).softmax(-1) @ x


CASES = {
    # entry by entry
    "scale": (lambda x, w: x * w, (D,)),
    "shift in place": (lambda x, w: (x * 1.0).add_(w), (D,)),
    "difference": (lambda x, w: w - x, (T, D)),
    "quotient": (lambda x, w: x / (w + 3), (D,)),
    "reversed quotient": (lambda x, w: w / (x.square() + 1), (D,)),
    "power": (lambda x, w: (x.square() + 0.1) ** w, (D,)),
    "with a factor": (lambda x, w: torch.add(x, w, alpha=2), (D,)),
    "chosen by a mask": (lambda x, w: torch.where(x > 0, x, w), (D,)),
    "one for all": (lambda x, w: w * x, ()),
    "channels first": (lambda x, w: w[:, None] * x, (T,)),
    "by view": (lambda x, w: x * w.view(1, -1, 1), (T,)),
    "two in one": (lambda x, w, v: torch.addcmul(x, w, v), (D,), (T, D)),
    "an axis of one": (lambda x, w: x[..., :1] * w, (T, D)),
    "scale and shift the same": (lambda x, w: x * w + w, (D,)),
    # values computed from parameters
    "exponential": (lambda x, w: x * -w.float().exp(), (D,)),
    "plus one": (lambda x, w: x * (1 + w), (D,)),
    "parts": (lambda x, w: x * w[0] + w[1], (2, D)),
    "overlapping parts": (lambda x, w: x * w[:D] + w[1:], (D + 1,)),
    "the same part twice": (lambda x, w: (x * w[0] + w[1]) * w[0], (2, D)),
    "positions cut": (lambda x, w: x + w[:, :T], (1, 9, D)),
    "positions looked up": (lambda x, w: x + F.embedding(torch.arange(T), w), (9, D)),
    "positions looked up, the first one ignored": (
        lambda x, w: x + F.embedding(torch.arange(T), w, padding_idx=0),
        (9, D),
    ),
    "positions indexed": (lambda x, w: x + w[torch.arange(T)], (9, D)),
    "two parameters": (lambda x, w, v: x @ (w @ v), (D, 2), (2, D)),
    "two made one": (lambda x, w, v: x * torch.cat([w, v]), (1,), (D - 1,)),
    "normalised": (lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)), (D, D)),
    "with a constant": (shifted, (T,), (D,)),
    "relative positions": (relative_positions, (2 * T - 1,)),
    # one copy for each example
    "expanded": (lambda x, w: with_token(x, w.expand(len(x), -1, -1)), (1, 1, D)),
    "repeated": (lambda x, w: with_token(x, w.repeat(len(x), 1, 1)), (1, D)),
    "several": (lambda x, w: with_token(x, w[None].expand(len(x), -1, -1)), (2, D)),
    "one for all tokens": (lambda x, w: with_token(x, w.expand(len(x), 3, D)), (D,)),
    "expanded and scaled": (
        lambda x, w: with_token(x, 2 * w.exp().expand(len(x), -1, -1)),
        (1, 1, D),
    ),
    # operations with a rule
    "linear": (F.linear, (D, D), (D,)),
    "product": (lambda x, w: x @ w, (D, D)),
    "product with a transpose": (lambda x, w: x @ w.T, (D, D)),
    "product with a vector": (lambda x, w: x * (x @ w)[..., None], (D,)),
    "product from the left": (lambda x, w: w @ x, (3, T)),
    "product by heads": (
        lambda x, w: x.unflatten(2, (2, 2)).transpose(1, 2) @ w,
        (2, 2, 2),
    ),
    "product by heads from the left": (lambda x, w: w @ x[:, None], (2, T, T)),
    "projections": (three_projections, (3 * D, D)),
    "einsum": (lambda x, w: torch.einsum("btd,de->bte", x, w), (D, D)),
    "einsum, weight first": (lambda x, w: torch.einsum("ed,btd->bte", w, x), (D, D)),
    "einsum of positions": (lambda x, w: torch.einsum("btd,st->bsd", x, w), (3, T)),
    "einsum by position": (lambda x, w: torch.einsum("btd,tde->bte", x, w), (T, D, D)),
    "einsum of one position": (
        lambda x, w: torch.einsum("bd,de->be", x.mean(1), w),
        (D, D),
    ),
    "convolution": (
        lambda x, w, b: F.conv2d(image_of(x), w, b, padding=1),
        (4, T, 3, 3),
        (4,),
    ),
    "standardised convolution": (
        lambda x, w: F.conv2d(image_of(x), w - w.mean((1, 2, 3), keepdim=True)),
        (4, T, 1, 1),
    ),
    "transposed convolution": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2),
        (T, 4, 2),
    ),
    "look up": (lambda x, w: x + F.embedding(tokens_of(x), w, padding_idx=2), (7, D)),
    "look up by index": (lambda x, w: x + w[tokens_of(x) - 7], (7, D)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (D,), w, b), (D,), (D,)),
    "layer norm without shift": (lambda x, w: F.layer_norm(x, (D,), weight=w), (D,)),
    "rms norm": (lambda x, w: F.rms_norm(x, (D,), w), (D,)),
    "group norm": (lambda x, w, b: F.group_norm(x, T, w, b), (T,), (T,)),
    "batch norm": (
        lambda x, w: F.batch_norm(x, 0.1 * w.detach(), 1 + w.detach() ** 2, w),
        (T,),
    ),
    "scale and shift from one": (
        lambda x, w: F.layer_norm(x, (D,), w[0], w[1]),
        (2, D),
    ),
    "prelu": (lambda x, w: F.prelu(x, w), (T,)),
}
WITHOUT_RULE = {
    "written in place": (written_in_place, (D,)),
    "outer": (lambda x, w: torch.kron(x, w), (1, 1)),
    "written to": (lambda x, w: torch.zeros(B, T, D).copy_(w) * x, (D,)),
}


def batch_of(size=B):
    torch.manual_seed(1)
    return torch.randn(size, T, D), torch.arange(size) % 3


def measured(model, x, y):
    with isolated():
        engine = NormEngine(model, LOSSES)
        squares, _ = engine.squares(x, y)
        again, _ = engine.squares(x, y)
    assert torch.equal(squares, again)
    return engine, squares.sqrt()


@pytest.mark.parametrize("name", CASES)
def test_an_operation_with_a_rule(name):
    model, (x, y) = Using(*CASES[name]), batch_of()
    engine, norms = measured(model, x, y)
    assert not engine._taps.leftover
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_of_an_operation(name):
    """Training adds the gradients up with factors; autograd one after the other."""
    model, (x, y) = Using(*CASES[name]).double(), batch_of()
    x, taps, factors = x.double(), TrainingTaps(), torch.rand(B).double()
    handles = taps.attach(model)
    LOSSES(model(x), y).sum().backward()
    (cache,) = taps.caches
    parameters = list(model.parameters())
    found = cache.gradients(parameters, model)
    norms = example_norms(found.values())
    sums = [found[p].weighted_sum(factors).view_as(p) for p in parameters]
    for handle in handles:
        handle.remove()
    taps.detach()
    truth = torch.autograd.grad((factors * LOSSES(model(x), y)).sum(), parameters)
    torch.testing.assert_close(sums, list(truth))
    torch.testing.assert_close(norms, loop_norms(model, LOSSES, x, y))


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_an_operation_without_a_rule_is_left_over(name):
    model, (x, y) = Using(*WITHOUT_RULE[name]), batch_of()
    model.forward(x)
    engine, norms = measured(model, x, y)
    assert engine._taps.leftover == {"weights.0"}
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["scale", "expanded", "linear", "positions cut"])
def test_a_batch_of_one_example(name):
    model, (x, y) = Using(*CASES[name]), batch_of(1)
    engine, norms = measured(model, x, y)
    assert not engine._taps.leftover
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=2e-6, atol=0)


def test_a_parameter_used_with_and_without_a_rule():
    """The part that a rule would measure is not lost."""
    model = Using(lambda x, w: x * w + w.exp() * (x * w.exp()).cumsum(1), (D,))
    x, y = batch_of()
    model.function = lambda x, w: torch.kron(x * w.exp(), w[:1, None, None])
    engine, norms = measured(model, x, y)
    assert engine._taps.leftover == {"weights.0"}
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=2e-6, atol=0)


def test_values_cut_off_from_autograd():
    """A straight-through estimator: the difference to rounded weights is constant."""

    def rounded(x, w):
        return F.linear(x, w + (w.round() - w).detach())

    model, (x, y) = Using(rounded, (D, D)), batch_of()
    engine, norms = measured(model, x, y)
    assert not engine._taps.leftover
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=2e-6, atol=0)


class CastNorm(nn.GroupNorm):
    """Normalises in the precision of its weight, as diffusion models do."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).type(x.dtype)


class Standardised(nn.Conv1d):
    """A convolution with a standardised weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        weight = weight / (weight.std((1, 2), keepdim=True) + 1e-5)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_override_forward():
    torch.manual_seed(0)
    layers = [Doubled(D, 6), nn.Tanh(), CastNorm(1, T), Standardised(T, 3, 3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3))
    x, y = batch_of()
    engine, norms = measured(model, x, y)
    assert not engine._taps.leftover
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=2e-6, atol=0)


class Checkpointed(Using):
    def __init__(self, use_reentrant):
        super().__init__(None, (D,), (D, D))
        self.use_reentrant = use_reentrant

    def function(self, x):
        scale, weight = self.weights
        return F.linear(x, weight).tanh() * scale

    def forward(self, x):
        h = self.before(x)
        if self.use_reentrant is None:
            h = self.function(h)
        else:
            h = checkpoint(self.function, h, use_reentrant=self.use_reentrant)
        return self.head(torch.tanh(h).mean(1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_operations_of_a_checkpointed_part(use_reentrant):
    """They run again in the backward pass, where they are followed, too."""
    model, (x, y) = Checkpointed(use_reentrant), batch_of()
    engine, norms = measured(model, x, y)
    assert not engine._taps.leftover
    model.use_reentrant = None
    truth = loop_norms(model, LOSSES, x, y)
    torch.testing.assert_close(norms, truth, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:There is no formula")
def test_a_checkpointed_part_in_training_is_refused():
    """Its second run is not followed, and would save other tensors than the first."""
    model, (x, y), taps = Checkpointed(False), batch_of(), TrainingTaps()
    taps.attach(model)
    LOSSES(model(x), y).sum().backward()
    (cache,) = taps.caches
    with pytest.raises(ValueError, match=r"weights\.0, weights\.1 cannot be computed"):
        cache.gradients(list(model.parameters()), model)


class Anchored(nn.Module):
    """A layer that is called with a table, which all examples share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = nn.Parameter(torch.randn(5, D)), nn.Embedding(5, D)
        self.inner, self.head = nn.Linear(D, D), nn.Linear(5, 3)

    def forward(self, x):
        keys = self.inner(self.table) + self.places(torch.arange(5))
        return self.head(torch.tanh(x.mean(1) @ keys.T))


def test_as_many_rows_as_examples_in_a_later_batch():
    """The search for such tables sees the first batch only."""
    model = Anchored()
    batches = [batch_of(size) for size in (3, 5, 6, 1)]
    with isolated():
        engine = NormEngine(model, LOSSES)
        norms = [engine.squares(*batch)[0].sqrt() for batch in batches]
    assert not engine._taps.leftover
    for found, batch in zip(norms, batches, strict=True):
        truth = loop_norms(Anchored(), LOSSES, *batch)
        torch.testing.assert_close(found, truth, rtol=2e-6, atol=0)


def test_as_many_rows_as_examples_in_a_later_batch_of_training():
    model, taps = Anchored().double(), TrainingTaps()
    taps.attach(model)
    for x, y in (batch_of(size) for size in (3, 5, 6, 1)):
        taps.clear()
        LOSSES(model(x.double()), y).sum().backward()
        found = taps.caches[0].gradients(list(model.parameters()), model)
        truth = loop_norms(Anchored(), LOSSES, x, y)
        torch.testing.assert_close(example_norms(found.values()), truth)
