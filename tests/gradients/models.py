"""Small networks: one for each way in which a parameter can be used."""

import types

import torch
import torch.nn.functional as F
from torch import nn

NUM_CLASSES = 5


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    """``out += identity`` and an in-place ReLU after it."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            norm(),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            norm(),
        )

    def forward(self, x):
        out = self.body(x)
        out += x
        return F.relu_(out)


def residual(norm):
    def trained_norm():
        layer = norm()
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
        return layer

    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        trained_norm(),
        nn.ReLU(inplace=True),
        Residual(trained_norm),
        Residual(trained_norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, NUM_CLASSES),
    )


class Transformer(nn.Module):
    """A raw position parameter, attention and LayerNorms, batch first or not."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 6, 8) * 0.3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, NUM_CLASSES)
        self.batch_first = batch_first

    def forward(self, x):
        x = x + self.position
        if not self.batch_first:
            x = x.transpose(0, 1)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.feed(self.norms[1](x))
        return self.head(x.mean(1 if self.batch_first else 0))


class Attends(nn.Module):
    """Attention called in a way of the test's choice."""

    def __init__(self, attend, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        if self.attention.out_proj.bias is not None:
            nn.init.normal_(self.attention.out_proj.bias)
        if self.attention.in_proj_bias is not None:
            nn.init.normal_(self.attention.in_proj_bias)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.attend = attend

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(self.attend(self.attention, h)[0].mean(1))


def masked_attention(attention, h):
    b, t, _ = h.shape
    causal = torch.ones(t, t, dtype=torch.bool).triu(1)
    padding = torch.zeros(b, t)
    padding[:, -1] = -1.5  # a float mask is added
    options = {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False}
    return attention(h, h, h, **options)


def masked_per_head(attention, h):
    b, t, _ = h.shape
    mask = torch.linspace(-1, 1, t * t).view(1, t, t).expand(2 * b, t, t).clone()
    mask[1::2] *= -1
    return attention(h, h, h, attn_mask=mask, need_weights=False)


class Tied(nn.Module):
    """The embedding's weight is the output layer's as well."""

    def __init__(self, functional):
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES, 7, padding_idx=0)
        self.hidden = nn.Linear(7, 7)
        self.functional = functional
        if not functional:
            self.head = nn.Linear(7, NUM_CLASSES)
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        h = torch.tanh(self.hidden(self.embedding(tokens))).mean(1)
        if self.functional:
            return F.linear(h, self.embedding.weight)
        return self.head(h)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Positions(nn.Module):
    """A position embedding without a batch dimension."""

    def __init__(self, length):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 6), nn.Embedding(length, 6)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, tokens):
        h = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(h).mean(1))


class RowOfPositions(Positions):
    """The positions as one row that all examples share."""

    def __init__(self, length, squeeze=False):
        super().__init__(length)
        self.squeeze = squeeze

    def forward(self, tokens):
        places = self.places(torch.arange(tokens.shape[1])[None])
        if self.squeeze:  # works for one row only
            places = places.view(tokens.shape[1], -1)
        return self.head(torch.tanh(self.words(tokens) + places).mean(1))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(6, 8)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, a, b):
        return self.head(torch.tanh(self.left(input=a) * self.right(b)))


class OutsideLayers(nn.Module):
    """Parameters outside of layers, in all the ways in which they meet a batch."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.second = nn.Parameter(torch.randn(1, 6))
        self.places = nn.Parameter(torch.randn(6, 6))
        self.gain = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(()))
        self.row = nn.Parameter(torch.randn(6, 1))
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        b = len(x)
        tokens = self.token.expand(b, -1, -1), self.second.expand((b, 1, 6))
        h = torch.cat([*tokens, x], 1)
        h = torch.tanh(self.places + h) * self.gain
        h += self.shift
        h = self.row * self.mix(h)
        return self.head(torch.tanh(h).mean(1))


class ValuesOutsideLayers(nn.Module):
    """Parameters outside of layers, used in parts or computed with first."""

    def __init__(self):
        super().__init__()
        self.split = nn.Parameter(torch.randn(1, 2, 6))
        self.twice = nn.Parameter(torch.randn(6))
        self.left = nn.Parameter(torch.randn(4, 6))
        self.right = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = x + self.split[:, 0] + self.split[0, 1]  # each half is used by itself
        x = torch.tanh(x + self.twice) * self.twice
        y = x + (self.left + self.right).mean(0)  # no batch in the sum
        return self.head(torch.tanh(x + y))


class FoldedTokens(nn.Module):
    """Examples and tokens share the first dimension of the inner layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        h = torch.tanh(self.inner(x.reshape(-1, 6))).view(x.shape)
        return self.head(h.mean(1))


def frozen(model):
    """The same, of whose parameters two are not trained."""
    model[1].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


def mlp():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 8),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Linear(8, NUM_CLASSES),
    )


def convolutions(*layers, channels):
    return nn.Sequential(
        *[part for layer in layers for part in (layer, nn.Tanh())],
        nn.Flatten(2),
        Lambda(lambda x: x.mean(2)),
        nn.Linear(channels, NUM_CLASSES),
    )


def weight_normed():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        nn.utils.weight_norm(nn.Linear(8, NUM_CLASSES)),
    )


def overridden():
    inner = nn.Linear(6, 6)
    inner.forward = types.MethodType(
        lambda self, x: F.linear(2 * x, self.weight), inner
    )
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(6, NUM_CLASSES))
