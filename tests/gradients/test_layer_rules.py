"""Layer rules: squares, weighted sums and formed gradients, against autograd."""

import pytest
import torch
from torch import nn

from opacus_pi.gradients import products
from opacus_pi.gradients.clipping import TrainingTaps
from opacus_pi.gradients.example_gradients import ExplicitGradients, add_up
from opacus_pi.gradients.layers import conv
from opacus_pi.gradients.layers.registry import (
    gradients_by_rule,
    layer_rule,
    register_layer_rule,
)
from opacus_pi.gradients.norm_engine import NormEngine
from tests.gradients.oracle import loop_norms
from tests.gradients.test_exact_formulas import CONVOLUTIONS

B = 7
TRANSPOSED = {
    "plain": (nn.ConvTranspose2d(4, 6, 3), (5, 4)),
    "strided": (nn.ConvTranspose2d(4, 6, 2, stride=2), (3, 4)),
    "one-dimension": (nn.ConvTranspose1d(3, 5, 4, stride=2, padding=1), (6,)),
    "three-dimensions": (nn.ConvTranspose3d(2, 3, (2, 1, 3), stride=2), (2, 3, 2)),
    "groups": (nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2, bias=False), (4, 5)),
    "output-padding": (
        nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=(1, 2)),
        (3, 2),
    ),
    "dilated": (
        nn.ConvTranspose2d(4, 6, 2, padding=1, output_padding=(2, 1), dilation=3),
        (4, 3),
    ),
    "dilated-groups": (
        nn.ConvTranspose1d(4, 6, 3, 2, output_padding=2, groups=2, dilation=3),
        (5,),
    ),
    "point": (nn.ConvTranspose2d(4, 6, 1, stride=2, output_padding=1), (3, 4)),
}


def image(layer, sizes):
    return torch.randn(B, layer.in_channels, *sizes)


LAYERS = {
    **{
        name: (layer, lambda layer=layer, sizes=sizes: image(layer, sizes))
        for name, (layer, sizes) in CONVOLUTIONS.items()
    },
    **{
        f"transposed-{name}": (
            layer,
            lambda layer=layer, sizes=sizes: image(layer, sizes),
        )
        for name, (layer, sizes) in TRANSPOSED.items()
    },
    "few-channels": (nn.Conv2d(2, 5, 3, stride=2), lambda: torch.randn(B, 2, 9, 7)),
    "reflected": (
        nn.Conv1d(3, 5, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(B, 3, 6),
    ),
    "linear": (nn.Linear(6, 5), lambda: torch.randn(B, 6)),
    "linear-short": (nn.Linear(6, 5), lambda: torch.randn(B, 2, 6)),
    "linear-long": (nn.Linear(6, 5), lambda: torch.randn(B, 4, 3, 6)),
    "embedding": (nn.Embedding(6, 4, padding_idx=2), lambda: torch.randint(6, (B, 5))),
    "embedding-single": (nn.Embedding(6, 4), lambda: torch.randint(6, (B,))),
    **{
        f"bag-{mode}-{padding}": (
            nn.EmbeddingBag(6, 4, mode=mode, padding_idx=padding),
            lambda: torch.randint(6, (B, 5)),
        )
        for mode in ("sum", "mean", "max")
        for padding in (None, 2)
    },
    "group-norm": (nn.GroupNorm(2, 6), lambda: torch.randn(B, 6, 4)),
    "layer-norm": (nn.LayerNorm([2, 3]), lambda: torch.randn(B, 4, 2, 3)),
    "rms-norm": (nn.RMSNorm(3), lambda: torch.randn(B, 4, 3)),
    "slope": (nn.PReLU(), lambda: torch.randn(B, 3, 4)),
    "slopes": (nn.PReLU(3), lambda: torch.randn(B, 3)),
    "cell": (nn.RNNCell(4, 3, nonlinearity="relu"), lambda: torch.randn(B, 4)),
    "gated-cell": (nn.GRUCell(4, 3, bias=False), lambda: torch.randn(B, 4)),
    "instance-norm": (nn.InstanceNorm1d(3, affine=True), lambda: torch.randn(B, 3, 4)),
}


def explicit(layer, x, grad):
    """Each example's gradients, one backward pass each."""
    names = [name for name, _ in layer.named_parameters()]
    found = {name: [] for name in names}
    for i in range(B):
        loss = (layer(x[i : i + 1]) * grad[i : i + 1]).sum()
        for name, g in zip(
            names, torch.autograd.grad(loss, list(layer.parameters())), strict=True
        ):
            found[name].append(g.flatten())
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("block", [1, 1 << 9, 1 << 18])
@pytest.mark.parametrize("kept", [0, 1000])
@pytest.mark.parametrize("name", LAYERS)
def test_rules(name, kept, block, monkeypatch):
    monkeypatch.setattr(products, "_CPU_BLOCK", block)
    monkeypatch.setattr(conv, "_MAX_KEPT", kept)
    torch.manual_seed(0)
    layer, inputs = LAYERS[name]
    layer, x = layer.double(), inputs()
    x = x.double() if x.is_floating_point() else x
    grad, factors = torch.randn_like(layer(x)), torch.rand(B).double()
    truth = explicit(layer, x, grad)
    for to_keep in (False, True):  # as a sweep and as clipping use them
        found = by_rule(layer, x, grad, list(truth))
        assert set(found) == set(truth)
        for parameter, rows in truth.items():
            gradients = found[parameter]
            gradients = gradients.kept() if to_keep else gradients
            total = gradients.weighted_sum(factors).flatten()
            more = torch.rand(B).double()
            parts = {
                "squares": (gradients.squares, rows.square().sum(1)),
                "added": (gradients.add_squares_to(more) - more, gradients.squares),
                "weighted": (total, factors @ rows),
                "form": (gradients.form().flatten(1), rows),
            }
            for part, (mine, true) in parts.items():
                torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12, msg=part)


