"""Models that treat examples separately, and models that mix them.

Each entry is a function that makes a model and the inputs of a batch of six examples.
"""

import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn
from torch.nn import functional as F

SIZE = 6


def _generator():
    return torch.Generator().manual_seed(0)


def vectors(size=SIZE, width=5):
    return torch.randn(size, width, generator=_generator())


def images(size=SIZE, side=8):
    return torch.randn(size, 3, side, side, generator=_generator())


def sequences(size=SIZE, length=SIZE, width=4):
    return torch.randn(size, length, width, generator=_generator())


def tokens(size=SIZE, length=7):
    return torch.randint(0, 11, (size, length), generator=_generator())


class Calls(nn.Module):
    """A model whose forward pass is a given function of its layers and inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Counting(nn.Module):
    """Its outputs depend on how often it was run, by any copy of it."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        Counting.runs += 1
        return self.layer(x) * Counting.runs


def encoder(**options):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, **options), 2, enable_nested_tensor=False
    )


def _routed(m, x):
    """A mixture of two experts: which rows go through which depends on the content."""
    first = x[:, 0] > 0
    out = x.new_zeros(len(x), 3)
    out[first] = m.one(x[first])
    out[~first] = m.two(x[~first])
    return out


def _dropped_tokens(m, x):
    """Dropout on the tokens that are not padding: how many there are is content."""
    real = x > 2
    out = m.embed(x)
    packed = m.drop(out[real])
    out = out.masked_scatter(real[..., None], packed)
    return m.head(out.mean(1))


def _block(m, x):
    x = x + m.attend(x, x, x)[0]
    return m.outer(torch.relu(m.inner(m.norm(x)))).mean(1)


def _tied(m, x):
    return F.linear(m.embed(x).mean(1), m.embed.weight)


def _weight_norm(m, x):
    return m.layer(x)


def _checkpointed(m, x):
    return m.head(torch.utils.checkpoint.checkpoint(m.body, x, use_reentrant=False))


