"""Models for the tests of the fast mode, one for each way in which weights are used."""

import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn

from benchmarks.common.resnet import resnet18
from benchmarks.common.transformer import text_transformer, vit
from tests.gradients.models import frozen

CLASSES = 3


class Doubled(nn.Module):
    """A layer of a type that no rule knows."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in) / 3)
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return 2 * x @ self.weight.T + self.shift


class Tied(nn.Module):
    """The embedding's table is the weight of the last layer too."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.words(tokens)).mean(1))[:, :CLASSES]


class Functional(Tied):
    """The same model, using a function in place of the last layer."""

    def forward(self, tokens):
        hidden = torch.tanh(self.words(tokens)).mean(1)
        return F.linear(hidden, self.words.weight, self.head.bias)[:, :CLASSES]


class Reused(nn.Module):
    """A layer that is called twice, of convolutions and of a linear one."""

    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv1d(2, 2, 3, padding=1), nn.Linear(12, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x)))).flatten(1)
        return self.head(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Positions(nn.Module):
    """Parameters of a module that has layers as well."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.places = nn.Parameter(torch.randn(1, 3, 6))
        self.gain = nn.Parameter(torch.randn(6))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x.view(len(x), 2, 6)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(torch.tanh(self.mix(x) * self.gain).mean(1))


class Sequences(nn.Module):
    """Opacus's recurrent network and its attention."""

    def __init__(self):
        super().__init__()
        self.lstm = DPLSTM(6, 4, batch_first=True)
        self.attention = DPMultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        h = self.lstm(x.view(len(x), 2, 6))[0]
        return self.head(self.attention(h, h, h)[0].mean(1))


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )


def cnn(inplace=False):
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=inplace),
        nn.Conv1d(6, 8, 2, groups=2, bias=False),
        nn.InstanceNorm1d(8, affine=True),
        nn.Tanh(),
        nn.Conv1d(8, 4, 1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, CLASSES),
    )


def decoder():
    return nn.Sequential(
        nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 3, 2, dilation=2, bias=False),
        nn.Flatten(),
        nn.Linear(45, CLASSES),
    )


def bags():
    return nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, CLASSES))


def series(b):
    return torch.randn(b, 2, 6)


def tokens(b):
    return torch.randint(0, 9, (b, 5))


def images(b):
    return torch.randn(b, 3, 8, 8)


MODELS = {  # model, inputs
    "mlp": (mlp, series),
    "cnn": (cnn, series),
    "frozen": (lambda: frozen(mlp()), series),
    "linear": (lambda: nn.Linear(6, CLASSES), lambda b: torch.randn(b, 6)),
    "resnet18": (lambda: resnet18((3, 8, 8), CLASSES, width=8), images),
    "vit": (lambda: vit((3, 8, 8), CLASSES, dim=12, depth=1, num_heads=2), images),
    "text": (lambda: text_transformer(9, 5, CLASSES, 8, 1, 2), tokens),
    "tied": (Tied, tokens),
    "reused": (Reused, series),
    "unknown-layer": (
        lambda: nn.Sequential(nn.Flatten(), Doubled(12, 5), nn.Tanh(), Doubled(5, 3)),
        series,
    ),
    "outside-of-layers": (Positions, series),
    "recurrent": (Sequences, series),
}
MORE = {  # models that Opacus itself trains wrongly, or slowly
    "in-place": (lambda: cnn(inplace=True), series),
    "functional": (Functional, tokens),
    "decoder": (decoder, series),
    "bags": (bags, tokens),
}