def by_rule(layer, x, grad, names):
    return gradients_by_rule(layer_rule(layer), layer, ((x,), {}), grad, names)


@pytest.mark.parametrize("channels, size, is_explicit", [(4, 8, True), (64, 2, False)])
def test_what_is_smaller_is_kept(channels, size, is_explicit):
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    x, grad = torch.randn(2, B, channels, size, size)
    kept = by_rule(layer, x, grad, ["weight"])["weight"].kept()
    assert isinstance(kept, ExplicitGradients) == is_explicit


def test_several_uses_add_up_before_their_squares():
    parts = [ExplicitGradients(torch.randn(B, 2, 3).double()) for _ in range(3)]
    total = add_up(parts)
    rows = sum(part.values for part in parts).flatten(1)
    torch.testing.assert_close(total.squares, rows.square().sum(1))
    assert add_up(parts[:1]) is parts[0]


def use(kind):
    """One use of a matrix of 6 x 4, and the gradients by it."""
    if kind == "explicit":
        return ExplicitGradients(torch.randn(B, 24).double())
    if kind == "table":
        layer, x = nn.Embedding(6, 4), torch.randint(6, (B, 5))
        grad = torch.randn(B, 5, 4).double()
    else:
        positions = {"single": (), "long": (3, 2)}[kind]
        layer, x = nn.Linear(4, 6), torch.randn(B, *positions, 4).double()
        grad = torch.randn(B, *positions, 6).double()
    return by_rule(layer, x, grad, ["weight"])["weight"]