HONEST = {
    "linear": lambda: (nn.Linear(5, 3), (vectors(),)),
    "mlp": lambda: (
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        (vectors(),),
    ),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (images(),),
    ),
    "group norm": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()),
        (images(),),
    ),
    "instance norm": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)),
        (images(),),
    ),
    "layer norm": lambda: (
        nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
        (vectors(),),
    ),
    "frozen batch norm": lambda: (
        Calls(
            lambda m, x: m.head(m.norm.eval()(x)),
            norm=nn.BatchNorm1d(5).eval().requires_grad_(False),
            head=nn.Linear(5, 3),
        ),
        (vectors(),),
    ),
    "square images": lambda: (
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(108, 3)),
        (images(side=6),),
    ),
    "residual": lambda: (
        Calls(
            lambda m, x: m.b(x + torch.tanh(m.a(x))),
            a=nn.Linear(5, 5),
            b=nn.Linear(5, 3),
        ),
        (vectors(),),
    ),
    "dropout": lambda: (
        nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, 3)),
        (vectors(),),
    ),
    "functional dropout": lambda: (
        Calls(lambda m, x: m.a(F.dropout(x, 0.5, m.training)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "stochastic depth": lambda: (
        Calls(
            lambda m, x: m.a(x) * (torch.rand(len(x), 1) > 0.5),
            a=nn.Linear(5, 3),
        ),
        (vectors(),),
    ),
    "dropped tokens": lambda: (
        Calls(
            _dropped_tokens,
            embed=nn.Embedding(11, 4),
            drop=nn.Dropout(),
            head=nn.Linear(4, 3),
        ),
        (tokens(),),
    ),
    "embedding": lambda: (
        Calls(
            lambda m, x: m.h(m.e(x).mean(1)), e=nn.Embedding(11, 4), h=nn.Linear(4, 3)
        ),
        (tokens(),),
    ),
    "weight tying": lambda: (
        Calls(_tied, embed=nn.Embedding(11, 4)),
        (tokens(),),
    ),
    "lstm": lambda: (
        Calls(
            lambda m, x: m.h(m.r(x)[0][:, -1]),
            r=DPLSTM(4, 5, batch_first=True),
            h=nn.Linear(5, 3),
        ),
        (sequences(),),
    ),
    "transposed for a time-first lstm": lambda: (
        Calls(
            lambda m, x: m.h(m.r(x.transpose(0, 1))[0][-1]),
            r=DPLSTM(4, 5, batch_first=False),
            h=nn.Linear(5, 3),
        ),
        (sequences(length=9),),
    ),
    "attention": lambda: (
        Calls(
            lambda m, x: m.h(m.a(x, x, x)[0].mean(1)),
            a=DPMultiheadAttention(4, 2, batch_first=True),
            h=nn.Linear(4, 3),
        ),
        (sequences(),),
    ),
    "transformer block": lambda: (
        Calls(
            _block,
            attend=DPMultiheadAttention(4, 2, batch_first=True),
            norm=nn.LayerNorm(4),
            inner=nn.Linear(4, 8),
            outer=nn.Linear(8, 4),
        ),
        (sequences(),),
    ),
    "transformer encoder": lambda: (
        encoder(batch_first=True),
        (sequences(),),
    ),
    "position table": lambda: (
        Calls(
            lambda m, x: m.h((m.e(x) + m.p(torch.arange(7))).mean(1)),
            e=nn.Embedding(11, 4),
            p=nn.Embedding(7, 4),
            h=nn.Linear(4, 3),
        ),
        (tokens(),),
    ),
    "experts": lambda: (
        Calls(_routed, one=nn.Linear(5, 3), two=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "cosine head": lambda: (
        Calls(
            lambda m, x: F.linear(F.normalize(m.a(x), dim=1), F.normalize(m.w.weight)),
            a=nn.Linear(5, 4),
            w=nn.Linear(4, 3),
        ),
        (vectors(),),
    ),
    "spectral norm": lambda: (
        Calls(_weight_norm, layer=nn.utils.spectral_norm(nn.Linear(5, 3))),
        (vectors(),),
    ),
    "weight norm": lambda: (
        Calls(
            _weight_norm, layer=nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        ),
        (vectors(),),
    ),
    "checkpointing": lambda: (
        Calls(_checkpointed, body=nn.Linear(5, 6), head=nn.Linear(6, 3)),
        (vectors(),),
    ),
    "two inputs": lambda: (
        Calls(lambda m, x, z: m.a(x) * m.b(z), a=nn.Linear(5, 3), b=nn.Linear(5, 3)),
        (vectors(), vectors() * 2),
    ),
    "nested outputs": lambda: (
        Calls(
            lambda m, x: {
                "logits": m.a(x),
                "states": [m.a(x), (x.sum(),)],
                "name": "n",
            },
            a=nn.Linear(5, 3),
        ),
        (vectors(),),
    ),
    "plain lstm with states": lambda: (
        nn.LSTM(4, 5, num_layers=SIZE, batch_first=True),
        (sequences(),),
    ),
}


def _standardised(m, x):
    return m.a((x - x.mean(0)) / (x.std(0) + 1e-5))


MIXING = {
    "batch norm": lambda: (
        nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)),
        (vectors(),),
    ),
    "functional batch norm": lambda: (
        Calls(
            lambda m, x: m.a(F.batch_norm(x, None, None, training=True)),
            a=nn.Linear(5, 3),
        ),
        (vectors(),),
    ),
    "standardised": lambda: (Calls(_standardised, a=nn.Linear(5, 3)), (vectors(),)),
    "standardised, with dropout": lambda: (
        Calls(
            lambda m, x: m.d(_standardised(m, x)), a=nn.Linear(5, 3), d=nn.Dropout(0.5)
        ),
        (vectors(),),
    ),
    "standardised, functional dropout": lambda: (
        Calls(lambda m, x: F.dropout(_standardised(m, x), 0.5), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "a thousandth of the mean": lambda: (
        Calls(lambda m, x: m.a(x + 1e-3 * x.mean(0)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "a millionth of the mean": lambda: (
        Calls(lambda m, x: m.a(x + 1e-6 * x.mean(0)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "largest of the batch": lambda: (
        Calls(lambda m, x: m.a(x / x.abs().max()), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "previous example": lambda: (
        Calls(lambda m, x: m.a(x + x.roll(1, 0)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "the example before the previous one": lambda: (
        Calls(lambda m, x: m.a(x + x.roll(2, 0)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "mirrored example": lambda: (
        Calls(lambda m, x: m.a(x + x.flip(0)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "those before": lambda: (
        Calls(lambda m, x: m.a(x.cumsum(0)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "those after": lambda: (
        Calls(lambda m, x: m.a(x.flip(0).cumsum(0).flip(0)), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "time-first lstm": lambda: (
        Calls(lambda m, x: m.h(m.r(x)[0][:, -1]), r=DPLSTM(4, 5), h=nn.Linear(5, 3)),
        (sequences(),),
    ),
    "time-first gru of torch": lambda: (
        Calls(lambda m, x: m.h(m.r(x)[0][:, -1]), r=nn.GRU(4, 5), h=nn.Linear(5, 3)),
        (sequences(),),
    ),
    "time-first attention": lambda: (
        Calls(
            lambda m, x: m.h(m.a(x, x, x)[0].mean(1)),
            a=DPMultiheadAttention(4, 2),
            h=nn.Linear(4, 3),
        ),
        (sequences(),),
    ),
    "time-first encoder": lambda: (encoder(), (sequences(),)),
    "attention between examples": lambda: (
        Calls(
            lambda m, x: torch.softmax(x @ x.T, 1) @ m.a(x),
            a=nn.Linear(5, 3),
        ),
        (vectors(),),
    ),
    "softmax over the batch": lambda: (
        Calls(lambda m, x: m.a(x).softmax(0), a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "similarities": lambda: (
        Calls(lambda m, x: m.a(x) @ m.a(x).T, a=nn.Linear(5, 3)),
        (vectors(),),
    ),
    "hidden in a dict": lambda: (
        Calls(
            lambda m, x: {"fine": m.a(x), "nested": (None, [m.a(x - x.mean(0))])},
            a=nn.Linear(5, 3),
        ),
        (vectors(),),
    ),
    "images without a channel": lambda: (
        nn.Conv2d(SIZE, SIZE, 3, padding=1),
        (images(side=8)[:, 0],),
    ),
}