@pytest.mark.parametrize("block", [1, 1 << 18])
@pytest.mark.parametrize(
    "kinds, is_formed",
    [
        ("single single", False),
        ("long single long", False),
        ("table table", False),
        ("table single", False),
        ("long table single table", False),
        ("table explicit", True),
        ("long explicit", True),
    ],
)
def test_uses_of_several_kinds(kinds, is_formed, block, monkeypatch):
    monkeypatch.setattr(products, "_CPU_BLOCK", block)
    torch.manual_seed(0)
    parts = [use(kind) for kind in kinds.split()]
    rows = sum(part.form().flatten(1) for part in parts)
    total, factors = add_up(parts), torch.rand(B).double()
    assert isinstance(total, ExplicitGradients) == is_formed
    torch.testing.assert_close(total.squares, rows.square().sum(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(total.weighted_sum(factors).flatten(), factors @ rows)
    torch.testing.assert_close(total.form().flatten(1), rows)


def test_uses_that_cancel_are_not_too_small():
    """An embedding and an output layer with opposite gradients, in float32."""
    torch.manual_seed(0)
    tokens, hidden = torch.arange(6).expand(B, 6), 1e3 * torch.randn(B, 6, 4)
    grad = torch.eye(6).expand(B, 6, 6)
    below = by_rule(nn.Linear(4, 6), hidden, grad, ["weight"])["weight"]
    small = torch.randn(B, 6, 4)
    above = by_rule(nn.Embedding(6, 4), tokens, small - hidden, ["weight"])["weight"]
    truth = (hidden.double() + (small - hidden).double()).flatten(1).square().sum(1)
    found = add_up([above, below]).squares
    assert (found >= truth * (1 - 1e-2)).all() and (found < 2e3).all()


def test_users_rules_serve_layers_that_keep_forward():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.factor * x

    @register_layer_rule(Scale)
    def scale(module, x, grad, names):
        return {"factor": (x * grad).flatten(1).sum(1)}

    class Other(Scale):
        def forward(self, x):
            return 2 * self.factor * x

    assert layer_rule(Scale()) is scale and layer_rule(Other()) is None
    found = by_rule(Scale(), torch.ones(B, 3), torch.ones(B, 3), ["factor"])["factor"]
    assert found.squares.tolist() == [9.0] * B
    assert found.weighted_sum(torch.ones(B)).tolist() == [3.0 * B]


class Stepped(nn.Module):
    """A cell in a loop of the user, from a state that is computed."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(3, 3)

    def forward(self, x):
        state = torch.tanh(x[:, 0, :3])
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], hx=state)
        return self.head(state)


class Both(nn.Module):
    """A bilinear layer on vectors and on sequences."""

    def __init__(self):
        super().__init__()
        self.long, self.short = nn.Bilinear(4, 4, 3), nn.Bilinear(3, 4, 3, bias=False)

    def forward(self, x):
        return self.short(self.long(x, x.flip(1)).sum(1), input2=x[:, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stepped(nn.GRUCell(4, 3)),
        lambda: Stepped(nn.RNNCell(4, 3)),
        lambda: Stepped(nn.RNNCell(4, 3, bias=False, nonlinearity="relu")),
        Both,
    ],
)
def test_layers_of_two_inputs_in_sweeps_and_in_training(make):
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(B, 5, 4).double(), torch.arange(B) % 3
    losses, taps = nn.CrossEntropyLoss(reduction="none"), TrainingTaps()
    truth = loop_norms(model, losses, x, y)
    engine = NormEngine(model, losses)
    torch.testing.assert_close(engine.squares(x, y)[0].sqrt(), truth)
    assert not engine._taps.leftover
    taps.attach(model.train())
    losses(model(x), y).sum().backward()
    found = taps.caches[0].gradients(model.parameters(), model).values()
    torch.testing.assert_close(sum(g.squares for g in found).sqrt(), truth)


def test_a_rule_of_a_layer_whose_output_autograd_keeps():
    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.tanh(self.factor * x)

    @register_layer_rule(Squashed)
    def squashed(module, x, grad, names):
        slope = 1 - torch.tanh(module.factor.detach() * x).square()
        return {"factor": (x * slope * grad).flatten(1).sum(1)}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Squashed(), nn.Linear(4, 3))
    x, y = torch.randn(B, 4), torch.arange(B) % 3
    losses = nn.CrossEntropyLoss(reduction="none")
    engine = NormEngine(model, losses)
    found = engine.squares(x, y)[0].sqrt()
    assert not engine._taps.leftover
    torch.testing.assert_close(
        found, loop_norms(model, losses, x, y), rtol=1e-5, atol=0
    )
